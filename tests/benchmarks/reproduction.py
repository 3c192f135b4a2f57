"""Test the paper's claim at toy scale: does the embedding gate let the latent shrink without loss?

    python tests/benchmarks/reproduction.py --data train-1.txt --data train-2.txt --eval-data valid.txt --output repro
    python tests/benchmarks/reproduction.py --output repro --report

Trains small models from new weights with the engine of `egmla train`, on the same tokens in the same order. All
variants of a seed run before the next seed. Every finished run is a line of `results.jsonl` in the output folder,
and lines from other machines may be added. A killed command resumes, in the middle of a run too. At the end, or
with --report alone, it writes a table with confidence intervals, `table.md`, and `reproduction.png`.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.commands.common import quiet_transformers
from egmla.training.from_scratch import DEFAULTS, scratch_settings, train_tokenizer
from egmla.training.run import Job, run_job
from egmla.training.run_folders import RunFolders
from egmla.utils.accounting import cache_elements_per_layer, count_parameters, meta_model


SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
LATENT = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
RANK = 128  # r; a quarter is 32, a sixteenth 8
TABLE = 85  # width of a gate table; a third of the hidden size, as in the paper
# Width, depth, heads and MLP are equal. Latent attention rotates half of each query. Llamas (those with
# `key_value_heads`) rotate all of it.
VARIANTS: dict[str, dict[str, Any]] = {
    "MLA r": {"kv_lora_rank": RANK, "kv_gate": None},
    "MLA r/4": {"kv_lora_rank": RANK // 4, "kv_gate": None},
    "EG-MLA r/4, table": {"kv_lora_rank": RANK // 4, "kv_gate_embedding_dim": TABLE},
    "EG-MLA r/4, input": {"kv_lora_rank": RANK // 4},
    "MLA r/16": {"kv_lora_rank": RANK // 16, "kv_gate": None},
    "EG-MLA r/16, table": {"kv_lora_rank": RANK // 16, "kv_gate_embedding_dim": TABLE},
    "EG-MLA r/16, input": {"kv_lora_rank": RANK // 16},
    "EG-MLA r, table": {"kv_lora_rank": RANK, "kv_gate_embedding_dim": TABLE},
    "EG-MLA r, input": {"kv_lora_rank": RANK},
    "MHA": {"key_value_heads": 4},
    "GQA-2": {"key_value_heads": 2},
    "EG-MLA r/4, table 16": {"kv_lora_rank": RANK // 4, "kv_gate_embedding_dim": 16},
    "EG-MLA r/4, table 256": {"kv_lora_rank": RANK // 4, "kv_gate_embedding_dim": 256},
    "EG-MLA r/4, expanded": {"kv_lora_rank": RANK // 4, "kv_gate": "expanded"},
    "EG-MLA r/4, expanded table": {
        "kv_lora_rank": RANK // 4,
        "kv_gate": "expanded",
        "kv_gate_embedding_dim": TABLE,
    },
}
# Differences for the paper's claim: the first minus the second, paired by seed.
CLAIMS = (
    ("MLA r/4", "MLA r"),
    ("EG-MLA r/4, table", "MLA r"),
    ("EG-MLA r/4, input", "MLA r"),
    ("EG-MLA r/4, table", "MLA r/4"),
    ("EG-MLA r/4, input", "MLA r/4"),
    ("MLA r/16", "MLA r/4"),
    ("EG-MLA r/16, table", "MLA r/16"),
    ("EG-MLA r/16, input", "MLA r/16"),
    ("EG-MLA r, table", "MLA r"),
    ("EG-MLA r/4, expanded", "MLA r"),
    ("EG-MLA r/4, expanded", "EG-MLA r/4, input"),
    ("EG-MLA r/4, expanded table", "EG-MLA r/4, table"),
    ("EG-MLA r/16, table", "MLA r"),
    ("MLA r", "MHA"),
)
# Runs are comparable only if these are equal.
CONDITIONS = ("tokens", "batch_size", "eval_tokens", "learning_rate", "texts")
# Two-sided 95 % points of Student's t by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def make_config(variant: str) -> Any:
    """Return the configuration of a variant."""
    fields = dict(VARIANTS[variant])
    heads = fields.pop("key_value_heads", None)
    if heads is not None:
        return LlamaConfig(**SHAPE, head_dim=64, num_key_value_heads=heads, rms_norm_eps=1e-6)
    return EGMLAConfig(**SHAPE, **LATENT, **fields)


def make_model(config: Any, seed: int) -> Any:
    """Make new weights. Matrices of one name and shape are the same in all variants of a seed."""
    model = (EGMLAForCausalLM if config.model_type == "egmla" else LlamaForCausalLM)(config).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            generator = torch.Generator().manual_seed(crc32(name.encode()) + seed)
            with torch.no_grad():
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant with one seed, or resume it."""
    settings = scratch_settings(
        data=options.data,
        eval_data=options.eval_data,
        eval_tokens=options.eval_tokens,
        tokens=options.tokens,
        sequence_length=256,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=seed,
        eval_every=options.eval_every,
    )
    config = make_config(variant)
    target = options.output / f"{variant.replace('/', '-').replace(',', '').replace(' ', '_')}-{seed}"
    shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed before its line was written
    folders = RunFolders.of(target)
    job = Job(
        "train",
        config,
        None,
        build=lambda: make_model(config, seed),
        defaults=DEFAULTS,
        report={"kind": "train", "command": "reproduction", "origin": {"variant": variant}, "earlier": []},
        make_tokenizer=lambda: train_tokenizer(settings, SHAPE["vocab_size"]),
    )
    started = time.time()
    report = run_job(job, folders, settings)
    shutil.rmtree(target)  # results are kept, weights are not
    return {
        "variant": variant,
        "seed": seed,
        **conditions(options),
        "loss": report["evaluations"][-1]["loss"],
        "evaluations": [[row["tokens"], row["loss"]] for row in report["evaluations"]],
        "cache_elements": sum(cache_elements_per_layer(meta_model(config))),
        "parameters": count_parameters(meta_model(config)),
        "seconds": round(time.time() - started, 1),
        "resumed": report["resumed_at_step"] > 0,
        "commit": report["commit"],
        "versions": report["versions"],
    }


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """Return the `CONDITIONS` of this command. Texts are identified by content."""
    texts = [sha256(Path(name).read_bytes()).hexdigest()[:16] for name in (*options.data, *options.eval_data)]
    values = {**vars(options), "texts": texts}
    return {name: values[name] for name in CONDITIONS}


