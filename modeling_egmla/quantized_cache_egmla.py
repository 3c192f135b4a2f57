# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Layers of the latent cache that hold integer codes: int8, int4, and what layers with groups of tokens share."""

from typing import Any

import torch

from .cache_layers_egmla import GrowingLatentLayer, with_room
from .entries_egmla import Entries
from .quantization_egmla import (
    SCALE_DTYPE,
    dequantize_tokens,
    element_group_size,
    quantize_tokens,
    rotation,
    token_group_size,
    write_int8,
)
from .quantized_entries_egmla import ElementGroups, TokenGroups


# The first tokens of a text, which an int4 cache keeps as they are (StreamingLLM's number, arXiv 2309.17453).
KEPT_FIRST_TOKENS = 4


class QuantizedLatentLayer(GrowingLatentLayer):
    """What quantised layers share: codes in `buffer`, `scales` beside them.

    A token reads itself and all others as the cache holds them, in every call.
    """

    scales: Any  # a tensor, `None` before the first update
    storage_names = ("buffer", "scales")

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.scales = None

    def check(self, latent: torch.Tensor, rope_key: torch.Tensor) -> None:
        super().check(latent, rope_key)
        if torch.is_grad_enabled() and (latent.requires_grad or rope_key.requires_grad):
            raise ValueError(
                f"Layer {self.layer_idx} gives entries that require gradients, and this cache is quantised: rounding "
                "has none. Use EGMLACache(model.config, bits=16) for training, or torch.no_grad() around the call."
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
        return ElementGroups(self.buffer, self.scales, self.stored, self.matrix, self.kv_lora_rank, self.dtype)

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> ElementGroups:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        start = self.count(latent.shape[2])
        self.buffer = with_room(self.buffer, start, self.stored, self.tokens_to_come)
        self.scales = with_room(self.scales, start, self.stored, self.tokens_to_come)
        write_int8(latent, rope_key, self.buffer, self.scales, start)
        return self.entries


class TokenGroupLayer(QuantizedLatentLayer):
    """Codes of groups of `group_size` tokens, and the tokens that are in no group as they came.

    These are the first ones, whose latents are unlike all others and which much attention goes to, and the last ones,
    up to a whole group. A subclass says how a group becomes codes. Storages are codes `[B, 1, groups, .]`, `scales`
    `[B, 1, groups, 2 C]` and `kept` `[B, 1, n, C]`, where `C` elements of a token are stored.
    """

    kept: Any  # a tensor, `None` before the first update
    storage_names = ("buffer", "scales", "kept")
    group_size: int
    first_tokens = KEPT_FIRST_TOKENS
    recent_tokens = 0  # of the last ones, at least so many are in no group
    scale_dtype = SCALE_DTYPE

    def __init__(self, kv_lora_rank: int, qk_rope_head_dim: int, layer_idx: int = 0):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.groups = 0
        self.kept = None

    @property
    def group_shape(self) -> tuple[int, int, int]:
        """Bytes of a group's codes, its scales and zero points, and stored elements `C` of a token."""
        raise NotImplementedError

    def choose_channels(self, entries: torch.Tensor) -> torch.Tensor:
        """Return what is stored `[B, 1, T, C]` of new entries `[B, 1, T, R + P]`: here everything."""
        return entries

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes `[B, 1, n, .]` and scales `[B, 1, n, 2 C]` of groups `[B, 1, n, g, C]`."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> None:
        """Write what `encode` made of groups to `[B, 1, n, g, C]` in fp32."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (key_states.shape[0], 1, 0)
        code_bytes, scales, stored = self.group_shape
        self.buffer = key_states.new_empty((*shape, code_bytes), dtype=torch.uint8)
        self.scales = key_states.new_empty((*shape, scales), dtype=self.scale_dtype)
        self.kept = key_states.new_empty((*shape, stored))
        self.is_initialized = True

    @property
    def used(self) -> tuple[torch.Tensor, ...]:
        if self.buffer is None:
            return ()
        return self.buffer[:, :, : self.groups], self.scales[:, :, : self.groups], self.kept

    def append(self, latent: torch.Tensor, rope_key: torch.Tensor) -> Entries:
        if not self.is_initialized:
            self.lazy_initialization(latent, rope_key)
        entries = self.choose_channels(torch.cat((latent, rope_key), dim=-1))
        kept = torch.cat((self.kept, entries), dim=2)
        new_groups = max(0, kept.shape[2] - self.first_tokens - self.recent_tokens) // self.group_size
        if new_groups:
            first, grouped, rest = kept.tensor_split(
                [self.first_tokens, self.first_tokens + new_groups * self.group_size], dim=2
            )
            codes, scales = self.encode(grouped.unflatten(2, (new_groups, self.group_size)))
            start, self.groups = self.groups, self.groups + new_groups
            groups_to_come = max(1, self.expected_room // self.group_size - self.groups)
            self.buffer = with_room(self.buffer, start, self.groups, groups_to_come)
            self.scales = with_room(self.scales, start, self.groups, groups_to_come)
            self.buffer[:, :, start : self.groups] = codes
            self.scales[:, :, start : self.groups] = scales
            kept = torch.cat((first, rest), dim=2)
        self.kept = kept
        self.count(latent.shape[2])
        return self.entries

    def reset(self) -> None:
        super().reset()
        self.kept, self.groups = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        removed = self.check_crop(tokens_to_remove)
        if not removed:
            return
        remaining = self.stored - removed
        groups = min(self.groups, max(0, remaining - self.first_tokens) // self.group_size)
        if groups == self.groups:
            self.kept = self.kept[:, :, : remaining - groups * self.group_size].clone()
        else:
            # What is left of a group goes on as tokens in no group, with the values it had there.
            codes, scales = (storage[:, :, groups : groups + 1] for storage in (self.buffer, self.scales))
            shape = (self.batch_size, 1, 1, self.group_size, self.kept.shape[3])
            group = self.kept.new_empty(shape, dtype=torch.float32)
            self.decode(codes, scales, group)
            loose = max(0, remaining - self.first_tokens - groups * self.group_size)
            first = self.kept[:, :, : min(remaining, self.first_tokens)]
            self.kept = torch.cat((first, group[:, :, 0, :loose].to(self.dtype)), dim=2)
        self.count(-removed)
        self.groups = groups


class Int4LatentLayer(TokenGroupLayer):
    """int4 codes `[B, 1, groups, group_size * (R + P) / 2]`, and all elements of the tokens that are in no group."""

    def __init__(self, kv_lora_rank, qk_rope_head_dim, layer_idx: int = 0, *, group_size: int | None = None):
        super().__init__(kv_lora_rank, qk_rope_head_dim, layer_idx)
        self.group_size = token_group_size(group_size)

    @property
    def group_shape(self) -> tuple[int, int, int]:
        return self.group_size * ((self.width + 1) // 2), 2 * self.width, self.width

    @property
    def entries(self) -> TokenGroups:
        storages = self.buffer, self.scales, self.groups
        return TokenGroups(self.kept, self.first_tokens, *storages, self.group_size, self.kv_lora_rank)

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = quantize_tokens(groups)
        return codes.flatten(3), scales.flatten(3)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> None:
        dequantize_tokens(codes, scales, groups)


QUANTIZED_LAYERS: dict[str, type[QuantizedLatentLayer]] = {"int8": Int8LatentLayer, "int4": Int4LatentLayer}
