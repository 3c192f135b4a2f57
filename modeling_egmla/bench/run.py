"""The benchmark: contestants in turns over formats, batches and contexts, against what the machine allows.

Each case that is finished goes into `bench.json`, and a run that was interrupted goes on there. What does not fit into
memory is left out with the reason. No figure is taken before `check_parity` has passed for all contestants.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from egmla.cpu_egmla import cpu_operators
from egmla.utils.accounting import decode_flops, swept_weight_bytes
from egmla.utils.files import write_json
from egmla.utils.machine import device_bytes, load_average
from egmla.utils.plotting import check_matplotlib
from egmla.utils.progress import Progress, Say
from egmla.utils.provenance import software_versions

from .contestants import OUR_ROLES, Contestant, Models, Subject, check_lengths, compiled_graphs, compiling
from .decode import DecodeTiming, pair_ratios, time_decode, time_prefill
from .limits import SWEEP_BYTES, Limits, bandwidth, median_limits
from .memory import measure_apart
from .parity import check_parity
from .plots import plot_bench
from .report import REPORT, open_report, share_of_ceiling, slopes


DTYPES = ("float32", "bfloat16", "float16")
# Of the memory that is free, this much is used: other programs take some meanwhile, and estimates are estimates.
SHARE_OF_MEMORY = 0.9


@dataclass(frozen=True)
class BenchSettings:
    """What to measure and how.

    Attributes:
        contexts (`tuple[int, ...]`): tokens in the cache while decoding is timed.
        batch_sizes (`tuple[int, ...]`): sequences at once.
        dtypes (`tuple[str, ...]`): formats of weights and cache, of `DTYPES`.
        contestants (`tuple[str, ...]`): names in `CONTESTANTS`; empty for all that a subject has.
        rounds (`int`): turns of each contestant.
        steps (`int`): timed steps of a turn.
        first_warmup, warmup (`int`): steps before these in the first turn, and in each other.
        turn_seconds (`float`): a turn ends early beyond this, after one timed step at least.
        prefill_tokens (`int`): tokens of the prompts that prefill is timed on; 0 leaves it out.
        memory_tokens (`int`): tokens decoded in a process of its own per case, whose memory is followed; 0 for none.
        device (`str`): where to run.
        sweep_bytes (`int`): bytes of the matrices that the machine's limits are measured on.
    """

    contexts: tuple[int, ...] = (512, 2048, 8192, 32768)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    contestants: tuple[str, ...] = ()
    rounds: int = 5
    steps: int = 4
    first_warmup: int = 3
    warmup: int = 1
    turn_seconds: float = 60.0
    prefill_tokens: int = 512
    memory_tokens: int = 0
    device: str = "cpu"
    sweep_bytes: int = SWEEP_BYTES

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that occurs."""
        more = max(self.first_warmup, self.warmup) + self.steps
        return max(max(self.contexts) + max(more, self.memory_tokens + self.first_warmup), self.prefill_tokens)

    def check(self) -> None:
        """Raises `ValueError` for what cannot be measured."""
        for name in ("contexts", "batch_sizes", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"No {name.replace('_', ' ')} given; at least one is required.")
        for name, numbers, least in (
            ("context", self.contexts, 1),
            ("batch", self.batch_sizes, 1),
            ("rounds", (self.rounds,), 1),
            ("steps", (self.steps,), 1),
            ("warm-up steps of the first turn", (self.first_warmup,), 0),
            ("warm-up steps", (self.warmup,), 0),
            ("prefill tokens", (self.prefill_tokens,), 0),
            ("memory tokens", (self.memory_tokens,), 0),
        ):
            for number in numbers:
                if number < least:
                    raise ValueError(f"{name} {number}: must be at least {least}.")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}.")
        if not self.turn_seconds > 0:
            raise ValueError(f"turn seconds {self.turn_seconds}: must be above 0.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r}: must be cpu or cuda.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda': PyTorch finds no CUDA device here; use cpu.")

    def describe(self) -> dict[str, Any]:
        """What figures depend on: what must be the same for them to stand in one report."""
        kept = ("rounds", "steps", "first_warmup", "warmup", "turn_seconds", "device")
        settings = {name: getattr(self, name) for name in kept}
        here = {"threads": torch.get_num_threads(), "cpu_kernel": cpu_operators() is not None}
        return settings | here | {"versions": software_versions()}


