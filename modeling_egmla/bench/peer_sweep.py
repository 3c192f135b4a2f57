"""Measure EG-MLA's caches at several sizes beside what a user does otherwise, for `egmla sweep --peers`.

One conversion serves all sizes with bits. Every measurement is saved at once, and the same call does what is left.
"""

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from egmla.conversion import Refinement, convert_checkpoint, load_source
from egmla.conversion.bits import SMALLER_SHARES
from egmla.conversion.families import find_family
from egmla.conversion.job import calibration_tokens
from egmla.conversion.plan import plan_conversion
from egmla.conversion.settings import BITS, RANK_ONLY, ConversionSettings, check_settings
from egmla.conversion.source import Source
from egmla.conversion.sources import open_source
from egmla.conversion.sweep import (
    SWEEP_REPORT,
    describe_calibration,
    identify_source,
    is_finished,
    start_report,
)
from egmla.conversion.texts import (
    MAX_CHARACTERS_PER_TOKEN,
    EvaluationText,
    check_calibration_text,
    open_evaluation,
    read_text,
)
from egmla.utils.files import write_json
from egmla.utils.perplexity import cached_losses
from egmla.utils.plotting import check_matplotlib
from egmla.utils.progress import Progress, Say, stage_progress, with_name
from egmla.utils.retrieval import Passage, make_passages, measure_retrieval, summarise, token_counter
from egmla.utils.timing import Timer

from .decode import pair_ratios, time_decode
from .peer_plots import plot_peers
from .peers import SERIES, SOURCE, Peer, bits_folder, list_peers, rank_folder


CHUNK = 64  # tokens read at a time, as in decoding: what a cache has rounded is seen by all that follow
LENGTHS = (2048, 32768)  # tokens that bytes are stated at
ANSWER_TOKENS = 64  # room behind a passage for a question and its answer
MOST_CHARACTERS = MAX_CHARACTERS_PER_TOKEN * calibration_tokens(None, refined=True)  # of a text, compared with others
DECODE_STEPS, DECODE_ROUNDS = 4, 4


@dataclass(frozen=True)
class PeerSettings:
    """What is compared, and how.

    Attributes:
        caches (`Sequence[float]`): shares of the source's bytes in bf16 that EG-MLA is measured at. The largest is
            converted to with bits; of that conversion the smaller ones are among `SMALLER_SHARES`.
        evaluate (`Sequence[Path]`): plain texts to measure perplexity on. Facts are hidden in the first.
        calibration (`Sequence[Path]`): plain texts for all conversions; those with bits use the shipped text too.
        calibration_tokens (`int`, *optional*): as of `convert_checkpoint`.
        refinement (`Refinement`): of the conversions by rank alone; none by default.
        evaluation_windows (`int`): windows of each text, of 2,048 tokens or the source's whole context.
        retrieval (`Sequence[int]`): tokens of the passages; empty for no retrieval.
        passages, questions (`int`): passages of each length, and questions about each.
        context (`int`): tokens in the caches while decoding is timed; 0 for no times.
        dtype (`str`, *optional*): of the conversions' weights; everything is measured in float32.
        device (`str`, *optional*): the CPU by default; conversions use the GPU if there is one.
    """

    caches: Sequence[float]
    evaluate: Sequence[str | Path]
    calibration: Sequence[str | Path] = ()
    calibration_tokens: int | None = None
    refinement: Refinement = field(default_factory=lambda: Refinement(steps=0))
    evaluation_windows: int = 9
    retrieval: Sequence[int] = (512,)
    passages: int = 6
    questions: int = 8
    context: int = 8192
    dtype: str | None = None
    device: str | None = None

    def check(self) -> None:
        """Raise `ValueError` for what cannot be measured, whatever the source."""
        if not self.caches or not self.evaluate:
            raise ValueError("A sweep needs at least one size and one text: --cache 0.25,0.125 --evaluate FILE.")
        largest = max(self.caches)
        served = [largest, *(share for share in SMALLER_SHARES if share < largest)]
        for share in self.caches:
            if share not in served:
                raise ValueError(
                    f"cache={share:g} beside cache={largest:g}: one conversion serves all sizes with bits, and its "
                    f"are {', '.join(f'{each:g}' for each in served)}; choose from these, or another largest one."
                )
        if min(self.retrieval, default=1) < 1 or self.context < 0:
            raise ValueError(
                f"retrieval={list(self.retrieval)}, context={self.context}: lengths of passages are at least 1 token, "
                "and the context is not negative; use 0 for no retrieval, and 0 for no times."
            )
        names = [Path(path).name for path in self.evaluate]
        if len(set(names)) < len(names):
            raise ValueError(f"Evaluation texts {', '.join(names)}: rows are by file name, so give each another one.")


