"""Time decode steps with the compiled CPU kernel and without, interleaved, and one layer's attention alone.

    python tests/benchmarks/cpu_kernel.py --context 2048,8192,32768 --dtype float32,bfloat16 --threads 2

`egmla-kv64-120m` with random weights, batch 1. The last line of the output is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch

from egmla import EGMLAForCausalLM, cpu_egmla, load_cpu_kernel
from egmla.bench.contestants import CONTESTANTS, compiling
from egmla.bench.decode import pair_ratios, time_decode
from egmla.bench.limits import Limits
from egmla.configuration import load_preset
from egmla.entries_egmla import DenseEntries
from egmla.utils.provenance import software_versions


PRESET = "egmla-kv64-120m"


class Switched:
    """Wrap a model to run with the kernel or without it."""

    def __init__(self, model, runner, operators):
        self.model, self.runner, self.operators = model, runner, operators

    def __call__(self, *args, **kwargs):
        cpu_egmla.OPERATORS = self.operators
        return self.runner(*args, **kwargs)

    @property
    def _orig_mod(self):  # filling caches needs the model that is not compiled
        return self.model

    def __getattr__(self, name):
        return getattr(self.model, name)


def time_steps(model, context: int, names: list[str], rounds: int) -> list[dict]:
    """Return a row per contestant: medians with and without the kernel, and ratios over pairs of one round."""
    with compiling() as compiled:
        runners = {name: compiled(model) if CONTESTANTS[name].compiled else model for name in names}
        models, caches = {}, {}
        for name in names:
            for suffix, operators in (("", torch.ops.egmla), (" without", None)):
                models[name + suffix] = Switched(model, runners[name], operators)
                caches[name + suffix] = CONTESTANTS[name].cache
        timings = time_decode(models, context, caches=caches, rounds=rounds, steps=4, warmup=1, first_warmup=4)
    rows = []
    for name in names:
        ours, without = timings[name], timings[name + " without"]
        rows.append(
            {
                "contestant": name,
                "context": context,
                "dtype": str(model.dtype).removeprefix("torch."),
                "ms": 1e3 * ours.median,
                "ms_without": 1e3 * without.median,
                "times_without": statistics.median(pair_ratios(ours, without)),
                "times_of_full": statistics.median(pair_ratios(timings["egmla"], ours)),
                "times_of_full_without": statistics.median(pair_ratios(timings["egmla without"], without)),
            }
        )
    return rows


@torch.no_grad()
def time_layer(config, context: int, dtype: torch.dtype, rounds: int) -> dict:
    """Return milliseconds of one layer's attention, interleaved over all layers' entries, and of reading them."""
    width, rank = config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
    layers = [torch.randn(1, 1, context, width).to(dtype) for _ in range(config.num_hidden_layers)]
    query = torch.randn(1, config.num_attention_heads, 1, width).to(dtype)
    seconds: dict[str, list[float]] = {"kernel": [], "without": []}
    for _ in range(rounds + 1):
        for name, operators in (("kernel", torch.ops.egmla), ("without", None)):
            cpu_egmla.OPERATORS = operators
            start = time.perf_counter()
            for entries in layers:
                DenseEntries(entries, rank).attend(query, None, 0.1)
            seconds[name].append((time.perf_counter() - start) / len(layers))
    reading = layers[0].nbytes / Limits(dtype).read()
    medians = {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}
    return {"context": context, "dtype": str(dtype).removeprefix("torch."), "reading": 1e3 * reading, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", default="2048,8192,32768")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--contestants", default="egmla,egmla-compiled,egmla-int8,egmla-int4")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load_cpu_kernel()
    config = load_preset(PRESET)
    names = list(dict.fromkeys(["egmla", *options.contestants.split(",")]))
    layers, steps = [], []
    for dtype in (getattr(torch, name) for name in options.dtype.split(",")):
        model = EGMLAForCausalLM(config).to(dtype).eval()
        for context in map(int, options.context.split(",")):
            layers.append(time_layer(config, context, dtype, options.rounds))
            print(layers[-1], flush=True)
            for row in time_steps(model, context, names, options.rounds):
                steps.append(row)
                print(row, flush=True)
    print(json.dumps({"layers": layers, "steps": steps, "threads": options.threads, "versions": software_versions()}))


if __name__ == "__main__":
    main()