def run_bench(
    subjects: Sequence[Subject],
    settings: BenchSettings,
    output: str | Path,
    *,
    progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Measures, writes `bench.json` and its plots, and returns what is in it.

    Cases that an earlier run finished in the same folder, with the same settings, are not measured again.

    Args:
        subjects (`Sequence[Subject]`): what to measure.
        settings (`BenchSettings`): how.
        output (`str` or `Path`): folder for `bench.json`, `ms_per_token.png` and `cache_bytes.png`.
        progress (*optional*): called with (stage, done, total).
        say (*optional*): called with what a reader should know meanwhile.

    Returns:
        `dict`: format, settings, commit, machine, subjects, and rows: `parity`, `decode`, `ratios`, `prefill`,
        `memory`, `skipped`, `slopes`.

    Raises:
        ValueError, ImportError: for bad input, before any work.
        ParityError: when a contestant's logits are wrong, before any timing.
    """
    settings.check()
    if not subjects:
        raise ValueError("Nothing to measure: give a preset, or the folders of a source and its conversion.")
    for subject in subjects:
        subject.contestants(settings.contestants)
        check_lengths(subject, settings.longest)
    check_matplotlib()
    output = Path(output)
    report = open_report(output, subjects, settings.describe(), settings.device)
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


def pack(
    needs: Mapping[str, tuple[int, int]],
    weights: Mapping[str, Mapping[str, int]],
    ours: Sequence[str],
    pending: Sequence[str],
    budget: int,
) -> tuple[list[list[str]], dict[str, int]]:
    """Groups of contestants that fit into memory together, each with ours in it to be set against.

    Where there is no room for a contestant beside all of ours, the first of ours will do.

    Args:
        needs (`Mapping[str, tuple[int, int]]`): bytes each contestant holds beyond weights, and takes in its turn.
        weights (`Mapping[str, Mapping[str, int]]`): bytes of the weights of each role a contestant needs.
        ours (`Sequence[str]`): contestants to have in every group.
        pending (`Sequence[str]`): contestants to be measured.
        budget (`int`): bytes there are.

    Returns:
        `tuple`: the groups, and the bytes that each contestant left out would have needed.
    """

    def together(names: Sequence[str]) -> int:
        roles = {role: size for name in names for role, size in weights[name].items()}
        held = sum(needs[name][0] for name in names)
        return sum(roles.values()) + held + max((needs[name][1] for name in names), default=0)

    left_out: dict[str, int] = {}
    base: list[str] = []
    for name in ours:
        if together([*base, name]) <= budget:
            base.append(name)
        elif name in pending:
            left_out[name] = together([*base, name])
    groups: list[list[str]] = []
    for name in pending:
        if name in ours:
            continue
        groups_with_room = [group for group in groups if together([*group, name]) <= budget]
        new_groups = [[*some, name] for some in (base, base[:1]) if together([*some, name]) <= budget]
        if groups_with_room:
            groups_with_room[0].append(name)
        elif new_groups:
            groups.append(new_groups[0])
        else:
            left_out[name] = together([*base[:1], name])
    # Ours are measured even where nothing else is left to be, or to be set against all of them.
    if any(name in pending and not any(name in group for group in groups) for name in base):
        groups.insert(0, base)
    return groups, left_out


@dataclass(frozen=True)
class _Case:
    subject: str
    dtype: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.subject}, {self.dtype}, batch {self.batch}, {self.context} tokens"


class _Bench:
    """One run: what it adds to the report, and where it writes that."""

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
        """In an order that random weights survive: they are made anew for each format."""
        return sorted(dict.fromkeys(self.settings.dtypes), key=DTYPES.index)

    def pending(self, kind: str, case: _Case, names: Sequence[str]) -> list[str]:
        """Names without a row of a kind yet."""
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
        """The parity gate of everything still to be measured, before the first figure."""
        jobs = [(subject, dtype) for subject in subjects for dtype in self.dtypes() if self.unfinished(subject, dtype)]
        for done, (subject, dtype) in enumerate(jobs, start=1):
            models = Models(subject, getattr(torch, dtype), self.device)
            rows = check_parity(models, subject.contestants(self.settings.contestants), self.settings.longest)
            kept = [row for row in self.report["parity"] if (row["subject"], row["dtype"]) != (subject.name, dtype)]
            self.report["parity"] = kept + [{"subject": subject.name, "dtype": dtype, **row} for row in rows]
            self.progress("Parity gate", done, len(jobs))

    def measure(self, subject: Subject) -> None:
        """Everything of one subject that has no row yet."""
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
        """Groups still to be measured that fit into memory; says and notes what does not fit."""
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
                f"needs about {need / 2**30:.1f} GiB together with what it is set against, and "
                f"{max(0, budget) / 2**30:.1f} GiB can be used"
            )
            self.skip(kind, case, name, reason)
        return groups

    def clear_skipped(self, kind: str, case: _Case) -> None:
        """Forgets what an earlier run left out: this one tries again."""
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
            # One graph each is enough where no size changes.
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
                "expected of its shape; no figure of it is kept. Its accounting is wrong, or it caches something else."
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
            "turns": timing.turns,
        }

    def prefill(self, case: _Case, subject: Subject, models: Models) -> None:
        """Prompts of `case.context` tokens. Compiled contestants are left out: they compile the decode step alone."""
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
        """Each contestant in a process of its own."""
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