@dataclass
class _Run:
    """A sweep under way.

    Attributes:
        source: what was asked for; target: the folder.
        settings: what is measured.
        config: the source's; tokenizer: its tokenizer.
        texts: the texts by file name; passages: those of each length.
        jobs: options of each conversion, by its folder.
        report: what `sweep.json` holds, its rows by name in `rows`.
    """

    source: str | Path
    target: Path
    settings: PeerSettings
    config: Any
    tokenizer: Any
    texts: dict[str, EvaluationText]
    passages: dict[int, list[Passage]]
    jobs: dict[Path, dict[str, Any]]
    report: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    progress: Progress | None
    resume: bool
    model: Any = None
    loaded: Path | str | None = None

    def save(self) -> None:
        """Write `sweep.json`, rows by series and size."""

        def place(row: Mapping[str, Any]) -> tuple[int, float]:
            return SERIES.index(row["series"]), -row.get("shares", {}).get(str(LENGTHS[-1]), 0)

        self.report["rows"] = sorted(self.rows.values(), key=place)
        write_json(self.target / SWEEP_REPORT, self.report)

    def load(self, folder: Path | None) -> Any:
        """Return the source or a conversion in fp32, converted first if need be; one model is held at a time."""
        wanted = folder or SOURCE
        if self.loaded != wanted:
            self.model = None
            if folder is None:
                self.model = load_source(self.source)[0]
            else:
                self.convert(folder)
                self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self.model.to(self.settings.device or "cpu").eval()
            self.loaded = wanted
        return self.model

    def convert(self, folder: Path) -> None:
        """Make a conversion, unless it is there."""
        if not is_finished(folder):
            told = with_name(folder.name, self.progress)
            convert_checkpoint(self.source, folder, **self.jobs[folder], resume=self.resume, progress=told)


