"""`egmla gate`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Device


def gate(
    model: Annotated[Path, typer.Argument(help="Folder of an EG-MLA checkpoint. The gate is saved in it.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Plain text of a domain that the gate will serve; repeatable.")
    ],
    contexts: Annotated[int, typer.Option(min=5, help="Contexts of each text. A fifth is held out.")] = 24,
    context_tokens: Annotated[int, typer.Option(min=64, help="Tokens of a context.")] = 512,
    device: Device = "auto",
) -> None:
    """Fit the gate that tells which tokens a cache can do without, and save it beside the weights."""
    from rich.table import Table

    from egmla.compression.gate_folder import GATE_FILE, make_gate
    from egmla.conversion.texts import read_text

    from .common import chosen_device, console, progress_bars, quiet_transformers

    quiet_transformers()
    names = [path.name for path in data]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--data names {', '.join(doubled)} twice: give each domain one file of its own name.")
    texts = {path.name: read_text(path, "Gate") for path in data}
    with progress_bars() as progress:
        report = make_gate(model, texts, contexts, context_tokens, chosen_device(device), progress)
    table = Table("text", title=f"Eviction gate of {model}, on held-out contexts")
    for title in ("contexts", "R2 of log scores", "of the best half, found"):
        table.add_column(title, justify="right")
    for name, found in report["texts"].items():
        table.add_row(name, f"{found['contexts']}", f"{found['r2']:.2f}", f"{100 * found['recall']:.0f} %")
    console().print(table)
    console().print(
        f"A random half finds 50 %. Saved as {model / GATE_FILE}; use it with egmla.compression.GatePress.",
        soft_wrap=True,
        markup=False,
    )
