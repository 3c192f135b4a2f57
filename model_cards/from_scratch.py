"""What a card says about a model trained from new weights, which has no conversion report and no source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egmla import EGMLAConfig
from egmla.utils.accounting import mha_elements_per_token
from egmla.utils.files import read_json
from egmla.utils.provenance import TRAINING_REPORT

from .training import stages


def is_from_scratch(folder: Path) -> bool:
    """Whether a folder's training report begins with new weights (`egmla train`)."""
    path = folder / TRAINING_REPORT
    if not path.is_file():
        return False
    return stages(read_json(path))[0].get("kind") == "train"


def summary(config: EGMLAConfig, report: Mapping[str, Any]) -> str:
    """The first paragraph: what the model is, how much it was trained, what it caches."""
    tokens = sum(stage["tokens"] for stage in stages(report))
    kind = {
        "latent": "An EG-MLA model (embedding-gated multi-head latent attention)",
        "expanded": "An EG-MLA model whose gates act on expanded keys and values",
        None: "A model with multi-head latent attention, without EG-MLA's gate",
    }[config.kv_gate]
    read = "every step expands them" if config.kv_gate == "expanded" else "decoding reads them as they are"
    return (
        f"{kind}, trained from new weights on {tokens:,} tokens: each layer caches one latent and one rotary key per "
        f"token for all heads, and {read}. The cache holds {config.cache_elements_per_token:,} elements per token, "
        f"where multi-head attention of {config.num_attention_heads} heads {config.v_head_dim} wide would hold "
        f"{mha_elements_per_token(config):,}."
    )


def counterpart(config: EGMLAConfig) -> tuple[str, int]:
    """The attention that the cache table compares with, and its elements per token."""
    attention = f"multi-head attention, {config.num_attention_heads} heads {config.v_head_dim} wide (counted)"
    return attention, mha_elements_per_token(config)


def made(report: Mapping[str, Any]) -> str:
    """Where shape and vocabulary came from; the commands are under Training."""
    origin = stages(report)[0]["origin"]
    changes = ", ".join(f"{name}={value}" for name, value in origin["overrides"].items())
    if origin["new_tokenizer"] is not None:
        tokenizer = f"a byte-level BPE of {origin['new_tokenizer']:,} tokens, trained on the beginning of the text"
    else:
        tokenizer = f"`{origin['tokenizer']}`"
    return "\n".join(
        [
            f"- configuration: `{origin['config']}`" + (f", with {changes}" if changes else ""),
            f"- tokenizer: {tokenizer}",
            "- weights, text, command and versions: see Training",
        ]
    )


def limits(results: Mapping[str, Any] | None, changed: bool) -> list[str]:
    """Limits that a reader must know."""
    found = [
        "The text named under Training is all it is known to have been trained on: elsewhere it may know nothing."
    ]
    if changed:
        found.append("The weights have changed since they were last reported on, and nothing here says how.")
    if results is None:
        found.append("No task was measured.")
    return found


def licence(license: str | None, name: str | None) -> str:
    """The weights' licence, as their author stated it."""
    if license is None:
        stated = "None was stated for these weights: ask their author before use."
    else:
        stated = f"Of the weights: {license} ({name})." if name else f"Of the weights: {license}."
    return f"{stated} The code in this repository is Apache-2.0."
