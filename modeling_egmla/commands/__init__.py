"""The `egmla` command line: one thin file per command. Heavy imports happen inside the commands."""

from typing import Annotated

import typer

from .bench import bench
from .card import card
from .command import Command, CommandGroup, with_config
from .common import show_version
from .compare import compare
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .gate import gate
from .generate import generate
from .heal import heal
from .inspect import inspect
from .presets import presets
from .push import push
from .sweep import sweep
from .train import train


app = typer.Typer(
    name="egmla",
    cls=CommandGroup,
    help="EG-MLA: language models with a small, gated KV cache for Hugging Face Transformers.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: tables cut long names at 80 columns
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="EGMLA_DEBUG", help="Show tracebacks of errors.")] = False,
    cpu_kernel: Annotated[
        bool,
        typer.Option(
            "--cpu-kernel",
            envvar="EGMLA_CPU_KERNEL",
            help="Decode with the compiled CPU kernel (needs a C++ compiler).",
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """EG-MLA: language models with a small, gated KV cache for Hugging Face Transformers."""
    if cpu_kernel:
        from egmla import load_cpu_kernel

        load_cpu_kernel()


for command in (demo, convert, sweep, heal, gate, train, generate, compare, bench, inspect, presets, card, push):
    app.command(cls=Command)(with_config(command))
app.command("eval", cls=Command)(with_config(evaluate))


def main() -> None:
    """Entry point of the `egmla` command."""
    app()
