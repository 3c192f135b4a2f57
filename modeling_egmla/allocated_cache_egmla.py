# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Layer of the latent cache whose channels have as many bits each as the model's configuration gives them.

`bit_allocation_egmla.py` says which channel has how many bits, `channel_codes_egmla.py` how codes are made and packed.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.nn.functional import pad

from .bit_allocation_egmla import BitAllocation, LayerBits
from .channel_codes_egmla import dequantize_channels, encode, unpack_ranges, unpack_runs
from .quantized_cache_egmla import TokenGroupLayer
from .quantized_entries_egmla import GroupedEntries, piece_memory


# Elements converted to floating point at a time, of all sequences together: more do not stay in a core's cache.
PIECE_ELEMENTS = 2**18
# Codes unpacked at a time, a byte each: fewer cost more small operations.
BLOCK_ELEMENTS = 2**21


@cache
@torch.inference_mode(False)
def channel_order(bits: LayerBits, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels `[R + P]` in the order in which they are stored, and each channel's place in that order."""
    order = torch.tensor(bits.channels, dtype=torch.long)
    return order.to(device), order.argsort().to(device)


class AllocatedEntries(GroupedEntries):
    """Entries whose `C` stored channels have bits of their own, in the order of `LayerBits.channels`.

    Args:
        layer (`AllocatedLatentLayer`): the layer, whose storages are read.
    """

    cpu_operator = "latent_attention_allocated"

    def __init__(self, layer: "AllocatedLatentLayer"):
        storages = layer.kept, layer.first_tokens, layer.buffer, layer.scales
        super().__init__(*storages, layer.groups, layer.group_size, layer.kv_lora_rank, layer.width)
        self.bits = layer.bits
        self.dropped = layer.dropped

    def operator_arguments(self) -> tuple[Any, ...]:
        order = channel_order(self.bits, self.device)[0]
        groups = self.first, self.codes, self.scales, self.groups, self.group_size
        runs = [number for run in self.bits.runs for number in run]
        return self.kept, self.dropped, order, *groups, runs, self.bits.latent_channels

    @property
    def piece_tokens(self) -> int:
        return max(1, PIECE_ELEMENTS // max(1, self.shape[0] * self.bits.stored_channels))

    def pieces_of_groups(self) -> Iterator[torch.Tensor]:
        per_piece = max(1, self.piece_tokens // self.group_size)
        elements = self.shape[0] * self.group_size * max(1, self.bits.stored_channels)
        per_block = per_piece * max(1, BLOCK_ELEMENTS // (elements * per_piece))
        for start in range(0, self.groups, per_block):
            end = min(self.groups, start + per_block)
            codes = unpack_runs(self.codes[:, 0, start:end], self.bits.runs, self.group_size)
            block = (codes, *unpack_ranges(self.scales[:, 0, start:end], self.bits.runs))
            pieces = (tensor.split(per_piece, dim=1) for tensor in block)
            for numbers, steps, starts in zip(*pieces, strict=True):
                memory = piece_memory(numbers.shape, codes.device)
                yield dequantize_channels(numbers, steps, starts, memory)

    def sections(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, Iterable[torch.Tensor], int]]:
        C, latents = self.bits.stored_channels, self.bits.latent_channels
        rows = rows.index_select(-1, channel_order(self.bits, self.device)[0])
        if self.dropped.shape[2:].numel():
            # The first tokens have all channels.
            first = torch.cat((self.kept[:, 0, : self.first], self.dropped[:, 0]), dim=-1)
            yield rows, [first.float()], rows.shape[-1]
            yield rows[..., :C], self.pieces(after_first=True), latents
        else:
            yield rows[..., :C], self.pieces(), latents

    def rotate_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Return mean latents `[..., R]` of those in the order in which channels are stored, whole or stored ones."""
        if rows.shape[-1] == sum(self.shape[3:]):
            return rows.index_select(-1, channel_order(self.bits, self.device)[1][: self.latent_width])
        return pad(rows, (0, self.latent_width - rows.shape[-1]))

    def to_tensor(self) -> torch.Tensor:
        ordered = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        start, C = 0, self.bits.stored_channels
        for piece in self.pieces():
            ordered[:, 0, start : start + piece.shape[1], :C] = piece
            start += piece.shape[1]
        ordered[:, :, : self.dropped.shape[2], C:] = self.dropped
        return ordered.index_select(-1, channel_order(self.bits, self.device)[1])


class AllocatedLatentLayer(TokenGroupLayer):
    """Codes of groups of tokens with the bits of an allocation; other channels are not stored.

    With `C` stored channels of `R + P`: codes `[B, 1, groups, .]`, half ranges and centres `[B, 1, groups, 2 C]` (as
    `scales`), tokens in no group `[B, 1, n, C]`. The first tokens' other channels are kept too, `[B, 1, first_tokens,
    R + P - C]`: much attention goes to these tokens.

    Args:
        allocation (`BitAllocation`): of the whole model.
        layer_idx (`int`): the layer's number.
    """

    dropped: Any  # a tensor, `None` before the first update
    storage_names = ("buffer", "scales", "kept", "dropped")
    scale_dtype = torch.uint8

    def __init__(self, allocation: BitAllocation, layer_idx: int):
        self.bits = allocation.layers[layer_idx]
        super().__init__(self.bits.rank, self.bits.rope_dim, layer_idx)
        self.group_size = allocation.group_tokens
        self.first_tokens = allocation.first_tokens
        self.recent_tokens = allocation.recent_tokens
        self.dropped = None

    @property
    def group_shape(self) -> tuple[int, int, int]:
        channels = self.bits.stored_channels
        code_bytes = sum(count * self.group_size * bits // 8 for bits, count in self.bits.runs)
        return code_bytes, 2 * channels, channels

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.dropped = key_states.new_empty((key_states.shape[0], 1, 0, self.width - self.bits.stored_channels))

    @property
    def used(self) -> tuple[torch.Tensor, ...]:
        return () if self.buffer is None else (*super().used, self.dropped)

    @property
    def entries(self) -> AllocatedEntries:
        return AllocatedEntries(self)

    def choose_channels(self, entries: torch.Tensor) -> torch.Tensor:
        """Return the stored channels `[B, 1, T, C]` of new entries, and keep the others of the first tokens."""
        C = self.bits.stored_channels
        ordered = entries.index_select(-1, channel_order(self.bits, entries.device)[0])
        missing = self.first_tokens - self.dropped.shape[2]
        if missing > 0:
            self.dropped = torch.cat((self.dropped, ordered[:, :, :missing, C:]), dim=2)
        return ordered[..., :C]

    def encode(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return encode(groups, self.bits.runs)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> None:
        unpacked = unpack_runs(codes, self.bits.runs, self.group_size)
        dequantize_channels(unpacked, *unpack_ranges(scales, self.bits.runs), groups)

    def reset(self) -> None:
        super().reset()
        self.dropped = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.dropped = self.dropped[:, :, : int(self.stored)]
