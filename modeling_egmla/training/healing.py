"""Heal a converted model: self-distillation from the model it was converted from, or plain cross entropy."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import cached_file, extract_commit_hash

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.utils.files import read_json
from egmla.utils.provenance import CONVERSION_REPORT, TRAINING_REPORT, public_name, weights_sha256

from .report import command_line
from .run import Job, run_job
from .run_folders import RunFolders
from .saving import load_generation_config
from .settings import TrainingSettings
from .trainer import check_vocabulary


# Learning rates for 135M parameters; 2e-5 suits 7B. Gates start at identity and have further to go, above all when
# only they are trained. Together with attention a higher rate gains nothing ("The gates alone" in
# tests/benchmarks/LOG.md).
DEFAULTS = {"learning_rate": 1e-4, "gate_factor": 5.0, "weight_decay": 0.01}
GATE_FACTOR_ALONE = 50.0


def heal_checkpoint(
    converted: str | Path,
    target: str | Path,
    settings: TrainingSettings,
    *,
    teacher: str | Path | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = True,
    keep_checkpoints: bool = False,
    dry_run: bool = False,
    **callbacks: Any,
) -> dict[str, Any]:
    """Train a converted model towards the model it came from, and write it as a new checkpoint.

    Args:
        converted (`str` or `Path`): folder or Hub id of an EG-MLA checkpoint with its tokenizer.
        target (`str` or `Path`): a new or empty folder.
        settings (`TrainingSettings`): data, tokens, stage, loss and the rest.
        teacher (`str` or `Path`, *optional*): the model it was converted from: folder, Hub id or GGUF file of a causal
            language model with the same tokenizer. Required unless `settings.kl_weight` is 0.
        checkpoints (`str` or `Path`, *optional*): folder for checkpoints, `TARGET.checkpoints` by default.
        resume (`bool`): resume from the newest checkpoint of an interrupted run. `False` removes that run and starts
            over.
        keep_checkpoints (`bool`): keep that folder at the end.
        dry_run (`bool`): check everything, return the plan, write nothing.
        **callbacks: `progress`, `say` and `show_plan` of `run_job`.

    Returns:
        `dict`: the training report (also written as `training_report.json`), or with `dry_run` its plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        DivergedError, OSError: see `run_job`.
    """
    folders = RunFolders.of(target, checkpoints, resume, keep_checkpoints)
    config = load_config(converted)
    tokenizer = load_tokenizer(converted)
    advice = "save the model with resize_token_embeddings(len(tokenizer)), or its own tokenizer"
    check_tokenizer(tokenizer, config.vocab_size, advice)
    opened = None if settings.kl_weight == 0 else _open_teacher(teacher, config, tokenizer)
    if teacher is not None and opened is None and (say := callbacks.get("say")) is not None:
        say("The teacher is not used: with kl_weight=0 the loss is cross entropy alone.")
    training, conversion = (_file_of(converted, name) for name in (TRAINING_REPORT, CONVERSION_REPORT))
    earlier = None if training is None else read_json(training)
    names = {"model": public_name(str(converted)), "teacher": opened and public_name(str(teacher))}
    options = {"teacher": names["teacher"]}
    # A resumed run must have started with the same weights: adapters would be merged into others without an error.
    weights = {
        "weights_sha256": weights_sha256(Path(converted)),  # of a folder; the Hub has revisions
        "revision": extract_commit_hash(str(_file_of(converted, "config.json")), None),
        "teacher_type": opened and opened.config.model_type,
    }
    job = Job(
        "heal",
        config,
        tokenizer,
        build=lambda: EGMLAForCausalLM.from_pretrained(converted, dtype=torch.float32),
        defaults=DEFAULTS | ({"gate_factor": GATE_FACTOR_ALONE} if settings.stage == "gate" else {}),
        report={
            "kind": "heal",
            "command": command_line(["heal", str(names["model"]), "TARGET"], settings, options),
            "origin": {**names, **weights},
            # A model may be healed in stages, one run after another.
            "earlier": [] if earlier is None else [*earlier.pop("earlier", []), earlier],
        },
        teacher_config=opened and opened.config,
        load_teacher=None if opened is None else lambda: _load_teacher(str(teacher)),
        companions=[] if conversion is None else [conversion],
        generation_config=load_generation_config(converted, config),
    )
    return run_job(job, folders, settings, dry_run=dry_run, **callbacks)


def load_config(model: str | Path) -> EGMLAConfig:
    """Return the configuration of an EG-MLA checkpoint.

    Raises:
        FileNotFoundError: when there is no model.
        ValueError: when it is a model of another type.
    """
    path = Path(model)
    local = path.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if local and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no model (no config.json); give the folder of a converted checkpoint.")
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise FileNotFoundError(f"{model} is no local folder, and the hub has no model of that name.") from error
    if config.model_type != "egmla":
        raise ValueError(
            f"{model} is a {config.model_type} model; healing trains an EG-MLA model, so convert it first: egmla "
            f"convert {public_name(str(model))} TARGET --cache 0.5 --calibration FILE."
        )
    return config


def _file_of(model: str | Path, name: str) -> Path | None:
    """Return the path of a file of a checkpoint, in its folder or from the Hub; `None` when there is no such file."""
    found = cached_file(
        str(model),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def load_tokenizer(model: str | Path) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: when there is no tokenizer that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{model} has no tokenizer that can be read, and training needs one; save the source's tokenizer there: "
            f"AutoTokenizer.from_pretrained(SOURCE).save_pretrained({str(model)!r})."
        ) from error


def check_tokenizer(tokenizer: Any, vocabulary: int, advice: str) -> None:
    """Raise `ValueError` when a tokenizer has more tokens than a model has embeddings."""
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens and the model a vocabulary of {vocabulary:,}; {advice}."
        )


def _open_teacher(teacher: str | Path | None, config: EGMLAConfig, tokenizer: Any) -> Any:
    from egmla.conversion.sources import open_source

    if teacher is None:
        raise ValueError(
            "Self-distillation needs the model this one was converted from: name it as teacher (--teacher SOURCE), or "
            "train on the text alone with kl_weight=0 and ce_weight=1 (--kl-weight 0 --ce-weight 1)."
        )
    opened = open_source(teacher)
    check_vocabulary(config.vocab_size, opened.config.vocab_size)
    if opened.tokenizer is not None and opened.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer of {teacher} has other tokens than the model's own, so its predictions mean other text. "
            "The teacher must be the model this one was converted from, or share its tokenizer."
        )
    return opened


def _load_teacher(teacher: str) -> Any:
    from egmla.conversion import load_source

    return load_source(teacher)[0]
