# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""The latent cache: gated latent and rotary key of each token, stored once, in one buffer per layer.

Layout of a layer's buffer: `[B, 1, capacity, R + P]`, latent first, rotary key last. The absorbed attention reads the
buffer itself, as key and as value, so nothing is copied or joined on the way.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from .configuration_egmla import EGMLAConfig


# Spare room of a growing layer when it has to grow: 1/8 of what it holds, at least 64 tokens. Copying then costs eight
# tokens moved per token appended, and a buffer is never more than 12.5 % (beyond 512 tokens) larger than its content.
GROWTH_FRACTION = 8
GROWTH_MIN_TOKENS = 64


class LatentLayer(CacheLayerMixin):
    """What growing and fixed layers share: the buffer, its two views, and the operations of generation on it.

    Args:
        kv_lora_rank (`int`): latent width `R`.
        qk_rope_head_dim (`int`): rotary key width `P`.
        layer_idx (`int`): the layer's number, for messages.
    """

    is_sliding = False
    is_croppable = True
    buffer: Any  # the tensor, `None` before the first update
    dtype: torch.dtype
    device: torch.device

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0):
        # `keys` and `values` of the base class are views here, so its constructor (which sets them) is not called.
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.layer_idx = layer_idx
        self.buffer = None
        self.is_initialized = False

    @property
    def width(self) -> int:
        """Elements stored per token, `R + P`."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def entries(self) -> torch.Tensor:
        """The part of the buffer in use, `[B, 1, S, R + P]`, a view."""
        return self.buffer[:, :, : int(self.get_seq_length())]

    @property
    def keys(self) -> torch.Tensor | None:
        """Cached latents `[B, 1, S, R]`, a view (DeepSeek's place for them)."""
        return None if self.buffer is None else self.entries[..., : self.kv_lora_rank]

    @property
    def values(self) -> torch.Tensor | None:
        """Cached rotary keys `[B, 1, S, P]`, a view."""
        return None if self.buffer is None else self.entries[..., self.kv_lora_rank :]

    @property
    def batch_size(self) -> int:
        return -1 if self.buffer is None else self.buffer.shape[0]

    def check(self, latent: torch.Tensor, rope_key: torch.Tensor) -> None:
        """Raises `ValueError` when the new entries do not fit what this layer was made for or already holds."""
        given = (latent.shape[-1], rope_key.shape[-1])
        if given != (self.kv_lora_rank, self.qk_rope_head_dim):
            raise ValueError(
                f"Layer {self.layer_idx} gives a latent of {given[0]} and a rotary key of {given[1]} elements per "
                f"token, but this cache was built for {self.kv_lora_rank} and {self.qk_rope_head_dim}; build it with "
                "EGMLACache(model.config)."
            )
        if self.is_initialized and (latent.shape[0], latent.dtype) != (self.batch_size, self.dtype):
            raise ValueError(
                f"Layer {self.layer_idx} gives {latent.shape[0]} sequences in {latent.dtype}, but this cache holds "
                f"{self.batch_size} in {self.dtype}; use a new cache, or batch_repeat_interleave "
                "or batch_select_indices on this one."
            )

    def update(self, key_states, value_states, *args, packed: bool = False, **kwargs):
        """Stores `key_states` (gated latent `[B, 1, T, R]`) and `value_states` (rotary key `[B, 1, T, P]`).

        Returns:
            The cached latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]`; with `packed=True` the buffer in use
            `[B, 1, S, R + P]` twice instead. All are views.
        """
        self.check(key_states, value_states)
        entries = self.append(key_states, value_states)
        if packed:
            return entries, entries
        return entries[..., : self.kv_lora_rank], entries[..., self.kv_lora_rank :]

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
        """Writes the new entries behind the old ones and returns the part of the buffer to attend to."""
        raise NotImplementedError

    def offload(self):
        if self.is_initialized:
            self.buffer = self.buffer.to("cpu", non_blocking=True)

    def prefetch(self):
        if self.is_initialized and self.buffer.device != self.device:
            self.buffer = self.buffer.to(self.device, non_blocking=True)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.buffer = self.buffer.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.buffer = self.buffer.index_select(0, indices.to(self.buffer.device))

    def _check_crop(self, tokens_to_remove: int) -> int:
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): the argument is the number of tokens to remove, written as 0 or a "
                f"negative number, as in Transformers 5; use crop({-tokens_to_remove}) to remove {tokens_to_remove} "
                "tokens."
            )
        return min(-tokens_to_remove, int(self.get_seq_length()))


