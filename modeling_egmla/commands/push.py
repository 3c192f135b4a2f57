"""`egmla push`."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an EG-MLA checkpoint.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: your user or organization, a slash, the model's name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; send nothing.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to push to, created when it is not there.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Looks like a secret or a local path and is none; repeatable."),
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Message of the commit.")] = None,
) -> None:
    """Check a checkpoint and publish it on the Hugging Face Hub."""
    from rich.console import Console

    from egmla.publishing import push_folder

    from .common import console, in_bytes, quiet_transformers

    quiet_transformers()
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    report = push_folder(
        folder,
        repo_id,
        private=True if private else None,
        revision=revision,
        message=message,
        dry_run=dry_run,
        allow=allow or (),
        say=lambda text: stderr.print(f"{text} ...", style="dim", markup=False),
    )
    for warning in report.warnings:
        stderr.print(f"Warning: {warning}", style="yellow", markup=False)
    if dry_run:
        _print_plan(report)
        return
    kept = [file for file in report.files if file.state != "stale"]
    size = in_bytes(sum(file.size for file in kept))
    if report.changed:
        done = f"Pushed {len(kept)} files ({size}) as commit {report.commit[:8]}: {report.url}"
    else:
        done = f"The Hub has these {len(kept)} files already ({size}), so there is no new commit: {report.url}"
    console().print(done, soft_wrap=True, markup=False)


def _print_plan(report) -> None:
    from rich.table import Table

    from .common import console, in_bytes

    table = Table("file", "", title=f"Plan for {report.repo_id} (nothing was sent)")
    table.add_column("size", justify="right")
    for file in report.files:
        table.add_row(
            file.path, "remove, of an earlier push" if file.state == "stale" else file.state, in_bytes(file.size)
        )
    for path in report.left_out:
        table.add_row(path, "left out", "")
    out = console()
    out.print(table)
    sent = [file for file in report.files if file.state in ("new", "changed", "unknown")]
    size = in_bytes(sum(file.size for file in sent))
    about = {True: "updated", False: "created", None: "created or updated"}[report.exists]
    if sent or any(file.state == "stale" for file in report.files):
        text = f"{len(sent)} files, {size}, would be sent; {report.repo_id} would be {about}."
    else:
        text = f"{report.repo_id} has all of these files already: nothing would be sent."
    out.print(text, soft_wrap=True, markup=False)
