"""`egmla card`."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a converted or trained checkpoint.")],
    scores: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="lm-eval's JSON, or the folder of `egmla compare`; taken along, cleaned."),
    ] = None,
    repo_id: Annotated[str | None, typer.Option(metavar="NAME", help="Its name on the Hub, for the examples.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence, where no source states one.")] = None,
    license_name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name, where it is `other`.")] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="The source's Hub id, where unknown.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card written by hand.")] = False,
) -> None:
    """Write a checkpoint's model card from its reports and scores."""
    from egmla.model_cards import write_card

    from .common import console, quiet_transformers

    quiet_transformers()
    written = write_card(
        folder,
        scores=scores,
        repo_id=repo_id,
        license=license,
        license_name=license_name,
        base_model=base_model,
        overwrite=overwrite,
    )
    for path in written:
        console().print(f"Wrote {path}", soft_wrap=True, markup=False)
    console().print(f"Publish it: egmla push {folder} {repo_id or 'NAME/MODEL'} --dry-run", style="dim", markup=False)
