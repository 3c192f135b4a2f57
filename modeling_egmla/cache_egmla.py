# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""The latent cache of a model: which layers it has, the operations of generation on them, and its size in bytes."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import is_torchdynamo_compiling

from .allocated_cache_egmla import AllocatedLatentLayer
from .bit_allocation_egmla import UNQUANTIZED_BITS, find_allocation
from .cache_layers_egmla import FixedLatentLayer, GrowingLatentLayer, LatentLayer
from .configuration_egmla import EGMLAConfig
from .entries_egmla import Entries
from .eviction_egmla import fit_mask
from .left_padding_egmla import LeftPadding
from .quantized_cache_egmla import QUANTIZED_LAYERS


TOKEN_ID_DTYPE = torch.int32  # of TOKEN_ID_BYTES


class EGMLACache(Cache):
    """Key/value cache of an EG-MLA model: `R + P` elements per token and layer, gate already applied.

    For `kv_gate="expanded"`, whose gate acts on what is made of the latent, it holds each token's id as well, once for
    all layers.

    Args:
        config (`EGMLAConfig`):
            The model's configuration; it gives each layer's width.
        max_cache_len (`int`, *optional*):
            Tokens to allocate once and for all, for `torch.compile`; `None` grows as needed.
        offloading (`bool`, *optional*, defaults to `False`):
            Keep layers in CPU memory and prefetch each one. This is Transformers' mechanism. It needs an accelerator.
        quantization (`str`, *optional*):
            "int8" or "int4" for integer codes with a scale per group; `None` leaves it to `bits`.
        quantization_group_size (`int`, *optional*):
            For int8 elements of a token per scale, a divisor of every layer's `R` and of `P`, by default the largest
            one up to 64. For int4 tokens per scale, by default 64.
        expected_tokens (`int`, *optional*):
            Tokens that a growing cache makes room for when the first ones come; it takes more too. For prompts read in
            chunks: growing step by step copies what is there and leaves holes in the C library's heap.
        bits (`float`, `int` or `dict`, *optional*):
            `None` holds entries as the configuration says: with its `kv_cache_bits`, or as they are. A share of the
            source's bytes, such as 0.125, chooses the largest of the configuration's budgets that takes no more. 16
            keeps entries as they are. A dictionary of the form of `kv_cache_bits` is another allocation.

    Example:

    ```python
    >>> cache = EGMLACache(model.config)
    >>> model.generate(**inputs, past_key_values=cache)
    >>> cache.nbytes
    ```"""

    # What `holds_latents` asks for: `append` stores gated latents and rotary keys, and returns `Entries`.
    holds_latents = True

    def __init__(
        self,
        config: EGMLAConfig,
        max_cache_len: int | None = None,
        offloading: bool = False,
        quantization: str | None = None,
        quantization_group_size: int | None = None,
        expected_tokens: int | None = None,
        bits: float | dict[str, Any] | None = None,
    ):
        if not hasattr(config, "layer_kv_lora_ranks"):
            raise TypeError(
                f"EGMLACache needs an EGMLAConfig and got {type(config).__name__}; pass the config of an EG-MLA model."
            )
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len}: must be at least 1 token, or None for a growing cache.")
        if quantization is None and quantization_group_size is not None:
            raise ValueError(
                f"quantization_group_size={quantization_group_size} without quantization: nothing is quantised; give "
                "quantization='int8' or 'int4' too, or neither."
            )
        if quantization is not None and quantization not in QUANTIZED_LAYERS:
            names = " or ".join(repr(name) for name in QUANTIZED_LAYERS)
            raise ValueError(f"quantization={quantization!r}: must be {names}, or None to keep entries as they are.")
        if quantization is not None and max_cache_len is not None:
            raise ValueError(
                f"quantization={quantization!r} with max_cache_len={max_cache_len}: only growing caches are "
                "quantised; leave out one of the two."
            )
        if quantization is not None and bits is not None:
            raise ValueError(
                f"quantization={quantization!r} with bits={str(bits)[:100]}: each says how entries are held; leave "
                "out one of the two."
            )
        allocation = None if quantization is not None else find_allocation(config, bits)
        if allocation is not None and max_cache_len is not None:
            raise ValueError(
                f"max_cache_len={max_cache_len} with allocated bits (kv_cache_bits): only growing caches are "
                f"quantised; leave it out, or give bits={UNQUANTIZED_BITS} for entries as they are."
            )
        if expected_tokens is not None and (expected_tokens < 1 or max_cache_len is not None):
            raise ValueError(
                f"expected_tokens={expected_tokens} with max_cache_len={max_cache_len}: it must be at least 1 token, "
                "and is for growing caches; a fixed-size one has its room from the beginning."
            )
        layers: list[LatentLayer] = []
        for layer_idx, rank in enumerate(config.layer_kv_lora_ranks):
            if quantization is not None:
                kind: Any = QUANTIZED_LAYERS[quantization]
                layers.append(kind(rank, config.qk_rope_head_dim, layer_idx, group_size=quantization_group_size))
            elif allocation is not None:
                layers.append(AllocatedLatentLayer(allocation, layer_idx))
            elif max_cache_len is None:
                layers.append(GrowingLatentLayer(rank, config.qk_rope_head_dim, layer_idx))
            else:
                layers.append(FixedLatentLayer(rank, config.qk_rope_head_dim, layer_idx, max_cache_len=max_cache_len))
            if isinstance(layers[-1], GrowingLatentLayer):
                layers[-1].expected_tokens = expected_tokens or 0
        super().__init__(layers=layers, offloading=offloading)
        # Of the batch that is held, where layers keep first tokens exact.
        self.padding: LeftPadding | None = None
        # Ids of the cached tokens: entries of one element, in int32, beside the layers.
        self.token_ids: Any = None
        if config.cache_id_bytes_per_token and max_cache_len is None:
            self.token_ids = GrowingLatentLayer(1, 0)
            self.token_ids.expected_tokens = expected_tokens or 0
        elif config.cache_id_bytes_per_token:
            self.token_ids = FixedLatentLayer(1, 0, max_cache_len=max_cache_len)

    def append_token_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Stores the ids of the tokens whose entries are to be appended next; for `kv_gate="expanded"`.

        Args:
            ids (`torch.Tensor`): ids `[B, T]`.

        Returns:
            `torch.Tensor`: ids `[B, S]` of all tokens, as many as `append` returns entries; a copy.

        Raises:
            ValueError: when this cache is not made for ids, is of another number of sequences, is full, or holds
                tokens that came without ids.
        """
        if self.token_ids is None:
            raise ValueError(
                "This cache was built for a model whose gates need no token ids, and kv_gate='expanded' does; build "
                "it with EGMLACache(model.config)."
            )
        if self.layers[0].is_initialized and ids.shape[0] != self.layers[0].batch_size:
            raise ValueError(
                f"Ids of {ids.shape[0]} sequences were given, but this cache holds {self.layers[0].batch_size}; use "
                "a new cache, or batch_repeat_interleave or batch_select_indices on this one."
            )
        self._seek_token_ids()
        entries = ids.to(TOKEN_ID_DTYPE)[:, None, :, None]
        held = self.token_ids.append(entries, entries[..., :0]).to_tensor()
        # A copy, since backward passes keep ids and the next ones are written beside them.
        return held[:, 0, :, 0].to(ids.device, torch.long)

    def _seek_token_ids(self) -> None:
        """Sets the next ids' place to that of the next entries: after a forward that failed, or cropped layers."""
        length, held = self.layers[0].stored, self.token_ids
        if isinstance(length, torch.Tensor):  # in compiled code
            held.cumulative_length.copy_(length)
            return
        if held.is_initialized and not self.layers[0].is_initialized and not is_torchdynamo_compiling():
            held.reset()
            held.is_initialized = False  # the next ones may be of another number of sequences
        ahead = int(held.stored) - length
        if ahead < 0:
            raise ValueError(
                f"This cache holds {length} tokens and the ids of {length + ahead}, and kv_gate='expanded' needs "
                "them all; call append_token_ids before the entries of each token are appended."
            )
        if ahead:
            held.crop(-ahead)

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor, layer_idx: int) -> Entries:
        """Stores a layer's new entries and returns all to attend to.

        Args:
            latent (`torch.Tensor`): gated latent `[B, 1, T, R]`.
            rope_key (`torch.Tensor`): rotated shared key `[B, 1, T, P]`.
            layer_idx (`int`): the layer.

        Returns:
            `Entries`: of all `S` tokens, in the form in which the layer holds them. Nothing is copied.
        """
        return self.update(latent, rope_key, layer_idx, packed=True)[0]

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"Layer {layer_idx} does not exist in this cache of {len(self.layers)} layers, built for another "
                "config; build it with EGMLACache(model.config)."
            )
        if self.padding is not None and not self.layers[layer_idx].seen:
            key_states, value_states = map(self.padding.order_entries, (key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def place_padding(self, attention_mask: Any, causal_mask: Any) -> Any:
        """Note a prompt's left padding before its entries come, and return the mask as layers are to use it.

        Args:
            attention_mask: of all tokens so far, `[B, S]`; other forms say nothing about padding.
            causal_mask: of the new tokens, `[B or 1, 1, T, S]`; block masks and those of FlashAttention stay as they
                are.

        Returns:
            The mask over the entries in the order in which they are stored.

        Raises:
            ValueError: for tokens that are hidden, once entries were evicted: nobody knows where they are.
        """
        compiling = is_torchdynamo_compiling()
        hides = self.evicted and not compiling and attention_mask is not None
        if hides and (attention_mask.ndim != 2 or not attention_mask.all()):
            raise ValueError(
                "attention_mask hides tokens, and entries were evicted from this cache, so that columns are no longer "
                "entries; leave attention_mask out, or use a new cache."
            )
        if not isinstance(causal_mask, torch.Tensor) or causal_mask.ndim != 4:
            return causal_mask
        # Token ids, for a gate on expanded entries, lie in the order of columns.
        first = 0 if self.token_ids is not None else getattr(self.layers[0], "first_tokens", 0)
        padded = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and first
        if padded and not self.layers[0].seen and not compiling:
            self.padding = LeftPadding.of(attention_mask, first)
        return causal_mask if self.padding is None else self.padding.order_mask(causal_mask)

    @property
    def evicted(self) -> bool:
        """Whether entries were dropped from any layer."""
        return any(layer.evicted for layer in self.layers)

    def fit_mask(self, mask: Any, layer_idx: int, new_tokens: int, held: int) -> Any:
        """Return the mask of all layers as one layer is to use it.

        Args:
            mask: over the entries of the first layer, `[B or 1, 1, T, S]`; other forms stay as they are.
            layer_idx (`int`): the layer.
            new_tokens (`int`): `T`.
            held (`int`): entries that the layer holds, the new ones among them.
        """
        # The mask is of the first layer's length; a layer may have kept all of its entries.
        if self.layers[layer_idx].evicted or self.layers[0].evicted:
            return fit_mask(mask, new_tokens, held)
        # A fixed-size cache has masks as wide as it is, and returns only what is in use.
        return mask[..., :held] if isinstance(mask, torch.Tensor) and mask.ndim == 4 else mask

    def early_initialization(self, batch_size: int, num_heads=None, head_dim=None, dtype=None, device=None):
        """Allocates all layers now. The widths come from the config, so `num_heads` and `head_dim` are not needed."""
        for holder in self._holders:
            if not holder.is_initialized:
                kind = TOKEN_ID_DTYPE if holder is self.token_ids else dtype
                empty = torch.empty((batch_size, 1, 0, holder.width), dtype=kind, device=device)
                holder.lazy_initialization(empty, empty)

    @property
    def _holders(self) -> list[Any]:
        """The layers, and what holds the ids."""
        return self.layers if self.token_ids is None else [*self.layers, self.token_ids]

    def crop(self, tokens_to_remove: int) -> None:
        left = self.get_seq_length() + min(0, tokens_to_remove)
        if self.padding is not None and 0 < left < self.padding.columns:
            raise ValueError(
                f"crop({tokens_to_remove}) would leave {left} of {self.get_seq_length()} tokens, and the first tokens "
                f"of a row that is padded on the left end at {self.padding.columns}: leave as many, or none."
            )
        for holder in self._holders:
            holder.check_crop(tokens_to_remove)  # of all layers before any is cropped
        for holder in self._holders:
            holder.crop(tokens_to_remove)

    def reset(self) -> None:
        self.padding = None
        for holder in self._holders:
            holder.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.padding = None if self.padding is None else self.padding.repeat(repeats)
        for holder in self._holders:
            holder.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.padding = None if self.padding is None else self.padding.select(indices)
        for holder in self._holders:
            holder.batch_select_indices(indices)

    @property
    def max_cache_len(self) -> int:
        """Capacity in tokens, -1 for a growing cache; PEFT asks caches for it by this name."""
        return self.get_max_length()

    @property
    def nbytes(self) -> int:
        """Bytes in use: `B x S x (R + P)` elements, or their codes and scales, all layers, and `B x S` token ids."""
        return sum(used.numel() * used.element_size() for holder in self._holders for used in holder.used)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the storages behind the buffers, each counted once."""
        storages = [storage.untyped_storage() for holder in self._holders for storage in holder.storages]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def holds_latents(cache: Any) -> bool:
    """Tell whether a cache takes latents by `append`, and gives back `Entries`; stock caches take keys and values.

    An attribute tells, not the class: a model whose code came with its checkpoint may be given the package's cache.
    """
    return getattr(cache, "holds_latents", False)


def check_stock_cache(cache: Any, config: EGMLAConfig) -> None:
    """Refuse a cache of Transformers, or what is given as one, that cannot hold the entries of this model.

    Args:
        cache: what a caller gave as `past_key_values`.
        config (`EGMLAConfig`): the model's configuration.

    Raises:
        TypeError: for anything but a `Cache`, and for `EncoderDecoderCache`.
        ValueError: for too few layers, layers that drop old tokens, and entries of another model.
    """
    remedy = "use EGMLACache(model.config), or leave past_key_values out and one is made."
    if not isinstance(cache, Cache) or not hasattr(cache, "layer_class_to_replicate"):
        raise TypeError(f"past_key_values is of type {type(cache).__name__}: must be a cache of one decoder; {remedy}")
    needed = config.num_hidden_layers
    if cache.layer_class_to_replicate is None and len(cache.layers) < needed:
        raise ValueError(f"past_key_values has {len(cache.layers)} layers, and this model has {needed}; {remedy}")
    for layer_idx, (layer, rank) in enumerate(zip(cache.layers[:needed], config.layer_kv_lora_ranks, strict=False)):
        if layer.is_sliding:
            raise ValueError(
                f"Layer {layer_idx} of past_key_values has a sliding window, which drops old tokens, and this model "
                f"attends to all of them; {remedy}"
            )
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.ndim == 4 and (keys.shape[1], keys.shape[3]) != (1, rank):
            raise ValueError(
                f"Layer {layer_idx} of past_key_values holds keys of {keys.shape[1]} heads with {keys.shape[3]} "
                f"elements, and this model caches one latent of {rank} elements per token. A cache of another model "
                f"does not fit: {remedy} PEFT's prefix tuning makes such keys: use prompt tuning, p-tuning or LoRA. "
                "So does convert_and_export_with_cache: use export_with_dynamic_cache."
            )


__all__ = ["EGMLACache"]
