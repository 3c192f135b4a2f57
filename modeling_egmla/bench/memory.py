"""Measure the memory of one contestant in a process of its own: its peak, and what decoding adds.

`python -m egmla.bench.memory` reads the arguments of `measure` as JSON from stdin and prints its result as JSON.
"""

import ctypes
import gc
import json
import subprocess
import sys
from typing import Any

import torch
from transformers import AutoConfig

from egmla import EGMLAConfig, load_cpu_kernel  # also registers the architecture
from egmla.cpu_egmla import cpu_operators
from egmla.utils.accounting import cache_nbytes
from egmla.utils.machine import peak_resident_bytes, reset_peak_resident, resident_bytes
from egmla.utils.timing import Timer

from .contestants import CONTESTANTS, Role, compiling, make_model
from .decode import synthetic_cache


def measure_apart(role: Role, contestant: str, **options: Any) -> dict[str, Any]:
    """Measure the memory of a contestant in a new process with as many threads as this one.

    Args:
        role (`Role`): its model.
        contestant (`str`): its name in `CONTESTANTS`.
        **options: more arguments of `measure`.

    Returns:
        `dict`: as `measure`; or `error` with the last line that the process printed, when it failed.
    """
    options |= {"contestant": contestant, "folder": role.folder, "threads": torch.get_num_threads()}
    options["cpu_kernel"] = cpu_operators() is not None
    options["config"] = None if role.folder else {**role.config.to_dict(), "model_type": role.config.model_type}
    command = [sys.executable, "-m", "egmla.bench.memory"]
    done = subprocess.run(command, input=json.dumps(options), capture_output=True, text=True)
    if done.returncode:
        # A process that printed nothing was most likely killed for its memory.
        said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return {"error": said[-1]}
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(
    contestant: str,
    *,
    dtype: str,
    batch_size: int,
    context: int,
    warmup: int,
    tokens: int,
    device: str = "cpu",
    seconds: float = 240.0,
    folder: str | None = None,
    config: dict[str, Any] | None = None,
    threads: int = 1,
    cpu_kernel: bool = False,
) -> dict[str, Any]:
    """Fill a cache to `context` tokens, decode `warmup` and then `tokens` more, and measure this process's memory.

    Before each reading the C library returns freed memory to the system, so a reading holds only memory in use.
    Temporary memory shows in `decode_peak_bytes`.

    Args:
        contestant (`str`): name in `CONTESTANTS`.
        dtype, batch_size, context, device: as in `BenchSettings`, one of each.
        warmup, tokens (`int`): steps before the first reading, and between the two readings.
        seconds (`float`): a longer run ends early.
        folder, config (*optional*): the folder of the weights; the configuration if weights are random.
        threads (`int`): CPU threads.
        cpu_kernel (`bool`): use the CPU kernel.

    Returns:
        `dict`: bytes, resident on a CPU and allocated on a GPU: `weight_bytes`, `before_bytes`, `after_bytes`,
        `growth_bytes`, `decode_peak_bytes` (beyond `before_bytes`), `peak_bytes` (of the whole process);
        `cache_used_bytes`, `cache_allocated_bytes`, `cache_growth_bytes`; `tokens` decoded.
    """
    torch.set_num_threads(threads)
    if cpu_kernel:
        load_cpu_kernel()
    place = torch.device(device)
    timer = Timer(place)
    shape = EGMLAConfig() if config is None else AutoConfig.for_model(**config)
    model: Any = make_model(Role(shape, folder), getattr(torch, dtype)).to(place).eval()  # type: ignore[arg-type]
    chosen = CONTESTANTS[contestant]
    with compiling() as compiled:
        cache = None if chosen.cache is None else chosen.cache(model, context + warmup + tokens)
        cache = synthetic_cache(model, context, batch_size, cache=cache)
        runner = compiled(model) if chosen.compiled else model
        token = torch.zeros((batch_size, 1), dtype=torch.long, device=place)

        def step() -> torch.Tensor:
            return runner(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)

        for _ in range(warmup):
            token = step()
        used, allocated = cache_nbytes(cache)
        before = _held(place)
        peak = _peak(place)
        _reset_peak(place)
        done, spent = 0, 0.0
        while done < tokens and spent < seconds:
            token, taken = timer.measure(step)
            done, spent = done + 1, spent + taken
        decode_peak = _peak(place)
        after = _held(place)
        used_after, allocated_after = cache_nbytes(cache)
    return {
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "tokens": done,
        "before_bytes": before,
        "after_bytes": after,
        "growth_bytes": after - before,
        "decode_peak_bytes": decode_peak - before,
        "peak_bytes": max(peak, decode_peak),
        "cache_used_bytes": used_after,
        "cache_allocated_bytes": allocated_after,
        "cache_growth_bytes": used_after - used,
        "cache_allocated_growth_bytes": allocated_after - allocated,
        "growth_over_cache_growth": (after - before) / (used_after - used),
    }


def _held(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library
    if trim is not None:
        trim(0)
    return resident_bytes()


def _peak(device: torch.device) -> int:
    return peak_resident_bytes() if device.type != "cuda" else Timer(device).peak_bytes() or 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        Timer(device).reset_peak()
    else:
        reset_peak_resident()


if __name__ == "__main__":
    print(json.dumps(measure(**json.load(sys.stdin))))
