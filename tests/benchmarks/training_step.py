"""Measure time and memory of a training step: EG-MLA, MLA of the same rank, and Transformers' DeepSeek-V3.

    python tests/benchmarks/training_step.py
    python tests/benchmarks/training_step.py --config '{"num_hidden_layers": 4}' --tokens 512 --batch 2 --rounds 6
    python tests/benchmarks/training_step.py --reproduction --tokens 256 --batch 8      # variants of reproduction.py

A step is forward, backward and AdamW (fused, as in Trainer) on random tokens. Contestants are interleaved in one
process. Times are medians, and ratios are over pairs of one round, to the first contestant. Peak memory is
measured in a process of its own, beyond the start. Gate tables are frozen there, and their weights subtracted. The
last line of the output is one JSON object.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import reproduction
import torch
from transformers import AutoModelForCausalLM

from egmla import EGMLAConfig
from egmla.conversion.deepseek_export import deepseek_config
from egmla.utils.machine import peak_resident_bytes, reset_peak_resident, resident_bytes


CONTESTANTS: dict[str, dict[str, Any]] = {
    "mla": {"kv_gate": None},
    "egmla": {},
    "egmla-table": {"kv_gate_embedding_dim": 256},
    "deepseek": {"kv_gate": None},
}


def make_config(name: str, options: argparse.Namespace) -> Any:
    """Return the configuration of a contestant."""
    if options.reproduction:
        return reproduction.make_config(name)
    config = EGMLAConfig(**{**options.config, **CONTESTANTS[name]})
    return deepseek_config(config) if name == "deepseek" else config


def make_step(name: str, options: argparse.Namespace, train_tables: bool = True) -> tuple[Any, Any]:
    """Return a contestant's model, and a function that runs one step and returns its seconds."""
    config = make_config(name, options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    for name_, parameter in model.named_parameters():
        parameter.requires_grad_(train_tables or "kv_gate_embedding" not in name_)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (options.batch, options.tokens))

    def step() -> float:
        started = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return model, step


def measure_memory(name: str, options: argparse.Namespace) -> None:
    """Print this process's peak in bytes over three steps, without gate tables."""
    tiny: Any = EGMLAConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    AutoModelForCausalLM.from_config(tiny)(torch.ones(1, 8, dtype=torch.long)).logits.sum().backward()
    gc.collect()
    before = resident_bytes()
    reset_peak_resident()
    model, step = make_step(name, options, train_tables=False)
    for _ in range(3):
        step()
    tables = sum(p.nbytes for name, p in model.named_parameters() if "kv_gate_embedding" in name)
    print(peak_resident_bytes() - before - tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=json.loads, default={}, help="fields that differ from EGMLAConfig()")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--reproduction", action="store_true", help="the toy models of reproduction.py instead")
    parser.add_argument("--memory", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.memory, options)
        return

    names = list(reproduction.VARIANTS if options.reproduction else CONTESTANTS)
    base = names[0]
    peaks = {}
    for name in names:
        again = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
        peaks[name] = int(subprocess.run(again, check=True, capture_output=True, text=True).stdout.split()[-1])
    steps = {name: make_step(name, options)[1] for name in names}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step())
    result = {}
    for name in names:
        pairs = zip(times[name], times[base], strict=True)
        result[name] = {
            "ms_median": 1000 * statistics.median(times[name]),
            "time_over_first": statistics.median(ours / theirs for ours, theirs in pairs),
            "peak_bytes": peaks[name],
            "memory_over_first": peaks[name] / peaks[base],
        }
        row = result[name]
        print(
            f"{name:26} {row['ms_median']:8.1f} ms ({row['time_over_first']:.3f} of {base}), peak "
            f"{peaks[name] / 2**20:,.0f} MiB ({row['memory_over_first']:.3f})"
        )
    print(json.dumps({"tokens": options.tokens, "batch": options.batch, "threads": torch.get_num_threads(), **result}))


if __name__ == "__main__":
    main()
