"""What a source family says of itself: its widths, its attention weights by role, and what is copied unchanged.

`Family` describes Llama. The others are subclasses in `families.py` that say where they differ.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from egmla import EGMLAConfig
from egmla.conversion.source import Source, TensorSlice
from egmla.utils import models


# Configuration fields with the same name and meaning in the source and in EG-MLA.
KEPT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
)


@dataclass(frozen=True)
class AttentionShape:
    """Widths of a source's attention: `H` query heads, `g` key/value heads, `d` head width, `D` hidden size.

    Attributes:
        rotary_dim: how many of a head's dimensions RoPE rotates, its first ones; `None` is all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    rotary_dim: int | None = None

    @property
    def kv_width(self) -> int:
        """Width `g d` of all keys (or all values) of a token."""
        return self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def rotary_head_dim(self) -> int:
        """Dimensions per head that RoPE rotates."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def rope_width(self) -> int:
        """Dimensions that RoPE rotates in all keys of a token: the widest rotary key a conversion can use."""
        return self.kv_heads * self.rotary_head_dim

    @property
    def frequencies(self) -> int:
        """Rotary frequencies: one for every two dimensions that rotate."""
        return self.rotary_head_dim // 2


@dataclass(frozen=True)
class AttentionWeights:
    """A layer's attention in fp64: weights (out x in) and biases, zero where the source has none."""

    q: torch.Tensor  # [H d, D]
    k: torch.Tensor  # [g d, D]
    v: torch.Tensor  # [g d, D]
    o: torch.Tensor  # [D, H d]
    q_bias: torch.Tensor
    k_bias: torch.Tensor
    v_bias: torch.Tensor
    o_bias: torch.Tensor


def identity(*names: str) -> dict[str, TensorSlice]:
    """Tensors that keep their name and content."""
    return {name: TensorSlice(name) for name in names}


