# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""EG-MLA's attention layer: DeepSeek-V3's latent attention, with a gate on the latent before it is cached.

Shapes as in `modeling_egmla.py`. Subclasses state what differs: `converted_attention_egmla.py` for converted sources,
`expanded_gate_egmla.py` for a gate on keys and values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .absorption_egmla import absorbed_attention, up_projections
from .cache_egmla import holds_latents
from .configuration_egmla import EGMLAConfig
from .cpu_egmla import linear
from .entries_egmla import DenseEntries, Entries, PairedEntries
from .generation_egmla import append_paged


class EGMLARMSNorm(LlamaRMSNorm):
    """`LlamaRMSNorm` as one operation: seven small ones a layer and norm add up in a decode step."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class EGMLAGateNorm(nn.LayerNorm):
    """LayerNorm of the gate, starting at weight 0 and bias 1: the gate is exactly 1, its weight has a gradient."""

    def reset_parameters(self):
        init.zeros_(self.weight)
        init.ones_(self.bias)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of `x` `[..., T, P]` by angles with `cos` and `sin` `[B, 1, T, P // 2]`.

    Pairs are neighbours when `interleaved` (DeepSeek), else half the width apart (Llama). Either way the result has
    first members in its first half. That changes no product of a query with a key.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over `[B, H, T, .]` and `[B, H, S, .]`, with its weights `[B, H, T, S]`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def pad_expanded(
    module: nn.Module, keys: torch.Tensor, values: torch.Tensor, attention_mask: torch.Tensor | BlockMask | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad keys `[B, H, S, N + P]` and values `[B, H, S, V]` to what the attention implementation takes."""
    if isinstance(attention_mask, BlockMask) and attention_mask.shape[-1] > keys.shape[2]:
        missing = attention_mask.shape[-1] - keys.shape[2]  # a block mask cannot be cut, and hides the rest
        keys, values = (nn.functional.pad(x, (0, 0, 0, missing)) for x in (keys, values))
    padding = keys.shape[-1] - values.shape[-1]
    # On CPU, SDPA has a fused kernel for equal widths only; the other makes all T x S scores, four times slower.
    if module.config._attn_implementation == "sdpa" and keys.device.type == "cpu" and padding > 0:
        values = nn.functional.pad(values, (0, padding))
    return keys, values


def store(
    module: nn.Module,
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    past_key_values: Any,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Entries, Any]:
    """Store a layer's new entries in whichever cache there is, and return the entries to attend to.

    This is the one door to caches: `EGMLACache`, those of Transformers, and the pages of continuous batching, which
    come as the keyword argument `cache`.

    Args:
        module: the attention layer.
        latent (`torch.Tensor`): gated latents `[B, 1, T, R]` of the new tokens.
        rope_key (`torch.Tensor`): rotated rotary keys `[B, 1, T, P]`.
        past_key_values: the cache, or `None`.
        attention_mask: as the layer got it.
        kwargs (`dict`): the layer's keyword arguments; `cache` is taken out of them.

    Returns:
        The entries of all `S` tokens, and the mask, cut to what is in use.
    """
    pages = kwargs.pop("cache", None)
    if pages is not None:
        paged = append_paged(pages, latent, rope_key, module.layer_idx, kwargs)
        return DenseEntries(paged, latent.shape[-1]), attention_mask
    if past_key_values is None:
        return PairedEntries(latent, rope_key), attention_mask
    if holds_latents(past_key_values):
        entries = past_key_values.append(latent, rope_key, module.layer_idx)
        held = latent.shape[2], entries.shape[2]
        return entries, past_key_values.fit_mask(attention_mask, module.layer_idx, *held)
    entries = PairedEntries(*past_key_values.update(latent, rope_key, module.layer_idx))
    # A static cache has masks as wide as it is.
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        attention_mask = attention_mask[..., : entries.shape[2]]
    return entries, attention_mask


