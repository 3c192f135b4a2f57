"""`egmla bench`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Resume
from .scoring import Threads


# Runs estimated longer than this come with advice.
LONG_SECONDS = 600


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PRESET or FOLDER]...", help="Presets, one EG-MLA folder, or SOURCE CONVERTED."),
    ] = None,
    context: Annotated[str, typer.Option(metavar="TOKENS,...", help="Tokens in the cache.")] = "512,2048,8192,32768",
    batch: Annotated[str, typer.Option(metavar="ROWS,...", help="Sequences of a batch.")] = "1,4,16",
    dtype: Annotated[str, typer.Option(metavar="DTYPE,...", help="float32, bfloat16, float16.")] = "float32,bfloat16",
    contestants: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Contestants: egmla,llama-mha,...; all by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds, with every contestant timed once in each.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps of a contestant in a round.")] = 4,
    turn_seconds: Annotated[
        float, typer.Option(help="Cut a contestant's share of a round short after so long.")
    ] = 60.0,
    prefill: Annotated[int, typer.Option(metavar="TOKENS", help="Length of the prompts to time; 0 for none.")] = 512,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also follow the memory of each case, in a separate process.")
    ] = False,
    memory_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens to decode with --memory.")] = 256,
    threads: Threads = None,
    device: Device = "auto",
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of bench.json, ms_per_token.png and cache_bytes.png.")
    ] = Path("egmla-bench"),
    resume: Resume = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; measure nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON line; always done when stdout is no terminal.")
    ] = False,
) -> None:
    """Time decoding against other models of the same size. The same command resumes an interrupted run."""
    import json

    from rich.console import Console

    from egmla.bench.plan import plan_bench
    from egmla.bench.report import summary
    from egmla.bench.run import BenchSettings, run_bench

    from .common import console, find_device, progress_bars, quiet_transformers, split_names
    from .scoring import set_threads

    quiet_transformers()
    set_threads(threads)
    settings = BenchSettings(
        contexts=_counts("--context", context),
        batch_sizes=_counts("--batch", batch),
        dtypes=tuple(split_names(dtype)),
        contestants=tuple(split_names(contestants or "")),
        rounds=rounds,
        steps=steps,
        turn_seconds=turn_seconds,
        prefill_tokens=prefill,
        memory_tokens=memory_tokens if memory else 0,
        device=find_device(device),
    )
    settings.check()
    subjects = _subjects(models or ["egmla-kv64-120m"], settings.longest)
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    plan = _describe_plan(plan_bench(subjects, settings, output, resume), settings, output)
    if dry_run:
        typer.echo(plan)
        return
    typer.echo(plan, err=True)
    with progress_bars() as progress:
        report = run_bench(
            subjects,
            settings,
            output,
            resume=resume,
            progress=progress,
            say=lambda text: stderr.print(text, markup=False),
        )
    for table in _tables(report):
        console().print(table)
    console().print(
        f"Left in {output}: bench.json, ms_per_token.png, cache_bytes.png.", style="dim", markup=False, soft_wrap=True
    )
    if as_json or not _on_a_terminal():
        typer.echo(json.dumps(summary(report)))


def _on_a_terminal() -> bool:
    return sys.stdout.isatty()


def _describe_plan(plan, settings, output: Path) -> str:
    """The plan in words: what will be measured, for how long, and how to make it shorter."""

    def numbers(values) -> str:
        return ", ".join(f"{value:,}" for value in values)

    lines = [f"{name}: {', '.join(contestants)}" for name, contestants in plan.contestants.items()]
    lines.append(
        f"{', '.join(settings.dtypes)}; batch {numbers(settings.batch_sizes)}; {numbers(settings.contexts)} tokens in "
        f"the cache; {settings.rounds} rounds of {settings.steps} steps"
    )
    if settings.prefill_tokens:
        lines.append(f"prefill of {settings.prefill_tokens:,} tokens")
    if settings.memory_tokens:
        lines.append(f"memory over {settings.memory_tokens:,} tokens, each in a process of its own")
    left = plan.decodes - plan.done
    done = f" ({plan.done:,} more are finished in {output})" if plan.done else ""
    lines.append(
        f"{left:,} timings to take{done}: about {_duration(plan.seconds)} on this machine ({settings.device})."
    )
    if left and plan.seconds > LONG_SECONDS:
        lines.append(
            "Shorter: fewer of --context, --batch, --dtype or --contestants, or --rounds 3; for example "
            "--context 2048,8192 --batch 1 --dtype bfloat16."
        )
    lines.append(f"Each finished case is saved in {output}; Ctrl-C stops, and the same command resumes.")
    return "Plan\n" + "\n".join(f"  {line}" for line in lines)


def _duration(seconds: float) -> str:
    """An estimate for people: 40 seconds, 12 minutes, 3 hours."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}s"
    return f"{max(1, round(seconds))} seconds"


