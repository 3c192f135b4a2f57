# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""The latent cache: gated latent and rotary key of each token, stored once, in one buffer per layer.

Layout of a layer's buffer: `[B, 1, capacity, R + P]`, latent first, rotary key last. The absorbed attention reads the
buffer itself, as key and as value, so nothing is copied or joined on the way.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from .configuration_egmla import EGMLAConfig
from .quantization_egmla import (
    SCALE_DTYPE,
    ElementGroups,
    QuantizedEntries,
    TokenGroups,
    element_group_size,
    quantize_tokens,
    rotation,
    token_group_size,
    write_int8,
)


# Spare room of a growing layer when it has to grow: 1/8 of what it holds, at least 64 tokens. Copying then costs eight
# tokens moved per token appended, and a buffer is never more than 12.5 % (beyond 512 tokens) larger than its content.
GROWTH_FRACTION = 8
GROWTH_MIN_TOKENS = 64
# The first tokens of a text, which an int4 cache keeps as they are (StreamingLLM's number, arXiv 2309.17453).
KEPT_FIRST_TOKENS = 4
TOKEN_ID_DTYPE = torch.int32  # of TOKEN_ID_BYTES


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

    Args:
        kv_lora_rank (`int`): latent width `R`.
        qk_rope_head_dim (`int`): rotary key width `P`.
        layer_idx (`int`): the layer's number, for messages.
    """

    is_sliding = False
    is_croppable = True
    buffer: Any  # the tensor, `None` before the first update
    storage_names = ("buffer",)
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
        return tuple(storage[:, :, : int(self.get_seq_length())] for storage in self.storages)

    def replace_storages(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts `function(storage)` in the place of each storage."""
        if self.is_initialized:
            for name in self.storage_names:
                setattr(self, name, function(getattr(self, name)))

    @property
    def entries(self) -> torch.Tensor:
        """The part of the buffer in use, `[B, 1, S, R + P]`, a view."""
        return self.buffer[:, :, : int(self.get_seq_length())]

    def split(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]` of entries, as views."""
        return entries[..., : self.kv_lora_rank], entries[..., self.kv_lora_rank :]

    @property
    def keys(self) -> torch.Tensor | None:
        """Cached latents `[B, 1, S, R]`, a view (DeepSeek's place for them)."""
        return None if self.buffer is None else self.split(self.entries)[0]

    @property
    def values(self) -> torch.Tensor | None:
        """Cached rotary keys `[B, 1, S, P]`, a view."""
        return None if self.buffer is None else self.split(self.entries)[1]

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
            The cached latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]`; with `packed=True` the buffer in use
            `[B, 1, S, R + P]` twice instead. All are views.
        """
        self.check(key_states, value_states)
        entries = self.append(key_states, value_states)
        if packed:
            return entries, entries
        return self.split(entries)

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
        """Writes the new entries behind the old ones and returns the part of the buffer to attend to."""
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
    expected_tokens = 0  # room for as many is made at once

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.length = 0

    @property
    def tokens_to_come(self) -> int:
        """For how many more tokens there should be room where the layer has to grow, at least."""
        return max(GROWTH_MIN_TOKENS, self.expected_room - self.length)

    @property
    def expected_room(self) -> int:
        """Tokens to make room for from the beginning."""
        return self.expected_tokens + self.expected_tokens // GROWTH_FRACTION

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffer = key_states.new_empty((key_states.shape[0], 1, 0, self.width))
        self.is_initialized = True

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        start, self.length = self.length, self.length + latent.shape[2]
        if torch.is_grad_enabled():
            # Writing in place would break autograd, of entries and of queries that attend to them, so a cache that may
            # be trained through grows by concatenation.
            new = torch.cat((latent, rope_key), dim=-1)
            self.buffer = torch.cat((self.buffer[:, :, :start], new), dim=2)
            return self.buffer
        self.buffer = with_room(self.buffer, start, self.length, self.tokens_to_come)
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


class QuantizedLatentLayer(GrowingLatentLayer):
    """What int8 and int4 layers share: codes in `buffer`, `scales` beside them, reading through `QuantizedEntries`.

    A token reads itself and all others as the cache holds them, in every call.
    """

    scales: Any  # a tensor, `None` before the first update
    storage_names = ("buffer", "scales")

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.scales = None

    def split(self, entries: QuantizedEntries) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]` of entries, dequantised."""
        return super().split(entries.dequantize())

    def check(self, latent: torch.Tensor, rope_key: torch.Tensor) -> None:
        super().check(latent, rope_key)
        if torch.is_grad_enabled() and (latent.requires_grad or rope_key.requires_grad):
            raise ValueError(
                f"Layer {self.layer_idx} gives entries that require gradients, and this cache is quantised: rounding "
                "has none. Use EGMLACache(model.config) for training, or torch.no_grad() around the call."
            )

    def reset(self) -> None:
        super().reset()
        self.scales = None


