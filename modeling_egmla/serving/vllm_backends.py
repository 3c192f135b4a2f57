# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""vLLM's attention over pages of latents, for any latent width `R` and rotary width `P`.

vLLM's own backends for latent attention take DeepSeek's widths only: its CPU kernel is compiled for 512 + 64, and its
metadata refuses all but three sums. Pages, scheduling and prefill are vLLM's here.
"""

from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl


@dataclass
class AnyWidthMetadata(MLACommonMetadata):
    """`MLACommonMetadata` without its check of the width `R + P`."""

    def __post_init__(self) -> None:
        pass


class CPUMetadataBuilder(MLACommonMetadataBuilder[AnyWidthMetadata]):
    """vLLM's builder, making `AnyWidthMetadata`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, metadata_cls=AnyWidthMetadata)


class CPUBackend(CPUMLABackend):
    """Latent attention on a CPU, decoding in PyTorch."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        from vllm.v1.attention.backend import MultipleOf

        return [MultipleOf(1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return True

    @staticmethod
    def get_name() -> str:
        return "EGMLA_CPU"

    @staticmethod
    def get_impl_cls() -> type["CPUImpl"]:
        return CPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUMetadataBuilder]:
        return CPUMetadataBuilder


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Group rows whose lengths lie between the same powers of two: padding to the longest at most doubles one."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(row)
    return list(groups.values())


class CPUImpl(CPUMLAImpl):
    """Decoding over pages by PyTorch's fused attention."""

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """Attend to each sequence's pages with one query of all heads.

        Args:
            q: queries `[B, H, R]` and `[B, H, P]`, or both joined.
            kv_c_and_k_pe_cache (`torch.Tensor`): all pages `[pages, tokens of a page, R + P]`.

        Returns:
            Mean latents `[B, H, R]`, and `None` for the log-sum-exp.
        """
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        cache, decode = kv_c_and_k_pe_cache, attn_metadata.decode
        lengths = decode.seq_lens.tolist()
        outputs = query.new_empty(*query.shape[:2], self.kv_lora_rank)
        for rows in similar_lengths(lengths):
            longest = max(lengths[row] for row in rows)
            pages = decode.block_table[rows, : -(-longest // cache.shape[1])]
            entries = cache[pages].flatten(1, 2)[:, None, :longest]  # [B, 1, S, R + P]
            mask = None
            if min(lengths[row] for row in rows) < longest:
                seen = torch.arange(longest) < decode.seq_lens[rows, None]
                mask = seen[:, None, None]
                entries = entries.masked_fill(~seen[:, None, :, None], 0.0)  # what others left there may be NaN
            # Heads go where queries usually are: one pass over the pages serves all of them.
            attended = nn.functional.scaled_dot_product_attention(
                query[rows][:, None], entries, entries, attn_mask=mask, scale=self.scale
            )
            outputs[rows] = attended[:, 0, :, : self.kv_lora_rank]
        return outputs, None

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale) -> None:
        """Write entries into their pages, as vLLM's backend does, whose reshapes fail for a rotary width of 0.

        Args:
            kv_c_normed (`torch.Tensor`): gated latents `[T, R]`.
            k_pe (`torch.Tensor`): rotated keys `[T, 1, P]`.
            kv_cache (`torch.Tensor`): all pages `[pages, tokens of a page, R + P]`, empty while vLLM profiles.
            slot_mapping (`torch.Tensor`): places `[T]` in the pages; -1 for padding.
        """
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten()
        entries = torch.cat((kv_c_normed, k_pe.squeeze(1)), dim=-1)[slots >= 0]
        kv_cache.view(-1, entries.shape[-1])[slots[slots >= 0]] = entries.to(kv_cache.dtype)
