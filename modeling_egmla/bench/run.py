"""Run a benchmark: contestants are interleaved at each dtype, batch size and context.

Each finished case is saved in `bench.json`, and an interrupted run resumes there. A case that does not fit into memory
is skipped, with the reason. Nothing is timed before `check_parity` has passed for all contestants.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from egmla.utils.accounting import decode_flops, swept_weight_bytes
from egmla.utils.files import write_json
from egmla.utils.machine import device_bytes, load_average
from egmla.utils.plotting import check_matplotlib
from egmla.utils.progress import Progress, Say

from .contestants import OUR_ROLES, Contestant, Models, Subject, check_lengths, compiled_graphs, compiling
from .decode import DecodeTiming, pair_ratios, time_decode, time_prefill
from .limits import Limits, bandwidth, median_limits
from .memory import measure_apart
from .packing import pack
from .parity import check_parity
from .plots import plot_bench
from .report import REPORT, open_report, share_of_ceiling, slopes
from .settings import DTYPES, BenchSettings


# Fraction of the free memory to use. Other programs may need some meanwhile, and sizes are estimates.
SHARE_OF_MEMORY = 0.9


def run_bench(
    subjects: Sequence[Subject],
    settings: BenchSettings,
    output: str | Path,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Measure, write `bench.json` and its plots, and return the report.

    Cases that an earlier run finished in the same folder, with the same settings, are not measured again.

    Args:
        subjects (`Sequence[Subject]`): what to measure.
        settings (`BenchSettings`): how.
        output (`str` or `Path`): folder for `bench.json`, `ms_per_token.png` and `cache_bytes.png`.
        resume (`bool`): keep the cases that an earlier run finished there; otherwise all are measured again.
        progress (*optional*): called with (stage, done, total).
        say (*optional*): called with messages for the user, such as skipped cases.

    Returns:
        `dict`: format, settings, commit, machine, subjects, and rows: `parity`, `decode`, `ratios`, `prefill`,
        `memory`, `skipped`, `slopes`.

    Raises:
        ValueError, ImportError: for bad input, before any work.
        ParityError: when a contestant's logits are wrong; nothing has been timed then.
    """
    settings.check()
    if not subjects:
        raise ValueError("Nothing to measure: give a preset, or the folders of a source and its conversion.")
    for subject in subjects:
        subject.contestants(settings.contestants)
        check_lengths(subject, settings.longest)
    check_matplotlib()
    output = Path(output)
    report = open_report(output, subjects, settings.describe(), settings.device, resume)
    bench = _Bench(report, settings, output, progress or _silent, say or _silent)
    bench.check(subjects)
    for subject in subjects:
        bench.measure(subject)
    report["slopes"] = slopes(report)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / REPORT, report)
    if report["decode"]:
        plot_bench(report, output)
    return report


def _silent(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class _Case:
    subject: str
    dtype: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.subject}, {self.dtype}, batch {self.batch}, {self.context} tokens"


