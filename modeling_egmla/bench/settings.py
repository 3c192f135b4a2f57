"""Settings of a benchmark: what to measure and how."""

from dataclasses import dataclass
from typing import Any

import torch

from egmla.cpu_egmla import cpu_operators
from egmla.utils.provenance import software_versions

from .limits import SWEEP_BYTES


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure and how.

    Attributes:
        contexts (`tuple[int, ...]`): tokens in the cache while decoding is timed.
        batch_sizes (`tuple[int, ...]`): sequences at once.
        dtypes (`tuple[str, ...]`): dtypes of weights and cache, from `DTYPES`.
        contestants (`tuple[str, ...]`): names in `CONTESTANTS`; empty for all of a subject.
        rounds (`int`): rounds, in each of which every contestant is timed once.
        steps (`int`): timed steps of a contestant in a round.
        first_warmup, warmup (`int`): untimed steps before the timed ones, in the first round and in each later one.
        turn_seconds (`float`): a contestant that takes longer in a round stops early, after at least one timed step.
        prefill_tokens (`int`): tokens of the prompts that prefill is timed on; 0 skips prefill.
        memory_tokens (`int`): tokens decoded per case in a separate process that measures memory; 0 skips it.
        device (`str`): where to run.
        sweep_bytes (`int`): bytes of the matrices that the machine's limits are measured with.
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
        """Tokens of the longest sequence of the run."""
        more = max(self.first_warmup, self.warmup) + self.steps
        return max(max(self.contexts) + max(more, self.memory_tokens + self.first_warmup), self.prefill_tokens)

    def check(self) -> None:
        """Raise `ValueError` for settings that cannot be measured."""
        for name in ("contexts", "batch_sizes", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"No {name.replace('_', ' ')} given; at least one is required.")
        for name, numbers, least in (
            ("context", self.contexts, 1),
            ("batch", self.batch_sizes, 1),
            ("rounds", (self.rounds,), 1),
            ("steps", (self.steps,), 1),
            ("warm-up steps of the first round", (self.first_warmup,), 0),
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
        """Settings that results depend on; they must be the same for all results of one report."""
        kept = ("rounds", "steps", "first_warmup", "warmup", "turn_seconds", "device")
        settings = {name: getattr(self, name) for name in kept}
        here = {"threads": torch.get_num_threads(), "cpu_kernel": cpu_operators() is not None}
        return settings | here | {"versions": software_versions()}
