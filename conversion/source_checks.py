"""Whether the tensors of a checkpoint are those that its configuration asks for, before any work."""

import torch

from egmla.utils.models import meta_model

from .families.base import Family
from .source import Source, TensorSlice


# Families that may store layers behind the last, to predict further tokens; Transformers leaves them out too.
PREDICTING = ("deepseek_v3", "glm4_moe_lite")


def check_tensors(source: Source, family: Family) -> None:
    """Every tensor the conversion needs is there and of its shape, and none is left that it does not know."""
    parts: list[TensorSlice] = list(family.passthrough_tensors(source.config, None).values())
    for layer_idx in range(source.config.num_hidden_layers):
        parts += family.passthrough_tensors(source.config, layer_idx).values()
        parts += family.attention(source.config, layer_idx).values()
        parts += map(TensorSlice, (*family.norms(layer_idx).values(), *family.gate(source.config, layer_idx)))
    needed = {rows.name for rows in parts}
    _check_attention_extras(source, family)
    missing = sorted(needed - source.names)
    if missing:
        raise ValueError(
            f"{source.label} lacks {len(missing)} tensors its config asks for, first {missing[0]}; the checkpoint is "
            "incomplete."
        )
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    two_heads = source.config.tie_word_embeddings and {embedding, head} <= source.names
    if two_heads and not torch.equal(source.tensor(embedding), source.tensor(head)):
        raise ValueError(
            f"{source.label} has a {head} that is not its {embedding}, and its config says tie_word_embeddings: "
            "Transformers would use it all the same, with a warning. Set tie_word_embeddings to false in config.json, "
            "or remove the tensor."
        )
    # A tied head is the embedding under another name, and old checkpoints carry the rotary frequencies.
    known = needed | {head}
    layers = source.config.num_hidden_layers
    more = getattr(source.config, "num_nextn_predict_layers", 1) if source.config.model_type in PREDICTING else 0
    left_out = tuple(family.layer_prefix(layer_idx) for layer_idx in range(layers, layers + (more or 0)))
    unknown = sorted(
        name
        for name in source.names - known
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith(left_out)
    )
    if unknown:
        raise ValueError(
            f"{source.label} has {len(unknown)} tensors that a {source.config.model_type} model does not, first "
            f"{unknown[0]}; converting would drop them. Is config.json the right one?"
        )
    wanted = meta_model(source.config).state_dict()
    for name in sorted(needed):
        if source.shape(name) != tuple(wanted[name].shape):
            raise ValueError(
                f"Tensor {name} in {source.label} has shape {source.shape(name)} and its config asks for "
                f"{tuple(wanted[name].shape)}; the checkpoint and its config.json do not belong together."
            )
    for name in sorted(needed):
        source.tensor(name)  # raises for values that are not finite: hours before the loop would meet them


def _check_attention_extras(source: Source, family: Family) -> None:
    """Refuses what tensors show of attention and a configuration does not say: sinks, and biases on some maps only."""
    sinks = sorted(name for name in source.names if name.endswith("self_attn.sinks"))
    if sinks:
        raise ValueError(
            f"{source.label} has attention sinks ({sinks[0]}), logits beside those of the keys, which EG-MLA does not "
            "have; use a checkpoint without."
        )
    for layer_idx in range(0 if family.latent else source.config.num_hidden_layers):
        names = [f"{family.layer_prefix(layer_idx)}self_attn.{role}_proj.bias" for role in "qkv"]
        there = [name for name in names if name in source.names]
        absent = [name for name in names if name not in source.names]
        if there and absent:
            raise ValueError(
                f"{source.label} has {there[0]} and no {absent[0]}: queries, keys and values must all have biases or "
                "all have none. Save the checkpoint with the missing ones as zeros."
            )
