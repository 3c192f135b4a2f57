"""`egmla train`."""

from pathlib import Path
from typing import Annotated

import typer

from egmla.commands import training as options

from .command import read_config
from .common import DType, Resume
from .scoring import DataDir, Limit, check_tasks


def train(
    preset: Annotated[
        str, typer.Argument(metavar="PRESET_OR_CONFIG", help="Preset, or folder or Hub id of a config.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must be absent or empty.")],
    data: options.Data,
    tokens: options.Tokens,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="Folder or Hub id of a tokenizer.")] = None,
    new_tokenizer: Annotated[
        int | None,
        typer.Option(metavar="SIZE", help="Train a byte-level BPE tokenizer of this many tokens on the data instead."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE|FILE",
            is_eager=True,
            callback=read_config,
            help="Change a field of the model's configuration, or read options from a YAML file; repeatable.",
        ),
    ] = None,
    eval_data: options.EvalData = None,
    eval_share: options.EvalShare = 0.02,
    eval_tokens: options.EvalTokens = 65536,
    text_field: options.TextField = "text",
    sequence_length: options.SequenceLength = 512,
    batch_size: options.BatchSize = 8,
    micro_batch_size: options.MicroBatchSize = None,
    learning_rate: options.LearningRate = None,
    gate_learning_rate: options.GateLearningRate = None,
    weight_decay: options.WeightDecay = None,
    warmup_share: options.WarmupShare = 0.05,
    bf16: options.BFloat16 = False,
    gradient_checkpointing: options.GradientCheckpointing = False,
    seed: options.Seed = 0,
    save_every: options.SaveEvery = None,
    eval_every: options.EvalEvery = None,
    chunk: options.Chunk = 256,
    device: options.Device = "auto",
    dtype: Annotated[DType, typer.Option(help="dtype of the written weights; auto is fp32.")] = DType.auto,
    checkpoints: options.Checkpoints = None,
    keep_checkpoints: options.KeepCheckpoints = False,
    resume: Resume = True,
    dry_run: options.DryRun = False,
    settings: options.Settings = None,
    tasks: Annotated[
        str | None, typer.Option(help="Score the trained model on these lm-eval tasks, separated by commas.")
    ] = None,
    limit: Limit = None,
    data_dir: DataDir = None,
) -> None:
    """Train a model from new weights."""
    given = dict(locals())
    import functools

    from accelerate.utils import get_cpu_distributed_information

    from egmla.training import scratch_settings, train_from_scratch
    from egmla.training.from_scratch import changed_config

    from .common import find_config, quiet_transformers
    from .evaluate import evaluate

    quiet_transformers()
    wanted = scratch_settings(**options.settings_values(given))
    if tasks is not None:
        if (processes := get_cpu_distributed_information().world_size) > 1:  # read from the environment, GPUs or not
            raise ValueError(
                f"--tasks with {processes} processes: only one process can score. Leave --tasks out, and score the "
                f"trained model afterwards: egmla eval {target} --tasks {tasks}."
            )
        check_tasks(tasks, data_dir)
    shape, overrides = changed_config(find_config(preset), config or ())
    options.run_shown(
        functools.partial(
            train_from_scratch,
            shape,
            settings=wanted,
            tokenizer=tokenizer,
            new_tokenizer=new_tokenizer,
            name=preset,
            overrides=overrides,
        ),
        target,
        checkpoints=checkpoints,
        resume=resume,
        keep_checkpoints=keep_checkpoints,
        dry_run=dry_run,
    )
    if tasks is not None and not dry_run:
        # Beside the model: lm-eval's results hold paths of this machine.
        output = target.with_name(f"{target.resolve().name}.scores.json")
        evaluate(str(target), tasks, limit=limit, data_dir=data_dir, output=output)
