"""Compare the growth of a decode step with the context with the time to read the cache's further bytes.

    python tests/benchmarks/decode_slope.py --context 2048,32768 --dtype float32 --threads 2

Random weights, batch 1, with the CPU kernel; the fixed-size cache compiled, and the growing cache eager. Unlike in
`egmla bench`, contexts are interleaved and reading is measured in each round. So a machine whose speed changes
within minutes changes a whole round. Fixed caches of both contexts have the capacity of the long one. Reading is
measured in two ways: a plain sum, the most the machine gives, and GEMV, which is how decoding reads weights. Each
round's line also has the speed of large matmuls, which shows quiet rounds. The last line of the output is one JSON
object.
"""

import argparse
import json
import statistics

import torch

from egmla import EGMLACache, EGMLAForCausalLM, load_cpu_kernel
from egmla.bench.contestants import compiling, fixed_cache
from egmla.bench.decode import rewind, synthetic_cache, time_steps
from egmla.bench.limits import Limits
from egmla.configuration import load_preset
from egmla.utils.provenance import software_versions


WARMUP = 2  # untimed steps before the timed ones of a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="egmla-kv64-120m")
    parser.add_argument("--context", default="2048,32768", help="a short one and a long one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: at least 2 are required, for a median and deciles.")
    short, long = map(int, options.context.split(","))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load_cpu_kernel()
    config = load_preset(options.preset)
    model = EGMLAForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    turn = WARMUP + options.steps
    room = long + turn
    makers = {"compiled": lambda: fixed_cache(model, room), "eager": lambda: EGMLACache(config)}
    caches = {
        (name, context): synthetic_cache(model, context, 1, cache=make())
        for name, make in makers.items()
        for context in (short, long)
    }
    limits = Limits(model.dtype)
    further = (long - short) * config.cache_elements_per_token * model.dtype.itemsize
    ways = {"reading": limits.read, "gemv": limits.gemv}
    ratios = {(name, way): [] for name in makers for way in ways}
    steps, rounds = {key: [] for key in caches}, []
    with compiling() as compiled:
        runners = {"compiled": compiled(model), "eager": model}
        for number in range(options.rounds + 1):
            seconds_of = {way: further / statistics.median(speed() for _ in range(3)) for way, speed in ways.items()}
            for (name, context), cache in caches.items():
                seconds = time_steps(runners[name], cache, options.steps, WARMUP)
                rewind(cache, turn)
                steps[name, context].append(statistics.median(seconds))
            if number:  # the first round warms up
                for name, way in ratios:
                    ratios[name, way].append((steps[name, long][-1] - steps[name, short][-1]) / seconds_of[way])
                rounds.append(
                    {"gflops": round(limits.multiply() / 1e9)}
                    | {f"{way}_ms": round(1e3 * seconds, 1) for way, seconds in seconds_of.items()}
                    | {f"{name}_times_{way}": round(values[-1], 2) for (name, way), values in ratios.items()}
                )
                print(rounds[-1], flush=True)
    result = {"preset": options.preset, "dtype": options.dtype, "threads": options.threads, "steps": options.steps}
    result["rounds"] = rounds
    for name in makers:
        result[name] = {
            "ms": {context: 1e3 * statistics.median(steps[name, context][1:]) for context in (short, long)}
        }
        for way in ways:
            deciles = statistics.quantiles(ratios[name, way], n=10)
            result[name][f"times_{way}"] = statistics.median(ratios[name, way])
            result[name][f"times_{way}_p10_p90"] = [deciles[0], deciles[-1]]
    print(json.dumps(result | {"versions": software_versions()}))


if __name__ == "__main__":
    main()