def interval(values: list[float]) -> tuple[float, float | None]:
    """Return the mean, and half of its 95 % interval by Student's t (`None` for one value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    freedom = min(len(values) - 1, len(STUDENT))
    return mean, STUDENT[freedom - 1] * statistics.stdev(values) / math.sqrt(len(values))


def shown(pair: tuple[float, float | None], sign: str = "") -> str:
    mean, half = pair
    return f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


def make_table(rows: list[dict[str, Any]]) -> str:
    """Return losses by variant and the claims' differences, paired by seed, as Markdown."""
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["variant"], {})[row["seed"]] = row["loss"]
    of = {row["variant"]: row for row in rows}
    lines = [
        "| variant | cache elements per token | parameters beside embedding (gate tables apart) | gate tables | "
        "held-out loss, 95 % | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant in [name for name in VARIANTS if name in losses]:
        counts = of[variant]["parameters"]
        others = sum(counts.values()) - counts["embeddings"] - counts["gate tables"]
        loss = shown(interval(list(losses[variant].values())))
        lines.append(
            f"| {variant} | {of[variant]['cache_elements']} | {others:,} | {counts['gate tables']:,} | {loss} | "
            f"{len(losses[variant])} |"
        )
    lines += ["", "| difference of losses, paired by seed | 95 % | seeds |", "| --- | ---: | ---: |"]
    for first, second in CLAIMS:
        seeds = sorted(losses.get(first, {}).keys() & losses.get(second, {}).keys())
        if seeds:
            pair = interval([losses[first][seed] - losses[second][seed] for seed in seeds])
            lines.append(f"| {first} minus {second} | {shown(pair, '+')} | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot held-out loss against cache elements per token, and the effect of gate tables by width and seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    right.axhline(0, color="#999999", linewidth=0.8)
    without = {row["seed"]: row["loss"] for row in rows if row["variant"] == "MLA r/4"}
    beside: dict[int, int] = {}
    for index, (variant, fields) in enumerate(VARIANTS.items()):
        found = [row for row in rows if row["variant"] == variant]
        if not found:
            continue
        mean, half = interval([row["loss"] for row in found])
        size = found[0]["cache_elements"]
        beside[size] = beside.get(size, -1) + 1
        point = size * 1.03 ** beside[size]  # side by side where caches are of one size
        mark = {"marker": "os"[index // 10], "color": f"C{index % 10}", "capsize": 3, "linestyle": "none"}
        left.errorbar(point, mean, yerr=half, label=variant, **mark)
        width = fields.get("kv_gate_embedding_dim")
        if fields.get("kv_lora_rank") == RANK // 4 and width and "kv_gate" not in fields:
            paired = [row["loss"] - without[row["seed"]] for row in found if row["seed"] in without]
            if paired:
                change, half = interval(paired)
                right.errorbar(width, change, yerr=half, label=f"{variant}, {len(paired)} seed(s)", **mark)
    left.set_xscale("log")
    points = sorted({row["cache_elements"] for row in rows})
    left.set_xticks(points, [str(point) for point in points])
    left.set_xticks([], minor=True)
    left.legend(frameon=False, fontsize=7)
    left.set_xlabel("cache elements per token")
    left.set_ylabel("held-out loss, nats per token, 95 % intervals")
    right.set_xlabel("width of the gate table, rank r/4")
    right.set_ylabel("change of loss by the gate, paired by seed, 95 %")
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=7)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read earlier runs, one for each variant and seed.

    Raises:
        SystemExit: if they are not of one experiment.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for name in CONDITIONS:
        if len({json.dumps(row[name]) for row in lines}) > 1:
            sys.exit(f"{path} has runs of different {name}, which cannot be compared; give each its own --output.")
    return list({(row["variant"], row["seed"]): row for row in lines}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", default=[], help="text to train on, repeatable")
    parser.add_argument("--eval-data", action="append", default=[], help="held-out text, repeatable")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 256 tokens per optimiser step")
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--eval-every", type=int, default=160, help="optimiser steps")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable; all by default")
    parser.add_argument("--report", action="store_true", help="train nothing, only write table and plot")
    options = parser.parse_args()
    chosen = options.variant or list(VARIANTS)
    if not options.report and not (options.data and options.eval_data):
        sys.exit("Name text to train on and held-out text: --data FILE --eval-data FILE.")

    quiet_transformers()
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    rows = read_results(results)
    done = {(row["variant"], row["seed"]) for row in rows}
    if rows and not options.report:
        for name, value in conditions(options).items():
            if rows[0][name] != value:
                sys.exit(
                    f"{results} has runs with {name}={rows[0][name]}, and now it is {value}; use another --output."
                )
    for name in chosen:
        make_config(name)  # fails before hours of training
    wanted = [] if options.report else [(name, seed) for seed in range(options.seeds) for name in chosen]
    for index, (variant, seed) in enumerate(wanted):
        if (variant, seed) in done:
            continue
        print(f"{index + 1} of {len(wanted)}: {variant}, seed {seed}", flush=True)
        row = run(variant, seed, options)
        print(f"  held-out loss {row['loss']:.4f} after {row['tokens']:,} tokens, {row['seconds']:.0f} s", flush=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    if not rows:
        sys.exit(f"There are no results in {results}.")
    table = make_table(rows)
    (options.output / "table.md").write_text(table)
    plot(rows, options.output / "reproduction.png")
    print(table)


if __name__ == "__main__":
    main()
