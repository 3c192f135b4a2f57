"""Contestants of a benchmark: models of one shape, or a source and its conversion, each with a kind of cache.

A new contestant is one line in `CONTESTANTS`.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from egmla import EGMLACache, EGMLAConfig
from egmla.cache_layers_egmla import GROWTH_FRACTION
from egmla.quantization_egmla import SCALE_DTYPE, element_group_size, token_group_size
from egmla.quantized_cache_egmla import KEPT_FIRST_TOKENS
from egmla.utils.accounting import cache_elements_per_layer, cache_id_bytes, cache_windows, meta_model

from .decode import CacheMaker


# A growing EG-MLA cache allocates at most this many times the bytes in use.
GROWING_SLACK = 1 + 1 / GROWTH_FRACTION
# Fields that a Llama of the same size shares with an EG-MLA model. Its other fields keep their defaults.
LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "tie_word_embeddings",
)
# Rope types whose frequencies depend on the sequence length, so that steps beyond the trained length differ.
LENGTH_ROPE = ("dynamic", "longrope")


def fixed_cache(model: PreTrainedModel, room: int) -> Cache:
    """Make an empty fixed-size cache of `room` tokens: EG-MLA's own, or Transformers' `StaticCache`."""
    config: Any = model.config
    if config.model_type == "egmla":
        return EGMLACache(config, max_cache_len=room)
    return StaticCache(config=config, max_cache_len=room)


def quantized_cache(quantization: str) -> CacheMaker:
    """Return a maker of EG-MLA's growing cache of `"int8"` or `"int4"` codes."""

    def make(model: Any, room: int) -> Cache:
        return EGMLACache(model.config, quantization=quantization)

    return make


