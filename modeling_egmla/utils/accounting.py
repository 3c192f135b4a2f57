"""Count parameters by part, cache elements, bytes and operations of any causal language model, without weights."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from egmla import EGMLACache

from . import models


PARTS = ("embeddings", "attention", "gate tables", "MLP", "norms and other")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Make the model of a configuration on the meta device, ready for the counts of this module."""
    return models.meta_model(config, torch.bfloat16, counts_experts=True)


def _part(name: str) -> str:
    if "kv_gate_embedding" in name:
        return "gate tables"
    if "norm" in name.split(".")[-2] and "attn" not in name:
        return "norms and other"
    if "attn" in name or "attention" in name:
        return "attention"
    if "mlp" in name or "feed_forward" in name or "experts" in name:
        return "MLP"
    if "embed" in name or "lm_head" in name or "wte" in name:
        return "embeddings"
    return "norms and other"


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Count the parameters of each of `PARTS`. Tied weights are counted once."""
    counts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return dict(counts)


def swept_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """List the parameters that one decode step reads in full: all but the tables in which it looks up a row.

    These tables are the input embedding and the gate tables. The output head is read in full. A head that is tied to
    the input embedding is listed once.
    """
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    swept = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in lookups}
    head = model.get_output_embeddings()
    if head is not None:
        swept[id(head.weight)] = head.weight
    return list(swept.values())


def swept_weight_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of `swept_weights`; None for mixtures of experts, whose steps read different experts."""
    if any("experts" in name and "shared" not in name for name, _ in model.named_parameters()):
        return None
    return sum(parameter.nbytes for parameter in swept_weights(model))


def matrix_parameters(model: PreTrainedModel, trainable: bool = False) -> int:
    """Count parameters that multiply activations: all matrices but lookup tables, and the tied output embedding.

    Args:
        model (`PreTrainedModel`): the model, on any device.
        trainable (`bool`): count only trainable ones.
    """
    return sum(
        parameter.numel()
        for parameter in swept_weights(model)
        if parameter.ndim == 2 and (parameter.requires_grad or not trainable)
    )


def decode_attention_flops(config: PreTrainedConfig, context: int) -> int:
    """Count floating point operations of attention in one decode step of one sequence, over `context` tokens.

    A multiplication and an addition count as two. Per layer, with `S` cached tokens:

    - EG-MLA attends to latents: `2 S H (2R + P)`.
    - Transformers' DeepSeek expands its latent cache in each step: `2 S H (N + P + V)` and `2 S R H (N + V)`.
    - Expanded gates expand too, and compute gates of an input of width `E`: `2 S E H (N + V)` more.
    - All others: `4 S H d`.

    Source: derived, performance arithmetic of the design, section 1.2.
    """
    fields: Any = config
    heads, layers = fields.num_attention_heads, fields.num_hidden_layers
    if config.model_type == "egmla" and fields.kv_gate == "expanded":
        N, P, V = fields.qk_nope_head_dim, fields.qk_rope_head_dim, fields.v_head_dim
        gate = fields.kv_gate_embedding_dim or fields.hidden_size
        widths = [(N + P + V) + (rank + gate) * (N + V) for rank in fields.layer_kv_lora_ranks]
        return 2 * context * heads * sum(widths)
    if config.model_type == "egmla":
        widths = [2 * rank + fields.qk_rope_head_dim for rank in fields.layer_kv_lora_ranks]
        return 2 * context * heads * sum(widths)
    if getattr(config, "kv_lora_rank", None) is not None:
        N, P, V = fields.qk_nope_head_dim, fields.qk_rope_head_dim, fields.v_head_dim
        return 2 * context * heads * layers * ((N + P + V) + fields.kv_lora_rank * (N + V))
    width = getattr(config, "head_dim", None) or fields.hidden_size // heads
    return 4 * context * heads * layers * width


def decode_flops(model: PreTrainedModel, context: int) -> int:
    """Count floating point operations of one decode step of one sequence: 2 per matrix parameter, and attention's."""
    return 2 * matrix_parameters(model) + decode_attention_flops(model.config, context)


def _layer_tensors(cache: Cache) -> list[list[torch.Tensor]]:
    """List the tensors that each layer of a cache holds for its tokens: `[..., S, width]`."""
    return [
        [tensor for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)) if tensor is not None]
        for layer in cache.layers
    ]


def _cache_of(model: PreTrainedModel, tokens: int) -> Cache:
    """Return the cache that a forward pass over `tokens` tokens fills; with entries as they are, not as codes."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    config: Any = model.config
    given = EGMLACache(config, bits=16) if config.model_type == "egmla" else None
    with torch.no_grad():
        cache = getattr(model(ids, past_key_values=given, use_cache=True), "past_key_values", None)
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{type(model).__name__} leaves {type(cache).__name__} behind, no cache of Transformers' class "
            "Cache, so its elements cannot be counted; use a model that does."
        )
    return cache


def cache_elements_per_layer(model: PreTrainedModel, tokens: int = 4) -> list[int]:
    """Count the elements that each layer caches per token, in the cache that a forward pass fills.

    Works on the meta device. A layer whose state does not grow with the tokens counts as 0.

    Raises:
        ValueError: when the model does not use a cache of Transformers' class `Cache`.
    """

    def held(count: int) -> list[int]:
        return [sum(tensor.numel() for tensor in tensors) for tensors in _layer_tensors(_cache_of(model, count))]

    # The difference of two lengths leaves out what a layer holds at any length.
    return [(more - less) // tokens for more, less in zip(held(2 * tokens), held(tokens), strict=True)]


def cache_id_bytes(config: PreTrainedConfig) -> int:
    """Bytes cached per token once for all layers: the token's id, which expanded gates need; else 0."""
    return getattr(config, "cache_id_bytes_per_token", 0)


def cache_windows(model: PreTrainedModel) -> list[int | None]:
    """The most tokens that each layer caches, if it has a sliding window; None if it caches all tokens."""
    windows = [getattr(layer, "sliding_window", None) for layer in _cache_of(model, 1).layers]
    # The window counts the current token, which the next token does not need.
    return [None if window is None else int(window) - 1 for window in windows]


def cache_nbytes(cache: Any) -> tuple[int, int]:
    """Count the bytes of a `Cache`: in use, and allocated. Each storage is counted once."""
    if hasattr(cache, "allocated_nbytes"):
        return cache.nbytes, cache.allocated_nbytes
    tensors = [tensor for layer in _layer_tensors(cache) for tensor in layer]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    length = int(cache.get_seq_length())
    used = sum(tensor[..., :length, :].numel() * tensor.element_size() for tensor in tensors)
    return used, sum(storages.values())


def mha_elements_per_token(config) -> int:
    """Elements per token, all layers, that multi-head attention of this configuration's shape would cache."""
    return 2 * config.num_attention_heads * config.v_head_dim * config.num_hidden_layers


def mla_elements_per_token(config, kv_lora_rank: int = 256, qk_rope_head_dim: int = 64) -> int:
    """Elements per token, all layers, that plain MLA of the same depth caches at the published width."""
    return (kv_lora_rank + qk_rope_head_dim) * config.num_hidden_layers
