"""Options that commands share, names of models and devices, progress, and numbers for people."""

import ast
import contextlib
import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


Device = Annotated[
    str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1. auto takes the first GPU where there is one.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Resume an interrupted run of this command; --no-resume removes it and starts over.",
    ),
]


class DType(StrEnum):
    """Dtypes of weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@contextlib.contextmanager
def interruption_says(kept: Callable[[], str | None]) -> Iterator[None]:
    """Add what `kept` returns, if anything, to the message of an interruption inside."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if said := kept():
            raise KeyboardInterrupt(said) from interruption
        raise


def show_version(wanted: bool) -> None:
    """Print the version and exit, when wanted."""
    if wanted:
        from egmla import __version__

        typer.echo(f"egmla {__version__}")
        raise typer.Exit


def find_device(name: str) -> str:
    """Return the PyTorch device for `--device`: "cpu", or "cuda" with or without a number.

    Raises:
        ValueError: for another name, or a GPU that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"--device {name}: must be auto, cpu, cuda, or cuda:1 for the second GPU.")
    there = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(number or 0) >= there:
        raise ValueError(f"--device {name}: PyTorch sees {there} GPUs here. Choose cpu, or auto for what is there.")
    return name


def chosen_device(name: str) -> str | None:
    """Return the device for `--device` as `find_device`, or `None` for auto: what is called then chooses."""
    return None if name == "auto" else find_device(name)


def find_config(name: str):
    """Return the configuration of a preset, a local folder or a Hub id.

    Raises:
        FileNotFoundError: for anything else; the message says what was tried.
    """
    from transformers import AutoConfig

    from egmla.configuration import load_preset, preset_names

    if name in preset_names():
        return load_preset(name)
    check_model_path(name)
    if "/" not in name and not Path(name).is_dir() and difflib.get_close_matches(name, preset_names(), cutoff=0.5):
        load_preset(name)  # a preset misspelt: its message names the nearest ones, without asking the Hub
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"{name!r} is no preset ({', '.join(preset_names())}), no local folder, and the Hub has no "
            "configuration of that name or is out of reach; check the spelling (egmla --debug shows the Hub's answer)."
        ) from error


def check_model_path(name: str) -> None:
    """Raise `FileNotFoundError` when `name` can only be a local folder and is no model."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name} is a folder without a config.json, so it holds no model; check the path.")
    elif path.is_file():
        raise FileNotFoundError(f"{name} is a file; give the folder of a model (convert a .gguf file first).")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {name}; check the path.")


def console() -> Console:
    """Return the console for results. Its lines fit the tables when stdout is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, float, int], None]]:
    """Show progress on stderr: give a function of (stage, done, total) that keeps one bar per stage.

    Without a terminal it prints a line at each step of a stage, at each quarter where there are more than 100.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    stderr = Console(stderr=True)
    times = TimeElapsedColumn(), TimeRemainingColumn()
    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times, console=stderr)
    tasks: dict[str, TaskID] = {}
    printed: dict[str, int] = {}

    def advance(stage: str, done: float, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)
        milestone = int(done if total <= 100 else 4 * done // total)
        if not stderr.is_terminal and milestone > printed.get(stage, 0):
            printed[stage] = milestone
            stderr.print(f"{stage}: {int(done)}/{total}")

    if not stderr.is_terminal:
        yield advance
        return
    with bars:
        yield advance


def quiet_transformers() -> None:
    """Hide loading bars and the Hub's retry notices: the commands show their own progress and errors."""
    import transformers.modeling_gguf_pytorch_utils as gguf_loading
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    # The one bar without a switch; it would break up ours.
    gguf_loading.tqdm = functools.partial(gguf_loading.tqdm, disable=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Hide lm-eval's log, and send what it prints to stderr: stdout is for our tables. Its bars stay."""
    import logging

    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def split_names(text: str) -> list[str]:
    """Split names at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Read settings from texts like `key=value`. Values are Python literals or plain text.

    Raises:
        ValueError: for what is no pair.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r}: a setting is written key=value, such as balance=0.5.")
        try:
            settings[name.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name.strip()] = {"true": True, "false": False}.get(text.lower(), text)
    return settings


def read_limit(limit: float | None) -> float | None:
    """Return the number of questions as lm-eval wants it: a whole number, or a fraction below 1.

    Raises:
        ValueError: when it is neither.
    """
    if limit is None or 0 < limit < 1:
        return limit
    if limit < 1 or limit != int(limit):
        raise ValueError(f"--limit {limit:g}: must be a whole number of questions, or a fraction of them below 1.")
    return int(limit)


def in_units(count: int) -> str:
    """Write parameters for people: 19.2K, 154.5M, 1.25B."""
    for unit, size, digits in (("B", 1e9, 2), ("M", 1e6, 1), ("K", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


def change(part: float, whole: float) -> str:
    """Write how much smaller or larger `part` is: -91.7%, same."""
    return "same" if part == whole else f"{part / whole - 1:+.1%}"


def in_bytes(count: float) -> str:
    """Write bytes for people: 960 B, 22.5 KiB, 96.0 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
