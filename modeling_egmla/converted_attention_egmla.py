# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""What converted models need beyond the paper's attention: norms and rotary parts of their sources.

- normalised queries of Qwen3 and OLMo 2 below full width (`query_norm_dim`);
- an encoder before the latent, whose first features are normalised (`kv_encoder_dim`);
- norms on rotary queries and keys (`qk_norm_dim`);
- rotary pairs at chosen frequencies (`rope_slots`), and layers without rotation (`nope_layers`).
"""

import torch
from torch import nn
from transformers import initialization as init

from .attention_egmla import EGMLAAttention, EGMLARMSNorm
from .configuration_egmla import EGMLAConfig
from .cpu_egmla import linear


def is_converted(config: EGMLAConfig) -> bool:
    """Tell whether a model has anything of what `ConvertedAttention` adds."""
    fields = (
        *(config.query_norm_dim, config.kv_encoder_dim, config.qk_norm_dim),
        *(config.rope_slots, config.nope_layers),
    )
    return any(field is not None for field in fields)


class ConvertedAttention(EGMLAAttention):
    """`EGMLAAttention` with the norms and rotary parts of a converted source."""

    def __init__(self, config: EGMLAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.rotates = self.rotates and layer_idx not in (config.nope_layers or [])
        self.qk_norm_dim = config.qk_norm_dim
        self.query_norm_dim = config.query_norm_dim
        self.rope_table_dim = config.head_dim
        self.kv_encoder_norm_dim = config.kv_encoder_norm_dim
        self.kv_encoder_normed = (config.kv_encoder_norm_dim or 0) * config.kv_encoder_norm_groups
        slots = config.layer_rope_slots(layer_idx)
        self.rope_slots = None if slots is None else nn.Buffer(torch.tensor(slots, dtype=torch.long), persistent=False)

    def _add_query_projections(self, config: EGMLAConfig) -> None:
        if config.query_norm_dim is None:
            super()._add_query_projections(config)
            return
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.qk_nope_head_dim, bias=config.query_bias)
        self.q_norm = EGMLARMSNorm(config.query_norm_dim, eps=config.rms_norm_eps)
        if self.qk_rope_head_dim:
            self.q_rope_scale = nn.Parameter(torch.ones(self.num_heads, self.qk_rope_head_dim // 2))

    def _add_latent_projections(self, config: EGMLAConfig, input_dim: int) -> None:
        if config.kv_encoder_dim is not None:
            self.kv_encoder_proj = nn.Linear(input_dim, config.kv_encoder_dim, bias=config.attention_bias)
            self.kv_encoder_norm = EGMLARMSNorm(config.kv_encoder_norm_dim, eps=config.latent_norm_eps)
        super()._add_latent_projections(config, config.kv_encoder_dim or input_dim)
        if config.qk_norm_dim is not None:
            if self.q_lora_rank is None:
                self.q_norm = EGMLARMSNorm(config.qk_norm_dim, eps=config.rms_norm_eps)
            self.k_norm = EGMLARMSNorm(config.qk_norm_dim, eps=config.rms_norm_eps)

    def reset_own_parameters(self) -> None:
        """Set rotary slots and the scales of rotary queries to their initial values."""
        if self.rope_slots is not None:
            init.copy_(self.rope_slots, torch.tensor(self.config.layer_rope_slots(self.layer_idx)))
        if self.query_norm_dim is not None and self.qk_rope_head_dim:
            init.ones_(self.q_rope_scale)

    def project_queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries without position `[B, H, T, N]` and rotary queries, not yet rotated, `[B, H, T, P]`."""
        if self.query_norm_dim is not None:
            return self._project_normed_queries(hidden_states)
        nope, rope = super().project_queries(hidden_states)
        if self.qk_norm_dim is not None and self.q_lora_rank is None:
            rope = self.q_norm(rope.unflatten(-1, (-1, self.qk_norm_dim))).flatten(-2)
        return nope, rope

    def _project_normed_queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries = linear(self.q_proj, hidden_states)
        queries = self.q_norm(queries.unflatten(-1, (-1, self.query_norm_dim))).flatten(-2)
        queries = queries.unflatten(-1, (-1, self.qk_nope_head_dim)).transpose(1, 2)
        if not self.qk_rope_head_dim:
            return queries, queries[..., :0]
        # A matrix per head after the norm would be mostly zeros: rotary pairs are pairs of the query, scaled.
        pairs = queries[..., : self.rope_table_dim].unflatten(-1, (2, -1))  # [B, H, T, 2, head_dim // 2]
        if self.rope_slots is not None:
            pairs = pairs[..., self.rope_slots]
        return queries, (pairs * self.q_rope_scale[:, None, None]).flatten(-2)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return features `[B, T, kv_encoder_dim]` that latents are linear in, the first ones normed."""
        features = linear(self.kv_encoder_proj, hidden_states)
        normed, plain = features.tensor_split([self.kv_encoder_normed], dim=-1)
        normed = self.kv_encoder_norm(normed.unflatten(-1, (-1, self.kv_encoder_norm_dim))).flatten(-2)
        return torch.cat((normed, plain), dim=-1)

    def project_latents(self, hidden_states, gate_input) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents to cache `[B, 1, T, R]`, gated, and rotary keys `[B, 1, T, P]`, not yet rotated."""
        if self.kv_encoder_norm_dim is not None:
            hidden_states = self.encode(hidden_states)
        latents, rope_keys = super().project_latents(hidden_states, gate_input)
        if self.qk_norm_dim is not None:
            rope_keys = self.k_norm(rope_keys.unflatten(-1, (-1, self.qk_norm_dim))).flatten(-2)
        return latents, rope_keys

    def rotate(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate `x` `[B, H or 1, T, P]` to its positions, each pair at its slot's frequency."""
        if self.rope_slots is not None:
            position_embeddings = tuple(table[..., self.rope_slots] for table in position_embeddings)
        return super().rotate(x, position_embeddings)
