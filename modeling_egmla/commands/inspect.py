"""`egmla inspect`."""

from pathlib import Path
from typing import Annotated

import typer


CONTEXTS = (8_192, 32_768, 131_072)
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "kv_latent_norm",
    "tie_word_embeddings",
)


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_PRESET", help="Preset name, local folder, GGUF file or Hub id.")
    ],
) -> None:
    """Show shapes, parameters by part and cache bytes of a preset or of any causal language model."""
    from rich.table import Table
    from rich.text import Text

    from egmla.utils.accounting import (
        PARTS,
        cache_elements_per_layer,
        cache_id_bytes,
        cache_windows,
        count_parameters,
        meta_model,
    )

    from .common import console, find_config, in_bytes, in_units, quiet_transformers

    quiet_transformers()
    config = _gguf_config(Path(model)) if model.endswith(".gguf") else find_config(model)
    empty = meta_model(config)
    counts = count_parameters(empty)
    per_layer, windows = cache_elements_per_layer(empty), cache_windows(empty)
    is_egmla = config.model_type == "egmla"

    table = Table("", "", title=Text(f"{model} ({type(empty).__name__})"), show_header=False)
    for name in SHAPE_FIELDS:
        # Where keys and values are latents, the fields of ordinary heads only mislead.
        hidden = is_egmla and name in ("num_key_value_heads", "head_dim")
        if not hidden and hasattr(config, name):
            table.add_row(name, _short(getattr(config, name)))
    if is_egmla:
        table.add_row("gate", _gate(config))
    table.add_row("rope", _short(getattr(config, "rope_parameters", None)))
    table.add_section()
    for part in PARTS:
        if counts[part] or (is_egmla and part == "gate tables"):
            table.add_row(f"parameters: {part}", f"{in_units(counts[part])} ({counts[part]:,})")
    table.add_row("parameters: all", f"{in_units(sum(counts.values()))} ({sum(counts.values()):,})")
    table.add_section()
    elements, ids = sum(per_layer), cache_id_bytes(config)
    table.add_row("cache elements per token", f"{elements:,}")
    table.add_row("  of each layer", _short(per_layer if len(set(per_layer)) > 1 else per_layer[0]))
    table.add_row("cache bytes per token, bf16", f"{2 * elements + ids:,}")
    if ids:
        table.add_row("  of them the token's id, for all layers", f"{ids}")
    limited = sorted({window for window in windows if window is not None})
    if limited:
        table.add_row("  layers with a sliding window", f"{sum(window is not None for window in windows)}")
        table.add_row("  tokens these cache at most", ", ".join(f"{window:,}" for window in limited))
    for context in CONTEXTS:
        held = sum(count * min(context, window or context) for count, window in zip(per_layer, windows, strict=True))
        table.add_row(f"  at {context // 1024}K tokens", in_bytes(2 * held + ids * context))
    if is_egmla and config.kv_cache_bits is not None:
        _add_allocated_bits(table, config, in_bytes)
    console().print(table)


def _add_allocated_bits(table, config, in_bytes) -> None:
    """Add what the caches of a model with allocated bits take, in bf16 where entries are as they are."""
    stored = config.bit_allocation()
    table.add_section()
    channels = [bits.stored_channels for bits in stored.layers]
    table.add_row("allocated bits: stored channels", f"{sum(channels):,} of {config.cache_elements_per_token:,}")
    table.add_row("  of each layer", _short(channels))
    for context in CONTEXTS:
        table.add_row(f"  at {context // 1024}K tokens", in_bytes(stored.nbytes(context)))
    for share in sorted(stored.budgets, reverse=True):
        table.add_row(f"  with bits={share:g}, at 32K tokens", in_bytes(stored.at_most(share).nbytes(32_768)))


def _gguf_config(file: Path):
    """Configuration of the model in a GGUF file; its weights are not read."""
    from transformers import AutoConfig

    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}; check the path.")
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ImportError(f"Reading {file} needs the gguf package: pip install 'egmla[gguf]' ({error})") from error
    except Exception as error:  # the gguf package has no error class of its own for files that it cannot read
        raise ValueError(
            f"Transformers cannot read {file} ({error}): it is damaged, no GGUF file, or of an unknown architecture."
        ) from error


def _gate(config) -> str:
    if config.kv_gate is None:
        return "off (plain MLA)"
    width = config.kv_gate_embedding_dim
    source = "input embedding" if width is None else f"table of {config.vocab_size:,} x {width} in each layer"
    return f"{config.kv_gate}, fed by the {source}" if width is None else f"{config.kv_gate}, fed by a {source}"


def _short(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 70 else text[:67] + "..."
