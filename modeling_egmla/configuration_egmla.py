# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Configuration of EG-MLA models: fields, derived widths, validation and cache accounting."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .bit_allocation_egmla import BitAllocation, read_allocation


KV_GATES = ("latent", "expanded", None)
# A token's id in the cache (int32), from which expanded gates are computed at every step.
TOKEN_ID_BYTES = 4

# Written into every checkpoint, so that `trust_remote_code` finds each Auto class.
AUTO_MAP = {
    "AutoConfig": "configuration_egmla.EGMLAConfig",
    "AutoModel": "modeling_egmla.EGMLAModel",
    "AutoModelForCausalLM": "modeling_egmla.EGMLAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_egmla.EGMLAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_egmla.EGMLAForTokenClassification",
}
# The class of a mixture of experts in Transformers' module of an architecture.
MOE_MODULES = {"deepseek_v2": "DeepseekV2Moe", "deepseek_v3": "DeepseekV3MoE", "glm4_moe_lite": "Glm4MoeLiteMoE"}


@strict
class EGMLAConfig(PreTrainedConfig):
    r"""
    Configuration of an EG-MLA model (Embedding-Gated Multi-head Latent Attention). Fields that DeepSeek-V3 has keep
    its names and meaning. The defaults are the paper's kv64 row, with the gate fed by the input embedding.

    Args:
        num_attention_heads (`int`, *optional*, defaults to 12):
            Query heads `H`.
        q_lora_rank (`int`, *optional*):
            Width of the low-rank query pair `q_a_proj`, `q_b_proj`; `None` for one full `q_proj`.
        kv_lora_rank (`int` or `list[int]`, *optional*, defaults to 64):
            Width `R` of the cached latent, one number for all layers or one per layer.
        qk_nope_head_dim (`int`, *optional*, defaults to 64):
            Query/key width `N` without position, per head. May be 0 when `qk_rope_head_dim` is not.
        qk_rope_head_dim (`int`, *optional*, defaults to 64):
            Width `P` of the rotary key shared by all heads; even, 0 for no rotary part.
        v_head_dim (`int`, *optional*, defaults to 64):
            Value width `V` per head.
        kv_latent_norm (`bool`, *optional*, defaults to `True`):
            RMS-normalise the latent before the gate (`kv_a_layernorm`), as DeepSeek does.
        latent_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of `kv_a_layernorm`, `q_a_layernorm` and `kv_encoder_norm` (DeepSeek fixes it at 1e-6).
        rope_interleave (`bool`, *optional*, defaults to `True`):
            Rotary pairs are neighbours `(0, 1), (2, 3), ...` (DeepSeek) instead of half the width apart (Llama).
        rope_table_dim (`int`, *optional*):
            Width the rotary frequencies are computed for, `rope_table_dim // 2` frequencies. `None` is
            `qk_rope_head_dim`. A converted model keeps its source's head width here.
        rope_slots (`list[int]` or `list[list[int]]`, *optional*):
            Which of the frequencies each of the `qk_rope_head_dim // 2` rotary pairs rotates at; one list for all
            layers or one per layer. `None` takes them in order.
        nope_layers (`list[int]`, *optional*):
            Layer indices whose rotary queries and keys do not rotate (SmolLM3's NoPE layers). `None` rotates all.
        qk_norm_dim (`int`, *optional*):
            RMS-normalise rotary queries and keys, before they rotate, in groups of this many dimensions (`q_norm`,
            `k_norm`), as Qwen3 does with its heads. Low-rank queries have `q_a_layernorm` instead of `q_norm`. `None`
            for no such norms.
        query_norm_dim (`int`, *optional*):
            RMS-normalise whole queries in groups of this many dimensions (`q_norm`). Their rotary part is taken from
            normalised queries. `q_proj` gives `N` dimensions a head. Its rotary pairs are those that rotate at
            the frequencies of `rope_slots`, each times a factor per head (`q_rope_scale`). A smaller cache for
            Qwen3 (groups of one head) and OLMo 2 (all heads). `None` for queries without such a norm.
        kv_encoder_dim (`int`, *optional*):
            Width of features between the layer's input and `kv_a_proj_with_mqa`: `kv_encoder_proj`, part of it
            RMS-normalised by `kv_encoder_norm`. For sources with normalised keys or latents: a smaller latent is
            linear in normalised features only. The cache does not grow. `None` for no such encoder.
        kv_encoder_norm_dim (`int`, *optional*):
            Width of a group of features to normalise (epsilon `latent_norm_eps`), required with `kv_encoder_dim`.
        kv_encoder_norm_groups (`int`, *optional*, defaults to 1):
            How many such groups, the first features, are normalised; the rest stay as they are.
        post_norm (`bool`, *optional*, defaults to `False`):
            Normalise what attention and MLP give (`post_attention_layernorm`, `post_feedforward_layernorm`), as OLMo 2
            does, instead of what they take.
        softmax_scale (`float`, *optional*):
            Factor on the attention scores. `None` is `(N + P) ** -0.5`, as in DeepSeek. YaRN's `mscale` squared is
            multiplied in where `rope_parameters` has `mscale_all_dim`.
        kv_gate (`str`, *optional*, defaults to `"latent"`):
            Gate `"latent"` multiplies the latent by the token's gate before it is cached. Gate `"expanded"` multiplies
            the keys and values made of the latent instead; its width is `H (N + V)`. The latent is then cached
            ungated, and each token's id once for all layers. Every step expands the whole cache. `None` is plain MLA.
        kv_gate_embedding_dim (`int`, *optional*):
            `None` feeds the gate with the model's input embedding. A number gives each layer a table of its own,
            `vocab_size x kv_gate_embedding_dim` (256 in the paper).
        kv_cache_bits (`dict`, *optional*):
            Bits of each cached channel. Caches of this model hold entries by them unless asked otherwise. The form is
            in `bit_allocation_egmla.py`. `None` caches entries as they are.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Bias on `q_a_proj`, `kv_encoder_proj`, `kv_a_proj_with_mqa` and `o_proj` (DeepSeek's meaning).
        query_bias (`bool`, *optional*, defaults to `False`):
            Bias on `q_proj` (or `q_b_proj`).
        mlp_bias (`bool`, *optional*, defaults to `False`):
            Bias on the three MLP projections.
        moe_layers (`list[int]`, *optional*):
            Layer indices whose MLP is a mixture of experts.
        moe_config (`dict`, *optional*):
            Configuration of those mixtures, required with `moe_layers`: `model_type`, which says whose module of
            Transformers it is (`deepseek_v2`, `deepseek_v3` or `glm4_moe_lite`), and that architecture's own fields.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: for shapes that cannot work; the message says what
            was given, what is required and what to do.

    Example:

    ```python
    >>> from egmla import EGMLAConfig
    >>> EGMLAConfig(kv_lora_rank=64, num_hidden_layers=12).cache_elements_per_token
    1536
    ```"""

    model_type = "egmla"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The latent is shared by all heads, so what makes it (kv_a_proj, gate) is replicated and only heads are split.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "gate_input", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    # After expansion every query head has its own key and value head.
    attribute_map = {"num_key_value_heads": "num_attention_heads"}
    _auto_class = "AutoConfig"

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    q_lora_rank: int | None = None
    kv_lora_rank: int | list[int] = 64
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 64
    kv_latent_norm: bool = True
    latent_norm_eps: float | int = 1e-6
    kv_gate: str | None = "latent"
    kv_gate_embedding_dim: int | None = None
    kv_cache_bits: dict | None = None
    softmax_scale: float | int | None = None
    rope_interleave: bool = True
    rope_parameters: RopeParameters | dict | None = None
    rope_table_dim: int | None = None
    rope_slots: list[int] | list[list[int]] | None = None
    nope_layers: list[int] | None = None
    qk_norm_dim: int | None = None
    query_norm_dim: int | None = None
    kv_encoder_dim: int | None = None
    kv_encoder_norm_dim: int | None = None
    kv_encoder_norm_groups: int = 1
    attention_bias: bool = False
    query_bias: bool = False
    mlp_bias: bool = False
    moe_layers: list[int] | None = None
    moe_config: dict | None = None
    post_norm: bool = False
    attention_dropout: float | int = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        # Only one of the two is there, and a plan must not name what is not.
        absent = "q_b_proj" if self.q_lora_rank is None else "q_proj"
        self.base_model_tp_plan = {
            name: style for name, style in type(self).base_model_tp_plan.items() if not name.endswith(f".{absent}")
        }
        if self.qk_norm_dim is not None:
            norms = ["k_norm"] if self.q_lora_rank is not None else ["q_norm", "k_norm"]
            self.base_model_tp_plan |= {
                f"layers.*.self_attn.{norm}": "replicated_with_grad_allreduce" for norm in norms
            }
        if self.query_norm_dim:
            self._plan_normed_queries()
        if self.kv_gate == "expanded":
            self._plan_whole_attention()  # the gate's norm spans all heads
        # Derived from fields: DeepSeek's configs carry them, and must not set them apart.
        for derived in ("head_dim", "qk_head_dim"):
            kwargs.pop(derived, None)
        key_value_heads = kwargs.pop("num_key_value_heads", None)
        if key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads={key_value_heads} and num_attention_heads={self.num_attention_heads}: every "
                "query head has keys and values of its own, made of one latent; leave num_key_value_heads out and set "
                "kv_lora_rank and qk_rope_head_dim for a smaller cache."
            )
        try:
            super().__post_init__(**kwargs)
        except AttributeError as error:  # Transformers looks the dtype up by its name
            raise ValueError(
                f"dtype={self.dtype!r} is no format of PyTorch ({error}); use 'float32', 'bfloat16' or 'float16'."
            ) from error

    def _plan_normed_queries(self):
        """Tensor parallelism of `query_norm_dim`: heads are split where no norm spans several, else only the MLP."""
        if self.qk_nope_head_dim % self.query_norm_dim:
            self._plan_whole_attention()
            return
        self.base_model_tp_plan |= {"layers.*.self_attn.q_norm": "replicated_with_grad_allreduce"}
        if self.qk_rope_head_dim:
            scale = {"layers.*.self_attn.q_rope_scale": "colwise", "layers.*.self_attn": "local_params"}
            self.base_model_tp_plan |= scale

    def _plan_whole_attention(self):
        """Tensor parallelism of the MLP alone, where a norm spans several heads."""
        plan = self.base_model_tp_plan.items()
        self.base_model_tp_plan = {
            name: style for name, style in plan if not f"{name}.".startswith("layers.*.self_attn.")
        }

    @property
    def head_dim(self) -> int:
        """Width of the rotary table, under the name by which Transformers' rope functions read it."""
        return self.qk_rope_head_dim if self.rope_table_dim is None else self.rope_table_dim

    @property
    def qk_head_dim(self) -> int:
        """Query/key width `N + P` of a head; having it is how Transformers recognises latent attention."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def _validate_experts(self):
        layers, known = self.moe_layers or [], ", ".join(MOE_MODULES)
        if layers and (self.moe_config or {}).get("model_type") not in MOE_MODULES:
            raise ValueError(
                f"moe_config={self.moe_config}: layers with experts (moe_layers={layers}) need one whose model_type "
                f"is one of {known}, with that architecture's fields."
            )
        if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"moe_layers={layers}: must be numbers of layers, from 0 to {self.num_hidden_layers - 1}."
            )
        if layers and (self.moe_config or {}).get("hidden_size") != self.hidden_size:
            raise ValueError(
                f"moe_config has hidden_size={(self.moe_config or {}).get('hidden_size')}: must be that of the model, "
                f"{self.hidden_size}."
            )

    def validate_architecture(self):
        """Checks the widths against each other (called by `@strict` after construction)."""
        self._require_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "v_head_dim"
        )
        self._validate_experts()
        if isinstance(self.kv_lora_rank, list) and len(self.kv_lora_rank) != self.num_hidden_layers:
            raise ValueError(
                f"kv_lora_rank has {len(self.kv_lora_rank)} entries: one per layer is required and num_hidden_layers="
                f"{self.num_hidden_layers}; give one number for all layers or a list of that length."
            )
        for rank in self.layer_kv_lora_ranks:
            if rank < 1:
                raise ValueError(
                    f"kv_lora_rank={self.kv_lora_rank}: must be a positive number of elements; use 64 for the "
                    "paper's kv64 row."
                )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(
                f"q_lora_rank={self.q_lora_rank}: must be positive, or None for a full-rank query projection."
            )
        if self.qk_rope_head_dim < 0 or self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim}: rotary dimensions rotate in pairs, so it must be even (0 "
                f"for none); use {max(self.qk_rope_head_dim, 0) // 2 * 2 + 2} or "
                f"{max(self.qk_rope_head_dim, 0) // 2 * 2}."
            )
        if self.qk_nope_head_dim < 0 or self.qk_head_dim < 1:
            raise ValueError(
                f"qk_nope_head_dim={self.qk_nope_head_dim} and qk_rope_head_dim={self.qk_rope_head_dim}: together "
                "they are the query/key width of a head and must be at least 1, neither negative."
            )
        if self.kv_gate not in KV_GATES:
            raise ValueError(
                f"kv_gate={self.kv_gate!r}: known gates are {', '.join(map(repr, KV_GATES))}; use one of them."
            )
        if self.kv_gate_embedding_dim is not None and (self.kv_gate is None or self.kv_gate_embedding_dim < 1):
            raise ValueError(
                f"kv_gate_embedding_dim={self.kv_gate_embedding_dim} with kv_gate={self.kv_gate!r}: a gate table "
                "needs a positive width and kv_gate='latent' or 'expanded'; use None to feed the gate with the input "
                "embedding."
            )
        if self.qk_norm_dim is not None and (
            self.qk_norm_dim < 1 or self.qk_rope_head_dim == 0 or self.qk_rope_head_dim % self.qk_norm_dim
        ):
            raise ValueError(
                f"qk_norm_dim={self.qk_norm_dim}: must be a positive divisor of qk_rope_head_dim="
                f"{self.qk_rope_head_dim}, which is normalised in groups of that size; use None for no such norms."
            )
        self._validate_encoder()
        self._validate_normed_queries()
        if any(not 0 <= layer < self.num_hidden_layers for layer in self.nope_layers or []):
            raise ValueError(
                f"nope_layers={self.nope_layers}: must be numbers of layers, each from 0 to "
                f"{self.num_hidden_layers - 1}; use None to rotate all."
            )
        self._validate_rope_slots()
        self.bit_allocation()  # reads it, and says what is wrong with it

    def _require_positive(self, *names: str):
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")

    def _validate_encoder(self):
        width, group, groups = self.kv_encoder_dim, self.kv_encoder_norm_dim, self.kv_encoder_norm_groups
        if width is None and group is None and groups == 1:
            return
        if width is None or group is None or group < 1 or groups < 1 or group * groups > width:
            raise ValueError(
                f"kv_encoder_dim={width}, kv_encoder_norm_dim={group} and kv_encoder_norm_groups={groups}: an encoder "
                "needs a width and positive groups to normalise that are together no wider; use None, None and 1 for "
                "no encoder."
            )
        if self.qk_norm_dim is not None:
            raise ValueError(
                f"kv_encoder_dim={width} with qk_norm_dim={self.qk_norm_dim}: keys are normalised either in the "
                "encoder or behind it; use qk_norm_dim=None."
            )

    def _validate_normed_queries(self):
        group = self.query_norm_dim
        if group is None:
            return
        if group < 1 or self.num_attention_heads * self.qk_nope_head_dim % group or not self.qk_nope_head_dim:
            raise ValueError(
                f"query_norm_dim={group}: must be a positive divisor of num_attention_heads x qk_nope_head_dim="
                f"{self.num_attention_heads * self.qk_nope_head_dim}, which are normalised in groups of that size; "
                "use None for no such norm."
            )
        if self.q_lora_rank is not None or self.qk_norm_dim is not None:
            raise ValueError(
                f"query_norm_dim={group} with q_lora_rank={self.q_lora_rank} and qk_norm_dim={self.qk_norm_dim}: "
                "normalised queries are full-rank and have one norm; use None for these two."
            )
        if self.qk_rope_head_dim and (self.rope_interleave or self.head_dim > self.qk_nope_head_dim):
            raise ValueError(
                f"query_norm_dim={group} with rope_interleave={self.rope_interleave}, a rotary table of width "
                f"{self.head_dim} and qk_nope_head_dim={self.qk_nope_head_dim}: rotary pairs are taken from the "
                "normalised query, so they must be half the table apart (rope_interleave=False) and the table no "
                "wider than qk_nope_head_dim."
            )

    def _validate_rope_slots(self):
        pairs, frequencies = self.qk_rope_head_dim // 2, self.head_dim // 2
        if self.rope_slots is None:
            if self.head_dim != self.qk_rope_head_dim:
                raise ValueError(
                    f"rope_table_dim={self.rope_table_dim} differs from qk_rope_head_dim={self.qk_rope_head_dim}: "
                    f"rope_slots must then say which of the {frequencies} frequencies each of the {pairs} rotary "
                    "pairs rotates at."
                )
            return
        per_layer = bool(self.rope_slots) and isinstance(self.rope_slots[0], list)
        if per_layer and len(self.rope_slots) != self.num_hidden_layers:
            raise ValueError(
                f"rope_slots has {len(self.rope_slots)} lists: give one list for all layers or "
                f"{self.num_hidden_layers}, one per layer."
            )
        for slots in self.rope_slots if per_layer else [self.rope_slots]:
            if len(slots) != pairs or any(slot < 0 or slot >= frequencies for slot in slots):
                raise ValueError(
                    f"rope_slots={slots}: qk_rope_head_dim={self.qk_rope_head_dim} needs {pairs} frequency numbers, "
                    f"each from 0 to {frequencies - 1} (rope_table_dim={self.head_dim})."
                )

    @property
    def layer_kv_lora_ranks(self) -> list[int]:
        """Latent width `R` of each layer."""
        if isinstance(self.kv_lora_rank, list):
            return self.kv_lora_rank
        return [self.kv_lora_rank] * self.num_hidden_layers

    def layer_rope_slots(self, layer_idx: int) -> list[int] | None:
        """Frequency number of each rotary pair of a layer, or `None` when they are taken in order."""
        if self.rope_slots and isinstance(self.rope_slots[0], list):
            return self.rope_slots[layer_idx]
        return self.rope_slots

    def bit_allocation(self) -> BitAllocation | None:
        """Bits of each cached channel as `kv_cache_bits` has them, or `None` for entries as they are."""
        if self.kv_cache_bits is None:
            return None
        return read_allocation(self.kv_cache_bits, self.layer_kv_lora_ranks, self.qk_rope_head_dim)

    @property
    def cache_elements_per_layer(self) -> list[int]:
        """Elements `R + P` that each layer caches per token."""
        return [rank + self.qk_rope_head_dim for rank in self.layer_kv_lora_ranks]

    @property
    def cache_elements_per_token(self) -> int:
        """Elements cached per token, all layers together."""
        return sum(self.cache_elements_per_layer)

    def cache_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes cached per token, all layers together; two bytes an element is bf16 or fp16."""
        return self.cache_elements_per_token * bytes_per_element + self.cache_id_bytes_per_token

    @property
    def cache_id_bytes_per_token(self) -> int:
        """Bytes of a token's id in the cache, held once for all layers; 0 where no gate is computed from it later."""
        return TOKEN_ID_BYTES if self.kv_gate == "expanded" else 0


__all__ = ["EGMLAConfig"]
