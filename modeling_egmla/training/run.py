"""A training run from its checks to the folder it writes; healing and training from scratch share it."""

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import set_seed

from egmla import EGMLAConfig
from egmla.utils.files import write_json
from egmla.utils.machine import multiplies_bf16
from egmla.utils.models import meta_model
from egmla.utils.perplexity import perplexity
from egmla.utils.plotting import check_matplotlib
from egmla.utils.progress import Progress, Say, stage_progress
from egmla.utils.provenance import peak_bytes

from .data import PackedDataset, TextSource, read_sequences
from .estimates import run_plan
from .report import provenance, public_settings, training_curve
from .rounded_entries import RoundedEntries
from .run_folders import (
    EVAL_NAME,
    RUN_NAME,
    TEACHER_NAME,
    TOKENIZER_NAME,
    TRAIN_NAME,
    RunFolders,
    check_files,
    check_same_run,
    check_space,
    prepare_tokens,
    run_identity,
)
from .saving import KeepModelSettings, check_saves, write_target
from .settings import TrainingSettings, check_settings, micro_batch, training_arguments, world_size
from .stages import add_lora, check_peft, check_stage, set_trainable
from .trainer import DistillationTrainer, DivergedError, ProgressReport, check_weights, last_checkpoint


# Set by `accelerate launch`.
SHARDING_FLAGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass
class Job:
    """A model to train and how to make it.

    Attributes:
        kind: `heal` or `train`.
        config: configuration of the model.
        tokenizer: its tokenizer; `None` where `make_tokenizer` makes it.
        build: returns the model in fp32.
        defaults: learning rates and other arguments of this kind of run.
        report: first entries of the report, about the origins.
        teacher_config, load_teacher: of a teacher, if there is one.
        companions: files to copy into the target.
        make_tokenizer: trains the tokenizer on the data.
        generation_config: of the model; by default the one that follows from `config`.
    """

    kind: str
    config: EGMLAConfig
    tokenizer: Any
    build: Callable[[], Any]
    defaults: dict[str, Any]
    report: dict[str, Any]
    teacher_config: Any = None
    load_teacher: Callable[[], Any] | None = None
    companions: list[Path] = field(default_factory=list)
    make_tokenizer: Callable[[], Any] | None = None
    generation_config: GenerationConfig | None = None


@dataclass
class CheckedRun:
    """A run whose input has been checked; nothing is loaded or written yet.

    Attributes:
        sources, eval_sources: the texts.
        arguments: Transformers' arguments.
        plan: see `run_plan`.
        identity: see `run_identity`.
        last: checkpoint to resume from, if there is one.
    """

    sources: list[TextSource]
    eval_sources: list[TextSource]
    arguments: TrainingArguments
    plan: dict[str, Any]
    identity: dict[str, Any]
    last: Path | None


@dataclass
class Tokens:
    """Tokens of a run: sequences `[count, length]` for training and evaluation, and the record in `run.json`."""

    training: np.ndarray
    evaluation: np.ndarray
    record: dict[str, Any]


def check_job(settings: TrainingSettings, config: EGMLAConfig) -> None:
    """Check settings and configuration before anything is read or loaded.

    Raises:
        ValueError, ImportError: the message says what was given, what is required and what to do.
    """
    check_settings(settings, config.max_position_embeddings)
    # Baselines of the reproduction are Llamas, which lack this field.
    check_stage(settings.stage, getattr(config, "kv_gate", None) is not None)
    check_weights(settings.kl_weight, settings.ce_weight, settings.temperature)
    if settings.lora_rank is not None:
        check_peft()
    check_matplotlib()


def prepare_model(model: Any, settings: TrainingSettings) -> Any:
    """Mark the weights to train, or add adapters."""
    if settings.lora_rank is not None:
        return add_lora(model, settings.stage, settings.lora_rank)
    set_trainable(model, settings.stage)
    return model


def plan(config: Any, teacher_config: Any, settings: TrainingSettings, arguments: TrainingArguments) -> dict[str, Any]:
    """Return parameters, operations, memory and time of a run without loading a weight (see `run_plan`)."""
    model = prepare_model(meta_model(config), settings)
    teacher: Any = None if teacher_config is None else meta_model(teacher_config)
    if teacher is not None:
        teacher = teacher.to(_teacher_dtype(settings))
    return run_plan(model, settings, micro_batch(settings, world_size()), teacher, arguments.device, world_size())


def open_texts(settings: TrainingSettings) -> tuple[list[TextSource], list[TextSource]]:
    """Return the texts to train on and those to evaluate on; all of them are there."""
    sources = [TextSource(name, settings.text_field) for name in settings.data]
    eval_sources = [TextSource(name, settings.text_field) for name in settings.eval_data]
    check_files(sources, eval_sources)
    return sources, eval_sources