class Family:
    """A supported architecture. This class is Llama; subclasses override what is different.

    Attributes:
        latent: the source is an MLA model, whose attention is copied and not computed anew.
        partial_rotary: heads may be rotated in part.
        window_per_layer: the class applies a sliding window to the layers that `layer_types` names, not to all.
        qk_norm: queries and keys are RMS-normalised before they rotate: each `"head"`, or `"all"` heads as one vector.
    """

    latent = False
    partial_rotary = False
    window_per_layer = False
    qk_norm: str | None = None

    def layer_prefix(self, layer_idx: int) -> str:
        """Return what the tensor names of a layer begin with, in the source and in EG-MLA."""
        return f"model.layers.{layer_idx}."

    def check(self, config: PreTrainedConfig) -> None:
        """Raises `ValueError` for a variant of the architecture that cannot be converted."""
        rope = getattr(config, "rope_parameters", None) or {}
        known = ("default", *ROPE_INIT_FUNCTIONS)
        if rope.get("rope_type", "default") not in known:
            raise ValueError(
                f"rope_type={rope['rope_type']!r} in the rope_parameters of config.json: must be one of "
                f"{', '.join(known)}; correct it."
            )
        window = getattr(config, "sliding_window", None)
        slides = not self.window_per_layer or "sliding_attention" in config.layer_types
        # A token sees itself and the `window - 1` before it: never less than all of the longest context from here on.
        if window and slides and window < config.max_position_embeddings:
            raise ValueError(
                f"This {config.model_type} checkpoint attends in a sliding window of {window} tokens within a context "
                f"of {config.max_position_embeddings}, which EG-MLA does not have. Use a checkpoint without one "
                "(Mistral 7B v0.2 and later), or set sliding_window to null in its config.json to convert it for "
                "contexts no longer than the window."
            )
        # A constant in the keys moves all scores of a query alike, and so is left out: a cap would not let it.
        cap = getattr(config, "attn_logit_softcapping", None)
        if cap is not None:
            raise ValueError(
                f"This {config.model_type} checkpoint caps its attention logits (attn_logit_softcapping={cap}), which "
                f"neither EG-MLA nor Transformers' own {config.model_type} does; remove the field from its "
                "config.json only if the model was trained without."
            )
        partial = rope.get("partial_rotary_factor", 1.0)
        if partial not in (None, 1.0) and not self.partial_rotary:
            raise ValueError(
                f"This {config.model_type} checkpoint rotates only part of its heads (partial_rotary_factor="
                f"{partial}), which Transformers' own {config.model_type} does not; conversion knows it for phi3."
            )

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        """The widths of the source's attention.

        Raises:
            ValueError: for widths that do not fit each other.
        """
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = AttentionShape(heads, kv_heads, head_dim, config.hidden_size, self.rotary_dim(config, head_dim))
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}; config.json is wrong."
            )
        if shape.rotary_head_dim % 2:
            raise ValueError(
                f"This {config.model_type} checkpoint rotates {shape.rotary_head_dim} dimensions of each head, and "
                "rotation is of pairs; head_dim or partial_rotary_factor in its config.json is wrong."
            )
        return shape

    def rotary_dim(self, config: PreTrainedConfig, head_dim: int) -> int | None:
        """How many dimensions of a head rotate; `None` for all."""
        return None

    def rotates(self, config: PreTrainedConfig, layer_idx: int) -> bool:
        """Whether this layer's queries and keys are rotated."""
        return True

    def bias_roles(self, config: PreTrainedConfig) -> str:
        """Which of the projections `q`, `k`, `v`, `o` have a bias."""
        return "qkvo" if getattr(config, "attention_bias", False) else ""

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        """A layer's attention tensors by role: `q`, `k`, `v`, `o`, `q_bias`, ..."""
        prefix = f"{self.layer_prefix(layer_idx)}self_attn."
        names = {role: TensorSlice(f"{prefix}{role}_proj.weight") for role in "qkvo"}
        return names | {f"{role}_bias": TensorSlice(f"{prefix}{role}_proj.bias") for role in self.bias_roles(config)}

    def hooked_modules(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Attention modules, in order of use, that give all queries and then the features a latent is linear in."""
        return ("q_norm", "k_norm", "v_proj") if self.qk_norm else ("q_proj", "k_proj", "v_proj")

    def norms(self, layer_idx: int) -> dict[str, str]:
        """Names of the norms of queries and keys by role, `q` and `k`; empty where there are none."""
        return {role: f"{self.layer_prefix(layer_idx)}self_attn.{role}_norm.weight" for role in "qk" if self.qk_norm}

    def mlp(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        """Return the tensors of a layer's MLP, by their names in EG-MLA."""
        prefix = self.layer_prefix(layer_idx)
        kinds = ["weight", "bias"] if getattr(config, "mlp_bias", False) else ["weight"]
        return identity(*(f"{prefix}mlp.{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in kinds))

    def passthrough_tensors(self, config: PreTrainedConfig, layer_idx: int | None) -> dict[str, TensorSlice]:
        """What stays as it is, by its name in EG-MLA: of a layer, or with `None` of everything outside of them."""
        if layer_idx is None:
            head = [] if config.tie_word_embeddings else ["lm_head.weight"]
            return identity("model.embed_tokens.weight", "model.norm.weight", *head)
        prefix = self.layer_prefix(layer_idx)
        norms = identity(*(f"{prefix}{norm}.weight" for norm in self.layer_norms(config)))
        return norms | self.mlp(config, layer_idx)

    def layer_norms(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Names of the norms of a layer outside of its attention."""
        return "input_layernorm", "post_attention_layernorm"

    def gate(self, config: PreTrainedConfig, layer_idx: int) -> tuple[str, ...]:
        """Names of the tensors of a layer's gate, which conversion leaves out; empty without a gate."""
        return ()

    def has_trained_gate(self, source: Source) -> bool:
        """Tell whether a gate on the latent is trained. Its channels may then change places and get bits, no more.

        Raises:
            ValueError: where not even that can be done.
        """
        return False

    def check_new_latent(self, config: PreTrainedConfig) -> None:
        """Raise `ValueError` for configurations whose layers cannot get another latent."""

    def check_weights(self, source: Source) -> None:
        """Raises `ValueError` for weights of a supported architecture that cannot be converted."""

    def latent_norm(self, config: PreTrainedConfig) -> bool:
        """Whether the latent of an MLA source is normalised."""
        return self.latent

    def meta_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The source's model without weights, whose layers calibration runs."""
        return models.meta_model(config, torch.float32, "eager").eval()

    def layer_kwargs(self, tables: Any) -> dict[str, Any]:
        """What a layer is called with beside hidden states and mask; `tables` are the rotary embedding's."""
        return {"position_embeddings": tables}

    def read_attention(self, source: Source, layer_idx: int) -> AttentionWeights:
        """Reads a layer's attention weights, biases zero where the source has none."""
        shape = self.shape(source.config)
        tensors = {role: source.read(rows).double() for role, rows in self.attention(source.config, layer_idx).items()}
        widths = {"q": shape.heads * shape.head_dim, "k": shape.kv_width, "v": shape.kv_width, "o": shape.hidden_size}
        for role, width in widths.items():
            tensors.setdefault(f"{role}_bias", torch.zeros(width, dtype=torch.float64))
        return AttentionWeights(**tensors)

    def target_config(self, config: PreTrainedConfig, **attention) -> EGMLAConfig:
        """The EG-MLA configuration that keeps everything but the attention; `attention` are its fields."""
        fields = {name: getattr(config, name) for name in KEPT_FIELDS if hasattr(config, name)}
        # Part of a head rotates: here that part is a width of its own, the rotary table's.
        fields["rope_parameters"] = dict(fields["rope_parameters"])
        fields["rope_parameters"].pop("partial_rotary_factor", None)
        fields["attention_dropout"] = fields["attention_dropout"] or 0.0
        return EGMLAConfig(**fields, mlp_bias=getattr(config, "mlp_bias", False), **attention)
