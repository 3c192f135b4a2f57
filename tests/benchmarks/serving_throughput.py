"""Measure requests and tokens a second of folders that vLLM serves, each with the same bytes of cache.

    python tests/benchmarks/serving_throughput.py CONVERTED SOURCE --cache-mb 96 --in-flight 1 8 32 --rounds 2

Each folder has an engine in a process of its own, and their rounds are interleaved. A round sends many requests of
random ids at once. It ends when all of them are answered. The output is a Markdown table. Column "running" is the most
requests that ran at once. Column "preempted" counts those put back because the cache was full. Column "fit" is how
many requests the cache holds, which a round of just as many checks.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "KMP_BLOCKTIME": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def answer_all(engine, count: int, options, seed: int) -> dict:
    """Send requests at once; return seconds, the most that ran at once, and preemptions."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.metrics.reader import Counter

    def preempted() -> int:
        found = [metric for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"]
        return sum(metric.value for metric in found if isinstance(metric, Counter))

    generator, scheduler = torch.Generator().manual_seed(seed), engine.engine_core.engine_core.scheduler
    sampling = SamplingParams(max_tokens=options.new, temperature=0, ignore_eos=True, detokenize=False)
    before, running, started = preempted(), 0, time.perf_counter()
    for idx in range(count):
        ids = torch.randint(10, 10_000, (options.prompt,), generator=generator).tolist()
        engine.add_request(f"{seed}-{idx}", {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        engine.step()
        running = max(running, len(scheduler.running))
    return {"seconds": time.perf_counter() - started, "running": running, "preempted": preempted() - before}


def work(options) -> None:
    """Serve one folder: read how many requests, write what was measured, one JSON object a line."""
    from vllm import LLM

    served = LLM(
        options.folders[0],
        dtype=options.dtype,
        enforce_eager=options.eager,
        block_size=options.block,
        kv_cache_memory_bytes=int(options.cache_mb * 2**20),
        max_model_len=options.prompt + options.new,
        max_num_seqs=max(256, *options.in_flight),
        max_num_batched_tokens=options.step_tokens,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=False,
    )
    config = served.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    specs = [spec for layer in layers if (spec := layer.get_kv_cache_spec(config)) is not None]
    token_bytes = sum(spec.page_size_bytes for spec in specs) // options.block
    blocks_of_one = -(-(options.prompt + options.new) // options.block)
    fit = (config.cache_config.num_gpu_blocks - 1) // blocks_of_one  # vLLM keeps a block for itself
    answer_all(served.llm_engine, 2, options, 0)
    print(json.dumps({"fit": fit, "token_bytes": token_bytes}), flush=True)
    for seed, line in enumerate(sys.stdin, 1):
        print(json.dumps(answer_all(served.llm_engine, json.loads(line), options, seed)), flush=True)


class Contestant:
    """A folder's engine in a process of its own."""

    def __init__(self, folder: str, arguments: list[str]):
        self.name = Path(folder).name
        self.process = subprocess.Popen(
            [sys.executable, __file__, folder, "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **{k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}},
        )
        self.facts = self.read()

    def read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"The engine of {self.name} ended; its messages are above.")

    def answer(self, count: int) -> dict:
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="folders that vLLM serves")
    parser.add_argument("--cache-mb", type=float, default=96.0, help="memory of each engine's cache, in MiB")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 32], help="requests sent at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--block", type=int, default=32, help="tokens of a page")
    parser.add_argument("--step-tokens", type=int, default=512, help="most tokens that a step computes")
    parser.add_argument("--rounds", type=int, default=2, help="interleaved rounds")
    parser.add_argument("--dtype", default="float32", help="of weights and cache")
    parser.add_argument("--eager", action="store_true", help="do not compile, which takes minutes on a CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    contestants = [Contestant(folder, sys.argv[1 + len(options.folders) :]) for folder in options.folders]
    print(f"Load of the machine {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; {' '.join(sys.argv[1:])}\n")
    print("| folder | bytes of a token | fit | in flight | running | preempted | requests/s | tokens/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in [*options.in_flight, None]:
        rounds: dict[str, list[dict]] = {one.name: [] for one in contestants}
        for _ in range(options.rounds if count else 1):
            for one in contestants:
                rounds[one.name].append(one.answer(count or one.facts["fit"]))
        for one in contestants:
            sent, measured = count or one.facts["fit"], rounds[one.name]
            rates = sorted(sent / each["seconds"] for each in measured)
            running, preempted = (max(each[key] for each in measured) for key in ("running", "preempted"))
            tokens = [f"{rate * options.new:.1f}" for rate in (median(rates), rates[0], rates[-1])]
            cells = [one.name, f"{one.facts['token_bytes']:,}", one.facts["fit"], sent, running, preempted]
            cells += [f"{median(rates):.2f}", f"{tokens[0]} ({tokens[1]} to {tokens[2]})"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    for one in contestants:
        one.process.stdin.close()
        one.process.wait(60)


if __name__ == "__main__":
    main()
