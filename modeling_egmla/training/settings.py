"""Settings of a run, and the TrainingArguments of Transformers that follow from them."""

import ast
import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


# Arguments of Trainer that follow from our own settings, with the option to use instead.
RESERVED = {
    "output_dir": "--checkpoints",
    "resume_from_checkpoint": "--resume and --no-resume",
    "max_steps": "--tokens",
    "num_train_epochs": "--tokens",
    "per_device_train_batch_size": "--micro-batch-size",
    "per_device_eval_batch_size": "--micro-batch-size",
    "gradient_accumulation_steps": "--batch-size and --micro-batch-size",
    "learning_rate": "--learning-rate",
    "bf16": "--bf16",
    "gradient_checkpointing": "--gradient-checkpointing",
    "activation_checkpointing": "--gradient-checkpointing",
    "seed": "--seed",
    "save_steps": "--save-every",
    "save_strategy": "--save-every",
    "eval_steps": "--eval-every",
    "eval_strategy": "--eval-every",
    "logging_steps": "--save-every",
    "eval_on_start": "none: perplexity at 0 tokens is always measured",
    "eval_delay": "--eval-every",
    "prediction_loss_only": "none: perplexity is the only measure here",
    "logging_strategy": "--save-every",
    "load_best_model_at_end": "none: the last weights are written; --keep-checkpoints keeps earlier ones",
    "save_only_model": "none: a run could not resume from such checkpoints",
    "label_smoothing_factor": "--kl-weight: a teacher's distribution instead of a smoothed one",
    "push_to_hub": "egmla push",
    "hub_token": "egmla push",
    "disable_tqdm": "none: the command shows its own progress",
    "do_train": "the command itself",
    "do_eval": "the command itself",
    "do_predict": "the command itself",
}
CHECKPOINTS_KEPT = 2
MAX_LOGGED = 1000