class EGMLAAttention(nn.Module):
    """Multi-head attention over gated latents.

    Source: DeepSeek-V3's attention (module and parameter names, `expand_kv`), with the gate of arXiv 2509.16686 on the
    latent before it is cached.
    """

    def __init__(self, config: EGMLAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1  # after expansion, every head has its own keys and values
        self.q_lora_rank = config.q_lora_rank
        self.kv_lora_rank = config.layer_kv_lora_ranks[layer_idx]
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        # Kept here because reading a field of a config takes as long as a small operation of a decode step.
        self.kv_latent_norm = config.kv_latent_norm
        self.gates_latent = config.kv_gate == "latent"
        self.kv_gate_embedding_dim = config.kv_gate_embedding_dim
        self.rope_interleave = config.rope_interleave
        self.rotates = config.qk_rope_head_dim > 0
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.scaling = softmax_scale(config)

        self._add_query_projections(config)
        self._add_latent_projections(config, config.hidden_size)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, config.hidden_size, bias=config.attention_bias)
        self._add_gate(config, self.kv_lora_rank)

    def _add_query_projections(self, config: EGMLAConfig) -> None:
        D, width = config.hidden_size, self.num_heads * self.qk_head_dim
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(D, width, bias=config.query_bias)
        else:
            self.q_a_proj = nn.Linear(D, self.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = EGMLARMSNorm(self.q_lora_rank, eps=config.latent_norm_eps)
            self.q_b_proj = nn.Linear(self.q_lora_rank, width, bias=config.query_bias)

    def _add_latent_projections(self, config: EGMLAConfig, input_dim: int) -> None:
        R, P = self.kv_lora_rank, self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(input_dim, R + P, bias=config.attention_bias)
        if config.kv_latent_norm:
            self.kv_a_layernorm = EGMLARMSNorm(R, eps=config.latent_norm_eps)

    def _add_gate(self, config: EGMLAConfig, width: int) -> None:
        if config.kv_gate is None:
            return
        # No padding row in the table: a zero embedding is a gate like any other.
        if config.kv_gate_embedding_dim is not None:
            self.kv_gate_embedding = nn.Embedding(config.vocab_size, config.kv_gate_embedding_dim)
        self.kv_gate_proj = nn.Linear(config.kv_gate_embedding_dim or config.hidden_size, width, bias=False)
        self.kv_gate_norm = EGMLAGateNorm(width, eps=config.rms_norm_eps)

    def reset_own_parameters(self) -> None:
        """Set parameters and buffers that are no module's to their initial values. This class has none."""

    def gate(self, gate_input: torch.Tensor) -> torch.Tensor:
        """Return the gate `[B, T, R]` of tokens, given by embedding `[B, T, D]` or, with a table, by id `[B, T]`.

        Source: arXiv 2509.16686: a linear map of the token's embedding to the width of what it gates, normalised.
        """
        if self.kv_gate_embedding_dim is not None:
            gate_input = self.kv_gate_embedding(gate_input)
        return self.kv_gate_norm(linear(self.kv_gate_proj, gate_input))

    def project_queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries without position `[B, H, T, N]` and rotary queries, not yet rotated, `[B, H, T, P]`."""
        if self.q_lora_rank is None:
            queries = linear(self.q_proj, hidden_states)
        else:
            queries = linear(self.q_b_proj, self.q_a_layernorm(linear(self.q_a_proj, hidden_states)))
        queries = queries.view(*hidden_states.shape[:-1], -1, self.qk_head_dim).transpose(1, 2)
        return queries.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

    def project_latents(self, hidden_states, gate_input) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents to cache `[B, 1, T, R]`, gated, and rotary keys `[B, 1, T, P]`, not yet rotated."""
        latents, rope_keys = self.split(linear(self.kv_a_proj_with_mqa, hidden_states))
        if self.kv_latent_norm:
            latents = self.kv_a_layernorm(latents)
        if self.gates_latent:
            latents = latents * self.gate(gate_input)
        # One head, four dimensions: every cache of Transformers then handles them.
        return latents.unsqueeze(1), rope_keys.unsqueeze(1)

    def rotate(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate `x` `[B, H or 1, T, P]` to its positions."""
        return rotate_pairs(x, *position_embeddings, self.rope_interleave)

    def project(
        self,
        hidden_states: torch.Tensor,
        gate_input: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, and the new tokens' entries ready to be cached. Serving engines call this.

        Args:
            hidden_states (`torch.Tensor`): normed inputs `[B, T, D]`.
            gate_input (`torch.Tensor`): embeddings `[B, T, D]` or ids `[B, T]` of the tokens; `None` without a gate.
            position_embeddings (`tuple`): cosines and sines `[B, 1, T, .]`; `None` without a rotary part.

        Returns:
            Queries without position `[B, H, T, N]`, rotated queries `[B, H, T, P]`, gated latents `[B, 1, T, R]` and
            rotated keys `[B, 1, T, P]`.
        """
        nope, rope = self.project_queries(hidden_states)
        latents, rope_keys = self.project_latents(hidden_states, gate_input)
        if self.rotates:
            # Rotated together, as one more head: half the operations.
            rotated = self.rotate(torch.cat((rope, rope_keys), dim=1), position_embeddings)
            rope, rope_keys = rotated[:, :-1], rotated[:, -1:]
        return nope, rope, latents, rope_keys

    def split(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split entries `[..., R + P]` into latents `[..., R]` and rotary keys `[..., P]`, as views."""
        return entries.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)

    def up_projections(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return `W_UK` `[H, N, R]`, `W_UV` `[H, V, R]` and the values' bias `[H, V]`, as `kv_b_proj` is now.

        `like` is an activation, whose dtype and device are wanted.
        """
        return up_projections(self.kv_b_proj, self.kv_lora_rank, [self.qk_nope_head_dim, self.v_head_dim], like)

    def expand_kv(
        self, latents: torch.Tensor, rope_keys: torch.Tensor, gate_input: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expand latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]`.

        Returns:
            Keys `[B, H, S, N + P]` and values `[B, H, S, V]`.

        Source: `DeepseekV3Attention.expand_kv`, whose name and contract serving engines look for.
        """
        expanded = self.expand(latents.squeeze(1), gate_input)
        expanded = expanded.view(*expanded.shape[:-1], -1, self.qk_nope_head_dim + self.v_head_dim).transpose(1, 2)
        nope_keys, values = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        keys = torch.cat((nope_keys, rope_keys.expand(-1, nope_keys.shape[1], -1, -1)), dim=-1)
        return keys, values

    def expand(self, latents: torch.Tensor, gate_input: torch.Tensor | None) -> torch.Tensor:
        """Return keys and values of all heads `[B, S, H (N + V)]` of latents `[B, S, R]`."""
        return linear(self.kv_b_proj, latents)

    def attend_absorbed(self, nope, rope, entries, attention_mask):
        """Attend to `Entries` as the cache holds them; output `[B, T, H, V]`, and weights when eager.

            score_h(t, s) = scaling * [W_UK,h^T q_nope ; q_rope] . [z_s ; k_rope_s]
            out_h(t) = W_UV,h sum_s a_h(t, s) z_s

        Derived: equal to the expanded form by associativity.
        """
        eager = self.config._attn_implementation == "eager"
        maps = self.up_projections(nope)
        return absorbed_attention(nope, rope, entries, attention_mask, self.scaling, maps, eager)

    def forward(
        self,
        hidden_states: torch.Tensor,
        gate_input: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        absorb: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `[B, T, D]` and, with eager attention, weights `[B, H, T, S]`.

        `absorb` attends in the latent space. `gate_input` is of the `T` new tokens; of all `S` for a gate that acts on
        expanded keys and values.
        """
        nope, rope, latents, rope_keys = self.project(hidden_states, gate_input, position_embeddings)
        entries, attention_mask = store(self, latents, rope_keys, past_key_values, attention_mask, kwargs)
        if absorb:
            output, weights = self.attend_absorbed(nope, rope, entries, attention_mask)
        else:
            keys, values = self.expand_kv(*entries.split(), gate_input)
            keys, values = pad_expanded(self, keys, values, attention_mask)
            # "paged|eager" would read pages, which is done.
            name = self.config._attn_implementation.removeprefix("paged|")
            # vLLM's Transformers backend looks for exactly one such lookup and call in the source of `forward`.
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
            output, weights = attend(
                self,
                torch.cat((nope, rope), dim=-1),
                keys,
                values,
                attention_mask,
                dropout=self.attention_dropout * self.training,
                scaling=self.scaling,
                **kwargs,
            )
            output = output.reshape(*hidden_states.shape[:-1], nope.shape[1], -1)[..., : self.v_head_dim]
        return linear(self.o_proj, output.reshape(*hidden_states.shape[:-1], -1)), weights


def softmax_scale(config: EGMLAConfig) -> float:
    """Return the factor on attention scores: the configured one, or that of the head's width and YaRN."""
    if config.softmax_scale is not None:
        return config.softmax_scale
    return yarn_apply_mscale(config.rope_parameters or {}, config.qk_head_dim**-0.5)
