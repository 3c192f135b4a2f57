"""Parameters by part, and cache elements and bytes, of any causal language model; nothing here needs weights."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from . import models


PARTS = ("embeddings", "attention", "gate tables", "MLP", "norms and other")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a configuration's model on the meta device in bf16, ready for the forward passes that count its cache."""
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
    """Parameters of each of `PARTS`; tied weights are counted once."""
    counts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return dict(counts)


def swept_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters that one decode step reads in full: all but the tables of which it looks up a row.

    Those tables are the input embedding and the gate tables. An output head is read in full, and counted once where it
    is tied to the input embedding.
    """
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    swept = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in lookups}
    head = model.get_output_embeddings()
    if head is not None:
        swept[id(head.weight)] = head.weight
    return list(swept.values())


def swept_weight_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of `swept_weights`; None with mixtures of experts, of which each step reads others."""
    if any("experts" in name and "shared" not in name for name, _ in model.named_parameters()):
        return None
    return sum(parameter.nbytes for parameter in swept_weights(model))


def matrix_parameters(model: PreTrainedModel, trainable: bool = False) -> int:
    """Parameters that multiply activations: all matrices but lookups, and the output embedding even where it is tied.

    Args:
        model (`PreTrainedModel`): the model, on any device.
        trainable (`bool`): only those that are trained.
    """
    return sum(
        parameter.numel()
        for parameter in swept_weights(model)
        if parameter.ndim == 2 and (parameter.requires_grad or not trainable)
    )


def decode_attention_flops(config: PreTrainedConfig, context: int) -> int:
    """Floating point operations of one decode step and sequence that grow with the cache of `context` tokens.

    Scores and their use, a multiplication and an addition counting as two: `2 S H (2R + P)` in the latent space of
    EG-MLA; `2 S H (N + P + V)` and the expansion `2 S R H (N + V)` where a latent cache is expanded in each step, as
    Transformers' DeepSeek does, and `2 S E H (N + V)` more for expanded gates; `4 S H d` otherwise. Derived in the
    design, performance arithmetic 1.2.
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
    """Floating point operations of one decode step and sequence: 2 per matrix parameter, and attention's."""
    return 2 * matrix_parameters(model) + decode_attention_flops(model.config, context)


def _layer_tensors(cache: Cache) -> list[list[torch.Tensor]]:
    """The tensors each layer of a cache holds for its tokens: `[..., S, width]`."""
    return [
        [tensor for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)) if tensor is not None]
        for layer in cache.layers
    ]


def _cache_of(model: PreTrainedModel, tokens: int) -> Cache:
    """The cache that a forward pass over some tokens leaves behind."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    with torch.no_grad():
        cache = getattr(model(ids, use_cache=True), "past_key_values", None)
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{type(model).__name__} leaves {type(cache).__name__} behind, no cache of Transformers' class "
            "Cache, so its elements cannot be counted."
        )
    return cache


def cache_elements_per_layer(model: PreTrainedModel, tokens: int = 4) -> list[int]:
    """Elements each layer caches per token, counted in the cache that a forward pass leaves behind.

    Works on the meta device. Layers whose state does not grow with the tokens count 0.

    Raises:
        ValueError: when the model leaves no cache of Transformers' kind.
    """

    def held(count: int) -> list[int]:
        return [sum(tensor.numel() for tensor in tensors) for tensors in _layer_tensors(_cache_of(model, count))]

    # The difference of two lengths, so that what a layer holds whatever the length is not counted as per token.
    return [(more - less) // tokens for more, less in zip(held(2 * tokens), held(tokens), strict=True)]


def cache_id_bytes(config: PreTrainedConfig) -> int:
    """Bytes cached per token beside the elements of the layers, once for all of them: its id, for expanded gates."""
    return getattr(config, "cache_id_bytes_per_token", 0)


def cache_windows(model: PreTrainedModel) -> list[int | None]:
    """Tokens each layer caches at most, where it attends to a sliding window; None for all tokens."""
    windows = [getattr(layer, "sliding_window", None) for layer in _cache_of(model, 1).layers]
    # A window counts the token being read, which need not be cached for the next.
    return [None if window is None else int(window) - 1 for window in windows]


def cache_nbytes(cache: Any) -> tuple[int, int]:
    """Bytes of a `Cache`: in use, and allocated in the storages behind it, each storage counted once."""
    if hasattr(cache, "allocated_nbytes"):
        return cache.nbytes, cache.allocated_nbytes
    tensors = [tensor for layer in _layer_tensors(cache) for tensor in layer]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    length = int(cache.get_seq_length())
    used = sum(tensor[..., :length, :].numel() * tensor.element_size() for tensor in tensors)
    return used, sum(storages.values())


def mha_elements_per_token(config) -> int:
    """Elements per token that multi-head attention of an EG-MLA configuration's shape would cache, all layers."""
    return 2 * config.num_attention_heads * config.v_head_dim * config.num_hidden_layers


def mla_elements_per_token(config, kv_lora_rank: int = 256, qk_rope_head_dim: int = 64) -> int:
    """Elements per token that plain MLA of the same depth caches at the published width, all layers."""
    return (kv_lora_rank + qk_rope_head_dim) * config.num_hidden_layers
