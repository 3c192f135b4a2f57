# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""The expanded gate (`kv_gate="expanded"`): it acts on keys and values made of the cached latent, not on the latent.

Gates of all tokens are computed at every step, from token ids that the cache holds. Every token then has
up-projections of its own, so such a model never attends in the latent space.
"""

from typing import Any

import torch
from torch import nn

from .attention_egmla import EGMLAAttention
from .cache_egmla import holds_latents
from .configuration_egmla import EGMLAConfig
from .converted_attention_egmla import ConvertedAttention, is_converted


class ExpandedGateAttention(EGMLAAttention):
    """`EGMLAAttention` whose gate is `[B, S, H (N + V)]`, on expanded keys and values."""

    def _add_gate(self, config: EGMLAConfig, width: int) -> None:
        super()._add_gate(config, self.kv_b_proj.out_features)

    def expand(self, latents: torch.Tensor, gate_input: torch.Tensor | None) -> torch.Tensor:
        """Return gated keys and values `[B, S, H (N + V)]` of latents `[B, S, R]`; `gate_input` is of all `S`."""
        return super().expand(latents, gate_input) * self.gate(gate_input)


class ConvertedExpandedGateAttention(ExpandedGateAttention, ConvertedAttention):
    """Both differences at once."""


def attention_class(config: EGMLAConfig) -> type[EGMLAAttention]:
    """Return the class of a model's attention layers."""
    converted = is_converted(config)
    if config.kv_gate == "expanded":
        return ConvertedExpandedGateAttention if converted else ExpandedGateAttention
    return ConvertedAttention if converted else EGMLAAttention


def find_gate_input(
    config: EGMLAConfig,
    embed_tokens: nn.Module,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    kv_gate_input_ids: torch.Tensor | None,
    past_key_values: Any,
) -> torch.Tensor | None:
    """Return what the gates read: embeddings `[B, T, D]`, or ids `[B, T]` for tables; `None` without a gate.

    Expanded gates read that of all tokens, `[B, S, D]` or `[B, S]`. The ids of the new tokens go into the cache, which
    has those of the tokens before.

    Raises:
        ValueError: where ids are needed and missing, of another length, or the cache cannot hold them.
    """
    if config.kv_gate is None:
        return None
    expanded, table = config.kv_gate == "expanded", config.kv_gate_embedding_dim
    cached = expanded and past_key_values is not None
    if table is None and not cached and not (expanded and kv_gate_input_ids is not None):
        return inputs_embeds
    ids = input_ids if kv_gate_input_ids is None else kv_gate_input_ids
    if ids is None:
        need = f"this model's gates read a table by token id (kv_gate_embedding_dim={table})"
        if table is None:
            need = (
                "the cache of this model holds token ids, from which its gates (kv_gate='expanded') are computed "
                "at every step; use_cache=False does without"
            )
        raise ValueError(
            f"Only inputs_embeds was given, but {need}. Pass the ids of the same tokens as "
            "well: model(inputs_embeds=..., kv_gate_input_ids=ids), or pass input_ids alone."
        )
    if ids.shape[-1] != inputs_embeds.shape[1]:
        raise ValueError(
            f"kv_gate_input_ids covers {ids.shape[-1]} tokens and inputs_embeds {inputs_embeds.shape[1]}; both "
            "must be of the same tokens."
        )
    if cached:
        if not holds_latents(past_key_values):
            raise ValueError(
                f"{type(past_key_values).__name__} holds no token ids, from which the gates of this model "
                "(kv_gate='expanded') are computed at every step; pass past_key_values=EGMLACache(model.config), "
                "or none, and one is made."
            )
        ids = past_key_values.append_token_ids(ids.expand(inputs_embeds.shape[0], -1))
    if expanded and table is None:
        return embed_tokens(ids)
    return ids
