"""A training run from its checks to the folder it leaves; healing and training from scratch bring what differs."""

import contextlib
import copy
import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import set_seed

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.utils.accounting import meta_model
from egmla.utils.files import write_json
from egmla.utils.folders import staged_folder
from egmla.utils.machine import multiplies_bf16
from egmla.utils.perplexity import perplexity
from egmla.utils.plotting import check_matplotlib
from egmla.utils.provenance import peak_bytes, weights_sha256

from .data import PackedDataset, Progress, TextSource, read_sequences
from .estimates import run_plan
from .report import (
    PLOT_NAME,
    plot_training,
    provenance,
    public_settings,
    training_curve,
    write_report,
)
from .run_folders import (
    EVAL_NAME,
    RUN_NAME,
    TOKENIZER_NAME,
    TRAIN_NAME,
    Place,
    check_files,
    check_same_run,
    check_space,
    prepare_tokens,
    run_identity,
)
from .settings import TrainingSettings, check_settings, micro_batch, training_arguments, world_size
from .stages import add_lora, check_peft, check_stage, merge_lora, set_trainable
from .trainer import DistillationTrainer, DivergedError, ProgressReport, check_weights, last_checkpoint


Say = Callable[[str], None]
# Set by `accelerate launch`.
SHARDING_FLAGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass
class Job:
    """What is trained, and how it comes about.

    Attributes:
        kind: `heal` or `train`.
        config: configuration of the model.
        tokenizer: its tokenizer.
        build: makes the model in fp32.
        defaults: learning rates and other arguments of this kind of run.
        report: what the report says of the origins, first.
        teacher_config, load_teacher: of a teacher, when there is one.
        companions: files to take along into the target.
        make_tokenizer: makes the tokenizer from the data, where there is none yet.
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


def check_job(settings: TrainingSettings, config: EGMLAConfig) -> None:
    """Everything about settings and configuration that can be wrong, before anything is read or loaded.

    Raises:
        ValueError, ImportError: the message says what was given, what is required and what to do.
    """
    check_settings(settings, config.max_position_embeddings)
    # Baselines of the reproduction are Llamas, which have no such field.
    check_stage(settings.stage, getattr(config, "kv_gate", None) is not None)
    check_weights(settings.kl_weight, settings.ce_weight, settings.temperature)
    if settings.lora_rank is not None:
        check_peft()
    check_matplotlib()


def prepare_model(model: Any, settings: TrainingSettings) -> Any:
    """Marks what is trained, or adds adapters."""
    if settings.lora_rank is not None:
        return add_lora(model, settings.stage, settings.lora_rank)
    set_trainable(model, settings.stage)
    return model


def plan(job: Job, settings: TrainingSettings) -> dict[str, Any]:
    """Parameters, operations and memory of a run, without loading a weight (see `run_plan`)."""
    # Copies, for a model made on the meta device writes its number format into its configuration.
    model = prepare_model(meta_model(job.config), settings)
    teacher: Any = None if job.teacher_config is None else meta_model(job.teacher_config)
    if teacher is not None:
        teacher = teacher.to(torch.bfloat16 if settings.bf16 else torch.float32)
    size = micro_batch(settings, world_size())
    return run_plan(model, settings, settings.steps, settings.sequence_length, size, teacher)


def run_job(
    job: Job,
    place: Place,
    settings: TrainingSettings,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
    show_plan: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs a job: tokens, training with checkpoints, and the target folder, written whole or not at all.

    Args:
        job (`Job`): what is trained.
        place (`Place`): where.
        settings (`TrainingSettings`): how.
        dry_run (`bool`): check everything, return the plan, write nothing.
        progress (*optional*): called with (stage, done, total).
        say (*optional*): called with a line on what was found.
        show_plan (*optional*): called with the plan before anything long starts.

    Returns:
        `dict`: the report, or with `dry_run` its plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        DivergedError: when loss or gradients are not finite; the last checkpoint is named.
        OSError: when the disk is full; the last checkpoint is named.
    """
    started = time.time()
    say = say or (lambda text: None)
    check_job(settings, job.config)
    sources = [TextSource(name, settings.text_field) for name in settings.data]
    eval_sources = [TextSource(name, settings.text_field) for name in settings.eval_data]
    check_files(sources, eval_sources)
    last = last_checkpoint(place.work) if place.resume else None
    arguments = training_arguments(settings, place.work, job.defaults, resuming=last is not None)
    sharding = arguments.fsdp or arguments.deepspeed or any(map(parse_flag_from_env, SHARDING_FLAGS))
    if settings.lora_rank is not None and sharding:
        raise ValueError(
            f"lora_rank={settings.lora_rank} with FSDP or DeepSpeed: adapters cannot be merged into a sharded model. "
            "Leave out one of the two; adapters have small gradients and optimiser states, so copies of the model "
            "will do (accelerate launch --multi_gpu)."
        )
    planned = plan(job, settings)
    origin = {"kind": job.kind, "configuration": job.config.to_diff_dict(), **job.report.get("origin", {})}
    identity = run_identity(origin, settings, sources, eval_sources)
    if last is not None:
        check_same_run(place.work, identity)
    check_space(place, planned, adapters=settings.lora_rank is not None)
    if settings.bf16 and last is None and arguments.device.type == "cpu" and not multiplies_bf16():
        say("--bf16: this processor has no instructions for it and takes far longer than in fp32; leave --bf16 out.")
    if show_plan is not None:
        show_plan(planned)
    if dry_run:
        return planned

    state = PartialState()
    if state.is_main_process:
        prepare_tokens(
            place, job.make_tokenizer or (lambda: job.tokenizer), settings, sources, eval_sources, identity, progress
        )
    state.wait_for_everyone()
    tokens = json.loads((place.work / RUN_NAME).read_text(encoding="utf-8"))["tokens"]
    if job.tokenizer is None:
        job.tokenizer = AutoTokenizer.from_pretrained(place.work / TOKENIZER_NAME)
    training = read_sequences(place.work / TRAIN_NAME, settings.sequence_length)[: tokens["sequences"]]
    evaluation = read_sequences(place.work / EVAL_NAME, settings.sequence_length)
    epochs = settings.steps * settings.batch_size / len(training)
    if epochs > 1 and last is None:
        say(f"The data has {training.size:,} tokens, so it is gone through {epochs:.1f} times.")

    with _nothing_left_unstarted(place.work):
        teacher = None
        if job.load_teacher is not None:
            teacher = job.load_teacher().to(torch.bfloat16 if settings.bf16 else torch.float32)
        teacher_perplexity = _teacher_perplexity(place.work, teacher, evaluation, arguments, progress)
        set_seed(settings.seed)
        model = job.build()
        generation_config = copy.deepcopy(model.generation_config)
        model = prepare_model(model, settings)
        rate = arguments.learning_rate
        trainer = DistillationTrainer(
            model,
            arguments,
            train_dataset=PackedDataset(training),
            eval_dataset=PackedDataset(evaluation),
            processing_class=job.tokenizer,
            data_collator=default_data_collator,
            callbacks=[ProgressReport(progress, say, settings.batch_size * settings.sequence_length)],
            teacher=teacher,
            kl_weight=settings.kl_weight,
            ce_weight=settings.ce_weight,
            temperature=settings.temperature,
            gate_learning_rate=settings.gate_learning_rate or rate * job.defaults.get("gate_factor", 1.0),
            chunk=settings.chunk,
        )
        trainer.remove_callback(PrinterCallback)
        if last is not None:
            say(f"Going on from {last.name}.")
        _train(trainer, last, place)

    curve = training_curve(trainer.state.log_history, settings.batch_size * settings.sequence_length)
    report = {
        **job.report,
        "settings": {
            **public_settings(settings),
            "learning_rate": rate,
            "gate_learning_rate": trainer.gate_learning_rate,
            "weight_decay": arguments.weight_decay,
            "schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
            "processes": arguments.world_size,
            "threads": torch.get_num_threads(),
        },
        "plan": planned,
        "data": tokens["data"],
        "evaluation": {**tokens["evaluation"], "sequence_length": settings.sequence_length},
        "epochs": epochs,
        "tokens": planned["tokens"],
        "perplexity": {
            "teacher": teacher_perplexity,
            "0 tokens": curve["evaluations"][0]["perplexity"],
            "trained": curve["evaluations"][-1]["perplexity"],
        },
        "seconds": round(time.time() - started, 1),
        "resumed_at_step": 0 if last is None else int(last.name.rpartition("-")[2]),
        "peak_bytes": peak_bytes(),
        **provenance(),
        **curve,
    }
    _write_target(trainer, job, place, settings, report, generation_config)
    if state.is_main_process and not place.keep:
        shutil.rmtree(place.work)
    return report


