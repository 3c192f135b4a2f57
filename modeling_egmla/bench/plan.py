"""The plan of a benchmark: how many cases are left, and about how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from egmla.utils.accounting import decode_attention_flops

from .contestants import Contestant, Models, Subject
from .limits import Limits, bandwidth
from .report import open_report
from .settings import BenchSettings


# Rough guesses, not calibrated against measured runs. A step takes this many times as long as its limit.
STEP_OVERHEAD = 2.5
COMPILE_SECONDS = 60.0
# Starting Python and loading a model, for each memory measurement.
PROCESS_SECONDS = 15.0
# Bytes per second at which a cache is filled with random numbers.
FILL_BYTES_PER_SECOND = 2e8


@dataclass(frozen=True)
class BenchPlan:
    """What a run will measure.

    Attributes:
        contestants (`dict[str, list[str]]`): names of each subject's contestants.
        decodes (`int`): pairs of a case and a contestant to time.
        done (`int`): how many of them an earlier run has finished.
        seconds (`float`): estimated time of the rest.
    """

    contestants: dict[str, list[str]]
    decodes: int
    done: int
    seconds: float


def plan_bench(
    subjects: Sequence[Subject], settings: BenchSettings, output: str | Path, resume: bool = True
) -> BenchPlan:
    """Count what is left to measure and estimate its time. Takes seconds: only the machine's limits are measured.

    Args:
        subjects (`Sequence[Subject]`): the models.
        settings (`BenchSettings`): how they are measured.
        output (`str` or `Path`): the folder of the run; finished cases in it are not counted again.
        resume (`bool`): as `run_bench`.

    Raises:
        ValueError, FileExistsError: for bad input, as `run_bench`.
    """
    settings.check()
    names = {subject.name: subject.contestants(settings.contestants) for subject in subjects}
    report = open_report(Path(output), subjects, settings.describe(), settings.device, resume)
    keys = ("subject", "dtype", "batch", "context", "contestant")
    finished = {tuple(row[key] for key in keys) for row in report["decode"]}
    limits = Limits(torch.float32, settings.device, settings.sweep_bytes).measure()
    seconds, decodes, done = 0.0, 0, 0
    for subject in subjects:
        for dtype in dict.fromkeys(settings.dtypes):
            models = Models(subject, getattr(torch, dtype), torch.device(settings.device))
            for batch in settings.batch_sizes:
                for context in settings.contexts:
                    for name, contestant in names[subject.name].items():
                        decodes += 1
                        if (subject.name, dtype, batch, context, name) in finished:
                            done += 1
                        else:
                            seconds += _case_seconds(models, contestant, batch, context, settings, limits)
    return BenchPlan({name: list(chosen) for name, chosen in names.items()}, decodes, done, seconds)


def _case_seconds(
    models: Models,
    contestant: Contestant,
    batch: int,
    context: int,
    settings: BenchSettings,
    limits: dict[str, float],
) -> float:
    """Estimated seconds of one contestant in one case."""
    role = "egmla" if contestant.role == "deepseek" else contestant.role
    weights = models.weight_bytes(role)
    parameters = weights / models.dtype.itemsize
    cache = models.cache_bytes(contestant, context) * batch
    config: Any = models.subject.roles[contestant.role].config
    flops = batch * (2 * parameters + decode_attention_flops(config, context))
    step = STEP_OVERHEAD * max((weights + cache) / bandwidth(limits), flops / limits["product_flops_per_second"])

    def one_round(steps: int) -> float:
        return min(steps * step, settings.turn_seconds + step)

    seconds = one_round(settings.first_warmup + settings.steps)
    seconds += (settings.rounds - 1) * one_round(settings.warmup + settings.steps)
    seconds += cache / FILL_BYTES_PER_SECOND + (COMPILE_SECONDS if contestant.compiled else 0.0)
    if settings.prefill_tokens and context == settings.contexts[0] and not contestant.compiled:
        flops = 2 * parameters * batch * settings.prefill_tokens
        seconds += (min(3, settings.rounds) + 1) * flops / limits["product_flops_per_second"]
    if settings.memory_tokens:
        decoding = min((settings.first_warmup + settings.memory_tokens) * step, 4 * settings.turn_seconds)
        seconds += PROCESS_SECONDS + decoding + cache / FILL_BYTES_PER_SECOND
    return seconds
