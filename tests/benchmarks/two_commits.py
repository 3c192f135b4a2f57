"""Compare the time of a decode step between two installations of this package, interleaved.

    python tests/benchmarks/two_commits.py BEFORE/bin/python AFTER/bin/python --context 512,8192 --threads 2

Each interpreter has one of the two commits installed. One process each holds model and cache; only one of them
computes at a time, a few steps each. So a machine whose speed changes within seconds changes both. Random weights,
batch 1, growing cache, CPU kernel where it loads. The last line of the output is one JSON object: medians of each and
the median of the paired ratios with a 95 % interval (bootstrap).
"""

import argparse
import json
import random
import statistics
import subprocess

from egmla.utils.provenance import software_versions


WORKER = """
import sys, time
import torch
from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM, load_cpu_kernel
from egmla.configuration import load_preset

preset, context, dtype, threads, steps, quantization = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
kernel = load_cpu_kernel()
model = EGMLAForCausalLM(load_preset(preset)).to(getattr(torch, dtype)).eval()
cache = EGMLACache(model.config, quantization=None if quantization == "none" else quantization)
token = torch.ones(1, 1, dtype=torch.long)
with torch.no_grad():
    for layer_idx, rank in enumerate(model.config.layer_kv_lora_ranks):
        widths = rank, model.config.qk_rope_head_dim
        cache.append(*(torch.randn(1, 1, int(context), width, dtype=model.dtype) for width in widths), layer_idx)
    print("ready", flush=True)
    for _ in sys.stdin:
        model(token, past_key_values=cache)  # wakes the caches of the processor up, untimed
        start = time.perf_counter()
        for _ in range(int(steps)):
            model(token, past_key_values=cache)
        seconds = time.perf_counter() - start
        cache.crop(-int(steps) - 1)
        print(seconds / int(steps) * 1e3, flush=True)
"""


class Worker:
    """A process that times decode steps of one installation when asked."""

    def __init__(self, python: str, *settings: object):
        command = [python, "-c", WORKER, *map(str, settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{python}: the process ended before its first step; see its error above.")

    def time(self) -> float:
        """Return milliseconds per step."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def interval(ratios: list[float]) -> list[float]:
    """Return the 95 % interval of the median, by 2,000 resamplings."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return [round(medians[50], 4), round(medians[1949], 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="interpreter that has the old commit installed")
    parser.add_argument("after", help="interpreter that has the new one")
    parser.add_argument("--preset", default="egmla-kv64-120m")
    parser.add_argument("--context", default="512,8192", help="tokens in the cache, several with commas")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="none", help="none, int8 or int4")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = []
    for context in map(int, options.context.split(",")):
        settings = options.preset, context, options.dtype, options.threads, options.steps, options.quantization
        workers = [Worker(options.before, *settings), Worker(options.after, *settings)]
        pairs = []
        for turn in range(options.pairs):
            # Who begins changes: the second may profit from a machine that has just become quiet.
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            found = {which: workers[which].time() for which in order}
            pairs.append((found[0], found[1]))
        for worker in workers:
            worker.close()
        ratios = [after / before for before, after in pairs]
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        results.append(
            {
                "context": context,
                "before_ms": round(before, 2),
                "after_ms": round(after, 2),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_interval": interval(ratios),
            }
        )
        print(f"{context:,} tokens: {before:.2f} ms before, {after:.2f} after, ratio {results[-1]['ratio']:.3f}")
    settings = {key: value for key, value in vars(options).items() if key not in ("before", "after", "context")}
    print(json.dumps({"settings": settings, "results": results, "software": software_versions()}))


if __name__ == "__main__":
    main()
