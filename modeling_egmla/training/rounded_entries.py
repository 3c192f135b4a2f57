"""Training with the cache in the loop: attention sees entries as a cache with allocated bits rounds them."""

import torch

from egmla.allocated_cache_egmla import channel_order
from egmla.bit_allocation_egmla import BitAllocation, LayerBits
from egmla.channel_codes_egmla import dequantize_channels, encode, unpack_ranges, unpack_runs
from egmla.entries_egmla import Entries, PairedEntries


class RoundedEntries:
    """Give a whole sequence the entries that decoding it token by token would see. It stands in place of a cache.

    At each token, `EGMLACache` has rounded the groups before the last tokens, and holds the first and last ones exact.
    So `append` returns the rounded groups followed by all tokens exact, `S = G + T` entries for `T` tokens, and `mask`
    shows each query the ones of its time. Rounding is straight-through: the gradient is that of exact entries.

    Nothing is stored from call to call, so gradient checkpointing may call a layer again.

    Args:
        allocation (`BitAllocation`): bits of all layers, as `EGMLAConfig.bit_allocation()` returns them.
    """

    # What the model asks of a cache, see `holds_latents` in cache_egmla.py.
    holds_latents = True

    def __init__(self, allocation: BitAllocation):
        self.allocation = allocation

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens before this call: none, it is for whole sequences."""
        return 0

    def place_padding(self, attention_mask: torch.Tensor, causal_mask: torch.Tensor) -> torch.Tensor:
        """Return the mask as it is: sequences have no padding."""
        return causal_mask

    def fit_mask(self, mask: torch.Tensor, layer_idx: int, new_tokens: int, held: int) -> torch.Tensor:
        """Return the mask as it is: all layers hold as many entries."""
        return mask

    def append(self, latents: torch.Tensor, rope_keys: torch.Tensor, layer_idx: int) -> Entries:
        """Return the entries `[B, 1, G + T, R + P]` of latents `[B, 1, T, R]` and rotary keys `[B, 1, T, P]`."""
        bits, first = self.allocation.layers[layer_idx], self.allocation.first_tokens
        entries = torch.cat((latents, rope_keys), dim=-1)
        grouped = entries[:, :, first : first + self.allocation.grouped_tokens(entries.shape[2])]
        rounded = round_trip(grouped.detach(), bits, self.allocation.group_tokens)
        stored = channel_order(bits, entries.device)[1] < bits.stored_channels
        grouped = torch.where(stored, grouped + (rounded - grouped.detach()), 0)
        later = torch.where(stored, entries[:, :, first:], 0)
        both = torch.cat((grouped, entries[:, :, :first], later), dim=2)
        return PairedEntries(*both.split([latents.shape[-1], rope_keys.shape[-1]], dim=-1))

    def mask(self, tokens: int, device: torch.device) -> torch.Tensor:
        """Return which of the `S` entries each of `T` tokens sees, `[1, 1, T, S]`, boolean."""
        first, place = self.allocation.first_tokens, torch.arange(tokens, device=device)
        # Of each query, when its own entry is there.
        grouped = torch.tensor(
            [[self.allocation.grouped_tokens(seen)] for seen in range(1, tokens + 1)], device=device
        )
        group = place[: self.allocation.grouped_tokens(tokens)] < grouped
        exact = (place <= place[:, None]) & ((place < first) | (place >= first + grouped))
        return torch.cat((group, exact), dim=-1)[None, None]


def round_trip(entries: torch.Tensor, bits: LayerBits, group_tokens: int) -> torch.Tensor:
    """Return whole groups of entries `[B, 1, G, R + P]` as a cache gives them back, in their dtype."""
    channels = channel_order(bits, entries.device)[0][: bits.stored_channels]
    result = torch.zeros_like(entries)
    if not entries.shape[2] or not channels.numel():
        return result
    groups = entries.index_select(-1, channels).unflatten(2, (-1, group_tokens))
    codes, ranges = encode(groups, bits.runs)
    unpacked = unpack_runs(codes, bits.runs, group_tokens)
    values = torch.empty(unpacked.shape, dtype=torch.float32, device=entries.device)
    dequantize_channels(unpacked, *unpack_ranges(ranges, bits.runs), values)
    result[..., channels] = values.flatten(2, 3).to(entries.dtype)
    return result