def check_run(job: Job, folders: RunFolders, settings: TrainingSettings) -> CheckedRun:
    """Check everything that can be wrong before tokens are read and weights loaded.

    Raises:
        ValueError, FileNotFoundError, ImportError: for bad input.
        OSError: when the disk has no room for the run.
    """
    check_job(settings, job.config)
    sources, eval_sources = open_texts(settings)
    last = folders.last
    arguments = training_arguments(settings, folders.work, job.defaults, resuming=last is not None)
    sharding = arguments.fsdp or arguments.deepspeed or any(map(parse_flag_from_env, SHARDING_FLAGS))
    if settings.lora_rank is not None and sharding:
        raise ValueError(
            f"lora_rank={settings.lora_rank} with FSDP or DeepSpeed: adapters cannot be merged into a sharded model. "
            "Leave out one of the two; adapters have small gradients and optimiser states, so copies of the model "
            "will do (accelerate launch --multi_gpu)."
        )
    generation_config = job.generation_config or GenerationConfig.from_model_config(job.config)
    check_saves(job.config, generation_config, job.tokenizer)
    planned = plan(job.config, job.teacher_config, settings, arguments)
    origin = {"kind": job.kind, "configuration": job.config.to_diff_dict(), **job.report.get("origin", {})}
    identity = run_identity(origin, settings, sources, eval_sources)
    if last is not None:
        check_same_run(folders.work, identity)
    check_space(folders, planned, adapters=settings.lora_rank is not None)
    return CheckedRun(sources, eval_sources, arguments, planned, identity, last)


def run_job(
    job: Job,
    folders: RunFolders,
    settings: TrainingSettings,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    show_plan: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a job: prepare tokens, train with checkpoints, and write the target folder atomically.

    Args:
        job (`Job`): the model to train.
        folders (`RunFolders`): where.
        settings (`TrainingSettings`): how.
        dry_run (`bool`): check everything, return the plan, write nothing.
        progress (*optional*): called with (stage, done, total).
        say (*optional*): called with one line of text on what was found.
        show_plan (*optional*): called with the plan before anything long starts.

    Returns:
        `dict`: the report, or with `dry_run` its plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        BlockingIOError: when another process trains in the same folder.
        DivergedError: when loss or gradients are not finite; the last checkpoint is named.
        OSError: when the disk is full; the last checkpoint is named.
    """
    started = time.time()
    say = say or (lambda text: None)
    run = check_run(job, folders, settings)
    device = run.arguments.device.type
    if settings.bf16 and run.last is None and device == "cpu" and not multiplies_bf16():
        say("--bf16: this processor has no bf16 instructions, so bf16 is far slower than fp32; leave --bf16 out.")
    if show_plan is not None:
        show_plan(run.plan)
    if dry_run:
        return run.plan

    state = PartialState()
    with folders.locked() if state.is_main_process else contextlib.nullcontext():
        tokens = _tokens(job, folders, settings, run, progress)
        epochs = settings.steps * settings.batch_size / len(tokens.training)
        if run.last is not None:
            done = int(run.last.name.rpartition("-")[2])
            say(f"Resuming from step {done:,} of {settings.steps:,} ({run.last}).")
        elif epochs > 1:
            say(f"The data has {tokens.training.size:,} tokens, so each is seen {epochs:.1f} times.")
        with _remove_unless_resumable(folders):
            teacher = None if job.load_teacher is None else job.load_teacher().to(_teacher_dtype(settings))
            teacher_perplexity = _teacher_perplexity(folders.work, teacher, tokens, run.arguments, progress)
            trainer, kept = _make_trainer(job, settings, run, tokens, teacher, progress, say)
            _train(trainer, run.last, folders)
        report = _report(job, settings, run, tokens, trainer, teacher_perplexity)
        report["seconds"] = round(time.time() - started, 1)
        write_target(trainer, folders.target, job.config, job.tokenizer, settings, kept, report, job.companions)
        if state.is_main_process and not folders.keep:
            shutil.rmtree(folders.work)
    return report


def _teacher_dtype(settings: TrainingSettings) -> torch.dtype:
    return torch.bfloat16 if settings.bf16 else torch.float32


def _tokens(
    job: Job, folders: RunFolders, settings: TrainingSettings, run: CheckedRun, progress: Progress | None
) -> Tokens:
    """Prepare token files in the first process, and open them in all; a new tokenizer becomes the job's."""
    state = PartialState()
    if state.is_main_process:
        make_tokenizer = job.make_tokenizer or (lambda: job.tokenizer)
        prepare_tokens(folders, make_tokenizer, settings, run.sources, run.eval_sources, run.identity, progress)
    state.wait_for_everyone()
    record = json.loads((folders.work / RUN_NAME).read_text(encoding="utf-8"))["tokens"]
    if job.tokenizer is None:
        job.tokenizer = AutoTokenizer.from_pretrained(folders.work / TOKENIZER_NAME)
    training = read_sequences(folders.work / TRAIN_NAME, settings.sequence_length)[: record["sequences"]]
    return Tokens(training, read_sequences(folders.work / EVAL_NAME, settings.sequence_length), record)


@contextlib.contextmanager
def _remove_unless_resumable(folders: RunFolders) -> Iterator[None]:
    """Remove the tokens of a run that fails before its first checkpoint.

    They stay after an interruption or a full disk: the same command then starts with them.
    """
    try:
        yield
    except OSError:
        raise
    except Exception:
        if last_checkpoint(folders.work) is None and PartialState().is_main_process:
            folders.clear()
        raise


def _teacher_perplexity(
    work: Path, teacher: Any, tokens: Tokens, arguments: TrainingArguments, progress: Progress | None
) -> float | None:
    """Return the teacher's perplexity on the evaluation sequences; it is measured once for a run."""
    if teacher is None:
        return None
    file = work / TEACHER_NAME
    if not file.is_file() and PartialState().is_main_process:
        windows = torch.from_numpy(tokens.evaluation.astype("int64"))
        value = perplexity(teacher.to(arguments.device), windows, stage_progress("teacher", progress))
        write_json(file, {"perplexity": value})
    PartialState().wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))["perplexity"]