@dataclass
class TrainingSettings:
    """Settings of a healing or training run.

    Attributes:
        data: files, `.jsonl` files or data sets, see `TextSource`.
        tokens: tokens to train on; smaller data is read several times.
        eval_data: text to evaluate on; without it a part of the data is held out.
        eval_share: fraction of the data's sequences to hold out.
        eval_tokens: largest number of tokens to evaluate on.
        text_field: field of the text in `.jsonl` and data sets.
        sequence_length: tokens in a sequence.
        batch_size: sequences of an optimiser step, over all processes.
        micro_batch_size: sequences in one pass of one process; `None` takes a process's part of a batch in one pass.
        learning_rate, gate_learning_rate: peak rates; `None` uses the defaults of healing or of training from scratch.
        weight_decay: of matrices other than gates; `None` as above.
        warmup_share: fraction of the steps in which the rate rises; then it falls along a cosine.
        stage: the weights to train, one of `STAGES`.
        kl_weight, ce_weight, temperature: parameters of the loss, see `distillation_loss`.
        lora_rank: width of LoRA adapters; `None` trains the weights themselves.
        bf16: compute in bf16, weights and optimiser in fp32.
        rounding: train and evaluate through entries as the model's cache rounds them, where its bits are allocated.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: random seed of the order of the data and of new weights.
        save_every: optimiser steps between checkpoints; `None` is a twentieth of the run.
        eval_every: optimiser steps between evaluations; `None` is a tenth of the run.
        chunk: positions whose logits exist at one time.
        dtype: of the written weights; `None` keeps the model's own.
        device: `cpu`, or the machine's accelerator such as `cuda`; `None` uses an accelerator if there is one.
        arguments: further TrainingArguments by name.
    """

    data: list[str]
    tokens: int
    eval_data: list[str] = field(default_factory=list)
    eval_share: float = 0.02
    eval_tokens: int = 65536
    text_field: str = "text"
    sequence_length: int = 512
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    gate_learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_share: float = 0.05
    stage: str = "attention"
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    lora_rank: int | None = None
    bf16: bool = False
    rounding: bool = True
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int | None = None
    eval_every: int | None = None
    chunk: int = 256
    dtype: str | None = None
    device: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimiser steps needed to see the tokens asked for."""
        return -(-self.tokens // (self.batch_size * self.sequence_length))


def check_settings(settings: TrainingSettings, max_length: int) -> None:
    """Raise `ValueError` for values that cannot work; `max_length` is the model's longest sequence, in tokens."""
    if not settings.data:
        raise ValueError("There is nothing to train on: name at least one text with data (--data).")
    for name in ("tokens", "sequence_length", "batch_size", "eval_tokens", "chunk", "save_every", "eval_every"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1.")
    if not 2 <= settings.sequence_length <= max_length:
        raise ValueError(
            f"sequence_length={settings.sequence_length}: must be from 2 to {max_length}, the model's longest "
            "sequence (max_position_embeddings)."
        )
    for name in ("learning_rate", "gate_learning_rate"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value:g}: must be above 0.")
    if not 0 <= settings.warmup_share < 1:
        raise ValueError(f"warmup_share={settings.warmup_share:g}: must be from 0 to below 1.")
    if not settings.eval_data and not 0 < settings.eval_share <= 0.5:
        raise ValueError(
            f"eval_share={settings.eval_share:g}: the fraction of the data that is held out must be above 0 and at "
            "most 0.5; or name another text with eval_data (--eval-data)."
        )
    if settings.eval_tokens < settings.sequence_length:
        raise ValueError(
            f"eval_tokens={settings.eval_tokens}: must be at least one sequence of {settings.sequence_length}."
        )


def world_size() -> int:
    """Return the number of processes of this run, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def micro_batch(settings: TrainingSettings, processes: int) -> int:
    """Return the number of sequences in one pass of one process.

    Raises:
        ValueError: when the batch cannot be divided evenly.
    """
    size = settings.micro_batch_size or max(1, settings.batch_size // processes)
    if size < 1 or settings.batch_size % (size * processes):
        raise ValueError(
            f"batch_size={settings.batch_size} cannot be made of passes of {size} sequences on {processes} "
            f"process{'es' if processes > 1 else ''}; choose a multiple of {size * processes}."
        )
    return size


def check_device(device: str | None) -> None:
    """Raise `ValueError` for a device that this machine lacks, or one that the launcher has to choose."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if device is None or device in kinds:
        return
    kind, colon, number = device.partition(":")
    if colon and kind in kinds:
        raise ValueError(
            f"device={device!r}: a single accelerator is chosen by the environment: give {kind!r} and set "
            f"CUDA_VISIBLE_DEVICES={number} (or your accelerator's own variable)."
        )
    raise ValueError(f"device={device!r}: this machine has {' and '.join(kinds)}; give one of these, or leave it out.")


def training_arguments(
    settings: TrainingSettings, folder: Path, defaults: Mapping[str, Any], resuming: bool = False
) -> TrainingArguments:
    """Return Transformers' arguments for a run.

    Args:
        settings (`TrainingSettings`): our settings.
        folder (`Path`): folder of the checkpoints.
        defaults (`Mapping`): of this kind of run: `learning_rate`, `weight_decay`, further arguments. `gate_factor` is
            the learning rate of the gates divided by that of all other weights.
        resuming (`bool`): whether the run resumes from a checkpoint.

    Raises:
        ValueError: for a batch that cannot be divided, a device this machine lacks, or arguments that Transformers
            refuses.
    """
    check_device(settings.device)
    processes, steps = world_size(), settings.steps
    on_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
    micro = micro_batch(settings, processes)
    logged = -(-steps // MAX_LOGGED)
    # Checkpoints fall on logged steps, so that a resumed run logs the same losses as an uninterrupted one.
    save = -(-(settings.save_every or max(1, steps // 20)) // logged) * logged
    values: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(settings.warmup_share * steps),
        "save_total_limit": CHECKPOINTS_KEPT,
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "log_level": "error",
        "use_cache": True,  # for the checkpoints' configuration; training fills no cache
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        **{name: value for name, value in defaults.items() if name != "gate_factor"},
        "weight_decay": defaults["weight_decay"] if settings.weight_decay is None else settings.weight_decay,
        **settings.arguments,
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        # Several processes repeat the first sequences to fill the last batch. Trainer drops them from the mean only if
        # they make whole batches, so a batch is one sequence.
        "per_device_eval_batch_size": micro if processes == 1 else 1,
        "gradient_accumulation_steps": settings.batch_size // (micro * processes),
        "learning_rate": settings.learning_rate or defaults["learning_rate"],
        "bf16": settings.bf16,
        "activation_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "logging_steps": logged,
        "save_strategy": "steps",
        "save_steps": save,
        "eval_strategy": "steps",
        "eval_steps": settings.eval_every or max(1, steps // 10),
        "eval_on_start": not resuming,
        "disable_tqdm": True,
        "prediction_loss_only": True,
    }
    arguments = TrainingArguments(**values)
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} accelerators are visible to one process: start one process for each with "
            "`accelerate launch -m egmla ...`, or show it one (CUDA_VISIBLE_DEVICES=0)."
        )
    return arguments


def parse_training_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse TrainingArguments such as `lr_scheduler_type=linear`; values are Python literals or plain text.

    Raises:
        ValueError: when a text has no `=`, names no argument, or names one that has its own option here.
    """
    known = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"{pair!r}: a setting is written key=value, such as lr_scheduler_type=linear.")
        if name in RESERVED:
            raise ValueError(f"{name} follows from other options here: {RESERVED[name]}.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
            raise ValueError(
                f"{name!r} is not an argument of Transformers' TrainingArguments; there is {', '.join(near)}."
            )
        found[name] = parse_value(text)
    return found


def parse_value(text: str) -> Any:
    """Parse a Python literal, `true` or `false`; return any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)


def parse_count(text: str) -> int:
    """Parse a number of tokens: 5000000, 5M, 0.5B.

    Raises:
        ValueError: for any other text.
    """
    factors = {"K": 10**3, "M": 10**6, "B": 10**9}
    number, factor = (text[:-1], factors[text[-1].upper()]) if text[-1:].upper() in factors else (text, 1)
    try:
        count = round(float(number) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ValueError(f"{text!r}: a number of tokens is written 5000000, 5M or 0.5B.")
    return count
