# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""EG-MLA: multi-head latent attention whose cached latent is gated by the token's embedding (arXiv 2509.16686).

Shapes, everywhere in this file:
    B batch, T new tokens, S tokens seen so far (the new ones included), D hidden_size, H heads, R kv_lora_rank,
    N / P / V qk_nope_head_dim / qk_rope_head_dim / v_head_dim, E width of the gate's input.

Everything but the gate and the absorbed attention is DeepSeek-V3's, under its names. The gate is
`EGMLAAttention.gate`, the absorption `EGMLAAttention.attend_absorbed` with `latent_attention_egmla.py`, the cache is
`cache_egmla.py`.
"""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .absorption_egmla import absorption_pays, affine_map, can_absorb
from .cache_egmla import EGMLACache, check_stock_cache
from .configuration_egmla import AUTO_MAP, MOE_MODULES, EGMLAConfig
from .cpu_egmla import linear
from .generation_egmla import EGMLAGenerationMixin, append_paged
from .latent_attention_egmla import latent_attention, needs_no_mask


class EGMLARMSNorm(LlamaRMSNorm):
    """`LlamaRMSNorm` as one operation: seven small ones a layer and norm add up in a decode step."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class EGMLARotaryEmbedding(LlamaRotaryEmbedding):
    pass


class EGMLAMLP(LlamaMLP):
    def __init__(self, config: EGMLAConfig):
        nn.Module.__init__(self)
        self.config = config
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.down_proj, self.act_fn(linear(self.gate_proj, x)) * linear(self.up_proj, x))


class EGMLAGateNorm(nn.LayerNorm):
    """LayerNorm of the gate, starting at weight 0 and bias 1: the gate is exactly 1, its weight has a gradient."""

    def reset_parameters(self):
        init.zeros_(self.weight)
        init.ones_(self.bias)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turns the rotary pairs of `x` `[..., T, P]` by the angles behind `cos` and `sin` `[B, 1, T, P // 2]`.

    Pairs are neighbours when `interleaved` (DeepSeek), else half the width apart (Llama); the result has first
    members in its first half either way, which changes no product of a query with a key.
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


# What the mask functions read of a config, for masks in the form the latent path takes. A constant: torch.compile
# cannot trace its construction.
DENSE_MASKS = SimpleNamespace(_attn_implementation="sdpa")