def _make_trainer(
    job: Job,
    settings: TrainingSettings,
    run: CheckedRun,
    tokens: Tokens,
    teacher: Any,
    progress: Progress | None,
    say: Say,
) -> tuple[DistillationTrainer, KeepModelSettings]:
    """Build the model and its trainer; also return the model's settings as they were before."""
    set_seed(settings.seed)
    model = job.build()
    kept = KeepModelSettings(model)
    rate = run.arguments.learning_rate
    trainer = DistillationTrainer(
        prepare_model(model, settings),
        run.arguments,
        train_dataset=PackedDataset(tokens.training),
        eval_dataset=PackedDataset(tokens.evaluation),
        processing_class=job.tokenizer,
        data_collator=default_data_collator,
        callbacks=[ProgressReport(progress, say, settings.batch_size * settings.sequence_length), kept],
        teacher=teacher,
        kl_weight=settings.kl_weight,
        ce_weight=settings.ce_weight,
        temperature=settings.temperature,
        gate_learning_rate=settings.gate_learning_rate or rate * job.defaults.get("gate_factor", 1.0),
        chunk=settings.chunk,
        rounded=_rounded_entries(model, settings),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, kept


def _rounded_entries(model: Any, settings: TrainingSettings) -> RoundedEntries | None:
    """Return the entries to train through; `None` where the model's cache holds them exact."""
    allocation = getattr(model.config, "bit_allocation", lambda: None)()  # Llamas of the reproduction have none
    if allocation is None or not settings.rounding:
        return None
    for layer in model.model.layers:
        layer._can_checkpoint_with_cache = True  # nothing is stored, so a layer may run twice
    return RoundedEntries(allocation)


def _train(trainer: DistillationTrainer, last: Path | None, folders: RunFolders) -> None:
    """Train; a loss that is not finite and a full disk become errors that say what is left and what to do."""
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except DivergedError as error:
        found = last_checkpoint(folders.work)
        newest = "there is no checkpoint yet" if found is None else f"the last good checkpoint is {found}"
        raise DivergedError(
            f"{error} Nothing was written to {folders.target}; {newest}. Other settings make another run: choose "
            "another target, or start over with --no-resume. A lower learning rate, a longer warm-up or fp32 may help."
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its writer, safetensors as an error of its own.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"Writing a checkpoint into {folders.work} failed ({error}). Free space on the disk. "
            f"{folders.left_behind()}",
        ) from error


def _report(
    job: Job,
    settings: TrainingSettings,
    run: CheckedRun,
    tokens: Tokens,
    trainer: DistillationTrainer,
    teacher_perplexity: float | None,
) -> dict[str, Any]:
    """Return the report of a finished training, before the target is written."""
    arguments = run.arguments
    curve = training_curve(trainer.state.log_history, settings.batch_size * settings.sequence_length)
    return {
        **job.report,
        "settings": {
            **public_settings(settings),
            "learning_rate": arguments.learning_rate,
            "gate_learning_rate": trainer.gate_learning_rate,
            "weight_decay": arguments.weight_decay,
            "schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
            "processes": arguments.world_size,
            "threads": torch.get_num_threads(),
            "rounding": trainer.rounded is not None,
        },
        "plan": run.plan,
        "data": tokens.record["data"],
        "evaluation": {**tokens.record["evaluation"], "sequence_length": settings.sequence_length},
        "epochs": settings.steps * settings.batch_size / len(tokens.training),
        "tokens": run.plan["tokens"],
        "perplexity": {
            "teacher": teacher_perplexity,
            "0 tokens": curve["evaluations"][0]["perplexity"],
            "trained": curve["evaluations"][-1]["perplexity"],
        },
        "resumed_at_step": 0 if run.last is None else int(run.last.name.rpartition("-")[2]),
        "peak_bytes": peak_bytes(),
        **provenance(),
        **curve,
    }
