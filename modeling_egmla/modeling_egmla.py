# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""EG-MLA: multi-head latent attention whose cached latent is gated by the token's embedding (arXiv 2509.16686).

Shapes, everywhere in this file:
- B batch, T new tokens, S tokens seen so far (the new ones included)
- D hidden_size, H heads, R kv_lora_rank, E width of the gate's input
- N / P / V qk_nope_head_dim / qk_rope_head_dim / v_head_dim

Everything but the gate and the absorbed attention is DeepSeek-V3's, under its names. The attention layer with its gate
is `attention_egmla.py`, absorbed attention `absorption_egmla.py`, the cache `cache_egmla.py`.
"""

from importlib import import_module
from types import SimpleNamespace

import torch
from torch import nn
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
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .absorption_egmla import absorption_pays, can_absorb
from .attention_egmla import EGMLAAttention, EGMLAGateNorm, EGMLARMSNorm
from .bit_allocation_egmla import UNQUANTIZED_BITS
from .cache_egmla import EGMLACache, check_stock_cache, holds_latents
from .configuration_egmla import AUTO_MAP, MOE_MODULES, EGMLAConfig
from .cpu_egmla import linear
from .entries_egmla import needs_no_mask
from .expanded_gate_egmla import attention_class, find_gate_input
from .generation_egmla import EGMLAGenerationMixin, check_paged_cache


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before Transformers 5.23; serving engines pin older ones

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Return the positions `[B, T', D]` that logits are wanted of: the last ones, or those given by index."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


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


# What the mask functions read of a config, for masks in the form the latent path takes. A constant: torch.compile
# cannot trace its construction.
DENSE_MASKS = SimpleNamespace(_attn_implementation="sdpa")


def mixture_of_experts(config: EGMLAConfig) -> nn.Module:
    """Transformers' own module of the architecture in `moe_config`: router, experts, shared experts."""
    experts = AutoConfig.for_model(**(config.moe_config or {}))
    experts._experts_implementation = config._experts_implementation or "eager"
    modelling = import_module(f"transformers.models.{experts.model_type}.modeling_{experts.model_type}")
    return getattr(modelling, MOE_MODULES[experts.model_type])(experts)


class EGMLADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EGMLAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = attention_class(config)(config, layer_idx)
        self.mlp = mixture_of_experts(config) if layer_idx in (config.moe_layers or ()) else EGMLAMLP(config)
        self.post_norm = config.post_norm
        if not self.post_norm:
            self.input_layernorm = EGMLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = EGMLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.post_norm:
            self.post_feedforward_layernorm = EGMLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, hidden_states: torch.Tensor, gate_input: torch.Tensor | None = None, **kwargs):
        # A keyword as in Llama's layers, so that tools can hook a layer or put a module of their own in its place. But
        # re-entrant gradient checkpointing drops the gradients of keyword arguments.
        if self.gradient_checkpointing and self.training:
            return super().__call__(hidden_states, gate_input, **kwargs)
        return super().__call__(hidden_states, gate_input=gate_input, **kwargs)

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
            module.reset_own_parameters()

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

    def _absorb(self, new_tokens: int, past_key_values: Cache | None, like: torch.Tensor) -> bool:
        """Whether this forward attends in the latent space: decoding, and any continuation where that is cheaper."""
        if past_key_values is None or (self.training and self.config.attention_dropout):
            return False
        if self.config.kv_gate == "expanded":  # every token has up-projections of its own
            return False
        if new_tokens > 1 and not self._continues_cheaper_absorbed(new_tokens, past_key_values):
            return False
        # A tool that skips layers may put a module without attention in one's place, or one around the attention.
        attentions = (layer.self_attn for layer in self.layers if hasattr(layer, "self_attn"))
        up_projections = [getattr(attention, "kv_b_proj", None) for attention in attentions]
        return None not in up_projections and can_absorb(up_projections, max(self.config.layer_kv_lora_ranks), like)

    def _continues_cheaper_absorbed(self, new_tokens: int, past_key_values: Cache) -> bool:
        """Tell whether several new tokens after a past take fewer operations in the latent space."""
        # The pages of continuous batching are of many sequences, and have no length.
        length = getattr(past_key_values, "get_seq_length", None)
        if length is not None and (is_torchdynamo_compiling() or int(length()) == 0):
            return False
        # The widest layer has the lowest limit, so one decision serves all.
        rank = max(self.config.layer_kv_lora_ranks)
        return absorption_pays(new_tokens, rank, self.config.qk_nope_head_dim, self.config.v_head_dim)

    def embed_positions(
        self, like: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return cosines and sines `[B, 1, T, head_dim // 2]` of positions `[B, T]`; `None` without a rotary part.

        `like` is an activation, whose dtype and device are wanted. Serving engines call this.
        """
        if not self.config.qk_rope_head_dim:
            return None
        # The tables repeat each angle for both members of a pair; once is enough.
        cosines, sines = self.rotary_emb(like, position_ids)
        half = cosines.shape[-1] // 2
        return cosines[..., :half].unsqueeze(1), sines[..., :half].unsqueeze(1)

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
            # Rounding has no gradient.
            past_key_values = EGMLACache(self.config, bits=UNQUANTIZED_BITS if torch.is_grad_enabled() else None)
        elif past_key_values is not None and not holds_latents(past_key_values):
            check_stock_cache(past_key_values, self.config)
        pages = kwargs.get("cache")
        if pages is not None:
            check_paged_cache(pages)
        gate_input = find_gate_input(
            self.config, self.embed_tokens, input_ids, inputs_embeds, kv_gate_input_ids, past_key_values
        )
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)

        absorb = self._absorb(inputs_embeds.shape[1], past_key_values if pages is None else pages, inputs_embeds)
        mask_config = self.config
        if absorb and self.config._attn_implementation != "eager":
            # The latent path takes dense masks, whatever the attention implementation of the expanded one wants.
            mask_config = DENSE_MASKS
        causal_mask = None
        # Other caches may hand out empty slots too.
        maskless = mask_config is DENSE_MASKS and holds_latents(past_key_values)
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
        if holds_latents(past_key_values):
            causal_mask = past_key_values.place_padding(attention_mask, causal_mask)
        absorb = absorb and (causal_mask is None or isinstance(causal_mask, torch.Tensor))

        position_embeddings = self.embed_positions(inputs_embeds, position_ids)
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