class EGMLAAttention(nn.Module):
    """Multi-head attention over gated latents.

    Source: DeepSeek-V3's attention (module and parameter names, `expand_kv`), with the gate of arXiv 2509.16686 on the
    latent before it is cached, or (`kv_gate="expanded"`) on the keys and values that are made of the cached latent.
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
        self.kv_gate = config.kv_gate
        self.kv_gate_embedding_dim = config.kv_gate_embedding_dim
        self.rope_interleave = config.rope_interleave
        self.rotates = config.qk_rope_head_dim > 0 and layer_idx not in (config.nope_layers or [])
        self.qk_norm_dim = config.qk_norm_dim
        self.query_norm_dim = config.query_norm_dim
        self.rope_table_dim = config.head_dim
        self.kv_encoder_norm_dim = config.kv_encoder_norm_dim
        self.kv_encoder_normed = (config.kv_encoder_norm_dim or 0) * config.kv_encoder_norm_groups
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.scaling = config.softmax_scale
        if self.scaling is None:
            self.scaling = yarn_apply_mscale(config.rope_parameters or {}, self.qk_head_dim**-0.5)

        D, R, bias = config.hidden_size, self.kv_lora_rank, config.attention_bias
        if self.query_norm_dim is not None:
            self.q_proj = nn.Linear(D, self.num_heads * self.qk_nope_head_dim, bias=config.query_bias)
            self.q_norm = EGMLARMSNorm(self.query_norm_dim, eps=config.rms_norm_eps)
            if self.qk_rope_head_dim:
                self.q_rope_scale = nn.Parameter(torch.ones(self.num_heads, self.qk_rope_head_dim // 2))
        elif self.q_lora_rank is None:
            self.q_proj = nn.Linear(D, self.num_heads * self.qk_head_dim, bias=config.query_bias)
        else:
            self.q_a_proj = nn.Linear(D, self.q_lora_rank, bias=bias)
            self.q_a_layernorm = EGMLARMSNorm(self.q_lora_rank, eps=config.latent_norm_eps)
            self.q_b_proj = nn.Linear(self.q_lora_rank, self.num_heads * self.qk_head_dim, bias=config.query_bias)
        if config.kv_encoder_dim is not None:
            self.kv_encoder_proj = nn.Linear(D, config.kv_encoder_dim, bias=bias)
            self.kv_encoder_norm = EGMLARMSNorm(config.kv_encoder_norm_dim, eps=config.latent_norm_eps)
        self.kv_a_proj_with_mqa = nn.Linear(config.kv_encoder_dim or D, R + self.qk_rope_head_dim, bias=bias)
        if config.kv_latent_norm:
            self.kv_a_layernorm = EGMLARMSNorm(R, eps=config.latent_norm_eps)
        if config.qk_norm_dim is not None:
            if self.q_lora_rank is None:
                self.q_norm = EGMLARMSNorm(config.qk_norm_dim, eps=config.rms_norm_eps)
            self.k_norm = EGMLARMSNorm(config.qk_norm_dim, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(R, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, D, bias=bias)
        if config.kv_gate is not None:
            # No padding row in the table: a zero embedding is a gate like any other.
            if config.kv_gate_embedding_dim is not None:
                self.kv_gate_embedding = nn.Embedding(config.vocab_size, config.kv_gate_embedding_dim)
            width = self.kv_b_proj.out_features if config.kv_gate == "expanded" else R
            self.kv_gate_proj = nn.Linear(config.kv_gate_embedding_dim or D, width, bias=False)
            self.kv_gate_norm = EGMLAGateNorm(width, eps=config.rms_norm_eps)
        slots = config.layer_rope_slots(layer_idx)
        self.rope_slots = None if slots is None else nn.Buffer(torch.tensor(slots, dtype=torch.long), persistent=False)

    def gate(self, gate_input: torch.Tensor) -> torch.Tensor:
        """The gate `[B, T, R]` of tokens, given by embedding `[B, T, D]` or, where there is a table, by id `[B, T]`.

        `[B, T, H (N + V)]` where it acts on expanded keys and values.

        Source: arXiv 2509.16686: a linear map of the token's embedding to the width of what it gates, normalised.
        """
        if self.kv_gate_embedding_dim is not None:
            gate_input = self.kv_gate_embedding(gate_input)
        return self.kv_gate_norm(linear(self.kv_gate_proj, gate_input))

    def project_queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries without position `[B, H, T, N]` and rotary queries, not yet turned, `[B, H, T, P]`."""
        if self.query_norm_dim is not None:
            return self._project_normed_queries(hidden_states)
        if self.q_lora_rank is None:
            queries = linear(self.q_proj, hidden_states)
        else:
            queries = linear(self.q_b_proj, self.q_a_layernorm(linear(self.q_a_proj, hidden_states)))
        queries = queries.view(*hidden_states.shape[:-1], -1, self.qk_head_dim).transpose(1, 2)
        return queries.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

    def _project_normed_queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries = linear(self.q_proj, hidden_states)
        queries = self.q_norm(queries.unflatten(-1, (-1, self.query_norm_dim))).flatten(-2)
        queries = queries.unflatten(-1, (-1, self.qk_nope_head_dim)).transpose(1, 2)
        if not self.qk_rope_head_dim:
            return queries, queries[..., :0]
        # A matrix per head behind the norm would be mostly zeros: rotary pairs are pairs of the query, scaled.
        pairs = queries[..., : self.rope_table_dim].unflatten(-1, (2, -1))  # [B, H, T, 2, head_dim // 2]
        if self.rope_slots is not None:
            pairs = pairs[..., self.rope_slots]
        return queries, (pairs * self.q_rope_scale[:, None, None]).flatten(-2)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Features `[B, T, kv_encoder_dim]` that latents and rotary keys are linear in, the first ones normalised."""
        features = linear(self.kv_encoder_proj, hidden_states)
        normed, plain = features.tensor_split([self.kv_encoder_normed], dim=-1)
        normed = self.kv_encoder_norm(normed.unflatten(-1, (-1, self.kv_encoder_norm_dim))).flatten(-2)
        return torch.cat((normed, plain), dim=-1)

    def project_latents(self, hidden_states, gate_input) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents to cache `[B, 1, T, R]`, gated if the gate is theirs, and rotary keys `[B, 1, T, P]`, not turned."""
        if self.kv_encoder_norm_dim is not None:
            hidden_states = self.encode(hidden_states)
        compressed = linear(self.kv_a_proj_with_mqa, hidden_states)
        latents, rope_keys = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        if self.kv_latent_norm:
            latents = self.kv_a_layernorm(latents)
        if self.kv_gate == "latent":
            latents = latents * self.gate(gate_input)
        # One head, four dimensions: every cache of Transformers then handles them.
        return latents.unsqueeze(1), rope_keys.unsqueeze(1)

    def rotate(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotary part `x` `[B, H or 1, T, P]` turned to its positions, each pair at its slot's frequency."""
        cos, sin = position_embeddings
        if self.rope_slots is not None:
            cos, sin = cos[..., self.rope_slots], sin[..., self.rope_slots]
        return rotate_pairs(x, cos, sin, self.rope_interleave)

    def up_projections(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return `W_UK` `[H, N, R]`, `W_UV` `[H, V, R]` and the values' bias `[H, V]`, as `kv_b_proj` is now.

        A bias on keys adds the same to every score of a query, which the softmax cancels. `like` is an activation.
        """
        weight, bias = affine_map(self.kv_b_proj, self.kv_lora_rank, like)
        parts = [self.qk_nope_head_dim, self.v_head_dim]
        key_up, value_up = weight.view(-1, sum(parts), self.kv_lora_rank).split(parts, dim=1)
        return key_up, value_up, None if bias is None else bias.view(-1, sum(parts))[:, parts[0] :]

    def expand_kv(
        self, latents: torch.Tensor, rope_keys: torch.Tensor, gate_input: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[B, H, S, N + P]` and values `[B, H, S, V]` of latents `[B, 1, S, R]` and rotary keys `[B, 1, S, P]`.

        With `kv_gate="expanded"` they are gated here, for which `gate_input` must be of all `S` tokens.

        Source: `DeepseekV3Attention.expand_kv`, whose name and contract serving engines look for.
        """
        expanded = linear(self.kv_b_proj, latents.squeeze(1))
        if self.kv_gate == "expanded":
            expanded = expanded * self.gate(gate_input)
        expanded = expanded.view(*expanded.shape[:-1], -1, self.qk_nope_head_dim + self.v_head_dim).transpose(1, 2)
        nope_keys, values = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        keys = torch.cat((nope_keys, rope_keys.expand(-1, nope_keys.shape[1], -1, -1)), dim=-1)
        return keys, values

    def attend_expanded(self, nope, rope, latents, rope_keys, attention_mask, gate_input=None, **kwargs):
        """Attention `[B, T, H, V]` through the attention interface, on keys and values expanded from all latents."""
        keys, values = self.expand_kv(latents, rope_keys, gate_input)
        if isinstance(attention_mask, BlockMask) and attention_mask.shape[-1] > keys.shape[2]:
            missing = attention_mask.shape[-1] - keys.shape[2]  # a block mask cannot be cut, and hides the rest
            keys, values = (nn.functional.pad(x, (0, 0, 0, missing)) for x in (keys, values))
        # On CPU, SDPA has a fused kernel for equal widths only; the other makes all T x S scores, four times slower.
        padding = self.qk_head_dim - self.v_head_dim
        padded = self.config._attn_implementation == "sdpa" and keys.device.type == "cpu" and padding > 0
        if padded:
            values = nn.functional.pad(values, (0, padding))
        # "paged|eager" would read pages, which is done.
        implementation = self.config._attn_implementation.removeprefix("paged|")
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            torch.cat((nope, rope), dim=-1),
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., : self.v_head_dim] if padded else output, weights

    def attend_absorbed(self, nope, rope, entries, attention_mask):
        """Attention `[B, T, H, V]` on the cache entries `[B, 1, S, R + P]` as they are, in the latent space.

            score_h(t, s) = scaling * [W_UK,h^T q_nope ; q_rope] . [z_s ; k_rope_s]
            out_h(t) = W_UV,h sum_s a_h(t, s) z_s

        Derived: equal to the expanded form by associativity. Heads are the batch of both products, so the weights are
        read once for all sequences.
        """
        B, H, T, _ = nope.shape
        key_up, value_up, value_bias = self.up_projections(nope)
        absorbed = torch.bmm(nope.transpose(0, 1).reshape(H, B * T, -1), key_up)  # [H, B T, R]
        absorbed = absorbed.view(H, B, T, self.kv_lora_rank).transpose(0, 1)
        query = torch.cat((absorbed, rope), dim=-1)
        weights = None
        if self.config._attn_implementation == "eager":
            if not isinstance(entries, torch.Tensor):
                entries = entries.dequantize()
            # As `eager_attention_forward`, heads beside one another: broadcasting would copy the cache for each.
            scores = torch.matmul(query.reshape(B, 1, H * T, -1), entries.transpose(2, 3)) * self.scaling
            scores = scores.view(B, H, T, -1)
            if attention_mask is not None:
                scores = scores + attention_mask
            weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
            output = torch.matmul(weights.view(B, 1, H * T, -1), entries[..., : self.kv_lora_rank])
            output = output.view(B, H, T, -1)
        else:
            output = latent_attention(query, entries, attention_mask, self.scaling, self.kv_lora_rank)
        output = output.transpose(0, 1).reshape(H, B * T, self.kv_lora_rank)
        output = torch.bmm(output, value_up.transpose(1, 2))  # [H, B T, V]
        if value_bias is not None:  # weights of a row sum to one
            output = output + value_bias.unsqueeze(1)
        return output.view(H, B, T, self.v_head_dim).permute(1, 2, 0, 3), weights

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
        """Output `[B, T, D]` and, with eager attention, weights `[B, H, T, S]`. `absorb` picks the latent space.

        `gate_input` is of the `T` new tokens, of all `S` for a gate that acts on expanded keys and values.
        """
        nope, rope = self.project_queries(hidden_states)
        latents, rope_keys = self.project_latents(hidden_states, gate_input)
        if self.qk_norm_dim is not None:
            if self.q_lora_rank is None:
                rope = self.q_norm(rope.unflatten(-1, (-1, self.qk_norm_dim))).flatten(-2)
            rope_keys = self.k_norm(rope_keys.unflatten(-1, (-1, self.qk_norm_dim))).flatten(-2)
        if self.rotates:
            # Turned together, as one more head: half the operations.
            turned = self.rotate(torch.cat((rope, rope_keys), dim=1), position_embeddings)
            rope, rope_keys = turned[:, :-1], turned[:, -1:]

        entries, pages = None, kwargs.pop("cache", None)
        if pages is not None:
            entries = append_paged(pages, latents, rope_keys, self.layer_idx, kwargs)
            latents, rope_keys = entries.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        elif past_key_values is not None:
            if hasattr(past_key_values, "append"):
                entries = past_key_values.append(latents, rope_keys, self.layer_idx)
                if not absorb and not isinstance(entries, torch.Tensor):
                    entries = entries.dequantize()
                seen = entries.shape[2]
                if not absorb:
                    latents, rope_keys = entries.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            else:
                latents, rope_keys = past_key_values.update(latents, rope_keys, self.layer_idx)
                seen = latents.shape[2]
            # A fixed-size cache has masks as wide as it is, and returns only what is in use.
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
                attention_mask = attention_mask[..., :seen]
        if absorb:
            if entries is None:
                entries = torch.cat((latents, rope_keys), dim=-1)
            output, weights = self.attend_absorbed(nope, rope, entries, attention_mask)
        else:
            output, weights = self.attend_expanded(
                nope, rope, latents, rope_keys, attention_mask, gate_input, **kwargs
            )
        return linear(self.o_proj, output.reshape(*hidden_states.shape[:-1], -1)), weights


def mixture_of_experts(config: EGMLAConfig) -> nn.Module:
    """Transformers' own module of the architecture in `moe_config`: router, experts, shared experts."""
    experts = AutoConfig.for_model(**(config.moe_config or {}))
    experts._experts_implementation = config._experts_implementation or "eager"
    modelling = import_module(f"transformers.models.{experts.model_type}.modeling_{experts.model_type}")
    return getattr(modelling, MOE_MODULES[experts.model_type])(experts)


class EGMLADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EGMLAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = EGMLAAttention(config, layer_idx)
        self.mlp = mixture_of_experts(config) if layer_idx in (config.moe_layers or ()) else EGMLAMLP(config)
        self.post_norm = config.post_norm
        if not self.post_norm:
            self.input_layernorm = EGMLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = EGMLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.post_norm:
            self.post_feedforward_layernorm = EGMLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, hidden_states: torch.Tensor, gate_input: torch.Tensor | None = None, **kwargs):
        # Positional here: re-entrant gradient checkpointing drops the gradients of keyword arguments. The caller uses
        # a keyword, so that tools can put a module with `forward(hidden_states, **kwargs)` in a layer's place.
        return super().__call__(hidden_states, gate_input, **kwargs)

    def forward(self, hidden_states: torch.Tensor, gate_input: torch.Tensor | None, **kwargs) -> torch.Tensor:
        if self.post_norm:  # as `Olmo2DecoderLayer`
            attended, _ = self.self_attn(hidden_states=hidden_states, gate_input=gate_input, **kwargs)
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
            return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, gate_input=gate_input, **kwargs)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class EGMLAPreTrainedModel(PreTrainedModel):
    config: EGMLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EGMLADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EGMLADecoderLayer, "attentions": EGMLAAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EGMLAGateNorm):
            module.reset_parameters()
        elif hasattr(module, "e_score_correction_bias") or type(module).__name__.endswith("TopkRouter"):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if hasattr(module, "e_score_correction_bias"):
                init.zeros_(module.e_score_correction_bias)
        elif type(module).__name__.endswith("Experts"):  # of any architecture in MOE_MODULES
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, EGMLAAttention):
            if module.rope_slots is not None:
                init.copy_(module.rope_slots, torch.tensor(self.config.layer_rope_slots(module.layer_idx)))
            if module.query_norm_dim is not None and module.qk_rope_head_dim:
                init.ones_(module.q_rope_scale)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Resizes the token embeddings, as in `PreTrainedModel`, and every gate table with them."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embeddings.weight.shape[0]
        for module in self.modules():
            table = getattr(module, "kv_gate_embedding", None) if isinstance(module, EGMLAAttention) else None
            if table is not None and table.num_embeddings != size:
                resized = self._get_resized_embeddings(table, size, None, mean_resizing)
                resized.requires_grad_(table.weight.requires_grad)
                module.kv_gate_embedding = resized
        return embeddings

    def save_pretrained(self, save_directory, **kwargs):
        """Saves weights and configuration, as in `PreTrainedModel`, and the code that loads them anywhere."""
        # Transformers would name only the class being saved; serving engines and the heads need the others too.
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


