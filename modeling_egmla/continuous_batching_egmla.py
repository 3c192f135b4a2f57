# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Continuous batching (`generate_batch`) with latents in its pages.

Transformers' paged cache stores a key and a value of equal width per token, head and layer, and reads its widths off
the configuration. Here the one "head" of a token is its cache entry of `R + P` elements: the first half goes where
keys go, the second where values go, so a page holds what `EGMLACache` holds and not an element more.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from .configuration_egmla import EGMLAConfig


class PagedView:
    """A model as the paged cache shall see it: itself, but its configuration says one head, half an entry wide.

    Args:
        model: the model.
        entry_width (`int`): elements `R + P` per token and layer.
    """

    def __init__(self, model: Any, entry_width: int):
        self._model = model
        self.config = _PagedConfig(model.config, entry_width)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _PagedConfig:
    num_key_value_heads = 1

    def __init__(self, config: EGMLAConfig, entry_width: int):
        self._config = config
        self.head_dim = entry_width // 2

    def get_text_config(self) -> "_PagedConfig":
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def check_pages(config: EGMLAConfig) -> int:
    """Width `R + P` of the entries to page.

    Raises:
        ValueError: where they do not fit Transformers' pages, or where the attention asked for reads pages by itself.
    """
    if config.kv_gate == "expanded":
        raise ValueError(
            "generate_batch with kv_gate='expanded': its gates are computed from the ids of all cached tokens, and "
            "pages hold latents and rotary keys only. Use generate(), whose cache holds the ids."
        )
    widths = sorted(set(config.cache_elements_per_layer))
    if len(widths) > 1 or widths[0] % 2:
        raise ValueError(
            f"generate_batch would page {' to '.join(map(str, widths))} elements per token and layer: all layers must "
            "have the same, even number (kv_lora_rank + qk_rope_head_dim). Use generate(), which takes any."
        )
    if "flash" in str(config._attn_implementation):
        raise ValueError(
            f"generate_batch with attn_implementation={config._attn_implementation!r}: flash attention reads pages by "
            "itself, as keys and values, and these hold latents; load the model with attn_implementation='sdpa'."
        )
    return widths[0]


def without_flash(batching_config: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
    """The settings, not switching the model to flash attention."""
    return replace(batching_config or ContinuousBatchingConfig(), auto_switch_to_flash=False)


def append_paged(
    cache: PagedAttentionCache, latent: torch.Tensor, rope_key: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Stores a layer's new entries in pages and returns those of all sequences in the batch.

    Args:
        cache (`PagedAttentionCache`): the pages.
        latent (`torch.Tensor`): gated latents `[1, 1, T, R]` of the new tokens of all sequences, one after another.
        rope_key (`torch.Tensor`): rotated shared keys `[1, 1, T, P]`.
        layer_idx (`int`): the layer.
        kwargs (`dict`): where to read and to write, as continuous batching passes it to a model.

    Returns:
        `torch.Tensor`: `[1, 1, S, R + P]`, `S` tokens of all sequences, one sequence after another.
    """
    halves = torch.cat((latent, rope_key), dim=-1).chunk(2, dim=-1)
    return torch.cat(cache.update(*halves, layer_idx=layer_idx, kwargs=kwargs), dim=-1)