class GrowingLatentLayer(LatentLayer):
    """A layer without a limit: its buffer grows by an eighth when full, so that most steps write in place."""

    is_compileable = False

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffer = key_states.new_empty((key_states.shape[0], 1, 0, self.width))
        self.is_initialized = True

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        start, self.length = self.length, self.length + latent.shape[2]
        if torch.is_grad_enabled() and (latent.requires_grad or self.buffer.requires_grad):
            # Writing in place would break autograd, so a cache that is trained through grows by concatenation.
            new = torch.cat((latent, rope_key), dim=-1)
            self.buffer = torch.cat((self.buffer[:, :, :start], new), dim=2)
            return self.buffer
        # A tensor made in inference mode cannot be written to outside of it.
        frozen = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        if self.length > self.buffer.shape[2] or frozen:
            spare = max(GROWTH_MIN_TOKENS, self.length // GROWTH_FRACTION)
            grown = latent.new_empty((latent.shape[0], 1, self.length + spare, self.width))
            grown[:, :, :start] = self.buffer[:, :, :start]
            self.buffer = grown
        entries = self.buffer[:, :, : self.length]
        entries[:, :, start:, : self.kv_lora_rank] = latent
        entries[:, :, start:, self.kv_lora_rank :] = rope_key
        return entries

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.buffer, self.length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= self._check_crop(tokens_to_remove)


class FixedLatentLayer(LatentLayer):
    """A layer of `max_cache_len` tokens allocated once, for `torch.compile` and export.

    Outside of compiled code it returns only what is in use, so that attention does not pay for empty slots.
    """

    is_compileable = True
    cumulative_length: Any  # a tensor

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0, *, max_cache_len: int):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.max_cache_len = max_cache_len
        # A tensor, as in Transformers' static layers: an int would make every step a new graph.
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: compiled attention reads empty slots too, and a masked NaN would still be a NaN.
        self.buffer = key_states.new_zeros((key_states.shape[0], 1, self.max_cache_len, self.width))
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(self.buffer)
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        new_tokens = latent.shape[2]
        if is_torchdynamo_compiling():
            positions = torch.arange(new_tokens, device=self.device) + self.cumulative_length
            self.cumulative_length.add_(new_tokens)
            self.buffer.index_copy_(2, positions, torch.cat((latent, rope_key), dim=-1))
            return self.buffer
        self._thaw()
        start = int(self.cumulative_length)
        end = start + new_tokens
        if end > self.max_cache_len:
            raise ValueError(
                f"{start} cached and {new_tokens} new tokens exceed this cache's max_cache_len={self.max_cache_len}; "
                f"the cache is unchanged. Build one with max_cache_len={end} or more, or a growing one, "
                "EGMLACache(config)."
            )
        self.cumulative_length.add_(new_tokens)
        self.buffer[:, :, start:end, : self.kv_lora_rank] = latent
        self.buffer[:, :, start:end, self.kv_lora_rank :] = rope_key
        return self.buffer[:, :, :end]

    def _thaw(self) -> None:
        """Replaces tensors made in inference mode, which cannot be written to outside of it, by copies that can."""
        if torch.is_inference_mode_enabled():
            return
        if self.buffer is not None and self.buffer.is_inference():
            self.buffer = self.buffer.clone()
        if self.cumulative_length.is_inference():
            self.cumulative_length = self.cumulative_length.clone()

    def get_seq_length(self) -> int | torch.Tensor:
        if not self.is_initialized:
            return 0
        return self.cumulative_length if is_torchdynamo_compiling() else int(self.cumulative_length)

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def reset(self) -> None:
        if self.is_initialized:
            self._thaw()
            self.buffer.zero_()
            self.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        self._thaw()
        self.cumulative_length.sub_(self._check_crop(tokens_to_remove))


class EGMLACache(Cache):
    """Key/value cache of an EG-MLA model: `R + P` elements per token and layer, gate already applied.

    Args:
        config (`EGMLAConfig`):
            The model's configuration; it gives each layer's width.
        max_cache_len (`int`, *optional*):
            Tokens to allocate once and for all, for `torch.compile`; `None` grows as needed.
        offloading (`bool`, *optional*, defaults to `False`):
            Keep layers in CPU memory and fetch each before its turn (Transformers' mechanism; needs an accelerator).

    Example:

    ```python
    >>> cache = EGMLACache(model.config)
    >>> model.generate(**inputs, past_key_values=cache)
    >>> cache.nbytes
    ```"""

    def __init__(self, config: EGMLAConfig, max_cache_len: int | None = None, offloading: bool = False):
        if not hasattr(config, "layer_kv_lora_ranks"):
            raise TypeError(
                f"EGMLACache needs an EGMLAConfig and got {type(config).__name__}; pass the config of an EG-MLA model."
            )
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len={max_cache_len}: must be at least 1 token, or None for a growing cache.")
        layers: list[LatentLayer] = []
        for layer_idx, rank in enumerate(config.layer_kv_lora_ranks):
            if max_cache_len is None:
                layers.append(GrowingLatentLayer(rank, config.qk_rope_head_dim, layer_idx))
            else:
                layers.append(FixedLatentLayer(rank, config.qk_rope_head_dim, layer_idx, max_cache_len=max_cache_len))
        super().__init__(layers=layers, offloading=offloading)

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Stores a layer's new entries and returns what to attend to, packed.

        Args:
            latent (`torch.Tensor`): gated latent `[B, 1, T, R]`.
            rope_key (`torch.Tensor`): rotated shared key `[B, 1, T, P]`.
            layer_idx (`int`): the layer.

        Returns:
            `torch.Tensor`: `[B, 1, S, R + P]`, a view of the layer's buffer.
        """
        return self.update(latent, rope_key, layer_idx, packed=True)[0]

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"Layer {layer_idx} does not exist in this cache of {len(self.layers)} layers, built for another "
                "config; build it with EGMLACache(model.config)."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def early_initialization(self, batch_size: int, num_heads=None, head_dim=None, dtype=None, device=None):
        """Allocates all layers now. The widths come from the config, so `num_heads` and `head_dim` are not needed."""
        for layer in self.layers:
            if not layer.is_initialized:
                empty = torch.empty((batch_size, 1, 0, layer.width), dtype=dtype, device=device)
                layer.lazy_initialization(empty, empty)

    @property
    def nbytes(self) -> int:
        """Bytes in use: `B x S x (R + P)` elements, all layers."""
        return sum(
            layer.entries.numel() * layer.buffer.element_size() for layer in self.layers if layer.is_initialized
        )

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the storages behind the buffers, each counted once."""
        storages = [layer.buffer.untyped_storage() for layer in self.layers if layer.is_initialized]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


__all__ = ["EGMLACache"]
