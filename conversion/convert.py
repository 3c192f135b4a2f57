"""Converting a checkpoint into EG-MLA: checks, plan, layer-by-layer work, and a folder written whole or not at all."""

import hashlib
import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

import egmla
from egmla import EGMLAConfig
from egmla.provenance import software_versions, source_commit, weights_sha256

from .closed_form import LatentAttention, Recipe, exact_attention, low_rank_attention
from .families import find_family
from .family import Family
from .plan import Plan, full_widths, plan_conversion, plan_copy
from .sources import Rows, Source, open_source
from .statistics import collect_statistics
from .writing import ShardWriter, check_target, staged_folder


REPORT_NAME = "conversion_report.json"
SEQUENCE_LENGTH = 1024
MIN_SEQUENCES = 4
# More text than this per token asked for is not read: tokenising a whole corpus takes minutes.
MAX_CHARACTERS_PER_TOKEN = 16

Progress = Callable[[str, int, int], None]


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    exact: bool = False,
    kv_lora_rank: int | list[int] | None = None,
    qk_rope_head_dim: int | None = None,
    cache: float | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = 65536,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint of a supported family (`families.py`) into an EG-MLA checkpoint, its gate at identity.

    Args:
        source (`str` or `Path`): a local folder with safetensors, a hub id, or a GGUF file.
        target (`str` or `Path`): a new or empty folder.
        exact (`bool`): same function and cache size as the source; needs no calibration.
        kv_lora_rank (`int` or `list[int]`, *optional*): latent width `R`, one or per layer.
        qk_rope_head_dim (`int`, *optional*): rotary width `P`.
        cache (`float`, *optional*): share of the source's cache to keep, instead of `kv_lora_rank`.
        calibration (`str` or `Path`, *optional*): a plain text, required unless `exact`; never the evaluation text.
        calibration_tokens (`int`): tokens of it to use at most.
        recipe (`Recipe`, *optional*): choices of the closed form.
        dtype (`str`, *optional*): dtype to write, `"float32"`, `"bfloat16"` or `"float16"`; the source's by default.
        dry_run (`bool`): check everything, return the plan, write nothing.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `dict`: the conversion report (also written as `conversion_report.json`), or with `dry_run` its plan part.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        OSError: when the target cannot be written; nothing is left there.
    """
    started = time.time()
    target = Path(target).resolve()
    recipe = recipe or Recipe()
    output_dtype = _parse_dtype(dtype)
    check_target(target)
    opened = open_source(source)
    family = find_family(opened.config)
    if family.exact_only and not exact:
        raise ValueError(
            f"A {opened.config.model_type} checkpoint can be converted exactly only, into a cache of its own size: it "
            f"{family.exact_only}. Use exact (--exact)."
        )
    if family.latent:
        plan = plan_copy(opened.config, kv_lora_rank, qk_rope_head_dim, cache)
    else:
        shape = family.shape(opened.config)
        if calibration is None and (kv_lora_rank, qk_rope_head_dim) == full_widths(shape):
            exact, kv_lora_rank, qk_rope_head_dim = True, None, None  # all that the source has: nothing to calibrate
        plan = plan_conversion(opened.config, shape, exact, kv_lora_rank, qk_rope_head_dim, cache)
    _check_tensors(opened, family)
    sequences, calibration_report = torch.empty(0, 0, dtype=torch.long), None
    if not exact:
        sequences, calibration_report = _calibration_sequences(opened, calibration, calibration_tokens)
    report: dict[str, Any] = {
        "source": {
            "label": _public_label(opened.label),
            "model_type": opened.config.model_type,
            "cache_elements_per_token": plan.source_elements,
            **opened.origin,
        },
        "command": _command(opened.label, exact, kv_lora_rank, qk_rope_head_dim, cache, calibration_report, dtype),
        "plan": {**asdict(plan), "cache_kept": plan.kept},
        "recipe": None if exact else asdict(recipe),
        "calibration": calibration_report,
        "tokenizer": None if opened.tokenizer is None else type(opened.tokenizer).__name__,
    }
    if opened.tokenizer is None:
        warnings.warn(f"{source} has no tokenizer that can be read; the converted model will have none.", stacklevel=2)
    if dry_run:
        return report

    layers = []
    with staged_folder(target) as folder, torch.no_grad():
        writer = ShardWriter(folder)
        slots = []
        for name, rows in family.copied(opened.config, None).items():
            writer.add(name, _cast(opened.read(rows), output_dtype))
        for layer_idx, (tensors, layer_slots, details) in enumerate(
            _converted_layers(opened, family, plan, recipe, sequences, progress)
        ):
            for name, rows in family.copied(opened.config, layer_idx).items():
                writer.add(name, _cast(opened.read(rows), output_dtype))
            stored = opened.tensor(f"model.layers.{layer_idx}.self_attn.o_proj.weight").dtype
            rank = plan.ranks[layer_idx]
            tensors |= _gate_at_identity(rank, opened.config, layer_idx)
            for name, tensor in tensors.items():
                writer.add(f"model.layers.{layer_idx}.self_attn.{name}", tensor.to(output_dtype or stored))
            slots.append(layer_slots)
            layers.append(details)
        writer.finish()
        config = _target_config(opened.config, family, plan, slots)
        config.dtype = output_dtype or stored
        _write_companions(folder, config, opened, writer)
        report |= {
            "layers": layers,
            "seconds": round(time.time() - started, 1),
            "dtype": str(config.dtype).removeprefix("torch."),
            "versions": software_versions(),
            "commit": source_commit(),
            "weights_sha256": weights_sha256(folder),
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _converted_layers(
    source: Source,
    family: Family,
    plan: Plan,
    recipe: Recipe,
    sequences: torch.Tensor,
    progress: Progress | None,
) -> Iterator[tuple[dict[str, torch.Tensor], list[int], dict[str, Any]]]:
    """Each layer's new attention tensors, its rotary slots and what the report says of it, in order."""
    config, count, current = source.config, source.config.num_hidden_layers, 0
    if plan.exact:
        for layer_idx in range(count):
            tensors, slots = _exact_layer(source, family, layer_idx)
            yield tensors, slots, {"layer": layer_idx}
            if progress is not None:
                progress("convert", layer_idx + 1, count)
        return

    def per_sequence(done: int, total: int) -> None:
        if progress is not None:
            progress("convert", current * total + done, count * total)

    shape, factor, query_bias = family.shape(config), _attention_factor(config), bool(family.bias_roles(config))
    statistics = collect_statistics(source, family, sequences, recipe.weighting, per_sequence)
    for layer_idx, layer_statistics in enumerate(statistics):
        current = layer_idx + 1
        rank = plan.ranks[layer_idx]
        attention = low_rank_attention(
            family.read_attention(source, layer_idx),
            shape,
            layer_statistics,
            rank,
            plan.rope_dim,
            recipe,
            factor,
            family.rotates(config, layer_idx),
        )
        spectrum = attention.spectrum.clamp_min(0)
        details = {
            "layer": layer_idx,
            "kv_lora_rank": rank,
            "rope_slots": attention.slots,
            "energy_kept": float(spectrum[:rank].sum() / spectrum.sum()),
        }
        yield _attention_tensors(attention, query_bias, True), attention.slots, details