@contextlib.contextmanager
def _nothing_left_unstarted(work: Path) -> Iterator[None]:
    """Removes the tokens of a run that fails before its first checkpoint; beside them the mended one would be refused.

    Not where there is no room on the disk: that run can go on with them.
    """
    try:
        yield
    except OSError:
        raise
    except Exception:
        if last_checkpoint(work) is None and PartialState().is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _teacher_perplexity(
    work: Path, teacher: Any, evaluation: Any, arguments: TrainingArguments, progress: Progress | None
) -> float | None:
    """The teacher's perplexity on the evaluation sequences, measured once for a run."""
    if teacher is None:
        return None
    file = work / "teacher.json"
    if not file.is_file() and PartialState().is_main_process:
        step = None if progress is None else (lambda done, total: progress("teacher", done, total))
        windows = torch.from_numpy(evaluation.astype("int64"))
        value = perplexity(teacher.to(arguments.device), windows, step)
        write_json(file, {"perplexity": value})
    PartialState().wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))["perplexity"]


def _train(trainer: DistillationTrainer, last: Path | None, place: Place) -> None:
    def newest() -> str:
        found = last_checkpoint(place.work)
        return "there is no checkpoint yet" if found is None else f"the last good checkpoint is {found}"

    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except DivergedError as error:
        raise DivergedError(
            f"{error} Nothing was written to {place.target}; {newest()}. Other settings make another run: start it in "
            "another folder, with a lower learning rate, a longer warm-up or fp32."
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its writer, safetensors as an error of its own.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"Writing a checkpoint into {place.work} failed ({error}); {newest()}. Free space and go on with "
            "resume=True (--resume).",
        ) from error


