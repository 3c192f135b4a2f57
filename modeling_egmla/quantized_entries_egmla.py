# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Quantised entries: attention to integer codes piece by piece, so that no dequantised cache is ever made.

`quantization_egmla.py` has the layouts of the codes, `quantized_cache_egmla.py` the layers that hold them.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.utils import is_torchdynamo_compiling

from .cpu_egmla import cpu_threads
from .entries_egmla import Entries
from .quantization_egmla import dequantize_tokens


# Tokens converted to floating point at a time, of all sequences together: fewer cost more small operations, and more
# were no faster. At 128 elements a token that is 4 MB, which a thread keeps.
PIECE_TOKENS = 8192


class _Kept(threading.local):
    memory: torch.Tensor | None = None


_kept = _Kept()


def piece_memory(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An fp32 tensor of a shape, in memory that this thread keeps for the next call: hold one at a time.

    The C library would return memory of this size to the system after each piece, and getting it back takes longer
    than filling it. With gradients every call has its own, since pieces may be needed again; compiled code too.
    """
    elements = math.prod(shape)
    if torch.is_grad_enabled() or device.type != "cpu" or is_torchdynamo_compiling():
        return torch.empty(shape, dtype=torch.float32, device=device)
    if _kept.memory is None or _kept.memory.numel() < elements:
        with torch.inference_mode(False):  # such a tensor could not be written to outside of it
            memory = torch.empty(elements, dtype=torch.float32, device=device)
        if type(memory) is not torch.Tensor:  # a tracer's, of no use to others
            return memory.view(shape)
        _kept.memory = memory
    return _kept.memory[:elements].view(shape)


class QuantizedEntries(Entries):
    """What int8 and int4 entries share: `pieces()` in fp32, and attention to them.

    Such entries have the layer's storages, with all room in them: making views of what is in use takes longer than a
    step's quantisation, and the compiled kernel needs none.
    """

    @property
    def piece_tokens(self) -> int:
        """Tokens of a piece, at most."""
        return max(1, PIECE_TOKENS // max(1, self.shape[0]))

    def pieces(self) -> Iterator[torch.Tensor]:
        """All entries in order, rotated, in fp32 pieces `[B, n, R + P]`.

        A piece is valid until the next one is asked for, or another object's.
        """
        raise NotImplementedError

    def rotate(self, query: torch.Tensor) -> torch.Tensor:
        """Return queries `[..., R + P]` rotated as the pieces are. Without a rotation they stay as they are."""
        return query

    def rotate_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Return pieces `[..., R + P]`, or sums of their latents `[..., R]`, without the rotation."""
        return rows

    def sections(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, Iterable[torch.Tensor], int]]:
        """All entries in order, in sections whose pieces are alike. Most forms have one.

        Args:
            rows (`torch.Tensor`): queries `[B, rows, R + P]`, scaled, in fp32.

        Returns:
            Queries `[B, rows, w]`, pieces `[B, n, w]`, and how many of their first elements are values.
        """
        yield self.rotate(rows), self.pieces(), self.latent_width

    def to_tensor(self) -> torch.Tensor:
        entries = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        start = 0
        for piece in self.pieces():
            with torch.autocast(piece.device.type, enabled=False):
                entries[:, 0, start : start + piece.shape[1]] = self.rotate_back(piece)
            start += piece.shape[1]
        return entries

    def attend_rows(self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):  # sums are in fp32
            return self._attend_piecewise(query, attention_mask, scaling)

    def _attend_piecewise(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Attend `[B, 1, rows, R]` to one piece after the other, merged by their sums of exponentials.

        Sums are in fp32, whatever the model's dtype: pieces are made anew in each step, in either dtype as fast. A
        product of few rows keeps one core busy, so each piece is cut in parts for the threads that the batch leaves
        idle.
        """
        B = query.shape[0]
        threads = max(1, cpu_threads() // B) if query.device.type == "cpu" else 1
        found, start = [], 0
        for rows, pieces, values in self.sections(query[:, 0].float() * scaling):
            queries = rows.repeat_interleave(threads, dim=0)
            for parts in (parts for piece in pieces for parts in _in_parts(piece, threads)):  # [B * count, n, w]
                scores = torch.bmm(rows if parts.shape[0] == B else queries, parts.transpose(1, 2))
                if attention_mask is not None:
                    count, n = parts.shape[0] // B, parts.shape[1]
                    mask = attention_mask[:, 0, :, start : start + count * n].unflatten(-1, (count, n)).transpose(1, 2)
                    mask = mask.expand(B, -1, -1, -1).flatten(0, 1)
                    # Not infinite: a part without any visible token would give weights that are not numbers.
                    hidden = torch.finfo(scores.dtype).min
                    if mask.dtype == torch.bool:
                        scores = scores.masked_fill(~mask, hidden)
                    else:
                        scores = (scores + mask).clamp(min=hidden)
                    start += count * n
                # Relative to each part's own highest score: none overflows, in half the time of softmax and logsumexp.
                # It cancels out in the end, and so does its gradient.
                top = scores.detach().amax(dim=-1, keepdim=True)
                weights = scores.sub_(top).exp_()
                found.append((torch.bmm(weights, parts[..., :values]), weights.sum(dim=-1, keepdim=True), top))
        width = max(output.shape[-1] for output, _, _ in found)
        found = [(pad(output, (0, width - output.shape[-1])), total, top) for output, total, top in found]
        # [B, parts, rows, width or 1]
        outputs, totals, tops = (
            torch.cat([tensor.unflatten(0, (B, -1)) for tensor in kind], dim=1) for kind in zip(*found, strict=True)
        )
        shares = torch.exp(tops - tops.amax(dim=1, keepdim=True))
        output = (outputs * shares).sum(dim=1, keepdim=True)
        output = output / (totals * shares).sum(dim=1, keepdim=True)
        return self.rotate_back(output).to(query.dtype)


def _in_parts(piece: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """A piece `[B, n, W]` as `[B * count, n / count, W]`, and the rest of it `[B, ., W]`.

    Where `count` does not divide a piece of several sequences, all of it is rest.
    """
    B, n = piece.shape[:2]
    # Of several sequences, the front of a piece would have to be copied.
    even = n - n % count if B == 1 or n % count == 0 else 0
    if even:
        yield piece[:, :even].unflatten(1, (count, -1)).flatten(0, 1)
    if even < n:
        yield piece[:, even:]


class ElementGroups(QuantizedEntries):
    """Rotated entries in int8: codes `[B, 1, capacity, W]` and scales `[B, 1, capacity, W / group_size]`."""

    cpu_operator = "latent_attention_int8"

    def __init__(self, codes, scales, tokens: int, matrix: torch.Tensor, latent_width: int, dtype: torch.dtype):
        shape = torch.Size((codes.shape[0], 1, tokens, codes.shape[3]))
        super().__init__(shape, latent_width, dtype, codes.device)
        self.codes = codes
        self.scales = scales
        self.matrix = matrix

    def operator_arguments(self) -> tuple[Any, ...]:
        return self.codes, self.scales, self.shape[2]

    def rotate(self, query: torch.Tensor) -> torch.Tensor:
        return query @ self.matrix

    def rotate_back(self, rows: torch.Tensor) -> torch.Tensor:
        width = rows.shape[-1]  # the matrix is symmetric, and has blocks for the latent and the rotary key
        return rows @ self.matrix[:width, :width]

    def pieces(self) -> Iterator[torch.Tensor]:
        # Not a range, which would be another one, and another graph, in each compiled step.
        used = (
            storage[:, 0, : self.shape[2]].split(self.piece_tokens, dim=1) for storage in (self.codes, self.scales)
        )
        for codes, scales in zip(*used, strict=True):
            piece = piece_memory(codes.shape, codes.device).copy_(codes)
            piece.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.float().unsqueeze(-1))
            yield piece


class GroupedEntries(QuantizedEntries):
    """Groups of `g` tokens, and tokens as they came `[B, 1, n, C]`, the first few before all groups, the rest behind.

    Codes are `[B, 1, capacity, .]`, scales and zero points `[B, 1, capacity, 2 C]`, of which `groups` are in use.

    Args:
        width (`int`): `R + P`, of which `C` elements are stored.
        others: what is named above; `first` and `groups` are numbers, `latent_width` is `R`.
    """

    def __init__(self, kept, first: int, codes, scales, groups: int, group_size: int, latent_width: int, width: int):
        B, _, held, _ = kept.shape
        shape = torch.Size((B, 1, held + groups * group_size, width))
        super().__init__(shape, latent_width, kept.dtype, kept.device)
        self.kept = kept
        self.first = first
        self.codes = codes
        self.scales = scales
        self.groups = groups
        self.group_size = group_size

    def pieces_of_groups(self) -> Iterator[torch.Tensor]:
        """All groups in order, dequantised in fp32: pieces `[B, n, g, C]`, valid as those of `pieces` are."""
        raise NotImplementedError

    def pieces(self, after_first: bool = False) -> Iterator[torch.Tensor]:
        kept = self.kept[:, 0]
        if self.first and not after_first:
            yield kept[:, : self.first].float()
        for piece in self.pieces_of_groups():
            yield piece.flatten(1, 2)
        for piece in kept[:, self.first :].split(self.piece_tokens, dim=1):
            if piece.shape[1]:
                yield piece.float()


class TokenGroups(GroupedEntries):
    """Entries in int4: codes of two elements in each byte."""

    cpu_operator = "latent_attention_int4"

    def __init__(self, kept, first: int, codes, scales, groups: int, group_size: int, latent_width: int):
        super().__init__(kept, first, codes, scales, groups, group_size, latent_width, kept.shape[3])

    def operator_arguments(self) -> tuple[Any, ...]:
        return self.kept, self.first, self.codes, self.scales, self.groups

    def pieces_of_groups(self) -> Iterator[torch.Tensor]:
        groups = max(1, self.piece_tokens // self.group_size)
        for start in range(0, self.groups, groups):
            end = min(self.groups, start + groups)
            piece = piece_memory((self.shape[0], end - start, self.group_size, self.shape[3]), self.device)
            dequantize_tokens(self.codes[:, 0, start:end], self.scales[:, 0, start:end], piece)
            yield piece