def int8_bytes(config: EGMLAConfig, itemsize: int, tokens: int) -> int:
    """Bytes of an int8 cache: one per element, and a scale per group of elements."""
    P, total = config.qk_rope_head_dim, 0
    for rank in config.layer_kv_lora_ranks:
        total += tokens * ((rank + P) + (rank + P) // element_group_size(None, rank, P) * SCALE_DTYPE.itemsize)
    return total


def int4_bytes(config: EGMLAConfig, itemsize: int, tokens: int) -> int:
    """Bytes of an int4 cache: half a byte per element, scales and zero points per group, and unquantised tokens."""
    size = token_group_size(None)
    groups = max(0, tokens - KEPT_FIRST_TOKENS) // size
    total = 0
    for rank in config.layer_kv_lora_ranks:
        width = rank + config.qk_rope_head_dim
        total += groups * (size * math.ceil(width / 2) + 2 * width * SCALE_DTYPE.itemsize)
        total += (tokens - groups * size) * width * itemsize
    return total


@dataclass(frozen=True)
class Contestant:
    """A model with a kind of cache.

    Attributes:
        label (`str`): its name in tables and plots.
        role (`str`): which of a subject's models it is.
        cache (*optional*): makes its empty cache; the model's default (a growing one) if none.
        compiled (`bool`): decodes in one graph of `torch.compile`.
        cache_bytes (*optional*): bytes a sequence takes in its cache's layers by formula, of (configuration, bytes of
            an element in the model's format, tokens); elements times bytes times tokens if none.
        tolerance (`float`, *optional*): of the parity gate, relative; for a cache that is not exact.
    """

    label: str
    role: str
    cache: CacheMaker | None = None
    compiled: bool = False
    cache_bytes: Callable[[Any, int, int], int] | None = None
    tolerance: float | None = None


CONTESTANTS = {
    "source": Contestant("source", "source"),
    "source-static": Contestant("source, static cache", "source", fixed_cache),
    "egmla": Contestant("EG-MLA", "egmla"),
    "egmla-fixed": Contestant("EG-MLA, fixed-size cache", "egmla", fixed_cache),
    "egmla-compiled": Contestant("EG-MLA, compiled", "egmla", fixed_cache, compiled=True),
    "egmla-int8": Contestant("EG-MLA, int8 cache", "egmla", quantized_cache("int8"), False, int8_bytes, 0.05),
    "egmla-int4": Contestant("EG-MLA, int4 cache", "egmla", quantized_cache("int4"), False, int4_bytes, 0.3),
    "converted": Contestant("converted", "converted"),
    "converted-static": Contestant("converted, static cache", "converted", fixed_cache),
    "deepseek": Contestant("DeepseekV3", "deepseek"),
    "llama-mha": Contestant("Llama MHA", "llama-mha"),
    "llama-mha-static": Contestant("Llama MHA, static cache", "llama-mha", fixed_cache),
    "llama-gqa4": Contestant("Llama GQA-4", "llama-gqa4"),
    "llama-gqa4-static": Contestant("Llama GQA-4, static cache", "llama-gqa4", fixed_cache),
}
# All other contestants of a subject are compared with these.
OUR_ROLES = ("egmla", "converted")


@dataclass(frozen=True)
class Role:
    """One model of a subject: its configuration and the folder of its weights, which are random without one."""

    config: PreTrainedConfig
    folder: str | None = None


@dataclass
class Subject:
    """Models that are benchmarked together under one name.

    Attributes:
        name (`str`): in reports.
        roles (`dict[str, Role]`): its models.
        missing (`dict[str, str]`): roles that this shape cannot have, with the reason.
    """

    name: str
    roles: dict[str, Role]
    missing: dict[str, str] = field(default_factory=dict)

    def contestants(self, wanted: Collection[str] | None = None) -> dict[str, Contestant]:
        """List its contestants, all or the wanted ones, in the order of `CONTESTANTS`.

        Raises:
            ValueError: for an unknown name, or a contestant that this subject does not have.
        """
        for name in wanted or ():
            if name not in CONTESTANTS:
                raise ValueError(f"{name!r} is no contestant: use any of {', '.join(CONTESTANTS)}.")
            role = CONTESTANTS[name].role
            if role not in self.roles:
                known = [name for name, contestant in CONTESTANTS.items() if contestant.role in self.roles]
                reason = f": {self.missing[role]}" if role in self.missing else ""
                raise ValueError(f"{self.name} has no contestant {name!r}{reason}; it has {', '.join(known)}.")
        return {
            name: contestant
            for name, contestant in CONTESTANTS.items()
            if contestant.role in self.roles and (not wanted or name in wanted)
        }


def shape_subject(name: str, config: EGMLAConfig, longest: int, folder: str | None = None) -> Subject:
    """Set an EG-MLA model beside DeepSeek-V3 with the same weights and Llamas of its size.

    Args:
        name (`str`): of the preset or checkpoint.
        config (`EGMLAConfig`): its configuration.
        longest (`int`): tokens of the longest sequence; models with random weights are made for it.
        folder (`str`, *optional*): of its weights; random ones without.
    """
    from egmla.conversion.deepseek_export import deepseek_config

    config = deepcopy(config)
    if folder is None:
        config.max_position_embeddings = max(config.max_position_embeddings, longest)
    subject = Subject(name, {"egmla": Role(config, folder)})
    try:
        subject.roles["deepseek"] = Role(deepseek_config(config))
    except ValueError as error:
        reason = str(error).partition(": ")[2].removesuffix(" Or leave --layout out.")
        subject.missing["deepseek"] = f"Transformers' DeepSeek-V3 has no such shape: {reason}"
    for role, groups in (("llama-mha", config.num_attention_heads), ("llama-gqa4", 4)):
        if config.num_attention_heads % groups:
            subject.missing[role] = f"{config.num_attention_heads} heads do not share {groups} keys evenly"
        else:
            subject.roles[role] = Role(_llama_config(config, groups, longest))
    return subject


def _llama_config(config: EGMLAConfig, key_value_heads: int, longest: int) -> LlamaConfig:
    fields = {name: getattr(config, name) for name in LLAMA_FIELDS}
    fields["max_position_embeddings"] = max(longest, config.max_position_embeddings)
    theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
    return LlamaConfig(
        **fields,
        num_key_value_heads=key_value_heads,
        head_dim=config.v_head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def pair_subject(
    names: tuple[str, str], configs: tuple[PreTrainedConfig, PreTrainedConfig], folders: tuple[str, str]
) -> Subject:
    """Set a source beside its conversion, each with its own weights.

    Raises:
        ValueError: when both are the same.
    """
    if folders[0] == folders[1]:
        raise ValueError(f"{folders[0]} was given twice; give the folder of a source and that of its conversion.")
    ours = "egmla" if configs[1].model_type == "egmla" else "converted"
    return Subject(
        f"{names[0]}, {names[1]}", {"source": Role(configs[0], folders[0]), ours: Role(configs[1], folders[1])}
    )


def check_lengths(subject: Subject, longest: int) -> None:
    """Check that models with their own weights can be timed with sequences of `longest` tokens.

    With fixed rotary frequencies any position costs the same, so contexts beyond the trained length can be timed.
    Learned positions, frequencies that depend on the length, and sliding windows do not allow that.

    Raises:
        ValueError: for a model that does not allow it.
    """
    for role in subject.roles.values():
        if role.folder is None:
            continue
        fields: Any = role.config.get_text_config()
        most = getattr(fields, "max_position_embeddings", None) or longest
        rope = getattr(fields, "rope_parameters", None) or {}
        if longest > most and (not rope or rope.get("rope_type") in LENGTH_ROPE):
            kind = f"rope_type {rope.get('rope_type')!r}" if rope else "its positions"
            raise ValueError(
                f"{subject.name}: a context of {longest} tokens (steps included) exceeds max_position_embeddings="
                f"{most}, which matters with {kind}; give a shorter --context."
            )
        windows = [window for window in cache_windows(meta_model(role.config)) if window is not None]
        if windows and min(windows) < longest:
            raise ValueError(
                f"{subject.name}: {fields.model_type} has sliding windows of {min(windows) + 1} tokens, so no "
                f"cache of {longest} can be filled with synthetic entries; give a shorter --context."
            )


class Models:
    """The models of a subject in one dtype. Each is made on first use and held until `keep` drops it.

    Args:
        subject (`Subject`): what they are of.
        dtype (`torch.dtype`): their dtype.
        device (`torch.device`): where they lie.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype, device: torch.device):
        self.subject = subject
        self.dtype = dtype
        self.device = device
        self._loaded: dict[str, PreTrainedModel] = {}
        self._shapes: dict[str, tuple[int, list[int]]] = {}

    def needed(self, role: str) -> set[str]:
        """Roles whose models one role needs: DeepSeek-V3 shares the memory of EG-MLA's weights."""
        return {role, "egmla"} if role == "deepseek" else {role}

    def get(self, role: str) -> PreTrainedModel:
        """Return the model of a role, in evaluation mode. Random weights are the same each time."""
        if role not in self._loaded:
            if role == "deepseek":
                model = _deepseek_like(self.get("egmla"), self.subject.roles[role].config, self.dtype)
            else:
                model = make_model(self.subject.roles[role], self.dtype)
            self._loaded[role] = model.to(self.device).eval()  # type: ignore[arg-type]
        return self._loaded[role]

    def keep(self, roles: Collection[str] = ()) -> None:
        """Drop all models but those that `roles` need."""
        kept = {needed for role in roles for needed in self.needed(role)}
        for role in [role for role in self._loaded if role not in kept]:
            del self._loaded[role]

    def weight_bytes(self, role: str) -> int:
        """Bytes of its weights beyond those of the roles it needs."""
        return 0 if role == "deepseek" else self._shape(role)[0] * self.dtype.itemsize

    def loaded_bytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(self.weight_bytes(role) for role in self._loaded)

    def cache_elements(self, role: str) -> list[int]:
        """Elements that each layer caches per token, computed from the configuration."""
        return self._shape(role)[1]

    def cache_bytes(self, contestant: Contestant, tokens: int) -> int:
        """Bytes of `tokens` tokens of one sequence in a contestant's cache, all layers, by formula."""
        config, itemsize = self.subject.roles[contestant.role].config, self.dtype.itemsize
        ids = cache_id_bytes(config) * tokens
        if contestant.cache_bytes is not None:
            return contestant.cache_bytes(config, itemsize, tokens) + ids
        return sum(self.cache_elements(contestant.role)) * itemsize * tokens + ids

    def case_bytes(self, contestant: Contestant, batch_size: int, room: int, new_tokens: int = 1) -> tuple[int, int]:
        """Estimate the bytes that a contestant needs beyond its weights, with `room` tokens cached.

        Returns:
            `tuple[int, int]`: bytes held all the time, which are the cache with its slack; and temporary bytes
            while it is timed. The latter are the copy of a growing cache's layer, expanded keys and values with their
            gates, hidden states and logits. DeepSeek's keys and values count again in fp32 where the fused kernel
            refuses them.
        """
        config: Any = self.subject.roles[contestant.role].config
        itemsize, elements = self.dtype.itemsize, self.cache_elements(contestant.role)
        cached: float = self.cache_bytes(contestant, room) * batch_size
        layer = max(elements) * itemsize * batch_size * room
        if contestant.role == "deepseek":
            N, P, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
            width = 2 * (N + V) + (N + P) + V if itemsize == 4 else 2 * (N + V) + 2 * (N + P + V)
            layer += batch_size * room * config.num_attention_heads * width * itemsize
            layer += batch_size * room * config.num_attention_heads * new_tokens * 4 * 2  # its scores
        elif cache_id_bytes(config):  # expanded gates: their input, two intermediate results, and what they gate
            N, P, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
            width = config.num_attention_heads * (4 * (N + V) + 2 * (N + P + V))
            width += 2 * (config.kv_gate_embedding_dim or config.hidden_size)
            layer += batch_size * room * width * itemsize
        if contestant.cache is None:
            cached *= GROWING_SLACK if config.model_type == "egmla" else 1
            layer += 2 * max(elements) * 4 * room  # random entries in fp32
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        states = batch_size * new_tokens * (12 * config.hidden_size + 4 * inner) * itemsize
        logits = 2 * batch_size * config.vocab_size * itemsize
        return int(cached), int(layer + states + logits)

    def _shape(self, role: str) -> tuple[int, list[int]]:
        """Number of parameters, and cache elements of each layer."""
        if role not in self._shapes:
            empty = meta_model(self.subject.roles[role].config)
            parameters = sum(parameter.numel() for parameter in empty.parameters())
            self._shapes[role] = parameters, cache_elements_per_layer(empty)
        return self._shapes[role]


def make_model(role: Role, dtype: torch.dtype) -> PreTrainedModel:
    """Make the model of a role, with its weights or with random ones that are the same each time."""
    if role.folder is not None:
        return AutoModelForCausalLM.from_pretrained(role.folder, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(deepcopy(role.config), dtype=dtype)


def _deepseek_like(egmla: PreTrainedModel, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Make Transformers' DeepSeek-V3 on the tensors of an EG-MLA model, without the gate."""
    from egmla.conversion.deepseek_export import query_factor

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    ours: Any = egmla.config
    factor = query_factor(ours, config)
    last = "self_attn.q_proj.weight" if ours.q_lora_rank is None else "self_attn.q_b_proj.weight"
    weights = {
        name: tensor * factor if factor != 1 and name.endswith(last) else tensor
        for name, tensor in egmla.state_dict().items()
        if ".kv_gate_" not in name
    }
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    # The only module with a buffer that is in no checkpoint.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


@contextlib.contextmanager
def compiling() -> Iterator[Callable[[PreTrainedModel], Any]]:
    """Yield a function that compiles a model as one graph, on its first call.

    Compiled graphs are dropped before and after. Otherwise earlier graphs would make this one's sizes dynamic, which
    makes its kernels slower.
    """
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    try:
        yield lambda model: torch.compile(model, fullgraph=True)
    finally:
        torch.compiler.reset()


def compiled_graphs() -> int:
    """Count the graphs that `torch.compile` has made since `compiling` began."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
