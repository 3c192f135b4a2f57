"""`egmla heal`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from egmla.commands import training as options

from .common import DType, Resume


class Stage(StrEnum):
    """Weights to train."""

    gate = "gate"
    attention = "attention"
    all = "all"


def heal(
    converted: Annotated[str, typer.Argument(help="Folder or Hub id of a converted checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must be absent or empty.")],
    data: options.Data,
    tokens: options.Tokens,
    teacher: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Model it was converted from: folder, Hub id or .gguf file.")
    ] = None,
    stage: Annotated[
        Stage, typer.Option(help="Train the gates alone, attention with gates and norms, or every weight.")
    ] = Stage.attention,
    kl_weight: Annotated[
        float, typer.Option(help="Weight of the KL divergence to the teacher; with 0 no teacher is needed.")
    ] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross entropy to the text.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Divides the logits in the KL divergence.")] = 1.0,
    lora_rank: Annotated[
        int | None, typer.Option(metavar="R", help="Train LoRA adapters of this rank, and merge them at the end.")
    ] = None,
    rounding: Annotated[
        bool, typer.Option(help="Train through the rounding of the model's cache, if its bits are allocated.")
    ] = True,
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
    dtype: Annotated[
        DType, typer.Option(help="dtype of the written weights; auto keeps the converted model's.")
    ] = DType.auto,
    checkpoints: options.Checkpoints = None,
    keep_checkpoints: options.KeepCheckpoints = False,
    resume: Resume = True,
    dry_run: options.DryRun = False,
    settings: options.Settings = None,
) -> None:
    """Heal a converted model by self-distillation from the model it was converted from."""
    given = dict(locals())
    import functools

    from egmla.training import TrainingSettings, heal_checkpoint

    from .common import quiet_transformers

    quiet_transformers()
    wanted = TrainingSettings(**options.settings_values({**given, "stage": stage.value}))
    options.run_shown(
        functools.partial(heal_checkpoint, converted, settings=wanted, teacher=teacher),
        target,
        checkpoints=checkpoints,
        resume=resume,
        keep_checkpoints=keep_checkpoints,
        dry_run=dry_run,
    )
