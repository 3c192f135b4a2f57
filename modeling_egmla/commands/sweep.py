"""`egmla sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, DType, Resume


Peers = Annotated[
    bool,
    typer.Option(
        "--peers",
        help="Measure caches with bits of these sizes, through the cache, beside the source's own cache quantised "
        "or cut to a window, and beside conversions by rank alone.",
    ),
]
Retrieval = Annotated[
    str | None,
    typer.Option(metavar="TOKENS,...", help="With --peers, lengths to retrieve from, 0 for none; 512 by default."),
]
Passages = Annotated[
    int | None, typer.Option(min=1, help="With --peers, passages of each length, 8 facts in each; 6 by default.")
]
Context = Annotated[
    int | None,
    typer.Option(min=0, help="With --peers, tokens in the cache of timed steps, 0 for none; 8,192 by default."),
]


def sweep(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, a .gguf file or a Hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder for the models, sweep.json and the plots.")],
    cache: Annotated[str, typer.Option(metavar="FRACTIONS", help="Fractions of the source's cache: 0.5,0.3125.")],
    evaluate: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Other plain text, to measure perplexity on; with --peers repeatable."),
    ],
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Plain text to calibrate with; repeatable, one a domain."),
    ] = None,
    peers: Peers = False,
    retrieval: Retrieval = None,
    passages: Passages = None,
    context: Context = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAMES", help="Recipes: default,transmla-like,mha2mla-like.")
    ] = "default",
    choices: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A choice of each recipe, or as refine.KEY=VALUE of the refinement; repeatable.",
        ),
    ] = None,
    latent_norm: Annotated[
        bool, typer.Option("--latent-norm", help="Give the latents a norm, which --layout deepseek_v3 wants.")
    ] = False,
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="egmla or deepseek_v3, as in convert.")] = "egmla",
    qk_rope_head_dim: Annotated[
        int | None, typer.Option(metavar="P", help="Width of the shared rotary key, the same in all.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to calibrate with at most; as in convert by default.")
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Training steps of each layer's attention; as in convert by default. With --peers: by rank only, 0.",
        ),
    ] = None,
    refine_gate: Annotated[
        bool, typer.Option("--refine-gate", help="Train the gates with the rest of each layer's attention.")
    ] = False,
    evaluation_windows: Annotated[int, typer.Option(min=1, help="Windows to measure, 2,048 tokens each.")] = 9,
    dtype: Annotated[DType, typer.Option(help="dtype of the written weights; auto keeps the source's.")] = DType.auto,
    device: Device = "auto",
    resume: Resume = True,
) -> None:
    """Convert a model at several cache sizes and measure each. The same command resumes an interrupted run."""
    from egmla.conversion.recipes import find_refinement, split_choices

    from .common import chosen_device, quiet_transformers, read_settings

    quiet_transformers()
    of_recipes, of_refinement = split_choices(read_settings(choices or ()))
    texts = {"calibration": calibration or [], "evaluate": evaluate}
    shared = {
        "calibration_tokens": calibration_tokens,
        "refinement": find_refinement(refine_steps, refine_gate, of_refinement),
        "evaluation_windows": evaluation_windows,
        "dtype": None if dtype is DType.auto else dtype.value,
        "device": chosen_device(device),
    }
    if peers:
        fixed = {"--recipe": recipe != "default", "--set": bool(of_recipes), "--latent-norm": latent_norm}
        fixed |= {"--layout": layout != "egmla", "--qk-rope-head-dim": qk_rope_head_dim is not None}
        if given := [name for name, there in fixed.items() if there]:
            raise ValueError(f"{', '.join(given)} with --peers: its conversions are the default ones; leave it out.")
        more = {"passages": passages, "context": context, "retrieval": _lengths(retrieval)}
        _sweep_peers(source, target, _fractions(cache), texts, shared | more, resume)
        return
    _check_alone(texts, {"--retrieval": retrieval, "--passages": passages, "--context": context})
    if latent_norm:
        of_recipes["latent_norm"] = True
    shared |= {} if layout == "egmla" else {"layout": layout}
    recipes = {"recipes": recipe, "choices": of_recipes, "qk_rope_head_dim": qk_rope_head_dim}
    _sweep_ranks(source, target, _fractions(cache), texts, shared | recipes, resume)


def _sweep_ranks(source: str, target: Path, caches: list[float], texts: dict, options: dict, resume: bool) -> None:
    """Run a sweep by rank, print its table and say where its plot is."""
    from egmla.conversion.sweep import sweep as run_sweep

    from .common import console, interruption_says, progress_bars, split_names

    options |= {"recipes": split_names(options["recipes"]), "calibration": texts["calibration"], "resume": resume}
    with interruption_says(lambda: _kept(target) if resume else None), progress_bars() as progress:
        report = run_sweep(source, target, caches, evaluate=texts["evaluate"][0], progress=progress, **options)
    _print_report(report)
    console().print(f"Wrote sweep.json and sweep.png in {target}", style="dim", markup=False, soft_wrap=True)


def _check_alone(texts: dict, of_peers: dict) -> None:
    """Raise `ValueError` for what only `--peers` takes, and for a text that is missing without it."""
    if not texts["calibration"]:
        raise ValueError(
            "A sweep by rank needs calibration text: give --calibration FILE, plain text other than --evaluate."
        )
    given = [name for name, value in of_peers.items() if value is not None]
    if len(texts["evaluate"]) > 1:
        given.append("a second --evaluate")
    if given:
        raise ValueError(f"{', '.join(given)} without --peers: it measures one perplexity only; add --peers.")


def _sweep_peers(source: str, target: Path, caches: list[float], texts: dict, options: dict, resume: bool) -> None:
    """Run a sweep beside peers, print its tables and say where its plots are."""
    from egmla.bench.peer_sweep import PeerSettings, sweep_peers
    from egmla.samples import sample_path

    from .common import console, interruption_says, progress_bars

    # The text that caches with bits are calibrated on anyway: by rank, the same ones.
    calibration = list(dict.fromkeys([sample_path("calibration"), *texts["calibration"]]))
    given = {name: value for name, value in options.items() if value is not None}
    settings = PeerSettings(caches, texts["evaluate"], calibration, **given)
    with interruption_says(lambda: _kept(target) if resume else None), progress_bars() as progress:
        report = sweep_peers(
            source, target, settings, resume=resume, progress=progress, say=lambda text: typer.echo(text, err=True)
        )
    for table in _tables(report):
        console().print(table)
    for row in report["rows"]:
        if "skipped" in row:
            console().print(f"Left out: {row['name']}, {row['skipped']}", markup=False)
    console().print(f"Wrote sweep.json and the plots in {target}", style="dim", markup=False, soft_wrap=True)


def _lengths(text: str | None) -> list[int] | None:
    """Return the lengths of passages in `--retrieval`, none for 0."""
    from .common import split_names

    if text is None:
        return None
    try:
        lengths = [int(part) for part in split_names(text)]
    except ValueError:
        raise ValueError(
            f"--retrieval {text}: must be whole numbers of tokens separated by commas: 512,2048."
        ) from None
    return [] if lengths == [0] else lengths


def _kept(target: Path) -> str | None:
    """Return what an interrupted sweep has left to resume from."""
    from egmla.conversion.sweep import SWEEP_REPORT

    if not (target / SWEEP_REPORT).is_file():
        return None
    return "The models and layers that are finished are kept, and the same command resumes from there."


def _fractions(text: str) -> list[float]:
    from .common import split_names

    try:
        return [float(part) for part in split_names(text)]
    except ValueError:
        raise ValueError(
            f"--cache {text}: must be fractions of the source's cache separated by commas: 0.5,0.25."
        ) from None


def _print_report(report: dict) -> None:
    from rich.table import Table
    from rich.text import Text

    from .common import console

    source, evaluation = report["source"], report["settings"]["evaluation"]
    caption = (
        f"{evaluation['windows']} windows of {evaluation['window']:,} tokens of {evaluation['file']}; "
        "* no other one is smaller and better at once"
    )
    table = Table("recipe", title=Text(source["name"]), caption=Text(caption))
    for heading in ("cache kept", "P + R", "elements per token", "perplexity", "of source", ""):
        table.add_column(heading, justify="right")
    table.add_row("source", "100.0%", "", f"{source['elements']:,}", f"{source['perplexity']:.3f}", "1.000", "")
    for row in report["rows"]:
        ranks = sorted(set(row["ranks"]))
        table.add_row(
            row["recipe"],
            f"{row['cache_kept']:.1%}",
            f"{row['rope_dim']} + {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}",
            f"{row['elements']:,}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / source['perplexity']:.3f}",
            "*" if row["best"] else "",
        )
    console().print(table)


def _tables(report: dict) -> list:
    """Return the tables of a sweep beside peers: perplexity and retrieval against bytes."""
    from rich.table import Table
    from rich.text import Text

    rows = [row for row in report["rows"] if "skipped" not in row]
    texts = list(dict.fromkeys(name for row in rows for name in row["perplexity"]))
    lengths = list(dict.fromkeys(name for row in rows for name in row["retrieval"]))
    timed = [row["decode"] for row in rows if "decode" in row]
    perplexity = Table(title=Text(f"{report['source']['name']}: perplexity through the cache"))
    perplexity.caption = "in brackets: times the source's, and the standard error of the paired difference"
    retrieval = Table(title=Text(f"{report['source']['name']}: facts retrieved from the context"))
    retrieval.caption = "in brackets: 95 % interval"
    for table in (perplexity, retrieval):
        table.add_column("cache", no_wrap=True)
        for heading in ("bytes at 32,768", "at 2,048"):
            table.add_column(heading, justify="right")
    if timed:
        perplexity.add_column(f"ms a step at {timed[0]['context']:,}", justify="right")
    for name in texts:
        perplexity.add_column(Text(f"{name}, {report['texts'][name]['windows']} windows"), justify="right")
    for length in lengths:
        retrieval.add_column(f"{int(length):,} tokens", justify="right")
    for row in rows:
        shares = [f"{row['shares'][tokens]:.1%}" for tokens in ("32768", "2048")]
        step = [f"{row['decode']['ms_median']:.0f}" if "decode" in row else "-"] if timed else []
        found = [_perplexity(row["perplexity"].get(name)) for name in texts]
        perplexity.add_row(row["name"], *shares, *step, *found)
        retrieval.add_row(row["name"], *shares, *(_retrieved(row["retrieval"].get(length)) for length in lengths))
    return [perplexity, retrieval] if lengths else [perplexity]


def _perplexity(found: dict | None) -> str:
    if found is None:
        return "-"
    error = "" if found["ratio_error"] is None else f" ± {found['ratio'] * found['ratio_error']:.3f}"
    return f"{found['perplexity']:.2f} ({found['ratio']:.3f}{error})"


def _retrieved(found: dict | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{found['hits']} of {found['questions']} ({low:.0%} to {high:.0%})"