def _exact_layer(source: Source, family: Family, layer_idx: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Attention tensors and rotary slots of a layer that keeps its function."""
    if family.latent:
        prefix = f"model.layers.{layer_idx}.self_attn."
        parts = family.attention(source.config, layer_idx)
        return {name.removeprefix(prefix): source.read(rows) for name, rows in parts.items()}, []
    shape, weights = family.shape(source.config), family.read_attention(source, layer_idx)
    norms = {role: source.tensor(name) for role, name in family.norms(layer_idx).items()}
    biased = bool(family.bias_roles(source.config))
    if family.qk_norm != "all":
        attention = exact_attention(weights, shape, interleaved=bool(norms))
        tensors = _attention_tensors(attention, biased, biased)
    else:
        # The norm sees the queries of all heads, so it comes before they are put in place: a low-rank query of full
        # rank, whose second map does only that.
        place = torch.eye(shape.heads * shape.head_dim, dtype=torch.float64)
        attention = exact_attention(
            replace(weights, q=place, q_bias=torch.zeros_like(weights.q_bias)), shape, interleaved=True
        )
        tensors = _attention_tensors(attention, False, biased)
        tensors |= {"q_b_proj.weight": tensors.pop("q_proj.weight"), "q_a_proj.weight": weights.q}
        tensors["q_a_layernorm.weight"] = norms.pop("q")
        if biased:
            tensors["q_a_proj.bias"] = weights.q_bias
    for role, norm in norms.items():
        # In the order of the rows: pairs beside one another.
        tensors[f"{role}_norm.weight"] = norm.view(-1, 2, shape.frequencies).transpose(1, 2).reshape(-1)
    return tensors, attention.slots


def _attention_factor(config: PreTrainedConfig) -> float:
    """What the rope type multiplies cosines and sines by (YaRN and LongRoPE do, others 1)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = config.rope_parameters["rope_type"]
    return 1.0 if rope_type == "default" else float(ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))[1])


