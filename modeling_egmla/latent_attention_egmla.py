# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Attention of all heads over one shared latent, on cache entries as they are, and when that pays.

Shapes as in `modeling_egmla.py`: B batch, H heads, T new tokens, S tokens seen, R latent and P rotary key width.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from .cpu_egmla import CPU_KERNEL_DTYPES, cpu_operators, is_traced
from .quantization_egmla import QuantizedEntries


# Below this many cached tokens per thread, splitting the cache over threads costs more than it saves.
SPLIT_MIN_TOKENS = 512
# Up to this many query rows (heads x new tokens) are packed into one problem; more would copy the mask too often.
PACK_MAX_ROWS = 512


def absorbed_attention(
    nope: torch.Tensor,
    rope: torch.Tensor,
    entries: torch.Tensor | QuantizedEntries,
    attention_mask: torch.Tensor | None,
    scaling: float,
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    eager: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend in the latent space: queries are multiplied by `W_UK`, mean latents by `W_UV`.

    Heads are the batch of both matmuls, so the weights are read once for all sequences.

    Args:
        nope (`torch.Tensor`): queries without position `[B, H, T, N]`.
        rope (`torch.Tensor`): rotated queries `[B, H, T, P]`.
        entries: cache entries `[B, 1, S, R + P]`.
        attention_mask: as of `latent_attention`.
        scaling (`float`): factor on the scores.
        maps: `W_UK` `[H, N, R]`, `W_UV` `[H, V, R]` and the values' bias `[H, V]` or `None`.
        eager (`bool`): whether weights are wanted too, from plain matmuls.

    Returns:
        Output `[B, T, H, V]` and, if `eager`, weights `[B, H, T, S]`.
    """
    B, H, T, _ = nope.shape
    key_up, value_up, value_bias = maps
    R = key_up.shape[-1]
    absorbed = torch.bmm(nope.transpose(0, 1).reshape(H, B * T, -1), key_up)  # [H, B T, R]
    query = torch.cat((absorbed.view(H, B, T, R).transpose(0, 1), rope), dim=-1)
    weights = None
    if eager:
        output, weights = _eager_attention(query, entries, attention_mask, scaling, R)
    else:
        output = latent_attention(query, entries, attention_mask, scaling, R)
    output = torch.bmm(output.transpose(0, 1).reshape(H, B * T, R), value_up.transpose(1, 2))  # [H, B T, V]
    if value_bias is not None:  # weights of a row sum to one
        output = output + value_bias.unsqueeze(1)
    return output.view(H, B, T, -1).permute(1, 2, 0, 3), weights


def _eager_attention(query, entries, attention_mask, scaling: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean latents `[B, H, T, R]` and weights `[B, H, T, S]` by plain matmuls."""
    B, H, T, _ = query.shape
    if not isinstance(entries, torch.Tensor):
        entries = entries.dequantize()
    # As `eager_attention_forward`, heads beside one another: broadcasting would copy the cache for each.
    scores = torch.matmul(query.reshape(B, 1, H * T, -1), entries.transpose(2, 3)) * scaling
    scores = scores.view(B, H, T, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output = torch.matmul(weights.view(B, 1, H * T, -1), entries[..., :rank])
    return output.view(B, H, T, -1), weights


def latent_attention(
    query: torch.Tensor,
    entries: torch.Tensor | QuantizedEntries,
    attention_mask: torch.Tensor | None,
    scaling: float,
    kv_lora_rank: int,
) -> torch.Tensor:
    """Attention of all heads over one shared latent, which is key and value at once.

    Key and value are the same tensor, so the fused kernels apply: on CPU they want equal widths. Heads go where
    queries usually are. One pass over the cache then serves all of them.

    Args:
        query (`torch.Tensor`): absorbed queries `[B, H, T, R + P]`.
        entries (`torch.Tensor` or `QuantizedEntries`): cache entries `[B, 1, S, R + P]`.
        attention_mask (`torch.Tensor`, *optional*): `[B or 1, 1, T, S]`, boolean (true is seen) or additive. `None`:
            each of the `T` queries, the last tokens of the cache, sees all up to itself.
        scaling (`float`): factor on the scores.
        kv_lora_rank (`int`): `R`.

    Returns:
        `torch.Tensor`: `[B, H, T, R]`, mean latents.
    """
    if cpu_operators() is not None and scaling > 0 and _is_for_cpu_kernel(query, entries, attention_mask):
        return _compiled_attention(query, entries, attention_mask, scaling, kv_lora_rank)
    return _attention(query, entries, attention_mask, scaling)[..., :kv_lora_rank]


def _attention(
    query: torch.Tensor,
    entries: torch.Tensor | QuantizedEntries,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """By PyTorch's kernels: `[B, H, T, R + P]`, of which the first `R` elements mean anything and may come alone."""
    B, H, T, width = query.shape
    if T > 1 and (attention_mask is None or H * T > PACK_MAX_ROWS):
        if not isinstance(entries, torch.Tensor):
            entries = entries.dequantize()
        if attention_mask is None:
            return _continued_attention(query, entries, scaling)
        # Expanding has stride 0: no head gets a copy of the cache.
        shared = entries.expand(-1, H, -1, -1)
        return nn.functional.scaled_dot_product_attention(
            query, shared, shared, attn_mask=attention_mask, scale=scaling, is_causal=False
        )
    packed = query.reshape(B, 1, H * T, width)
    if attention_mask is not None and (T > 1 or attention_mask.shape[1] > 1):
        attention_mask = attention_mask.expand(-1, H, -1, -1).reshape(-1, 1, H * T, attention_mask.shape[-1])
    # Not by its class: a model whose code came with its checkpoint may be given the package's cache.
    if not isinstance(entries, torch.Tensor):
        with torch.autocast(query.device.type, enabled=False):  # its sums are in fp32
            return _quantized_attention(packed, entries, attention_mask, scaling).view(B, H, T, -1)
    parts = _split_count(packed, entries)
    if parts > 1:
        output = _split_attention(packed, entries, attention_mask, scaling, parts)
    else:
        output = nn.functional.scaled_dot_product_attention(
            packed, entries, entries, attn_mask=attention_mask, scale=scaling, is_causal=False
        )
    return output.view(B, H, T, width)


def needs_no_mask(attention_mask: torch.Tensor | None, rows: int, tokens: int, device: torch.device) -> bool:
    """Whether `latent_attention` does without a mask `[T, S]` for `rows` (heads x new tokens) behind a past.

    Many rows on a CPU, none of the `S` tokens hidden by `attention_mask` `[B, S]`: the mask of a long prompt's chunk
    would take more memory than the cache.
    """
    if rows <= PACK_MAX_ROWS or device.type != "cpu" or torch.is_grad_enabled() or is_torchdynamo_compiling():
        return False
    if attention_mask is None:
        return True
    two_dimensional = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    return two_dimensional and attention_mask.shape[1] == tokens and bool(attention_mask.all())


def _is_for_cpu_kernel(
    query: torch.Tensor, entries: torch.Tensor | QuantizedEntries, attention_mask: torch.Tensor | None
) -> bool:
    """Whether the compiled kernel takes the case: one new token per sequence on a CPU, nothing to record or trace."""
    if query.shape[2] != 1 or query.device.type != "cpu" or entries.device.type != "cpu":
        return False
    if entries.dtype not in CPU_KERNEL_DTYPES:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or getattr(entries, "requires_grad", False)):
        return False
    if is_traced():  # an exported program would need the kernel wherever it is run
        return False
    return attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)


def _compiled_attention(
    query: torch.Tensor,
    entries: torch.Tensor | QuantizedEntries,
    attention_mask: torch.Tensor | None,
    scaling: float,
    rank: int,
) -> torch.Tensor:
    """Attention `[B, H, 1, R]` of queries `[B, H, 1, R + P]` by the compiled kernel, on entries as they are cached."""
    operators, rest = cpu_operators(), (attention_mask, scaling, rank)
    if isinstance(entries, torch.Tensor):
        return operators.latent_attention(query, entries, *rest)
    if entries.rotation is None:
        kept = entries.kept, entries.first
        return operators.latent_attention_int4(query, *kept, entries.codes, entries.scales, entries.groups, *rest)
    return operators.latent_attention_int8(query, entries.codes, entries.scales, entries.shape[2], *rest)


def _continued_attention(query: torch.Tensor, entries: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of the last `T` of `S` tokens on all up to themselves: past and own tokens, by their log-sum-exp.

    Queries `[B, H, T, W]`, entries `[B, 1, S, W]` with `S > T`, output `[B, H, T, W]`; on a CPU no mask is made.
    """
    H, T, S = query.shape[1], query.shape[2], entries.shape[2]
    entries = entries.to(query.dtype).expand(-1, H, -1, -1)  # autocast leaves both formats
    if query.device.type != "cpu":  # a layer placed elsewhere than the embeddings
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
        return nn.functional.scaled_dot_product_attention(query, entries, entries, attn_mask=mask, scale=scaling)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past, own = entries.split([S - T, T], dim=2)
    before, before_lse = kernel(query, past, past, scale=scaling)
    among, among_lse = kernel(query, own, own, is_causal=True, scale=scaling)
    share = torch.sigmoid(before_lse - among_lse).to(query.dtype).unsqueeze(-1)  # [B, H, T, 1]
    return torch.lerp(among, before, share)


@torch.compiler.assume_constant_result
def _cpu_threads() -> int:
    return torch.get_num_threads()


def _split_count(query: torch.Tensor, entries: torch.Tensor) -> int:
    """Pieces to cut the cache into: one per CPU thread the batch leaves idle, 1 where the kernel does not apply."""
    if query.device.type != "cpu":
        return 1
    if torch.is_grad_enabled() and (query.requires_grad or entries.requires_grad):
        return 1
    if query.shape[2] < 2:  # a single row makes the kernel's log-sum-exp shape ambiguous, and there is nothing to gain
        return 1
    return max(1, min(_cpu_threads() // query.shape[0], entries.shape[2] // SPLIT_MIN_TOKENS))


def _split_attention(
    query: torch.Tensor, entries: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float, parts: int
) -> torch.Tensor:
    """Attention over `parts` pieces of the cache at once, merged by their log-sum-exp.

    A fused CPU kernel works on one (sequence, head) at a time, so a single sequence over a single shared head would
    keep one core busy. The pieces take the place of heads, as a view: nothing is copied.
    """
    step = entries.shape[2] // parts
    size = entries.shape[2] - step * (parts - 1)  # pieces overlap by what the division leaves, so all are of one size
    pieces = entries[:, 0].unfold(1, size, step).transpose(2, 3)  # [B, parts, size, R + P], a view
    mask = None
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            # Not infinite: the kernel gives a piece without any token the weight of one with score 0.
            hidden = torch.finfo(query.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
        else:
            attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min)
        mask = attention_mask[:, 0].unfold(2, size, step).transpose(1, 2)  # [B or 1, parts, rows or 1, size]
    if size > step:
        doubled = query.new_zeros((1, parts, 1, size))
        doubled[:, :-1, :, step:] = -torch.inf
        mask = doubled if mask is None else mask + doubled
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outputs, lse = kernel(query.expand(-1, parts, -1, -1), pieces, pieces, attn_mask=mask, scale=scaling)
    shares = torch.softmax(lse, dim=1).to(outputs.dtype)  # [B, parts, rows]
    return (outputs * shares.unsqueeze(-1)).sum(dim=1, keepdim=True)


def _quantized_attention(
    query: torch.Tensor, entries: QuantizedEntries, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention `[B, 1, rows, R]` over quantised entries, piece by piece, merged by their sums of exponentials.

    Sums are in fp32, whatever the model's dtype: pieces are made anew in each step, in either dtype as fast. A product
    of few rows keeps one core busy, so each piece is cut in parts for the threads that the batch leaves idle.
    """
    B, R = query.shape[0], entries.latent_width
    rotated = query[:, 0].float() * scaling  # [B, rows, R + P]
    if entries.rotation is not None:
        rotated = rotated @ entries.rotation
    threads = max(1, _cpu_threads() // B) if query.device.type == "cpu" else 1
    queries = rotated.repeat_interleave(threads, dim=0)
    found, start = [], 0
    for piece in entries.pieces():
        for parts in _in_parts(piece, threads):  # [B * count, n, R + P]
            scores = torch.bmm(rotated if parts.shape[0] == B else queries, parts.transpose(1, 2))
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
            # Relative to each part's own highest score: none overflows, in half the time of softmax and logsumexp. It
            # cancels out in the end, and so does its gradient.
            top = scores.detach().amax(dim=-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            found.append((torch.bmm(weights, parts[..., :R]), weights.sum(dim=-1, keepdim=True), top))
    # [B, parts, rows, R or 1]
    outputs, totals, tops = (
        torch.cat([tensor.unflatten(0, (B, -1)) for tensor in kind], dim=1) for kind in zip(*found, strict=True)
    )
    shares = torch.exp(tops - tops.amax(dim=1, keepdim=True))
    output = (outputs * shares).sum(dim=1, keepdim=True)
    output = output / (totals * shares).sum(dim=1, keepdim=True)
    if entries.rotation is not None:
        output = output @ entries.rotation[:R, :R]
    return output.to(query.dtype)


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