class EGMLAModel(EGMLAPreTrainedModel):
    """The decoder without a head: token embedding, layers, final norm."""

    _auto_class = "AutoModel"

    def __init__(self, config: EGMLAConfig):
        # Fields may have been set after construction, as `from_pretrained(..., field=value)` does.
        config.validate_architecture()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([EGMLADecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = EGMLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.qk_rope_head_dim:
            self.rotary_emb = EGMLARotaryEmbedding(config)
            # "proportional" keeps all frequencies and sets some to zero; other types would leave dimensions out.
            partial = config.rope_parameters.get("partial_rotary_factor") not in (None, 1.0)
            partial = partial and config.rope_parameters["rope_type"] != "proportional"
            if partial or self.rotary_emb.inv_freq.numel() != config.head_dim // 2:
                raise ValueError(
                    f"rope_parameters={config.rope_parameters} give {self.rotary_emb.inv_freq.numel()} frequencies "
                    f"and the rotary table of width {config.head_dim} needs {config.head_dim // 2}; leave "
                    "partial_rotary_factor out, the rotary width of this model is qk_rope_head_dim."
                )
        self.gradient_checkpointing = False
        if any("e_score_correction_bias" in name for name, _ in self.named_buffers()):  # as the routers' own classes
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]
        self.post_init()

    def _gate_input(self, input_ids, inputs_embeds, kv_gate_input_ids, past_key_values) -> torch.Tensor | None:
        """What the gates read: embeddings `[B, T, D]`, or ids `[B, T]` for tables; `None` without a gate.

        Expanded gates read that of all tokens, `[B, S, D]` or `[B, S]`: a cache holds the ids of those before.
        """
        if self.config.kv_gate is None:
            return None
        expanded, table = self.config.kv_gate == "expanded", self.config.kv_gate_embedding_dim
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
            if not hasattr(past_key_values, "append_token_ids"):
                raise ValueError(
                    f"{type(past_key_values).__name__} holds no token ids, from which the gates of this model "
                    "(kv_gate='expanded') are computed at every step; pass past_key_values=EGMLACache(model.config), "
                    "or none, and one is made."
                )
            ids = past_key_values.append_token_ids(ids.expand(inputs_embeds.shape[0], -1))
        if expanded and table is None:
            return self.embed_tokens(ids)
        return ids

    def _absorb(self, new_tokens: int, past_key_values: Cache | None, like: torch.Tensor) -> bool:
        """Whether this forward attends in the latent space: decoding, and any continuation where that is cheaper."""
        if past_key_values is None or (self.training and self.config.attention_dropout):
            return False
        if self.config.kv_gate == "expanded":  # every token has up-projections of its own
            return False
        if new_tokens > 1 and not self._continues_cheaper_absorbed(new_tokens, past_key_values):
            return False
        return can_absorb(
            # A tool that skips layers may put a module without attention in one's place.
            (layer.self_attn.kv_b_proj for layer in self.layers if hasattr(layer, "self_attn")),
            max(self.config.layer_kv_lora_ranks),
            like,
        )

    def _continues_cheaper_absorbed(self, new_tokens: int, past_key_values: Cache) -> bool:
        """Tell whether several new tokens after a past take fewer operations in the latent space."""
        # The pages of continuous batching are of many sequences, and have no length.
        length = getattr(past_key_values, "get_seq_length", None)
        if length is not None and (is_torchdynamo_compiling() or int(length()) == 0):
            return False
        # The widest layer has the lowest limit, so one decision serves all.
        rank = max(self.config.layer_kv_lora_ranks)
        return absorption_pays(new_tokens, rank, self.config.qk_nope_head_dim, self.config.v_head_dim)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        kv_gate_input_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            kv_gate_input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Ids of the tokens in `inputs_embeds`, for models whose gates have tables of their own, and for those
                with `kv_gate="expanded"` and a cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EGMLACache(self.config)
        elif past_key_values is not None and not hasattr(past_key_values, "append_token_ids"):
            check_stock_cache(past_key_values, self.config)
        gate_input = self._gate_input(input_ids, inputs_embeds, kv_gate_input_ids, past_key_values)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)

        absorb = self._absorb(inputs_embeds.shape[1], kwargs.get("cache", past_key_values), inputs_embeds)
        mask_config = self.config
        if absorb and self.config._attn_implementation != "eager":
            # The latent path takes dense masks, whatever the attention implementation of the expanded one wants.
            mask_config = DENSE_MASKS
        causal_mask = None
        # Other caches may hand out empty slots too.
        maskless = mask_config is DENSE_MASKS and hasattr(past_key_values, "append")
        if maskless:
            new_tokens = inputs_embeds.shape[1]
            rows, tokens = self.config.num_attention_heads * new_tokens, past_key_values.get_seq_length() + new_tokens
            maskless = needs_no_mask(attention_mask, rows, tokens, inputs_embeds.device)
        if not maskless:
            causal_mask = create_causal_mask(
                config=mask_config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        absorb = absorb and (causal_mask is None or isinstance(causal_mask, torch.Tensor))

        position_embeddings = None
        if self.config.qk_rope_head_dim:
            # The tables repeat each angle for both members of a pair; once is enough. [B, 1, T, head_dim // 2]
            position_embeddings = tuple(
                table[..., : table.shape[-1] // 2].unsqueeze(1)
                for table in self.rotary_emb(inputs_embeds, position_ids)
            )

        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer for an early exit
            hidden_states = layer(
                hidden_states,
                gate_input=gate_input,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                absorb=absorb,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class EGMLAForCausalLM(EGMLAPreTrainedModel, EGMLAGenerationMixin):
    """The language model: `EGMLAModel` and a linear head over the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: EGMLAConfig):
        super().__init__(config)
        self.model = EGMLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        kv_gate_input_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            kv_gate_input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Ids of the tokens in `inputs_embeds`, for models whose gates have tables of their own, and for those
                with `kv_gate="expanded"` and a cache.

        Returns:
            `CausalLMOutputWithPast`: logits `[B, T, vocab_size]` (or of the positions in `logits_to_keep`), the loss
            when `labels` are given, and the cache.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            kv_gate_input_ids=kv_gate_input_ids,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = linear(self.lm_head, hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class EGMLAForSequenceClassification(GenericForSequenceClassification, EGMLAPreTrainedModel):
    """`EGMLAModel` with a linear classifier on the last token that is not padding."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: EGMLAConfig):
        # Not `super()`: the generic head builds its trunk through AutoModel, which finds no remote code by its config.
        EGMLAPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = EGMLAModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class EGMLAForTokenClassification(GenericForTokenClassification, EGMLAPreTrainedModel):
    """`EGMLAModel` with a linear classifier on every token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: EGMLAConfig):
        EGMLAPreTrainedModel.__init__(self, config)  # as above
        self.num_labels = config.num_labels
        self.model = EGMLAModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "EGMLAPreTrainedModel",
    "EGMLAModel",
    "EGMLAForCausalLM",
    "EGMLAForSequenceClassification",
    "EGMLAForTokenClassification",
]