def _counts(option: str, text: str) -> tuple[int, ...]:
    from .common import split_names

    try:
        return tuple(dict.fromkeys(int(part) for part in split_names(text)))
    except ValueError:
        raise ValueError(f"{option} {text}: must be whole numbers separated by commas, such as 1,4.") from None


def _subjects(names, longest: int):
    """Each preset by itself, one folder of an EG-MLA model as a preset is, two folders as a pair."""
    from egmla.bench.contestants import pair_subject, shape_subject
    from egmla.configuration import preset_names
    from egmla.utils.provenance import public_name

    from .common import find_config

    folders = [name for name in names if name not in preset_names()]
    if len(folders) > 2:
        raise ValueError(
            f"{', '.join(folders)}: give presets, the folders of one source and its conversion, or the folder of one "
            "EG-MLA model."
        )
    configs = {name: find_config(name) for name in dict.fromkeys(names)}
    subjects = [shape_subject(name, configs[name], longest) for name in configs if name not in folders]
    if len(folders) == 2:
        source, converted = folders
        labels = public_name(source), public_name(converted)
        subjects.append(pair_subject(labels, (configs[source], configs[converted]), (source, converted)))
    elif folders:
        (folder,) = folders
        if configs[folder].model_type != "egmla":
            raise ValueError(
                f"{folder} is a {configs[folder].model_type} model; give the folder of its conversion behind it: "
                "egmla bench SOURCE CONVERTED."
            )
        subjects.append(shape_subject(public_name(folder), configs[folder], longest, folder))
    return subjects


def _tables(report):
    """A table per subject, format and batch, a row per context and contestant; one of prefill and one of memory."""
    from rich.table import Table

    from .common import in_bytes

    caption = (
        "cache allocated / in use; ceiling: weights and cache over the measured bandwidth; times: medians of "
        "pairs of one round, how much longer than EG-MLA"
    )
    tables = {}
    for row in report["decode"]:
        key = f"{row['subject']}, {row['dtype']}, batch {row['batch']}"
        if key not in tables:
            tables[key] = Table("tokens", "contestant", title=key, caption=caption)
            for heading in ("ms per step", "p10 - p90", "tokens/s", "of ceiling", "cache", "times"):
                tables[key].add_column(heading, justify="right")
        share, times = row["share_of_ceiling"], _times(report, row)
        tables[key].add_row(
            f"{row['context']:,}",
            row["label"],
            f"{row['ms_median']:,.1f}",
            f"{row['ms_p10']:,.1f} - {row['ms_p90']:,.1f}",
            f"{row['tokens_per_second']:,.1f}",
            "" if share is None else f"{share:.0%}",
            f"{in_bytes(row['cache_allocated_bytes'])} / {in_bytes(row['cache_used_bytes'])}",
            "" if times is None else f"{times:.2f}",
        )
    return [*tables.values(), *_prefill_table(report), *_memory_table(report)]


def _prefill_table(report):
    from rich.table import Table

    if not report["prefill"]:
        return
    table = Table("subject", "format", title="Prefill into an empty cache")
    for heading in ("batch", "tokens", "contestant", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for row in report["prefill"]:
        cells = (row["subject"], row["dtype"], str(row["batch"]), f"{row['context']:,}", row["label"])
        table.add_row(*cells, f"{row['tokens_per_second']:,.0f}")
    yield table


def _memory_table(report):
    from rich.table import Table

    from .common import in_bytes

    if not report["memory"]:
        return
    caption = "a fresh process each: its peak; what decoding adds, held and at most on the way; what the cache grew by"
    table = Table("case", "contestant", title="Memory", caption=caption)
    for heading in ("weights", "peak", "tokens", "growth", "at most", "cache growth"):
        table.add_column(heading, justify="right")
    for row in report["memory"]:
        case = f"{row['subject']}, {row['dtype']}, batch {row['batch']}, {row['context']:,}"
        names = ("growth_bytes", "decode_peak_bytes", "cache_growth_bytes")
        sizes = [in_bytes(row[name]) for name in ("weight_bytes", "peak_bytes", *names)]
        table.add_row(case, row["label"], *sizes[:2], f"{row['tokens']:,}", *sizes[2:])
    yield table


def _times(report, row):
    """How much longer a contestant takes than ours with its default cache, where both were in one group."""
    keys = ("subject", "dtype", "batch", "context")
    for ratio in report["ratios"]:
        same = all(ratio[key] == row[key] for key in keys)
        if same and ratio["against"] == row["contestant"] and ratio["contestant"] in ("egmla", "converted"):
            return ratio["times"]
    return None