class _Bench:
    """One run: measures cases and adds their rows to the report."""

    def __init__(self, report: dict[str, Any], settings: BenchSettings, output: Path, progress: Progress, say: Say):
        self.report = report
        self.settings = settings
        self.output = output
        self.progress = progress
        self.say = say
        self.device = torch.device(settings.device)

    def cases(self, subject: Subject, dtype: str) -> Iterator[_Case]:
        for batch in self.settings.batch_sizes:
            for context in self.settings.contexts:
                yield _Case(subject.name, dtype, batch, context)

    def dtypes(self) -> list[str]:
        """The dtypes in the order of `DTYPES`, each once."""
        return sorted(dict.fromkeys(self.settings.dtypes), key=DTYPES.index)

    def pending(self, kind: str, case: _Case, names: Sequence[str]) -> list[str]:
        """Contestants that have no row of this kind yet."""
        done = {row["contestant"] for row in self.report[kind] if _of(row, case)}
        return [name for name in names if name not in done]

    def unfinished(self, subject: Subject, dtype: str) -> bool:
        chosen = subject.contestants(self.settings.contestants)
        for case in self.cases(subject, dtype):
            if self.pending("decode", case, list(chosen)):
                return True
            if self.settings.memory_tokens and self.pending("memory", case, list(chosen)):
                return True
            prefill = _Case(case.subject, case.dtype, case.batch, self.settings.prefill_tokens)
            if self.settings.prefill_tokens and self.pending("prefill", prefill, _uncompiled(chosen)):
                return True
        return False

    def check(self, subjects: Sequence[Subject]) -> None:
        """Check parity of everything still to be measured, before anything is timed."""
        jobs = [(subject, dtype) for subject in subjects for dtype in self.dtypes() if self.unfinished(subject, dtype)]
        for done, (subject, dtype) in enumerate(jobs, start=1):
            models = Models(subject, getattr(torch, dtype), self.device)
            rows = check_parity(models, subject.contestants(self.settings.contestants), self.settings.longest)
            kept = [row for row in self.report["parity"] if (row["subject"], row["dtype"]) != (subject.name, dtype)]
            self.report["parity"] = kept + [{"subject": subject.name, "dtype": dtype, **row} for row in rows]
            self.progress("Parity check", done, len(jobs))

    def measure(self, subject: Subject) -> None:
        """Measure everything of one subject that has no row yet."""
        for dtype in self.dtypes():
            if not self.unfinished(subject, dtype):
                continue
            models = Models(subject, getattr(torch, dtype), self.device)
            for case in self.cases(subject, dtype):
                if self.settings.prefill_tokens and case.context == self.settings.contexts[0]:
                    prompt = _Case(case.subject, case.dtype, case.batch, self.settings.prefill_tokens)
                    self.prefill(prompt, subject, models)
                self.decode(case, subject, models)
                if self.settings.memory_tokens:
                    self.memory(case, subject, models)

    def groups(
        self, kind: str, case: _Case, chosen: Mapping[str, Contestant], models: Models, new_tokens: int = 1
    ) -> list[list[str]]:
        """Group the contestants still to be measured so that each group fits into memory; skip those that do not."""
        pending = self.pending(kind, case, list(chosen))
        room = case.context + self.settings.first_warmup + self.settings.steps
        needs = {
            name: models.case_bytes(contestant, case.batch, room, new_tokens) for name, contestant in chosen.items()
        }
        weights = {
            name: {role: models.weight_bytes(role) for role in models.needed(contestant.role)}
            for name, contestant in chosen.items()
        }
        available = device_bytes(self.device) + models.loaded_bytes()
        budget = int(SHARE_OF_MEMORY * available) - self.settings.sweep_bytes
        ours = [name for name, contestant in chosen.items() if contestant.role in OUR_ROLES]
        groups, left_out = pack(needs, weights, ours, pending, budget)
        self.clear_skipped(kind, case)
        for name, need in left_out.items():
            reason = (
                f"needs about {need / 2**30:.1f} GiB together with what it is compared with, and "
                f"{max(0, budget) / 2**30:.1f} GiB can be used"
            )
            self.skip(kind, case, name, reason)
        return groups

    def clear_skipped(self, kind: str, case: _Case) -> None:
        """Forget what an earlier run skipped: this one tries again."""
        rows = self.report["skipped"]
        self.report["skipped"] = [row for row in rows if not (_of(row, case) and row["kind"] == kind)]

    def skip(self, kind: str, case: _Case, name: str, reason: str) -> None:
        self.say(f"Skipped: {case}, {kind} of {name}: {reason}.")
        self.report["skipped"].append({**asdict(case), "contestant": name, "kind": kind, "reason": reason})

    def decode(self, case: _Case, subject: Subject, models: Models) -> None:
        chosen = subject.contestants(self.settings.contestants)
        for names in self.groups("decode", case, chosen, models):
            models.keep({chosen[name].role for name in names})
            self._decode_group(case, {name: chosen[name] for name in names}, models)
            self.save()

    def _decode_group(self, case: _Case, group: Mapping[str, Contestant], models: Models) -> None:
        settings = self.settings
        limits = Limits(models.dtype, self.device, settings.sweep_bytes)
        limits.measure()
        measured: list[dict[str, float]] = []
        with compiling() as compiled:
            runners: dict[str, Any] = {}
            for name, contestant in group.items():
                model = models.get(contestant.role)
                runners[name] = compiled(model) if contestant.compiled else model
            timings = time_decode(
                runners,
                case.context,
                caches={name: contestant.cache for name, contestant in group.items()},
                steps=settings.steps,
                rounds=settings.rounds,
                warmup=settings.warmup,
                first_warmup=settings.first_warmup,
                batch_size=case.batch,
                turn_seconds=settings.turn_seconds,
                before_round=lambda: measured.append(limits.measure()),
                progress=lambda done, total: self.progress(str(case), done, total),
            )
            # One graph per compiled contestant is enough: no shape changes.
            recompilations = compiled_graphs() - sum(contestant.compiled for contestant in group.values())
        found = median_limits(measured)
        new = self.pending("decode", case, list(group))
        for name in new:
            row = self._decode_row(case, name, group[name], timings[name], models, found)
            if group[name].compiled:
                row["recompilations"] = max(0, recompilations)
            self.report["decode"].append(row)
        for ours in (name for name, contestant in group.items() if contestant.role in OUR_ROLES):
            for name in group:
                if name != ours and (name in new or ours in new):
                    ratios = pair_ratios(timings[ours], timings[name])
                    self.report["ratios"].append(
                        {
                            **asdict(case),
                            "contestant": ours,
                            "against": name,
                            "times": statistics.median(ratios),
                            "least": min(ratios),
                            "most": max(ratios),
                        }
                    )

    def _decode_row(
        self,
        case: _Case,
        name: str,
        contestant: Contestant,
        timing: DecodeTiming,
        models: Models,
        limits: Mapping[str, float],
    ) -> dict[str, Any]:
        model = models.get(contestant.role)
        formula = models.cache_bytes(contestant, case.context) * case.batch
        if timing.cache_used_bytes != formula:
            raise ValueError(
                f"{case}: the cache of {name} holds {timing.cache_used_bytes:,} bytes and {formula:,} are "
                "expected from its shape. Its accounting is wrong, or it caches something else; nothing of it is kept."
            )
        weight_bytes = swept_weight_bytes(model)
        bytes_read = None if weight_bytes is None else weight_bytes + timing.cache_used_bytes
        gemv = limits["gemv_bytes_per_second"]
        limit = bandwidth(limits)

        def share(speed: float) -> float | None:
            return None if bytes_read is None else share_of_ceiling(bytes_read, speed, timing.median)

        return {
            **asdict(case),
            "contestant": name,
            "label": contestant.label,
            "ms_median": 1e3 * timing.median,
            "ms_p10": 1e3 * timing.p10,
            "ms_p90": 1e3 * timing.p90,
            "steps": len(timing.seconds),
            "tokens_per_second": timing.tokens_per_second,
            "cache_used_bytes": timing.cache_used_bytes,
            "cache_allocated_bytes": timing.cache_allocated_bytes,
            "cache_formula_bytes": formula,
            "weight_bytes_swept": weight_bytes,
            "cache_bytes_read": timing.cache_used_bytes,
            **limits,
            "ceiling_ms": None if bytes_read is None else 1e3 * bytes_read / limit,
            "share_of_ceiling": share(limit),
            "share_of_gemv": share(gemv),
            "flops_per_token": decode_flops(model, case.context),
            "bytes_per_token": None if bytes_read is None else bytes_read / case.batch,
            "load_average": load_average(),
            "turns": timing.rounds,
        }

    def prefill(self, case: _Case, subject: Subject, models: Models) -> None:
        """Time prompts of `case.context` tokens, without compiled contestants: they compile the decode step alone."""
        chosen = subject.contestants(self.settings.contestants)
        chosen = {name: chosen[name] for name in _uncompiled(chosen)}
        for names in self.groups("prefill", case, chosen, models, new_tokens=case.context):
            models.keep({chosen[name].role for name in names})
            timings = time_prefill(
                {name: models.get(chosen[name].role) for name in names},
                case.context,
                caches={name: chosen[name].cache for name in names},
                rounds=min(3, self.settings.rounds),
                batch_size=case.batch,
                progress=lambda done, total: self.progress(f"Prefill: {case}", done, total),
            )
            for name in self.pending("prefill", case, names):
                seconds = statistics.median(timings[name])
                self.report["prefill"].append(
                    {
                        **asdict(case),
                        "contestant": name,
                        "label": chosen[name].label,
                        "seconds": seconds,
                        "tokens_per_second": case.batch * case.context / seconds,
                    }
                )
            self.save()

    def memory(self, case: _Case, subject: Subject, models: Models) -> None:
        """Measure the memory of each contestant in a process of its own."""
        chosen = subject.contestants(self.settings.contestants)
        skipped = {row["contestant"] for row in self.report["skipped"] if _of(row, case) and row["kind"] == "decode"}
        pending = [name for name in self.pending("memory", case, list(chosen)) if name not in skipped]
        models.keep()
        self.clear_skipped("memory", case)
        for done, name in enumerate(pending, start=1):
            figures = measure_apart(
                subject.roles[chosen[name].role],
                name,
                dtype=case.dtype,
                batch_size=case.batch,
                context=case.context,
                warmup=self.settings.first_warmup,
                tokens=self.settings.memory_tokens,
                device=self.settings.device,
                seconds=4 * self.settings.turn_seconds,
            )
            if "error" in figures:
                self.skip("memory", case, name, f"its process failed ({figures['error']})")
            else:
                row = {**asdict(case), "contestant": name, "label": chosen[name].label, **figures}
                self.report["memory"].append(row)
            self.save()
            self.progress(f"Memory: {case}", done, len(pending))

    def save(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / REPORT, self.report)


def _of(row: Mapping[str, Any], case: _Case) -> bool:
    return all(row[name] == value for name, value in asdict(case).items())


def _uncompiled(chosen: Mapping[str, Contestant]) -> list[str]:
    return [name for name, contestant in chosen.items() if not contestant.compiled]
