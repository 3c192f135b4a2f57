# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Entries: what a cache layer gives to attention, as objects that know how to be attended to.

In the latent space all heads attend to one shared head. Its entries are key and value at once.

`Entries` is the interface. `DenseEntries` is a plain tensor. `quantized_entries_egmla.py` has integer codes.

Shapes as in `modeling_egmla.py`: B batch, H heads, T new tokens, S entries, R latent and P rotary key width.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from .cpu_egmla import CPU_KERNEL_DTYPES, cpu_operators, cpu_threads, is_traced


# Below this many cached tokens per thread, splitting the cache over threads costs more than it saves.
SPLIT_MIN_TOKENS = 512
# Up to this many query rows (heads x new tokens) are packed into one problem; more would copy the mask too often.
PACK_MAX_ROWS = 512


class Entries:
    """Latents and rotary keys of `S` tokens, in the form in which a cache layer holds them.

    A new form overrides `to_tensor` and `attend_rows`, and `cpu_operator` where the compiled kernel reads it. Nothing
    asks for the class: a model whose code came with its checkpoint may be given the package's cache.

    Args:
        shape (`torch.Size`): `[B, 1, S, R + P]`, whatever the storages look like.
        latent_width (`int`): `R`.
        dtype (`torch.dtype`): of `to_tensor()`.
        device (`torch.device`): where they lie.
    """

    # Name of the compiled kernel's operator for this form; `None` where it has none.
    cpu_operator: str | None = None

    def __init__(self, shape: torch.Size, latent_width: int, dtype: torch.dtype, device: torch.device):
        self.shape = shape
        self.latent_width = latent_width
        self.dtype = dtype
        self.device = device

    @property
    def requires_grad(self) -> bool:
        """Whether a backward pass reaches the entries."""
        return False

    def to_tensor(self) -> torch.Tensor:
        """Return the entries `[B, 1, S, R + P]`. It may be the cache's own memory, so do not write to it."""
        raise NotImplementedError

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]`."""
        entries = self.to_tensor()
        return entries[..., : self.latent_width], entries[..., self.latent_width :]

    def attend(self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attend with all heads. Key is the whole entry, value its latent.

        Args:
            query (`torch.Tensor`): absorbed queries `[B, H, T, R + P]`.
            attention_mask (`torch.Tensor`, *optional*): `[B or 1, 1, T, S]`, boolean (true is seen) or additive.
                `None`: each of the `T` queries, the last tokens of the cache, sees all up to itself.
            scaling (`float`): factor on the scores.

        Returns:
            `torch.Tensor`: `[B, H, T, R]`, mean latents.
        """
        R = self.latent_width
        if self._is_for_cpu_kernel(query, attention_mask, scaling):
            operator = getattr(cpu_operators(), str(self.cpu_operator))
            return operator(query, *self.operator_arguments(), attention_mask, scaling, R)
        B, H, T, width = query.shape
        if T > 1 and (attention_mask is None or H * T > PACK_MAX_ROWS):
            return _attention_of_many_rows(query, self.to_tensor(), attention_mask, scaling)[..., :R]
        # Heads go where queries usually are. One pass over the cache then serves all of them.
        rows = query.reshape(B, 1, H * T, width)
        if attention_mask is not None and (T > 1 or attention_mask.shape[1] > 1):
            attention_mask = attention_mask.expand(-1, H, -1, -1).reshape(-1, 1, H * T, attention_mask.shape[-1])
        return self.attend_rows(rows, attention_mask, scaling).view(B, H, T, -1)[..., :R]

    def attend_rows(self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Attend with all heads and tokens as rows of one head, by PyTorch's operators.

        Args:
            query (`torch.Tensor`): `[B, 1, rows, R + P]`.
            attention_mask (`torch.Tensor`, *optional*): `[B or 1, 1, rows or 1, S]`; `None`: all are seen.
            scaling (`float`): factor on the scores.

        Returns:
            `torch.Tensor`: `[B, 1, rows, R or more]`, of which the first `R` elements are read.
        """
        raise NotImplementedError

    def operator_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of `cpu_operator` between the query and the mask."""
        raise NotImplementedError

    def _is_for_cpu_kernel(self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> bool:
        """Tell whether the compiled kernel takes the case: one new token per sequence, nothing to record or trace."""
        if cpu_operators() is None or self.cpu_operator is None or scaling <= 0:
            return False
        if query.shape[2] != 1 or query.device.type != "cpu" or self.device.type != "cpu":
            return False
        if self.dtype not in CPU_KERNEL_DTYPES:
            return False
        if torch.is_grad_enabled() and (query.requires_grad or self.requires_grad):
            return False
        if is_traced():  # an exported program would need the kernel wherever it is run
            return False
        return attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)


class DenseEntries(Entries):
    """Entries as one tensor `[B, 1, S, R + P]`, the cache's own memory where there is a cache."""

    cpu_operator = "latent_attention"

    def __init__(self, tensor: torch.Tensor, latent_width: int):
        super().__init__(tensor.shape, latent_width, tensor.dtype, tensor.device)
        self.tensor = tensor

    @property
    def requires_grad(self) -> bool:
        return self.tensor.requires_grad

    def to_tensor(self) -> torch.Tensor:
        return self.tensor

    def attend_rows(self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        # Key and value are the same tensor, so fused kernels apply: on CPU they want equal widths.
        parts = _split_count(query, self.tensor)
        if parts > 1:
            return _split_attention(query, self.tensor, attention_mask, scaling, parts)
        return nn.functional.scaled_dot_product_attention(
            query, self.tensor, self.tensor, attn_mask=attention_mask, scale=scaling, is_causal=False
        )

    def operator_arguments(self) -> tuple[Any, ...]:
        return (self.tensor,)


class PairedEntries(Entries):
    """Latents and rotary keys as two tensors: of a cache of Transformers, or of the new tokens without a cache."""

    def __init__(self, latents: torch.Tensor, rope_keys: torch.Tensor):
        width = latents.shape[3] + rope_keys.shape[3]
        shape = torch.Size((*latents.shape[:3], width))
        super().__init__(shape, latents.shape[3], latents.dtype, latents.device)
        self.pair = latents, rope_keys

    def to_tensor(self) -> torch.Tensor:
        return torch.cat(self.pair, dim=-1)

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair

    def attend(self, query: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
        return DenseEntries(self.to_tensor(), self.latent_width).attend(query, attention_mask, scaling)


def needs_no_mask(attention_mask: torch.Tensor | None, rows: int, tokens: int, device: torch.device) -> bool:
    """Tell whether `Entries.attend` does without a mask `[T, S]` for `rows` (heads x new tokens) behind a past.

    Many rows on a CPU, none of the `S` tokens hidden by `attention_mask` `[B, S]`: the mask of a long prompt's chunk
    would take more memory than the cache.
    """
    if rows <= PACK_MAX_ROWS or device.type != "cpu" or torch.is_grad_enabled() or is_torchdynamo_compiling():
        return False
    if attention_mask is None:
        return True
    two_dimensional = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    return two_dimensional and attention_mask.shape[1] == tokens and bool(attention_mask.all())


def _attention_of_many_rows(
    query: torch.Tensor, entries: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attend with `[B, H, T, R + P]`, of the same shape the output; all heads share entries `[B, 1, S, R + P]`."""
    if attention_mask is None:
        return _continued_attention(query, entries, scaling)
    # Expanding has stride 0: no head gets a copy of the cache.
    shared = entries.expand(-1, query.shape[1], -1, -1)
    return nn.functional.scaled_dot_product_attention(
        query, shared, shared, attn_mask=attention_mask, scale=scaling, is_causal=False
    )


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


def _split_count(query: torch.Tensor, entries: torch.Tensor) -> int:
    """Pieces to cut the cache into: one per CPU thread the batch leaves idle, 1 where the kernel does not apply."""
    if query.device.type != "cpu":
        return 1
    if torch.is_grad_enabled() and (query.requires_grad or entries.requires_grad):
        return 1
    if query.shape[2] < 2:  # a single row makes the kernel's log-sum-exp shape ambiguous, and there is nothing to gain
        return 1
    return max(1, min(cpu_threads() // query.shape[0], entries.shape[2] // SPLIT_MIN_TOKENS))


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
