"""Source architectures: what maps to what, and what is special. conversion/README.md says which variants are refused.

| family        | attention tensors              | biases        | special                                          |
|---------------|--------------------------------|---------------|--------------------------------------------------|
| llama         | q_proj, k_proj, v_proj, o_proj | optional, all | every RoPE type; head_dim free                   |
| mistral       | the same                       | none          | head_dim free; a window must not bite            |
| qwen2         | the same                       | q, k, v       | a window must not bite                           |
| phi3          | rows of qkv_proj; o_proj       | none          | rows of gate_up_proj; partial rotation; longrope |
| smollm3       | as llama                       | optional, all | layers without rotation (`nope_layers`)          |
| qwen3         | as llama, q_norm, k_norm       | optional, all | smaller with an encoder: keys are not linear     |
| olmo2         | the same                       | optional, all | the same; norms behind attention and MLP         |
| deepseek_v3   | copied under their names       | optional      | experts too; smaller with an encoder             |
| deepseek_v2   | copied                         | optional      | the same; pairs always interleaved               |
| youtu         | copied                         | optional      | smaller with an encoder                          |
| minicpm3      | copied                         | optional      | the same; multipliers go into the weights        |
| glm4_moe_lite | copied                         | optional      | experts too; smaller with an encoder             |
| egmla         | copied                         | optional      | gate at identity; an encoder only for its norm   |

A family is an entry of `FAMILIES`: `Family` (which is llama) or a subclass that says what differs. Names outside of
attention are the same in source and target unless `copied` or `mlp` say otherwise.
"""

import difflib
from typing import NoReturn

from transformers import PreTrainedConfig

from .base import Family
from .egmla import EGMLA
from .llama import Mistral, Phi3, Qwen2, SmolLM3
from .mla import MLA, MiniCPM3
from .normed import Olmo2, Qwen3


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Mistral(),
    "qwen2": Qwen2(),
    "phi3": Phi3(),
    "smollm3": SmolLM3(),
    "qwen3": Qwen3(),
    "olmo2": Olmo2(),
    "deepseek_v3": MLA(),
    "deepseek_v2": MLA(),
    "youtu": MLA(),
    "minicpm3": MiniCPM3(rope_interleave=False),
    "glm4_moe_lite": MLA(),
    "egmla": EGMLA(),
}

# Architectures people ask for: the nearest supported one, and what EG-MLA or its conversion lacks for them.
EXPERTS = "mixtures of experts"
MISSING = {
    "mixtral": ("mistral", EXPERTS),
    "qwen2_moe": ("qwen2", EXPERTS),
    "qwen3_moe": ("qwen3", EXPERTS),
    "phimoe": ("phi3", f"{EXPERTS} and LayerNorm"),
    "olmoe": ("olmo2", EXPERTS),
    "gpt_oss": ("llama", f"{EXPERTS}, attention sinks and sliding windows"),
    "deepseek_v32": ("deepseek_v3", f"{EXPERTS} and the indexer that picks tokens"),
    "qwen3_next": ("qwen3", "linear attention layers"),
    "ministral": ("mistral", "sliding windows"),
    "gemma": ("llama", "norms that multiply by 1 + weight, and scaled embeddings"),
    "gemma2": ("llama", "soft-capped logits, norms behind attention and MLP, sliding windows"),
    "gemma3_text": ("qwen3", "norms behind attention and MLP, sliding windows"),
    "olmo": ("llama", "norms without weights, and clipped queries, keys and values"),
    "olmo3": ("olmo2", "sliding windows"),
    "glm4": ("phi3", "norms behind attention and MLP, and interleaved rotation of half a head"),
    "granite": ("llama", "multipliers on embeddings, scores, residual branches and logits"),
    "cohere": ("llama", "LayerNorm, attention beside the MLP, and scaled logits"),
    "starcoder2": ("qwen2", "LayerNorm, an MLP without gate, sliding windows"),
    "gpt_neox": ("llama", "LayerNorm, attention beside the MLP, and an MLP without gate"),
    "phi": ("phi3", "LayerNorm, attention beside the MLP, and an MLP without gate"),
    "gpt2": ("llama", "learned positions, LayerNorm, and an MLP without gate"),
}


def refuse_architecture(model_type: str) -> NoReturn:
    """Raises `ValueError` that names the architecture, the nearest supported one and what is missing."""
    by_name = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)[0]
    near, lacks = MISSING.get(model_type, (by_name, "a description of its layers (nearest is by name alone)"))
    raise ValueError(
        f"Architecture {model_type!r} is not supported. Supported: {', '.join(FAMILIES)}. Nearest: {near}; "
        f"missing: {lacks}. A new family is an entry in conversion/families/registry.py."
    )


def find_family(config: PreTrainedConfig) -> Family:
    """The family of a source.

    Raises:
        ValueError: for an architecture or a variant that is not supported; the message names the architecture, the
            nearest supported one and what is missing.
    """
    if config.model_type not in FAMILIES:
        refuse_architecture(config.model_type)
    family = FAMILIES[config.model_type]
    family.check(config)
    return family