def sweep_peers(
    source: str | Path,
    target: str | Path,
    settings: PeerSettings,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Convert a source with bits and by rank, and measure these caches beside the source's and its peers.

    The same call resumes an interrupted run. More sizes below the largest, texts and lengths may be added.

    Args:
        source (`str` or `Path`): as of `convert_checkpoint`; its keys and values must be per head.
        target (`str` or `Path`): folder for the models, `sweep.json`, `perplexity.png` and `retrieval.png`.
        settings (`PeerSettings`): what is compared, and how.
        resume (`bool`): resume; otherwise the sweep in the folder is replaced, with its models.
        progress (*optional*): called with (stage, done, total).
        say (*optional*): called with the plan, and later with what is left.

    Returns:
        `dict`: what `sweep.json` holds: settings, texts, and a row per cache.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, ImportError: for bad input, before any long work starts.
    """
    check_matplotlib()
    settings.check()
    target = Path(target).resolve()
    run, plans = _prepare(source, target, settings, resume, progress)
    target.mkdir(parents=True, exist_ok=True)
    if not resume:
        for folder in filter(is_finished, run.jobs):
            shutil.rmtree(folder)
    peers = list_peers(target, settings.caches, run.report["source"]["cache_elements_per_token"])
    run.save()
    if say is not None:
        say(_describe_plan(run, peers, plans))
    for peer in peers:
        _measure(run, peer)
        if say is not None and peer.name == SOURCE:
            say(_describe_rest(run, peers))
    _time(run, peers)
    run.model = None
    run.save()
    plot_peers(run.report, target)
    return run.report


def _prepare(
    source: str | Path, target: Path, settings: PeerSettings, resume: bool, progress: Progress | None
) -> tuple[_Run, dict[Path, dict[str, Any]]]:
    """Check everything, and return the run as an earlier one left it, and the plan of each conversion."""
    opened = open_source(source)
    family = find_family(opened.config)
    if family.latent:
        raise ValueError(
            f"{source} is a {opened.config.model_type}, which caches a latent, and the peers quantise or drop keys "
            "and values per head; use egmla sweep without --peers."
        )
    shape = family.shape(opened.config)
    tokenizer = opened.needed_tokenizer("evaluation")
    found = [
        open_evaluation(path, tokenizer, opened.config, settings.evaluation_windows) for path in settings.evaluate
    ]
    texts = {text.name: text for text in found}
    passages = {length: _passages(length, found[0], opened, settings) for length in settings.retrieval}
    jobs = _jobs(target, settings)
    for size in settings.caches:
        plan_conversion(opened.config, shape, cache=size)
    report = start_report(target, _identity(opened, settings, jobs, found), resume)
    report["source"]["cache_elements_per_token"] = 2 * shape.kv_width * opened.config.num_hidden_layers
    known = report.setdefault("texts", {})
    for name, text in texts.items():
        if known.setdefault(name, text.describe()) != text.describe():
            raise ValueError(
                f"{target} holds figures on another {name}, or on another number of its windows, and they could not "
                "be compared; choose another folder or remove it."
            )
    plans = {}
    for folder, job in list(jobs.items())[:2]:  # the others differ in size alone
        if not (resume and is_finished(folder)):
            # A finished model that is to be replaced stays until all is checked, so its name is not free.
            checked = folder.with_name(f"{folder.name}.new") if is_finished(folder) else folder
            plans[folder] = convert_checkpoint(source, checked, **job, dry_run=True)
    rows = {row["name"]: row for row in report.get("rows", [])}
    run = _Run(
        source, target, settings, opened.config, tokenizer, texts, passages, jobs, report, rows, progress, resume
    )
    return run, plans


def _jobs(target: Path, settings: PeerSettings) -> dict[Path, dict[str, Any]]:
    """Return the options of each conversion by its folder."""
    shared: dict[str, Any] = {
        "calibration": list(settings.calibration),
        "calibration_tokens": settings.calibration_tokens,
        "dtype": settings.dtype,
        "device": settings.device,
    }
    jobs: dict[Path, dict[str, Any]] = {}
    jobs[bits_folder(target, settings.caches)] = {"cache": max(settings.caches), "cache_dtype": BITS, **shared}
    for size in sorted(set(settings.caches), reverse=True):
        by_rank = {"cache": size, "cache_dtype": RANK_ONLY, "refinement": settings.refinement}
        jobs[rank_folder(target, size)] = {**by_rank, **shared}
    return jobs


def _identity(
    opened: Source, settings: PeerSettings, jobs: Mapping[Path, dict[str, Any]], texts: Sequence[EvaluationText]
) -> dict[str, Any]:
    """Return all that every figure depends on. Refuse calibration that is not apart from an evaluation text."""
    calibrations = {job["cache_dtype"]: check_settings(ConversionSettings(**job)).calibration for job in jobs.values()}
    for path in dict.fromkeys(path for paths in calibrations.values() for path in paths):
        content = read_text(path, "Calibration", MOST_CHARACTERS)
        for text in texts:
            check_calibration_text(path, content, text)
    return {
        **identify_source(opened),
        "mode": "peers",
        "largest_cache": max(settings.caches),
        "calibration": {
            kind: describe_calibration(paths, settings.calibration_tokens) for kind, paths in calibrations.items()
        },
        "refinement": asdict(settings.refinement) if settings.refinement.steps else None,
        "retrieval": {"passages": settings.passages, "questions": settings.questions, "text": texts[0].sha256},
        "dtype": settings.dtype,
        "device": settings.device,
    }


def _passages(length: int, text: EvaluationText, opened: Source, settings: PeerSettings) -> list[Passage]:
    most = opened.config.max_position_embeddings - ANSWER_TOKENS
    if length > most:
        raise ValueError(
            f"retrieval={length}: this source's context has room for passages of {most} tokens; give a shorter one."
        )
    count = token_counter(opened.tokenizer)
    return make_passages(text.text, length, settings.passages, settings.questions, count_tokens=count)


def _measure(run: _Run, peer: Peer) -> None:
    """Fill in what is missing in a peer's row, and save it after each measurement."""
    if peer.skipped is not None:
        run.rows.setdefault(peer.name, {"name": peer.name, "series": peer.series, "skipped": peer.skipped})
        return run.save()
    row = run.rows.get(peer.name, {})
    if not row or "skipped" in row:
        row = run.rows[peer.name] = {"name": peer.name, "series": peer.series, "perplexity": {}, "retrieval": {}}
    for kind, key, measure in _missing(run, peer):
        model = run.load(peer.folder)
        result, seconds = Timer(model.device).measure(lambda measure=measure, model=model: measure(model))  # type: ignore[misc]
        row[kind][key] = result | {"seconds": round(seconds, 1)}
        run.save()
    if "shares" not in row:
        if peer.folder is not None:
            run.convert(peer.folder)
        per_token = 2 * run.report["source"]["cache_elements_per_token"]
        row["shares"] = {str(tokens): peer.share(run.config, tokens) for tokens in LENGTHS}
        row["bytes"] = {str(tokens): round(row["shares"][str(tokens)] * per_token * tokens) for tokens in LENGTHS}
        run.save()


Measurement = tuple[str, str, Callable[[Any], dict[str, Any]]]


def _missing(run: _Run, peer: Peer) -> list[Measurement]:
    """List the measurements that a peer's row lacks: kind, key, and a function of the model that measures."""
    row = run.rows.get(peer.name, {})

    def on_text(name: str) -> Callable[[Any], dict[str, Any]]:
        return lambda model: _perplexity(run, peer, name, model)

    def of_length(length: int) -> Callable[[Any], dict[str, Any]]:
        return lambda model: _retrieval(run, peer, length, model)

    if peer.skipped is not None:
        return []
    texts = [name for name in run.texts if name not in row.get("perplexity", {})]
    lengths = [length for length in run.passages if str(length) not in row.get("retrieval", {})]
    return [
        *(("perplexity", name, on_text(name)) for name in texts),
        *(("retrieval", str(length), of_length(length)) for length in lengths),
    ]


def _perplexity(run: _Run, peer: Peer, name: str, model: Any) -> dict[str, Any]:
    """Measure perplexity on a text, and its ratio to the source's with the standard error over windows."""
    windows = run.texts[name].windows
    told = stage_progress(f"{peer.name}: perplexity, {name}", run.progress)
    losses = cached_losses(
        model, windows, lambda: peer.make_cache(model, windows.shape[1]), chunk=CHUNK, progress=told
    ).tolist()
    of_source = losses if peer.name == SOURCE else run.rows[SOURCE]["perplexity"][name]["losses"]
    differences = torch.tensor(losses, dtype=torch.float64) - torch.tensor(of_source, dtype=torch.float64)
    error = float(differences.std() / len(losses) ** 0.5) if len(losses) > 1 else None
    return {
        "perplexity": float(torch.tensor(losses, dtype=torch.float64).mean().exp()),
        "ratio": float(differences.mean().exp()),
        "ratio_error": error,  # of its logarithm, so a share of the ratio
        "losses": losses,
    }


def _retrieval(run: _Run, peer: Peer, length: int, model: Any) -> dict[str, Any]:
    told = stage_progress(f"{peer.name}: retrieval, {length:,} tokens", run.progress)
    passages = run.passages[length]
    hits = measure_retrieval(
        model, run.tokenizer, passages, lambda: peer.make_cache(model, length), chunk=CHUNK, progress=told
    )
    return summarise(passages, hits)


def _time(run: _Run, peers: Sequence[Peer]) -> None:
    """Time a decode step of the caches that really run: those of each conversion, interleaved with the source's."""
    context = run.settings.context
    timed = [peer for peer in peers if peer.timed]
    source = None
    for folder in dict.fromkeys(peer.folder for peer in timed if peer.folder is not None):
        group = [peer for peer in timed if peer.folder == folder]
        if not context or all(run.rows[peer.name].get("decode", {}).get("context") == context for peer in group):
            continue
        source = source or run.load(None)
        converted = run.load(folder)
        models = {peer.name: source if peer.folder is None else converted for peer in (peers[0], *group)}
        timings = time_decode(
            models,
            context,
            caches={peer.name: peer.make_cache for peer in (peers[0], *group)},
            steps=DECODE_STEPS,
            rounds=DECODE_ROUNDS,
            warmup=1,
            progress=stage_progress(f"{folder.name}: decode steps", run.progress),
        )
        for name, timing in timings.items():
            faster = statistics.median(pair_ratios(timing, timings[SOURCE]))
            run.rows[name]["decode"] = {
                "context": context,
                "ms_median": 1e3 * timing.median,
                "ms_p10": 1e3 * timing.p10,
                "ms_p90": 1e3 * timing.p90,
                "times_source": 1 / faster,
            }
        run.save()


def _describe_plan(run: _Run, peers: Sequence[Peer], plans: Mapping[Path, Mapping[str, Any]]) -> str:
    """Return the plan in words."""
    pending = [folder for folder in run.jobs if not is_finished(folder)]
    seconds = sum(_seconds(folder, plans) for folder in pending)
    lines = [
        f"{len(peers)} caches; perplexity on {', '.join(run.texts)}; retrieval from "
        f"{', '.join(f'{length:,}' for length in run.passages) or 'no'} tokens",
        f"{len(pending)} conversions to make: about {seconds / 60:,.0f} minutes"
        if pending
        else "All conversions are there.",
    ]
    lines += [f"{peer.name} is left out: {peer.skipped}." for peer in peers if peer.skipped is not None]
    lines.append(f"Each measurement is saved in {run.target}; Ctrl-C stops, and the same command resumes.")
    return "Plan\n" + "\n".join(f"  {line}" for line in lines)


def _seconds(folder: Path, plans: Mapping[Path, Mapping[str, Any]]) -> float:
    """Return the estimate for a conversion: its own, or that of the last one that was planned."""
    plan = plans.get(folder) or (list(plans.values()) or [{}])[-1]
    return plan.get("estimate", {}).get("seconds", 0.0)


def _describe_rest(run: _Run, peers: Sequence[Peer]) -> str:
    """Return in words what is left to measure, and for about how long: as long as the source took for the same."""
    left = [(kind, key) for peer in peers for kind, key, _ in _missing(run, peer)]
    seconds = sum(run.rows[SOURCE][kind][key]["seconds"] for kind, key in left)
    return (
        f"The source is measured. {len(left)} measurements are left: about {seconds / 60:,.0f} minutes at its pace, "
        "and longer for caches that are quantised."
    )