def _target_config(config: PreTrainedConfig, family: Family, plan: Plan, slots: list[list[int]]) -> EGMLAConfig:
    if family.latent:
        return family.target_config(config, kv_gate="latent")
    shape = family.shape(config)
    same_rank, same_slots = len(set(plan.ranks)) == 1, all(layer == slots[0] for layer in slots)
    biased, norms = bool(family.bias_roles(config)), {}
    if family.qk_norm == "head":
        norms = {"qk_norm_dim": shape.head_dim}
    elif family.qk_norm == "all":
        eps = config.rms_norm_eps
        norms = {"qk_norm_dim": shape.kv_width, "q_lora_rank": shape.heads * shape.head_dim, "latent_norm_eps": eps}
    nope_layers = [layer for layer in range(config.num_hidden_layers) if not family.rotates(config, layer)]
    return family.target_config(
        config,
        kv_lora_rank=plan.ranks[0] if same_rank else plan.ranks,
        qk_nope_head_dim=shape.head_dim - shape.rotary_head_dim if plan.exact else shape.head_dim,
        qk_rope_head_dim=plan.rope_dim,
        v_head_dim=shape.head_dim,
        kv_latent_norm=False,
        kv_gate="latent",
        softmax_scale=shape.head_dim**-0.5,
        rope_interleave=family.qk_norm is not None,
        rope_table_dim=shape.rotary_head_dim,
        rope_slots=slots[0] if same_slots else slots,
        nope_layers=nope_layers or None,
        attention_bias=not plan.exact or biased,
        query_bias=biased and family.qk_norm != "all",
        **norms,
    )


def _attention_tensors(attention: LatentAttention, query_bias: bool, attention_bias: bool) -> dict[str, torch.Tensor]:
    """The layer's tensors by their names in the attention module."""
    tensors = {
        "q_proj.weight": attention.q,
        "kv_a_proj_with_mqa.weight": attention.kv_a,
        "kv_b_proj.weight": attention.kv_b,
        "o_proj.weight": attention.o,
    }
    if query_bias:
        tensors["q_proj.bias"] = attention.q_bias
    if attention_bias:
        tensors |= {"kv_a_proj_with_mqa.bias": attention.kv_a_bias, "o_proj.bias": attention.o_bias}
    return tensors


def _gate_at_identity(rank: int, config: PreTrainedConfig, layer_idx: int) -> dict[str, torch.Tensor]:
    """A layer's gate: LayerNorm with weight 0 and bias 1 = exactly 1; the map before it is random, to be trained."""
    generator = torch.Generator().manual_seed(layer_idx)
    return {
        "kv_gate_proj.weight": torch.randn(rank, config.hidden_size, generator=generator) * config.initializer_range,
        "kv_gate_norm.weight": torch.zeros(rank),
        "kv_gate_norm.bias": torch.ones(rank),
    }


def _write_companions(folder: Path, config: EGMLAConfig, source: Source, writer: ShardWriter) -> None:
    """Config, code, tokenizer and generation settings; checks that the weights are just those the model wants."""
    with torch.device("meta"):
        model = egmla.EGMLAForCausalLM(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    if wanted != writer.shapes:
        different = sorted(set(wanted.items()) ^ set(writer.shapes.items()))[:4]
        raise ValueError(f"The converted tensors are not those of the model's config; first differences: {different}.")
    config.auto_map = dict(egmla.configuration_egmla.AUTO_MAP)
    config.architectures = ["EGMLAForCausalLM"]
    custom_object_save(model, folder, config=config)  # type: ignore[arg-type]  # its hint says dict, it takes both
    config.save_pretrained(folder)
    if source.generation_config is not None:
        source.generation_config.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)