class Int8LatentLayer(QuantizedLatentLayer):
    """int8 codes `[B, 1, capacity, R + P]` and scales `[B, 1, capacity, (R + P) / group_size]`.

    Tokens are quantised each by itself, so logits depend on how they were divided into calls by rounding only.
    """

    def __init__(self, kv_lora_rank, qk_rope_head_dim, layer_idx: int = 0, *, group_size: int | None = None):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.group_size = element_group_size(group_size, kv_lora_rank, qk_rope_head_dim)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (key_states.shape[0], 1, 0)
        self.buffer = key_states.new_empty((*shape, self.width), dtype=torch.int8)
        self.scales = key_states.new_empty((*shape, self.width // self.group_size), dtype=SCALE_DTYPE)
        self.is_initialized = True

    @property
    def matrix(self) -> torch.Tensor:
        return rotation(self.kv_lora_rank, self.qk_rope_head_dim, self.device)

    @property
    def entries(self) -> ElementGroups:
        return ElementGroups(self.buffer, self.scales, self.length, self.matrix, self.kv_lora_rank, self.dtype)

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> ElementGroups:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        start, self.length = self.length, self.length + latent.shape[2]
        self.buffer = with_room(self.buffer, start, self.length, self.tokens_to_come)
        self.scales = with_room(self.scales, start, self.length, self.tokens_to_come)
        write_int8(latent, rope_key, self.buffer, self.scales, start)
        return self.entries


class Int4LatentLayer(QuantizedLatentLayer):
    """int4 codes of groups of `group_size` tokens, and the tokens that are in no group as they came.

    These are the first ones, whose latents are unlike all others and which much attention goes to, and the last ones,
    up to a whole group. Codes are `[B, 1, groups, group_size * (R + P) / 2]`, scales and zero points
    `[B, 1, groups, 2 (R + P)]`, tokens as they came `[B, 1, fewer than KEPT_FIRST_TOKENS + group_size, R + P]`.
    """

    kept: Any  # a tensor, `None` before the first update
    storage_names = ("buffer", "scales", "kept")

    def __init__(self, kv_lora_rank, qk_rope_head_dim, layer_idx: int = 0, *, group_size: int | None = None):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.group_size = token_group_size(group_size)
        self.groups = 0
        self.kept = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (key_states.shape[0], 1, 0)
        self.buffer = key_states.new_empty((*shape, self.group_size * ((self.width + 1) // 2)), dtype=torch.uint8)
        self.scales = key_states.new_empty((*shape, 2 * self.width), dtype=SCALE_DTYPE)
        self.kept = key_states.new_empty((*shape, self.width))
        self.is_initialized = True

    @property
    def used(self) -> tuple[torch.Tensor, ...]:
        if self.buffer is None:
            return ()
        return self.buffer[:, :, : self.groups], self.scales[:, :, : self.groups], self.kept

    @property
    def entries(self) -> TokenGroups:
        storages = self.buffer, self.scales, self.groups
        return TokenGroups(self.kept, KEPT_FIRST_TOKENS, *storages, self.group_size, self.kv_lora_rank)

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> TokenGroups:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        kept = torch.cat((self.kept, torch.cat((latent, rope_key), dim=-1)), dim=2)
        new_groups = max(0, kept.shape[2] - KEPT_FIRST_TOKENS) // self.group_size
        if new_groups:
            first, grouped, rest = kept.tensor_split(
                [KEPT_FIRST_TOKENS, KEPT_FIRST_TOKENS + new_groups * self.group_size], dim=2
            )
            codes, scales = quantize_tokens(grouped.unflatten(2, (new_groups, self.group_size)))
            start, self.groups = self.groups, self.groups + new_groups
            groups_to_come = max(1, self.expected_room // self.group_size - self.groups)
            self.buffer = with_room(self.buffer, start, self.groups, groups_to_come)
            self.scales = with_room(self.scales, start, self.groups, groups_to_come)
            self.buffer[:, :, start : self.groups] = codes.flatten(3)
            self.scales[:, :, start : self.groups] = scales.flatten(3)
            kept = torch.cat((first, rest), dim=2)
        self.kept = kept
        self.length += latent.shape[2]
        return self.entries

    def reset(self) -> None:
        super().reset()
        self.kept, self.groups = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        remaining = self.length - self._check_crop(tokens_to_remove)
        if not self.is_initialized or remaining == self.length:
            return
        groups = min(self.groups, max(0, remaining - KEPT_FIRST_TOKENS) // self.group_size)
        if groups == self.groups:
            self.kept = self.kept[:, :, : remaining - groups * self.group_size].clone()
        else:
            # What is left of a group goes on as tokens in no group, with the values it had there.
            codes, scales = self.buffer[:, :, groups : groups + 1], self.scales[:, :, groups : groups + 1]
            group = TokenGroups(self.kept[:, :, :0], 0, codes, scales, 1, self.group_size, self.kv_lora_rank)
            loose = max(0, remaining - KEPT_FIRST_TOKENS - groups * self.group_size)
            first = self.kept[:, :, : min(remaining, KEPT_FIRST_TOKENS)]
            self.kept = torch.cat((first, group.dequantize()[:, :, :loose]), dim=2)
        self.length, self.groups = remaining, groups


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


QUANTIZED_LAYERS: dict[str, type[QuantizedLatentLayer]] = {"int8": Int8LatentLayer, "int4": Int4LatentLayer}


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
            Keep layers in CPU memory and fetch each before its turn (Transformers' mechanism; needs an accelerator).
        quantization (`str`, *optional*):
            "int8" or "int4" for integer codes with a scale per group; `None` keeps entries as they are.
        quantization_group_size (`int`, *optional*):
            For int8 elements of a token per scale, a divisor of every layer's `R` and of `P`, by default the largest
            one up to 64. For int4 tokens per scale, by default 64.
        expected_tokens (`int`, *optional*):
            Tokens that a growing cache makes room for when the first ones come; it takes more too. For prompts read in
            chunks: growing step by step copies what is there and leaves holes in the C library's heap.

    Example:

    ```python
    >>> cache = EGMLACache(model.config)
    >>> model.generate(**inputs, past_key_values=cache)
    >>> cache.nbytes
    ```"""

    def __init__(
        self,
        config: EGMLAConfig,
        max_cache_len: int | None = None,
        offloading: bool = False,
        quantization: str | None = None,
        quantization_group_size: int | None = None,
        expected_tokens: int | None = None,
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
            elif max_cache_len is None:
                layers.append(GrowingLatentLayer(rank, config.qk_rope_head_dim, layer_idx))
            else:
                layers.append(FixedLatentLayer(rank, config.qk_rope_head_dim, layer_idx, max_cache_len=max_cache_len))
            if isinstance(layers[-1], GrowingLatentLayer):
                layers[-1].expected_tokens = expected_tokens or 0
        super().__init__(layers=layers, offloading=offloading)
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
        held = self.token_ids.append(entries, entries[..., :0])
        # A copy, since backward passes keep ids and the next ones are written beside them.
        return held[:, 0, :, 0].to(ids.device, torch.long)

    def _seek_token_ids(self) -> None:
        """Sets the next ids' place to that of the next entries: after a forward that failed, or cropped layers."""
        length, held = self.layers[0].get_seq_length(), self.token_ids
        if isinstance(length, torch.Tensor):  # in compiled code
            held.cumulative_length.copy_(length)
            return
        if held.is_initialized and not self.layers[0].is_initialized and not is_torchdynamo_compiling():
            held.reset()
            held.is_initialized = False  # the next ones may be of another number of sequences
        ahead = int(held.get_seq_length()) - length
        if ahead < 0:
            raise ValueError(
                f"This cache holds {length} tokens and the ids of {length + ahead}, and kv_gate='expanded' needs "
                "them all; call append_token_ids before the entries of each token are appended."
            )
        if ahead:
            held.crop(-ahead)

    def append(self, latent, rope_key, layer_idx: int) -> torch.Tensor | QuantizedEntries:
        """Stores a layer's new entries and returns what to attend to, packed.

        Args:
            latent (`torch.Tensor`): gated latent `[B, 1, T, R]`.
            rope_key (`torch.Tensor`): rotated shared key `[B, 1, T, P]`.
            layer_idx (`int`): the layer.

        Returns:
            `torch.Tensor`: `[B, 1, S, R + P]`, a view of the layer's buffer; `QuantizedEntries` of a quantised one.
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
        for holder in self._holders:
            holder.crop(tokens_to_remove)

    def reset(self) -> None:
        for holder in self._holders:
            holder.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for holder in self._holders:
            holder.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for holder in self._holders:
            holder.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
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
                f"does not fit: {remedy} PEFT's prefix tuning makes such keys: use prompt tuning, p-tuning or LoRA."
            )


__all__ = ["EGMLACache"]
