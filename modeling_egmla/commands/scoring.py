"""Options that `egmla eval` and `egmla compare` share, and what both make of them."""

from pathlib import Path
from typing import Annotated

import typer


Tasks = Annotated[str, typer.Option(help="Tasks or groups, separated by commas; egmla_paper and egmla_quick too.")]
Limit = Annotated[float | None, typer.Option(help="Questions of each task; below 1 a fraction of them.")]
NumFewshot = Annotated[
    int | None, typer.Option("--num-fewshot", "--num_fewshot", min=0, help="Solved examples before each question.")
]
BatchSize = Annotated[
    str, typer.Option("--batch-size", "--batch_size", help="Rows of a batch, or auto: as many as fit into memory.")
]
ModelArgs = Annotated[
    str | None,
    typer.Option(
        "--model-args", "--model_args", metavar="KEY=VALUE,...", help="For lm-eval's hf model: dtype=float32"
    ),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of JSON-lines files that replace the official data sets.")]
IncludePath = Annotated[list[Path] | None, typer.Option(help="Folder of further task files; repeatable.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any argument of lm-eval's simple_evaluate; repeatable."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")]


def read_batch_size(text: str) -> int | str:
    """Return a batch size as lm-eval takes it: a number where it is one."""
    return int(text) if text.isdecimal() else text


def check_tasks(tasks: str, data_dir: Path | None) -> None:
    """Raise `ValueError`, `FileNotFoundError` or `ImportError` when tasks cannot be run: before hours of training."""
    from egmla.evaluation.harness import check_lm_eval

    from .common import quiet_lm_eval, split_names

    check_lm_eval()
    with quiet_lm_eval():
        from egmla.evaluation.local_tasks import EGMLATaskManager

        manager = EGMLATaskManager(data_dir)
        manager.prepare(manager.match(split_names(tasks)))


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of PyTorch, when a number was given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
