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
from egmla.provenance import public_name, software_versions, source_commit, weights_sha256

from .closed_form import LatentAttention, exact_attention, low_rank_attention, smaller_latent
from .estimates import estimate
from .families import find_family
from .family import Family
from .plan import Plan, full_widths, plan_conversion, plan_latent
from .recipes import Recipe, find_recipe, nearest_recipe, recipe_options
from .refinement import ConvertedRun, Refinement
from .report import (
    converted_perplexity,
    draw_report,
    energy_by_rank,
    slots_per_frequency,
    source_perplexity,
    write_report,
)
from .sources import Rows, Source, open_source
from .statistics import LayerStatistics, SourceRun
from .texts import MAX_CHARACTERS_PER_TOKEN, EvaluationText, check_calibration_text, open_evaluation, read_text
from .writing import Journal, ShardWriter, check_target, check_unfinished, staged_folder


MIN_SEQUENCES = 4
CALIBRATION_TOKENS = 65536
REFINEMENT_TOKENS_FACTOR = 3  # it learns the text it sees by heart where there is less (conversion/README.md)

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
    calibration_tokens: int | None = None,
    evaluate: str | Path | None = None,
    evaluation_windows: int = 9,
    recipe: str | Recipe | None = None,
    refinement: Refinement | None = None,
    dtype: str | None = None,
    resume: bool = True,
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
        calibration_tokens (`int`, *optional*): tokens of it to use at most; 65,536 by default, 196,608 with
            refinement.
        evaluate (`str` or `Path`, *optional*): a plain text to measure perplexity on, of the source and the result.
        evaluation_windows (`int`): windows of it, of 2,048 tokens or the source's whole context, to use at most.
        recipe (`str` or `Recipe`, *optional*): choices of the closed form, or a name in `RECIPES`.
        refinement (`Refinement`, *optional*): choices of the refinement behind it; `Refinement(steps=0)` for none,
            which is the default of the peers' recipes.
        dtype (`str`, *optional*): dtype to write, `"float32"`, `"bfloat16"` or `"float16"`; the source's by default.
        resume (`bool`): go on where an interrupted conversion into the same target with the same settings stopped.
        dry_run (`bool`): check everything, return the plan and an estimate of time and memory, write nothing.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `dict`: the conversion report (also written as `conversion_report.json`), or with `dry_run` its plan part.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        OSError: when the target cannot be written; nothing is left there but what `resume` goes on from.
    """
    started = time.time()
    target = Path(target).resolve()
    recipe = find_recipe(recipe)
    if refinement is None:
        refinement = Refinement() if nearest_recipe(recipe) == "default" else Refinement(steps=0)
    output_dtype = _parse_dtype(dtype)
    check_target(target)
    opened = open_source(source)
    family = find_family(opened.config)
    if family.latent:
        plan = plan_latent(opened.config, exact, kv_lora_rank, qk_rope_head_dim, cache)
    else:
        shape = family.shape(opened.config)
        if calibration is None and (kv_lora_rank, qk_rope_head_dim) == full_widths(shape):
            exact, kv_lora_rank, qk_rope_head_dim = True, None, None  # all that the source has: nothing to calibrate
        plan = plan_conversion(opened.config, shape, exact, kv_lora_rank, qk_rope_head_dim, cache, recipe)
        if family.qk_norm is not None and recipe.freqfold > 1:
            raise ValueError(
                f"freqfold={recipe.freqfold}: this {opened.config.model_type} source normalises its queries, so a "
                "rotary slot can only take components of its own frequency; use freqfold=1."
            )
    _check_tensors(opened, family)
    family.check_weights(opened)
    evaluation = None
    if evaluate is not None:
        evaluation = open_evaluation(evaluate, opened.tokenizer, opened.config, evaluation_windows)
    sequences, calibration_report = torch.empty(0, 0, dtype=torch.long), None
    if not exact:
        if calibration_tokens is None:
            calibration_tokens = CALIBRATION_TOKENS * (REFINEMENT_TOKENS_FACTOR if refinement.steps else 1)
        sequences, calibration_report = _calibration_sequences(
            opened, calibration, calibration_tokens, recipe.sequence_length, evaluation
        )
    report: dict[str, Any] = {
        "source": {
            "label": public_name(opened.label),
            "model_type": opened.config.model_type,
            "cache_elements_per_token": plan.source_elements,
            **opened.origin,
        },
        "command": _command(
            opened.label,
            exact,
            kv_lora_rank,
            qk_rope_head_dim,
            cache,
            calibration_report,
            recipe,
            refinement,
            evaluation,
            dtype,
        ),
        "plan": {**asdict(plan), "cache_kept": plan.kept},
        "settings": {
            "exact": exact,
            "kv_lora_rank": kv_lora_rank,
            "qk_rope_head_dim": qk_rope_head_dim,
            "cache": cache,
            "calibration_tokens": calibration_tokens,
            "dtype": dtype,
        },
        "recipe": None if exact else asdict(recipe),
        "refinement": None if exact or not refinement.steps else asdict(refinement),
        "calibration": calibration_report,
        "tokenizer": None if opened.tokenizer is None else type(opened.tokenizer).__name__,
    }
    if opened.tokenizer is None:
        warnings.warn(f"{source} has no tokenizer that can be read; the converted model will have none.", stacklevel=2)
    if dry_run:
        if not exact:
            shape = family.shape(opened.config)
            report["estimate"] = asdict(estimate(opened.config, shape, plan, sequences, refinement))
        return report

    settings = {
        "source": opened.fingerprint(),
        **{name: report[name] for name in ("plan", "recipe", "refinement", "calibration")},
        "dtype": dtype,
        "versions": software_versions(),
    }
    settings = json.loads(json.dumps(settings))  # as the journal of an earlier run has them
    if resume:
        check_unfinished(target, settings)
    with staged_folder(target, keep=True) as folder, torch.no_grad():
        journal = Journal(folder, settings, resume)
        finished = len(journal.layers)
        writer = ShardWriter(folder, parts=finished + 1 if finished else 0)
        if not finished:
            for name, rows in family.copied(opened.config, None).items():
                writer.add(name, _cast(opened.read(rows), output_dtype))
            writer.end_part()
        elif progress is not None:
            progress("convert", finished, len(plan.ranks))
        for tensors, details, states in _converted_layers(
            opened, family, plan, recipe, refinement, sequences, journal, progress
        ):
            layer_idx = details["layer"]
            for name, rows in family.copied(opened.config, layer_idx).items():
                writer.add(name, _cast(opened.read(rows), output_dtype))
            stored = opened.tensor(f"model.layers.{layer_idx}.self_attn.o_proj.weight").dtype
            for name, tensor in tensors.items():
                writer.add(f"model.layers.{layer_idx}.self_attn.{name}", tensor.to(output_dtype or stored))
            writer.end_part()
            journal.finish_layer(details, states)
        writer.finish()
        config = _target_config(opened.config, family, plan, [layer["rope_slots"] for layer in journal.layers])
        config.dtype = output_dtype or opened.tensor("model.layers.0.self_attn.o_proj.weight").dtype
        _write_companions(folder, config, opened, writer)
        report |= {
            "layers": journal.layers,
            "seconds": round(time.time() - started, 1),
            "dtype": str(config.dtype).removeprefix("torch."),
            "versions": software_versions(),
            "commit": source_commit(),
            "weights_sha256": weights_sha256(folder),
        }
        if not plan.exact:
            report["slots_per_frequency"] = slots_per_frequency(
                [layer["rope_slots"] for layer in journal.layers], family.shape(opened.config).frequencies
            )
            draw_report(folder, report)
        write_report(folder, report)
        journal.remove()
        writer.remove_parts()
    if evaluation is not None:
        # The model is written: an interruption from here on costs the figures only.
        report["evaluation"] = evaluation.describe() | {
            "source": source_perplexity(source, evaluation, progress),
            "converted": converted_perplexity(target, evaluation, progress),
        }
        write_report(target, report)
    return report


def _converted_layers(
    source: Source,
    family: Family,
    plan: Plan,
    recipe: Recipe,
    refinement: Refinement,
    sequences: torch.Tensor,
    journal: Journal,
    progress: Progress | None,
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]]:
    """Each layer's attention tensors, what the report says of it, and the hidden states behind it, in order.

    Begins behind the layers that are in the journal.
    """
    config, count = source.config, source.config.num_hidden_layers
    if plan.exact:
        for layer_idx in range(len(journal.layers), count):
            tensors, layer_slots = _exact_layer(source, family, layer_idx)
            tensors |= _gate_at_identity(plan.ranks[layer_idx], config, layer_idx)
            yield tensors, {"layer": layer_idx, "rope_slots": layer_slots}, {}
            if progress is not None:
                progress("convert", layer_idx + 1, count)
        return

    run = SourceRun(source, family, sequences, recipe.weighting)
    converted = ConvertedRun(run, refinement) if refinement.steps else None
    states = journal.states()
    if states:
        run.states = states["source"]
        if converted is not None:
            converted.states = states["converted"]
    slots: list[list[int]] = [layer["rope_slots"] for layer in journal.layers]
    for layer_idx in range(len(journal.layers), count):
        stages = _layer_progress(progress, layer_idx, count, refined=converted is not None)
        rank, source_states = plan.ranks[layer_idx], run.states
        calibration = run.measure(layer_idx, stages["calibrate"])
        compute = _smaller_latent_layer if family.latent else _low_rank_layer
        tensors, layer_slots, spectrum = compute(source, family, layer_idx, calibration.statistics, plan, recipe)
        tensors |= _gate_at_identity(rank, config, layer_idx)
        slots.append(layer_slots)
        spectrum = spectrum.clamp_min(0)
        details = {
            "layer": layer_idx,
            "kv_lora_rank": rank,
            "rope_slots": layer_slots,
            "energy_kept": float(spectrum[:rank].sum() / spectrum.sum()),
            "energy_by_rank": energy_by_rank(spectrum),
        }
        if converted is not None:
            copied = {name: source.read(rows) for name, rows in family.copied(config, layer_idx).items()}
            prefix = f"model.layers.{layer_idx}."
            layer_tensors = {name.removeprefix(prefix): tensor for name, tensor in copied.items()}
            layer_tensors |= {f"self_attn.{name}": tensor for name, tensor in tensors.items()}
            # Of the config only this layer is looked at, so the layers to come may have its slots.
            layer_config = _target_config(config, family, plan, slots + [layer_slots] * (count - len(slots)))
            tensors, details["attention_error"] = converted.refine(
                layer_config, layer_idx, layer_tensors, source_states, calibration.outputs, stages["refine"]
            )
        states = {"source": run.states} | ({} if converted is None else {"converted": converted.states})
        yield tensors, details, states


def _layer_progress(progress: Progress | None, layer_idx: int, count: int, refined: bool) -> dict[str, Any]:
    """What reports the steps inside of a layer as parts of the whole, by stage."""
    stages = ["calibrate", "refine"] if refined else ["calibrate"]

    def report(stage: str) -> Callable[[int, int], None]:
        first = layer_idx * len(stages) + stages.index(stage)
        return lambda done, total: progress("convert", first * total + done, count * len(stages) * total)  # type: ignore[misc]

    return {stage: None if progress is None else report(stage) for stage in stages}


def _low_rank_layer(
    source: Source, family: Family, layer_idx: int, statistics: LayerStatistics, plan: Plan, recipe: Recipe
) -> tuple[dict[str, torch.Tensor], list[int], torch.Tensor]:
    """Attention tensors, rotary slots and spectrum of a layer whose keys and values become a smaller latent."""
    config = source.config
    attention = low_rank_attention(
        family.read_attention(source, layer_idx),
        family.shape(config),
        statistics,
        plan.ranks[layer_idx],
        plan.rope_dim,
        recipe,
        _attention_factor(config),
        family.rotates(config, layer_idx),
        family.qk_norm is not None,
    )
    tensors = _attention_tensors(attention, bool(family.bias_roles(config)), True)
    norms = {"q": "q_norm.weight", "k": "kv_encoder_norm.weight"}
    tensors |= {norms[role]: source.tensor(name) for role, name in family.norms(layer_idx).items()}
    return tensors, attention.slots, attention.spectrum


def _smaller_latent_layer(
    source: Source, family: Family, layer_idx: int, statistics: LayerStatistics, plan: Plan, recipe: Recipe
) -> tuple[dict[str, torch.Tensor], list[int], torch.Tensor]:
    """The same of a layer that has a latent: what makes it stays, and its rotary key as it is."""
    config, (tensors, slots) = source.config, _exact_layer(source, family, layer_idx)
    kv_b, o = (tensors[f"{name}.weight"].double() for name in ("kv_b_proj", "o_proj"))
    smaller = smaller_latent(kv_b, o, config.qk_nope_head_dim, statistics, plan.ranks[layer_idx], recipe)
    for name in ("q_a_proj", "kv_encoder_proj", "kv_a_proj_with_mqa", "o_proj"):  # means go into biases: now all have
        if f"{name}.weight" in tensors:
            tensors.setdefault(f"{name}.bias", torch.zeros(len(tensors[f"{name}.weight"])))
    down = torch.block_diag(smaller.down, torch.eye(plan.rope_dim, dtype=torch.float64))
    down_bias = torch.nn.functional.pad(smaller.down_bias, (0, plan.rope_dim))
    weight, bias = (tensors[f"kv_a_proj_with_mqa.{kind}"] for kind in ("weight", "bias"))
    if family.latent_norm(config):
        tensors |= {"kv_encoder_proj.weight": weight, "kv_encoder_proj.bias": bias}
        tensors["kv_encoder_norm.weight"] = tensors.pop("kv_a_layernorm.weight")
    else:
        down, down_bias = down @ weight.double(), down @ bias.double() + down_bias
    return (
        tensors
        | {
            "kv_a_proj_with_mqa.weight": down,
            "kv_a_proj_with_mqa.bias": down_bias,
            "kv_b_proj.weight": smaller.kv_b,
            "o_proj.bias": tensors["o_proj.bias"] + smaller.o_bias,
        },
        slots,
        smaller.spectrum,
    )


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
    ranks = plan.ranks[0] if len(set(plan.ranks)) == 1 else plan.ranks
    if family.latent:
        fields: dict[str, Any] = {"kv_gate": "latent"}
        if not plan.exact:
            fields |= {"kv_lora_rank": ranks, "kv_latent_norm": False, "attention_bias": True}
            if family.latent_norm(config):
                fields |= {
                    "kv_encoder_dim": config.kv_lora_rank + plan.rope_dim,
                    "kv_encoder_norm_dim": config.kv_lora_rank,
                }
        return family.target_config(config, **fields)
    shape = family.shape(config)
    same_slots = all(layer == slots[0] for layer in slots)
    biased = bool(family.bias_roles(config))
    nope_layers = [layer for layer in range(config.num_hidden_layers) if not family.rotates(config, layer)]
    fields = {
        "kv_lora_rank": ranks,
        "qk_nope_head_dim": shape.head_dim - shape.rotary_head_dim if plan.exact else shape.head_dim,
        "qk_rope_head_dim": plan.rope_dim,
        "v_head_dim": shape.head_dim,
        "kv_latent_norm": False,
        "kv_gate": "latent",
        "softmax_scale": shape.head_dim**-0.5,
        "rope_interleave": False,
        "rope_table_dim": shape.rotary_head_dim,
        "rope_slots": slots[0] if same_slots else slots,
        "nope_layers": nope_layers or None,
        "attention_bias": not plan.exact or biased,
        "query_bias": biased,
    }
    return family.target_config(config, **fields | _norm_fields(config, family, plan))


def _norm_fields(config: PreTrainedConfig, family: Family, plan: Plan) -> dict[str, Any]:
    """Fields of a source with normalised queries and keys; those of exact mode stand behind their projections."""
    if family.qk_norm is None:
        return {}
    shape, together = family.shape(config), family.qk_norm == "all"
    key_group = shape.kv_width if together else shape.head_dim
    if not plan.exact:
        return {
            "query_norm_dim": shape.heads * shape.head_dim if together else shape.head_dim,
            "kv_encoder_dim": 2 * shape.kv_width,
            "kv_encoder_norm_dim": key_group,
            "kv_encoder_norm_groups": shape.kv_width // key_group,
            "latent_norm_eps": config.rms_norm_eps,
        }
    fields = {"rope_interleave": True, "qk_norm_dim": key_group}
    if together:
        width = shape.heads * shape.head_dim
        fields |= {"q_lora_rank": width, "latent_norm_eps": config.rms_norm_eps, "query_bias": False}
    return fields


def _attention_tensors(attention: LatentAttention, query_bias: bool, attention_bias: bool) -> dict[str, torch.Tensor]:
    """The layer's tensors by their names in the attention module."""
    tensors = {
        "q_proj.weight": attention.q,
        "kv_a_proj_with_mqa.weight": attention.kv_a,
        "kv_b_proj.weight": attention.kv_b,
        "o_proj.weight": attention.o,
    }
    if attention.encoder is not None and attention.encoder_bias is not None:
        tensors |= {"kv_encoder_proj.weight": attention.encoder, "kv_encoder_proj.bias": attention.encoder_bias}
    if attention.q_rope_scale is not None and attention.slots:
        tensors["q_rope_scale"] = attention.q_rope_scale
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
        parts += map(Rows, (*family.norms(layer_idx).values(), *family.gate(source.config, layer_idx)))
    needed = {rows.name for rows in parts}
    _check_attention_extras(source, family)
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
    for name in sorted(needed):
        source.tensor(name)  # raises for values that are not finite: hours before the loop would meet them


