"""What a conversion leaves beside its weights: `conversion_report.json`, which model cards read, and its figure."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from egmla import EGMLACache
from egmla.utils.continuations import continue_contexts, shown_ends, take_contexts
from egmla.utils.perplexity import cached_losses, perplexity
from egmla.utils.plotting import COLOURS, check_matplotlib
from egmla.utils.progress import Progress, stage_progress
from egmla.utils.provenance import CONVERSION_FIGURE, CONVERSION_REPORT
from egmla.utils.retrieval import Passage, make_passages, measure_retrieval, token_counter

from .sources import load_source
from .texts import EvaluationText


RETRIEVAL_TOKENS = 512
RETRIEVAL_PASSAGES = 6


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write a conversion's report into its folder, atomically."""
    part = folder / f".{CONVERSION_REPORT}.partial"
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / CONVERSION_REPORT)


def source_perplexity(
    source: str | Path, evaluation: EvaluationText, progress: Progress | None = None, device: str | None = None
) -> float:
    """Measure the perplexity of a conversion's source, in fp32; `progress` is called with (stage, done, total)."""
    return perplexity(
        load_source(source)[0].to(device or "cpu"), evaluation.windows, stage_progress("evaluate source", progress)
    )


def converted_perplexity(
    folder: Path, evaluation: EvaluationText, progress: Progress | None = None, device: str | None = None
) -> float:
    """Measure the perplexity of a converted checkpoint, in fp32; `progress` is called with (stage, done, total)."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return perplexity(
        model.to(device or "cpu").eval(), evaluation.windows, stage_progress("evaluate converted", progress)
    )


def through_caches(
    source: str | Path,
    folder: Path,
    evaluation: EvaluationText,
    shares: Sequence[float],
    progress: Progress | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure a conversion with bits as it is used, read through its cache, beside its source and its smaller caches.

    Args:
        source (`str` or `Path`): the checkpoint that was converted.
        folder (`Path`): the converted one.
        evaluation (`EvaluationText`): windows for perplexity, whose text also hides the facts to retrieve.
        shares (`Sequence[float]`): the sizes of its cache.
        progress (*optional*): called with (stage, done, total).
        device (`str`, *optional*): the CPU by default.

    Returns:
        `dict`: perplexity of source and conversion, its ratio by size with a standard error, facts retrieved, and five
            contexts as each continues them.
    """
    losses: dict[str, torch.Tensor] = {}
    retrieved: dict[str, int | None] = {}
    original, tokenizer = load_source(source)
    converted: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    room = min(RETRIEVAL_TOKENS, original.config.max_position_embeddings - 64)
    passages = _passages(evaluation.text, room, tokenizer)
    contexts = take_contexts(evaluation.windows)
    written = [{"context": end} for end in shown_ends(tokenizer, contexts)]
    sizes: dict[str, Callable[[], Any]] = {"source": lambda: DynamicCache(config=original.config)}
    sizes |= {f"{share:g}": partial(EGMLACache, converted.config, bits=share) for share in shares}
    for name, make_cache in sizes.items():
        model = (original if name == "source" else converted).to(device or "cpu").eval()
        stage = stage_progress(f"evaluate {name}", progress)
        losses[name] = cached_losses(model, evaluation.windows, make_cache, progress=stage)
        hits = measure_retrieval(model, tokenizer, passages, make_cache, chunk=64)
        retrieved[name] = sum(hits) if passages else None
        for row, text in zip(written, continue_contexts(model, tokenizer, contexts, make_cache), strict=True):
            row[name] = text
    found = {
        name: {
            "perplexity": float(loss.mean().exp()),
            "ratio": float((loss - losses["source"]).mean().exp()),
            "ratio_error": _standard_error(loss - losses["source"]),
            "retrieved": retrieved[name],
        }
        for name, loss in losses.items()
    }
    largest = found[f"{max(shares):g}"]
    return {
        "source": found["source"]["perplexity"],
        "converted": largest["perplexity"],
        "caches": found,
        "questions": sum(len(passage.questions) for passage in passages),
        "passage_tokens": room,
        "continuations": written,
        "context_tokens": contexts.shape[1],
    }


def _passages(text: str, room: int, tokenizer: Any) -> list[Passage]:
    """Hide as many facts as a context has room for, up to 8 in a passage; none in a very short one."""
    for questions in (8, 4, 2, 1):
        try:
            return make_passages(text, room, RETRIEVAL_PASSAGES, questions, count_tokens=token_counter(tokenizer))
        except ValueError:  # the facts alone are longer than the context
            continue
    return []


def _standard_error(differences: torch.Tensor) -> float | None:
    """Return the standard error of a mean over windows, `None` for a single one."""
    return float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else None


def energy_by_rank(spectrum: torch.Tensor) -> list[list[float]]:
    """A spectrum `[n]`, largest first, in short: pairs of a rank, powers of two and `n`, and the energy kept at it."""
    kept = spectrum.cumsum(0) / spectrum.sum()
    ranks = [2**power for power in range(len(spectrum).bit_length()) if 2**power < len(spectrum)]
    return [[rank, float(kept[rank - 1])] for rank in [*ranks, len(spectrum)]]  # as JSON keeps it


def slots_per_frequency(slots: Sequence[Sequence[int]], frequencies: int) -> list[int]:
    """How many rotary slots of all layers rotate at each of a source's frequencies, the fastest first."""
    counts = Counter(frequency for layer in slots for frequency in layer)
    return [counts[frequency] for frequency in range(frequencies)]


def draw_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Draws the report of a calibrated conversion into its folder, or warns that matplotlib is missing.

    Panels: the error of each layer's attention, the energy its latent keeps, and its rotary slots per frequency.
    """
    try:
        check_matplotlib()
    except ImportError as error:
        warnings.warn(f"{CONVERSION_FIGURE} was not drawn. {error}", stacklevel=3)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = report["layers"]
    numbers = [layer["layer"] for layer in layers]
    refined = report["refinement"] is not None
    frequencies = len(report["slots_per_frequency"])  # none where slots are the source's own
    panels = 2 + bool(frequencies)
    figure = Figure(figsize=(1 + 4 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    lines = (("closed form", "before", COLOURS[0]), ("refined", "after", COLOURS[2]))
    for label, key, colour in lines if refined else lines[:1]:
        errors = [layer["attention_error"][key] for layer in layers]
        axes[0].plot(numbers, errors, marker="o", markersize=4, color=colour, label=label)
    axes[0].set_title("Attention error", fontsize=12, fontweight="bold", loc="left")
    axes[0].set_ylabel(f"relative squared, {'held-out' if refined else 'calibration'} text", fontsize=10)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    energy = axes[1]
    energy.bar(numbers, [layer["energy_kept"] for layer in layers], color=COLOURS[1])
    energy.set_title("Energy kept", fontsize=12, fontweight="bold", loc="left")
    energy.set_ylabel("share of the latent's second moment", fontsize=10)
    for axis in axes[:2]:
        axis.set_xlabel("layer", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    if frequencies:
        counts = [slots_per_frequency([layer["rope_slots"]], frequencies) for layer in layers]
        image = axes[-1].imshow(counts, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
        axes[-1].set_title("Rotary slots", fontsize=12, fontweight="bold", loc="left")
        axes[-1].set_xlabel("frequency, fastest first", fontsize=10)
        axes[-1].set_ylabel("layer", fontsize=10)
        for ticks in (axes[-1].xaxis, axes[-1].yaxis):
            ticks.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes[-1], ticks=MaxNLocator(integer=True))
    figure.savefig(folder / CONVERSION_FIGURE, dpi=110)
