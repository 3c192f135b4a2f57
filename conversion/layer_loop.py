"""The loop over the layers of a conversion: calibrate, compute in closed form, refine."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from .calibration import SourceRun, measured_sequences
from .families.base import Family
from .job import Job
from .journal import Journal
from .layers import exact_layer, gate_at_identity, low_rank_layer, smaller_latent_layer, target_config
from .plan import Plan, deal_ranks
from .refinement import ConvertedRun, Refinement
from .report import Progress, energy_by_rank


RANK_TOKENS = 24576  # calibration tokens that ranks are allocated by

# A layer's attention tensors, what the report says of it, and the hidden states after it.
ConvertedLayer = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]


def allocate_ranks(job: Job, journal: Journal, progress: Progress | None) -> Plan:
    """Return the plan with ranks allocated by the energy of each layer's latent on the first calibration tokens."""
    ranks, plan = journal.ranks, job.plan
    if ranks is None:
        count, spectra = len(plan.ranks), []
        sequences = job.sequences[: -(-RANK_TOKENS // job.sequences.shape[1])]
        run = SourceRun(job.source, job.family, sequences, job.recipe.weighting, device=job.settings.device)
        for layer_idx in range(count):
            statistics = run.measure(layer_idx).statistics
            layer = _layer_function(job.family)(job.source, job.family, layer_idx, statistics, plan, job.recipe)
            spectra.append(layer[2])
            if progress is not None:
                progress("ranks", layer_idx + 1, count)
        ranks = deal_ranks(spectra, plan.ranks[0])
        journal.note_ranks(ranks)
    return replace(plan, ranks=ranks)


def converted_layers(job: Job, journal: Journal, progress: Progress | None) -> Iterator[ConvertedLayer]:
    """Yield the layers in order, starting after those in the journal."""
    if job.keeps_layers:
        return _kept_layers(job, journal, progress)
    convert = _exact_layers if job.plan.exact else _low_rank_layers
    return convert(job, journal, progress)


def _kept_layers(job: Job, journal: Journal, progress: Progress | None) -> Iterator[ConvertedLayer]:
    """Yield the source's own layers: their gates are trained, so only the places of channels may change."""
    source, family, count = job.source, job.family, len(job.plan.ranks)
    for layer_idx in range(len(journal.layers), count):
        prefix = f"{family.layer_prefix(layer_idx)}self_attn."
        names = [*family.attention(source.config, layer_idx), *family.gate(source.config, layer_idx)]
        tensors = {name.removeprefix(prefix): source.tensor(name) for name in names}
        slots = source.config.layer_rope_slots(layer_idx) or list(range(source.config.qk_rope_head_dim // 2))
        yield tensors, {"layer": layer_idx, "kv_lora_rank": job.plan.ranks[layer_idx], "rope_slots": slots}, {}
        if progress is not None:
            progress("convert", layer_idx + 1, count)


def _exact_layers(job: Job, journal: Journal, progress: Progress | None) -> Iterator[ConvertedLayer]:
    config, count = job.source.config, len(job.plan.ranks)
    for layer_idx in range(len(journal.layers), count):
        tensors, slots = exact_layer(job.source, job.family, layer_idx)
        tensors |= gate_at_identity(job.plan.ranks[layer_idx], config, layer_idx)
        yield tensors, {"layer": layer_idx, "rope_slots": slots}, {}
        if progress is not None:
            progress("convert", layer_idx + 1, count)


def _low_rank_layers(job: Job, journal: Journal, progress: Progress | None) -> Iterator[ConvertedLayer]:
    source, family, plan, recipe, refinement = job.source, job.family, job.plan, job.recipe, job.refinement
    config, count, refined = source.config, len(plan.ranks), bool(refinement.steps)
    measured = measured_sequences(job.sequences, refined)
    if not refined:
        refinement = Refinement(steps=0, dtype="float32")  # only errors are measured
    run = SourceRun(source, family, job.sequences, recipe.weighting, refinement.dtype, measured, job.settings.device)
    converted = ConvertedRun(run, refinement)
    if states := journal.states():
        run.states, converted.states = states["source"], states["converted"]
    slots: list[list[int]] = [layer["rope_slots"] for layer in journal.layers]
    for layer_idx in range(len(journal.layers), count):
        stages = _layer_progress(progress, layer_idx, count, refined)
        rank, source_states = plan.ranks[layer_idx], run.states
        calibration = run.measure(layer_idx, stages["calibrate"])
        compute = _layer_function(family)
        tensors, layer_slots, spectrum = compute(source, family, layer_idx, calibration.statistics, plan, recipe)
        tensors |= gate_at_identity(rank, config, layer_idx)
        slots.append(layer_slots)
        spectrum = spectrum.clamp_min(0)
        details = {
            "layer": layer_idx,
            "kv_lora_rank": rank,
            "rope_slots": layer_slots,
            "energy_kept": float(spectrum[:rank].sum() / spectrum.sum()),
            "energy_by_rank": energy_by_rank(spectrum),
        }
        copies = {name: source.read(part) for name, part in family.passthrough_tensors(config, layer_idx).items()}
        prefix = family.layer_prefix(layer_idx)
        layer_tensors = {name.removeprefix(prefix): tensor for name, tensor in copies.items()}
        layer_tensors |= {f"self_attn.{name}": tensor for name, tensor in tensors.items()}
        # Only this layer of the configuration is used, so the layers to come may have its slots.
        all_slots = slots + [layer_slots] * (count - len(slots))
        layer_config = target_config(config, family, plan, all_slots, recipe.latent_norm)
        trained, details["attention_error"] = converted.refine(
            layer_config, layer_idx, layer_tensors, source_states, calibration.outputs, stages.get("refine")
        )
        # Without refinement the tensors stay in fp64, so that they are rounded once.
        yield trained if refined else tensors, details, {"source": run.states, "converted": converted.states}


def _layer_function(family: Family) -> Callable[..., tuple[dict[str, torch.Tensor], list[int], torch.Tensor]]:
    """Return what computes a smaller layer of the family."""
    return smaller_latent_layer if family.latent else low_rank_layer


def _layer_progress(progress: Progress | None, layer_idx: int, count: int, refined: bool) -> dict[str, Any]:
    """Return, by stage, what reports the steps inside a layer as parts of it."""
    stages = ["calibrate", "refine"] if refined else ["calibrate"]
    if progress is None:
        return dict.fromkeys(stages)

    def report(stage: str) -> Callable[[int, int], None]:
        first = layer_idx + stages.index(stage) / len(stages)
        return lambda done, total: progress("convert", first + done / total / len(stages), count)

    return {stage: report(stage) for stage in stages}
