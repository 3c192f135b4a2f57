"""What tests of allocated bits share: allocations for any model, and a plain layer that follows the definition."""

import torch

from egmla import EGMLACache
from egmla.bit_allocation_egmla import BitAllocation
from egmla.cache_layers_egmla import GrowingLatentLayer
from egmla.channel_codes_egmla import highest_code, quantize_channels, steps_and_starts
from egmla.entries_egmla import DenseEntries


GROUP, FIRST = 8, 3


def allocation_for(config, shares=(0.5, 0.3, 0.1), bits=(8, 3, 0), rope_bits=(6, 2)) -> dict:
    """Allocation of a model of any shape: so large a part of the latent at each of `bits`, the rest not stored."""
    layers = []
    for rank in config.layer_kv_lora_ranks:
        latent = [[width, max(1, int(share * rank))] for width, share in zip(bits, shares, strict=True)]
        pairs = config.qk_rope_head_dim // 2
        rope = [
            [width, count] for width, count in zip(rope_bits, ((pairs + 1) // 2, pairs // 4), strict=True) if count
        ]
        layers.append({"latent": latent, "rope": rope})
    return {"group_tokens": GROUP, "first_tokens": FIRST, "layers": layers}


class PlainLayer:
    """The definition: values of all tokens as they are read, in fp32, without storages.

    Args:
        allocation (`BitAllocation`): of the model.
        layer_idx (`int`): the layer's number.
    """

    def __init__(self, allocation: BitAllocation, layer_idx: int):
        self.first, self.recent, self.group = (
            *(allocation.first_tokens, allocation.recent_tokens),
            allocation.group_tokens,
        )
        layer = allocation.layers[layer_idx]
        self.runs, start = [], 0
        for bits, count in layer.latent:
            self.runs.append((bits, list(range(start, start + count))))
            start += count
        start = 0
        for bits, count in layer.rope:
            firsts = [layer.rank + pair for pair in range(start, start + count)]
            self.runs.append((bits, firsts + [channel + layer.rope_dim // 2 for channel in firsts]))
            start += count
        self.values, self.grouped = None, 0

    def append(self, entries: torch.Tensor) -> torch.Tensor:
        """Add entries `[B, T, R + P]` and return all as they are read."""
        before = 0 if self.values is None else self.values.shape[1]
        stored = [channel for _, channels in self.runs for channel in channels]
        dropped = [channel for channel in range(entries.shape[2]) if channel not in stored]
        entries = entries.clone()
        beyond = max(0, self.first - before)
        entries[:, beyond:, dropped] = 0
        self.values = entries if self.values is None else torch.cat((self.values, entries), dim=1)
        while self.values.shape[1] - self.first - self.recent - self.grouped >= self.group:
            start = self.first + self.grouped
            group = self.values[:, start : start + self.group]
            for bits, channels in self.runs:
                codes, stored = quantize_channels(group[..., channels], bits)
                steps, starts = steps_and_starts(stored, highest_code(bits))
                rounded = torch.addcmul(starts, codes.float(), steps)
                self.values[:, start : start + self.group, channels] = rounded.to(self.values.dtype)
            self.grouped += self.group
        return self.values

    def crop(self, removed: int) -> None:
        """Drop the last tokens. What is left of a group waits for new ones, with the values it had."""
        remaining = max(0, self.values.shape[1] - removed)
        self.values = self.values[:, :remaining].clone()
        self.grouped = min(self.grouped, max(0, remaining - self.first) // self.group * self.group)

    def select(self, rows: list[int]) -> None:
        """Put these sequences in the place of those that are there."""
        self.values = self.values[rows]


class RoundedLayer(GrowingLatentLayer):
    """A dense layer that gives back what one with allocated bits should, recomputed from all entries each time."""

    def __init__(self, allocation: BitAllocation, layer_idx: int):
        bits = allocation.layers[layer_idx]
        super().__init__(bits.rank, bits.rope_dim, layer_idx)
        self.allocation = allocation

    def append(self, latent, rope_key):
        entries = super().append(latent, rope_key).to_tensor()
        values = PlainLayer(self.allocation, self.layer_idx).append(entries[:, 0])
        return DenseEntries(values.unsqueeze(1), self.kv_lora_rank)


def rounded_cache(config, allocation: BitAllocation) -> EGMLACache:
    """A dense cache whose entries are rounded by the definition."""
    cache = EGMLACache(config, bits=16)
    cache.layers = [RoundedLayer(allocation, layer_idx) for layer_idx in range(len(allocation.layers))]
    return cache