def _write_target(
    trainer: DistillationTrainer,
    job: Job,
    place: Place,
    settings: TrainingSettings,
    report: dict[str, Any],
    generation_config: Any,
) -> None:
    """The target folder, whole or not at all: weights, code, tokenizer, report and picture."""
    dtype = getattr(torch, settings.dtype) if settings.dtype else _dtype(job.config)
    report["dtype"] = str(dtype).removeprefix("torch.")
    state = PartialState()
    # Every process takes part in gathering; what `save_model` writes depends on how checkpoints are written.
    sharded: Any = trainer.model
    whole: Any = None
    if trainer.is_fsdp_enabled:
        whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif trainer.is_deepspeed_enabled:
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    state.wait_for_everyone()
    if state.is_main_process:
        model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if whole is not None:
            model = EGMLAForCausalLM(copy.deepcopy(job.config))  # not from_config, which DeepSpeed would shard
            model.load_state_dict(whole)
        elif settings.lora_rank is not None:
            model = merge_lora(model)
        model = model.to(dtype)
        model.config.dtype = dtype
        # Trainer sets these by its own lights and the tokenizer's.
        for name in ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(job.config, name))
        model.generation_config = generation_config
        with staged_folder(place.target) as folder:
            model.save_pretrained(folder)
            job.tokenizer.save_pretrained(folder)
            for file in job.companions:
                shutil.copy(file, folder / file.name)
            report["weights_sha256"] = weights_sha256(folder)
            write_report(folder, report)
            plot_training(report, folder / PLOT_NAME)
    state.wait_for_everyone()


def _dtype(config: EGMLAConfig) -> torch.dtype:
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