def _check_attention_extras(source: Source, family: Family) -> None:
    """Refuses what tensors show of attention and a configuration does not say: sinks, and biases on some maps only."""
    sinks = sorted(name for name in source.names if name.endswith("self_attn.sinks"))
    if sinks:
        raise ValueError(
            f"{source.label} has attention sinks ({sinks[0]}), logits beside those of the keys, which EG-MLA does not "
            "have; use a checkpoint without."
        )
    for layer_idx in range(0 if family.latent else source.config.num_hidden_layers):
        names = [f"model.layers.{layer_idx}.self_attn.{role}_proj.bias" for role in "qkv"]
        there = [name for name in names if name in source.names]
        absent = [name for name in names if name not in source.names]
        if there and absent:
            raise ValueError(
                f"{source.label} has {there[0]} and no {absent[0]}: queries, keys and values must all have biases or "
                "all have none. Save the checkpoint with the missing ones as zeros."
            )


def _calibration_sequences(
    source: Source, calibration: str | Path | None, tokens: int, length: int, evaluation: EvaluationText | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    if calibration is None:
        raise ValueError(
            "A smaller cache needs calibration text: pass calibration=FILE (--calibration FILE), a plain text file "
            f"of at least {MIN_SEQUENCES * length} tokens that is not your evaluation text."
        )
    path = Path(calibration)
    text = read_text(path, "Calibration", MAX_CHARACTERS_PER_TOKEN * tokens)
    if source.tokenizer is None:
        raise ValueError(
            f"{source.label} has no tokenizer, which calibration needs; add its tokenizer files to the folder."
        )
    check_calibration_text(path, text, evaluation)
    ids = source.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    length = min(length, source.config.max_position_embeddings)
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


def _command(
    label, exact, kv_lora_rank, qk_rope_head_dim, cache, calibration, recipe, refinement, evaluation, dtype
) -> str:
    """The command that does this conversion again, with names in place of paths."""
    words = ["egmla", "convert", public_name(label), "TARGET", *(["--exact"] if exact else [])]
    if isinstance(kv_lora_rank, list):
        kv_lora_rank = ",".join(map(str, kv_lora_rank))
    options = {"--kv-lora-rank": kv_lora_rank, "--qk-rope-head-dim": qk_rope_head_dim, "--cache": cache}
    if calibration is not None:
        options |= {"--calibration": calibration["file"], "--calibration-tokens": calibration["tokens_asked"]}
        options["--refine-steps"] = refinement.steps
    if evaluation is not None:
        options |= {"--evaluate": evaluation.name, "--evaluation-windows": len(evaluation.windows)}
    options["--dtype"] = dtype
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(words + ([] if exact else recipe_options(recipe)))


def _parse_dtype(dtype: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(known)}, or left out for the source's own.")
    return None if dtype is None else known[dtype]


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else tensor.to(dtype)
