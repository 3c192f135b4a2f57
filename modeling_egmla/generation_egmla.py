# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Generation: which cache `generate()` gets, where LongRoPE starts over, and continuous batching with latents.

Continuous batching (`generate_batch`): Transformers' paged cache stores a key and a value of equal width per token,
head and layer, and reads its widths from the configuration. Here the one "head" of a token is its cache entry of
`R + P` elements. The first half goes where keys go, the second where values go. So a page holds what `EGMLACache`
holds, and not an element more.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from .cache_egmla import EGMLACache
from .configuration_egmla import EGMLAConfig


def quantized_cache_options(cache_config: dict | None, config: EGMLAConfig) -> dict[str, Any]:
    """Arguments of `EGMLACache` for the `cache_config` of `generate(cache_implementation="quantized")`.

    Without options it is the allocation of the configuration where it has one, else int4.

    Source: `QuantizedCache` of Transformers, whose names are `nbits` (4 by default there too) and `q_group_size`.
    `bits` is that of `EGMLACache`.

    Raises:
        ValueError: for other keys, which name choices this cache does not have, and other numbers of bits.
    """
    options = dict(cache_config or {})
    if "bits" in options or (not options and config.kv_cache_bits is not None):
        bits = options.pop("bits", None)
        if options:
            raise ValueError(
                f"cache_config has bits={str(bits)[:100]} and {', '.join(map(repr, options))}: bits says it all; "
                "leave the rest out."
            )
        return {"bits": bits}
    bits, group_size = options.pop("nbits", 4), options.pop("q_group_size", None)
    if options:
        raise ValueError(
            f"cache_config has {', '.join(map(repr, options))}, and the quantised cache of this model takes only "
            "nbits and q_group_size, or bits; it needs no backend. Leave the rest out."
        )
    names = {8: "int8", 4: "int4"}
    if bits not in names:
        raise ValueError(f"cache_config has nbits={bits!r}: must be {' or '.join(map(str, names))}.")
    return {"quantization": names[bits], "quantization_group_size": group_size}


class EGMLAGenerationMixin(GenerationMixin):
    """`GenerationMixin` with the latent cache.

    The cache is chosen as a whole, not by registering layers under a `_layer_type`. Options of a quantised cache and
    token ids of expanded gates belong to the cache, not to one layer.
    """

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in `GenerationMixin`, with the latent cache in place of the default, the static and the quantised one.

        Raises:
            ValueError: for a prompt of embeddings to be read in chunks.
        """
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} with inputs_embeds: generate() divides "
                "token ids only; leave prefill_chunk_size out, or give input_ids alone."
            )
        given = model_kwargs.get("past_key_values")
        options = {}
        # An assistant is called many times with the same settings, and from the second time on with its cache.
        if generation_config.cache_implementation == "quantized" and (given is None or generation_config.is_assistant):
            options = quantized_cache_options(generation_config.cache_config, self.config)
            # Transformers' quantised cache needs a backend that need not be installed; its default one is replaced.
            generation_config = copy.copy(generation_config)
            generation_config.cache_implementation = None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if given is None and type(cache) in (DynamicCache, StaticCache):
            length = cache.get_max_length() if type(cache) is StaticCache else None
            mask = model_kwargs.get("attention_mask")
            chunked = generation_config.prefill_chunk_size is not None and length is None
            if chunked and isinstance(mask, torch.Tensor) and mask.ndim == 2:
                options["expected_tokens"] = mask.shape[1]  # the prompt's, which the cache sees in chunks
            model_kwargs["past_key_values"] = EGMLACache(
                self.config, max_cache_len=length, offloading=cache.offloading, **options
            )

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """As in `ContinuousMixin`, with latents in the pages.

        Raises:
            ValueError: when the layers' widths do not fit pages, or for flash attention.
        """
        width, batching_config = check_pages(self.config), without_flash(continuous_batching_config)
        manager = super().init_continuous_batching(generation_config, batching_config, workload_hints)
        create = type(manager)._create_batch_processor

        def create_for_latents():
            manager.model = PagedView(self, width)
            try:
                return create(manager)
            finally:
                manager.model = self

        manager._create_batch_processor = create_for_latents
        return manager

    # `inputs_embeds` is named because `generate()` looks for it in this signature.
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """As in `GenerationMixin`; ids for the gate tables go along with `inputs_embeds` and nowhere else.

        Source: `Phi3ForCausalLM`, which also starts over where LongRoPE changes its frequencies: keys cached so far
        were rotated by the old ones.
        """
        cache, rope = kwargs.get("past_key_values"), self.config.rope_parameters or {}
        if cache is not None and rope.get("rope_type") == "longrope":
            switch = rope["original_max_position_embeddings"]
            if 0 < cache.get_seq_length() <= switch < input_ids.shape[1]:
                cache.reset()
                next_sequence_length = None
        ids = kwargs.pop("kv_gate_input_ids", None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        if ids is not None and inputs.get("inputs_embeds") is not None:
            inputs["kv_gate_input_ids"] = ids[:, -inputs["inputs_embeds"].shape[1] :]
        return inputs


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


def check_paged_cache(cache: Any) -> None:
    """Refuse anything but pages as a model's keyword argument `cache`.

    Raises:
        TypeError: for anything but a `PagedAttentionCache`.
    """
    if not isinstance(cache, PagedAttentionCache):
        raise TypeError(
            f"cache is of type {type(cache).__name__}: must be a PagedAttentionCache, which generate_batch gives to "
            "the model; pass any other cache as past_key_values."
        )


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
