# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Layers of the latent cache: gated latent and rotary key of each token, stored once, in one buffer per layer.

Layout of a layer's buffer: `[B, 1, capacity, R + P]`, latent first, rotary key last. The absorbed attention reads the
buffer itself, as key and as value, so nothing is copied or joined.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from .entries_egmla import DenseEntries, Entries


# Spare room of a growing layer when it has to grow: 1/8 of what it holds, at least 64 tokens. Copying then costs eight
# tokens moved per token appended, and a buffer is never more than 12.5 % (beyond 512 tokens) larger than its content.
GROWTH_FRACTION = 8
GROWTH_MIN_TOKENS = 64


def with_room(storage: torch.Tensor, start: int, length: int, least: int) -> torch.Tensor:
    """The storage `[B, 1, capacity, .]` itself if it holds `length` rows, else a larger one with its first `start`.

    It then has room for an eighth more, at least for `least`.
    """
    # A tensor made in inference mode cannot be written to outside of it.
    compiling = is_torchdynamo_compiling()  # where neither can be asked for
    frozen = not compiling and storage.is_inference() and not torch.is_inference_mode_enabled()
    if length <= storage.shape[2] and not frozen:
        return storage
    capacity = length + max(least, length // GROWTH_FRACTION)
    grown = storage.new_empty((storage.shape[0], 1, capacity, storage.shape[3]))
    grown[:, :, :start] = storage[:, :, :start]
    return grown


class LatentLayer(CacheLayerMixin):
    """What growing and fixed layers share: the buffer, its two views, and the operations of generation on it.

    A layer knows two numbers, equal unless it drops entries. `stored` is for whatever cuts storages: views, entries,
    masks, cropping. `seen` is for positions. Under `torch.compile` both may be tensors.

    Args:
        kv_lora_rank (`int`): latent width `R`.
        qk_rope_head_dim (`int`): rotary key width `P`.
        layer_idx (`int`): the layer's number, for messages.
    """

    is_sliding = False
    is_croppable = True
    buffer: Any  # the tensor, `None` before the first update
    stored: Any  # entries held
    seen: Any  # tokens so far, of which the next one's position is counted
    storage_names = ("buffer",)
    evicted = False  # whether entries were dropped, see `eviction_egmla.py`
    first_whole = 0  # from this entry on there is no gap
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
    def storages(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the entries, `[B, 1, capacity, .]`, empty before the first update."""
        return () if self.buffer is None else tuple(getattr(self, name) for name in self.storage_names)

    @property
    def used(self) -> tuple[torch.Tensor, ...]:
        """The parts of the storages that hold something, views."""
        return tuple(storage[:, :, : int(self.stored)] for storage in self.storages)

    def replace_storages(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts `function(storage)` in the place of each storage."""
        if self.is_initialized:
            for name in self.storage_names:
                setattr(self, name, function(getattr(self, name)))

    @property
    def entries(self) -> Entries:
        """What attention reads, `[B, 1, S, R + P]`: here the part of the buffer in use, a view."""
        return DenseEntries(self.buffer[:, :, : int(self.stored)], self.kv_lora_rank)

    @property
    def keys(self) -> torch.Tensor | None:
        """Cached latents `[B, 1, S, R]` (DeepSeek's place for them), a view or dequantised."""
        return None if self.buffer is None else self.entries.split()[0]

    @property
    def values(self) -> torch.Tensor | None:
        """Cached rotary keys `[B, 1, S, P]`, a view or dequantised."""
        return None if self.buffer is None else self.entries.split()[1]

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
        if self.is_initialized and latent.device != self.device:
            raise ValueError(
                f"Layer {self.layer_idx} gives entries on {latent.device}, but this cache holds its own on "
                f"{self.device}; use a new cache, or move the model back."
            )

    def update(self, key_states, value_states, *args, packed: bool = False, **kwargs):
        """Stores `key_states` (gated latent `[B, 1, T, R]`) and `value_states` (rotary key `[B, 1, T, P]`).

        Returns:
            The cached latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]`, views or dequantised; with `packed=True`
            the layer's `Entries` twice instead.
        """
        self.check(key_states, value_states)
        entries = self.append(key_states, value_states)
        if packed:
            return entries, entries
        return entries.split()

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> Entries:
        """Writes the new entries behind the old ones and returns all to attend to."""
        raise NotImplementedError

    def offload(self):
        self.replace_storages(lambda storage: storage.to("cpu", non_blocking=True))

    def prefetch(self):
        if self.is_initialized and self.buffer.device != self.device:
            self.replace_storages(lambda storage: storage.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.replace_storages(lambda storage: storage.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.replace_storages(lambda storage: storage.index_select(0, indices.to(storage.device)))

    def check_crop(self, tokens_to_remove: int) -> int:
        """Return how many entries `crop(tokens_to_remove)` removes; raises `ValueError` where it cannot."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): the argument is the number of tokens to remove, written as 0 or a "
                f"negative number, as in Transformers 5; use crop({-tokens_to_remove}) to remove {tokens_to_remove} "
                "tokens."
            )
        if self.evicted and self.stored + tokens_to_remove < self.first_whole:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches entries that were evicted: layer {self.layer_idx} holds the newest "
                f"{self.stored - self.first_whole} tokens without a gap. Crop no more, or reset() the cache."
            )
        return min(-tokens_to_remove, int(self.stored))


class GrowingLatentLayer(LatentLayer):
    """A layer without a limit: its buffer grows by an eighth when full, so that most steps write in place."""

    is_compileable = False
    expected_tokens = 0  # room for as many is made at once

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.stored = self.seen = 0

    @property
    def tokens_to_come(self) -> int:
        """For how many more tokens there should be room where the layer has to grow, at least."""
        return max(GROWTH_MIN_TOKENS, self.expected_room - self.stored)

    @property
    def expected_room(self) -> int:
        """Tokens to make room for from the beginning."""
        return self.expected_tokens + self.expected_tokens // GROWTH_FRACTION

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffer = key_states.new_empty((key_states.shape[0], 1, 0, self.width))
        self.is_initialized = True

    def count(self, tokens: int) -> int:
        """Count new tokens as stored and seen, and return where their entries begin."""
        start = self.stored
        self.stored += tokens
        self.seen += tokens
        return start

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> Entries:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        start = self.count(latent.shape[2])
        if torch.is_grad_enabled():
            # Writing in place would break autograd, of entries and of queries that attend to them, so a cache that may
            # be trained through grows by concatenation.
            new = torch.cat((latent, rope_key), dim=-1)
            self.buffer = torch.cat((self.buffer[:, :, :start], new), dim=2)
            return DenseEntries(self.buffer, self.kv_lora_rank)
        self.buffer = with_room(self.buffer, start, self.stored, self.tokens_to_come)
        entries = self.buffer[:, :, : self.stored]
        entries[:, :, start:, : self.kv_lora_rank] = latent
        entries[:, :, start:, self.kv_lora_rank :] = rope_key
        return DenseEntries(entries, self.kv_lora_rank)

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Entries held are masked as if they were the last tokens, so new tokens see all of them.
        return self.stored + query_length, self.seen - self.stored

    def reset(self) -> None:
        self.buffer, self.is_initialized = None, False
        self.stored = self.seen = 0
        self.evicted, self.first_whole = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        self.count(-self.check_crop(tokens_to_remove))


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

    @property
    def stored(self) -> int | torch.Tensor:
        if not self.is_initialized:
            return 0
        return self.cumulative_length if is_torchdynamo_compiling() else int(self.cumulative_length)

    @property
    def seen(self) -> int | torch.Tensor:
        return self.stored  # this layer drops nothing

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> Entries:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        new_tokens = latent.shape[2]
        if is_torchdynamo_compiling():
            positions = torch.arange(new_tokens, device=self.device) + self.cumulative_length
            self.cumulative_length.add_(new_tokens)
            self.buffer.index_copy_(2, positions, torch.cat((latent, rope_key), dim=-1))
            return DenseEntries(self.buffer, self.kv_lora_rank)
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
        return DenseEntries(self.buffer[:, :, :end], self.kv_lora_rank)

    def _thaw(self) -> None:
        """Replaces tensors made in inference mode, which cannot be written to outside of it, by copies that can."""
        if torch.is_inference_mode_enabled():
            return
        if self.buffer is not None and self.buffer.is_inference():
            self.buffer = self.buffer.clone()
        if self.cumulative_length.is_inference():
            self.cumulative_length = self.cumulative_length.clone()

    def get_seq_length(self) -> int | torch.Tensor:
        return self.seen

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
        self.cumulative_length.sub_(self.check_crop(tokens_to_remove))