def _check_tensors(source: Source, family: Family) -> None:
    """Every tensor the conversion needs is there and of its shape, and none is left that it does not know."""
    parts: list[Rows] = list(family.copied(source.config, None).values())
    for layer_idx in range(source.config.num_hidden_layers):
        parts += family.copied(source.config, layer_idx).values()
        parts += family.attention(source.config, layer_idx).values()
        parts += map(Rows, family.norms(layer_idx).values())
    needed = {rows.name for rows in parts}
    missing = sorted(needed - source.names)
    if missing:
        raise ValueError(
            f"{source.label} lacks {len(missing)} tensors its config asks for, first {missing[0]}; the checkpoint is "
            "incomplete."
        )
    # A tied head is the embedding under another name, and old checkpoints carry the rotary frequencies.
    known = needed | {"lm_head.weight"}
    unknown = sorted(name for name in source.names - known if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ValueError(
            f"{source.label} has {len(unknown)} tensors that a {source.config.model_type} model does not, first "
            f"{unknown[0]}; converting would drop them. Is config.json the right one?"
        )
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(source.config).state_dict()
    for name in sorted(needed):
        if source.shape(name) != tuple(wanted[name].shape):
            raise ValueError(
                f"Tensor {name} in {source.label} has shape {source.shape(name)} and its config asks for "
                f"{tuple(wanted[name].shape)}; the checkpoint and its config.json do not belong together."
            )


def _calibration_sequences(
    source: Source, calibration: str | Path | None, tokens: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    if calibration is None:
        raise ValueError(
            "A smaller cache needs calibration text: pass calibration=FILE (--calibration FILE), a plain text file "
            f"of at least {MIN_SEQUENCES * SEQUENCE_LENGTH} tokens that is not your evaluation text."
        )
    path = Path(calibration)
    if not path.is_file():
        raise FileNotFoundError(f"Calibration text {path} does not exist; give a plain text file.")
    if source.tokenizer is None:
        raise ValueError(
            f"{source.label} has no tokenizer, which calibration needs; add its tokenizer files to the folder."
        )
    with path.open(encoding="utf-8") as file:
        text = file.read(MAX_CHARACTERS_PER_TOKEN * tokens)
    ids = source.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    length = min(SEQUENCE_LENGTH, source.config.max_position_embeddings)
    # Where the tokenizer puts a first token before every text, that token draws the attention: it must be measured.
    first = source.tokenizer("a")["input_ids"][: -len(source.tokenizer("a", add_special_tokens=False)["input_ids"])]
    first = [token for token in first if token == source.tokenizer.bos_token_id]
    own = length - len(first)
    count = min(ids.numel(), tokens) // own
    if count < MIN_SEQUENCES:
        raise ValueError(
            f"{path.name} gives {min(ids.numel(), tokens)} calibration tokens; at least {MIN_SEQUENCES * length} are "
            f"required ({MIN_SEQUENCES} sequences of {length}), {64 * length} are recommended. Use a longer text or "
            "more calibration_tokens."
        )
    sequences = ids[: count * own].view(count, own)
    if first:
        sequences = torch.cat((torch.full((count, 1), first[0]), sequences), dim=1)
    return sequences, {
        "file": path.name,
        "tokens_asked": tokens,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sequences": count,
        "sequence_length": length,
    }


def _public_label(label: str) -> str:
    """The name of a source without the folders it lay in: reports are published."""
    return Path(label).name if Path(label).exists() else label


def _command(label, exact, kv_lora_rank, qk_rope_head_dim, cache, calibration, dtype) -> str:
    """The command that does this conversion again, with names in place of paths."""
    words = ["egmla", "convert", _public_label(label), "TARGET", *(["--exact"] if exact else [])]
    if isinstance(kv_lora_rank, list):
        kv_lora_rank = ",".join(map(str, kv_lora_rank))
    options = {"--kv-lora-rank": kv_lora_rank, "--qk-rope-head-dim": qk_rope_head_dim, "--cache": cache}
    if calibration is not None:
        options |= {"--calibration": calibration["file"], "--calibration-tokens": calibration["tokens_asked"]}
    options["--dtype"] = dtype
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(words)


def _parse_dtype(dtype: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(known)}, or left out for the source's own.")
    return None if dtype is None else known[dtype]


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def load_source(source: str | Path) -> tuple[Any, Any]:
    """Loads a source as a Transformers model in fp32, with its tokenizer; GGUF files too.

    Returns:
        The model in evaluation mode and the tokenizer (or `None`).
    """
    opened = open_source(source)
    if not opened.tensors:
        folder = next(iter(opened.files.values())).parent
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), opened.tokenizer
    model = AutoModelForCausalLM.from_config(opened.config, dtype=torch.float32)
    model.load_state_dict(opened.tensors)
    model.generation_config = opened.generation_config
    return model.eval(), opened.tokenizer
