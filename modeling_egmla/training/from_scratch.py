"""Train an EG-MLA model from new weights."""

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.utils.provenance import public_name

from .data import TextSource
from .healing import check_tokenizer, load_tokenizer
from .report import command_line
from .run import Job, run_job
from .run_folders import RunFolders
from .settings import TrainingSettings, parse_value


DEFAULTS = {"learning_rate": 6e-4, "gate_factor": 1.0, "weight_decay": 0.1, "adam_beta2": 0.95}
# Settings that are fixed in training from scratch.
FIXED = ("kl_weight", "ce_weight", "stage")
END = "<|endoftext|>"
# Characters of the data that a new tokenizer is trained on; a vocabulary of usual size needs less.
TOKENIZER_CHARACTERS = 50_000_000


def train_from_scratch(
    config: EGMLAConfig,
    target: str | Path,
    settings: TrainingSettings,
    *,
    tokenizer: str | Path | None = None,
    new_tokenizer: int | None = None,
    name: str = "CONFIG",
    overrides: dict[str, Any] | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = True,
    keep_checkpoints: bool = False,
    dry_run: bool = False,
    **callbacks: Any,
) -> dict[str, Any]:
    """Train a model from new weights by cross entropy, and write it as a checkpoint.

    Args:
        config (`EGMLAConfig`): the model; ids of special tokens are taken from the tokenizer.
        target (`str` or `Path`): a new or empty folder.
        settings (`TrainingSettings`): data, tokens and the rest; see `scratch_settings` for loss and stage.
        tokenizer (`str` or `Path`, *optional*): folder or Hub id of a tokenizer.
        new_tokenizer (`int`, *optional*): train a byte-level BPE tokenizer of this many tokens on the data instead;
            the model's vocabulary gets its size.
        name (`str`): preset or folder of the configuration, for the report.
        overrides (`dict`, *optional*): fields changed in it, for the report.
        checkpoints, resume, keep_checkpoints, dry_run, **callbacks: see `heal_checkpoint`.

    Returns:
        `dict`: the training report, or with `dry_run` its plan.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        DivergedError, OSError: see `run_job`.
    """
    folders = RunFolders.of(target, checkpoints, resume, keep_checkpoints)
    if (tokenizer is None) == (new_tokenizer is None):
        raise ValueError(
            "Training needs a tokenizer: name a folder or Hub id (--tokenizer NAME), or train one on the data "
            "(--new-tokenizer 8192); give one of the two."
        )
    if settings.kl_weight or settings.stage != "all" or settings.lora_rank is not None:
        raise ValueError(
            "Training from scratch is cross entropy on all weights: kl_weight=0, ce_weight=1, stage='all', no LoRA."
        )
    loaded = None if tokenizer is None else load_tokenizer(str(tokenizer))
    if loaded is not None:
        size = len(loaded)
        check_tokenizer(loaded, config.vocab_size, f"change it with vocab_size={size} (--config vocab_size={size})")
        config.bos_token_id, config.eos_token_id = loaded.bos_token_id, loaded.eos_token_id
        config.pad_token_id = loaded.pad_token_id
    else:
        asked = (overrides or {}).get("vocab_size", new_tokenizer)
        if asked != new_tokenizer:
            raise ValueError(
                f"new_tokenizer={new_tokenizer} with vocab_size={asked}: a new tokenizer sets the vocabulary size; "
                "leave vocab_size out, or give both the same number."
            )
        config.vocab_size = checked_size(new_tokenizer)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 0, 0
    config.validate_architecture()

    def build() -> EGMLAForCausalLM:
        torch.manual_seed(settings.seed)
        return EGMLAForCausalLM(config).float()

    options = {
        "tokenizer": None if tokenizer is None else public_name(str(tokenizer)),
        "new_tokenizer": new_tokenizer,
        "config": [f"{key}={value}" for key, value in (overrides or {}).items()],
    }
    label = public_name(name)
    job = Job(
        "train",
        config,
        loaded,
        build,
        DEFAULTS,
        make_tokenizer=None if new_tokenizer is None else lambda: train_tokenizer(settings, new_tokenizer),
        report={
            "kind": "train",
            "command": command_line(["train", label, "TARGET"], settings, options, leave_out=FIXED),
            "origin": {**options, "config": label, "overrides": overrides or {}},
            "earlier": [],
        },
    )
    return run_job(job, folders, settings, dry_run=dry_run, **callbacks)


def scratch_settings(**values: Any) -> TrainingSettings:
    """Return `TrainingSettings` for training from scratch: cross entropy, every weight."""
    return TrainingSettings(**{"kl_weight": 0.0, "ce_weight": 1.0, "stage": "all", **values})


def changed_config(config: Any, pairs: Sequence[str]) -> tuple[EGMLAConfig, dict[str, Any]]:
    """Replace fields of a configuration by texts such as `num_hidden_layers=4`; return it and the changes.

    Raises:
        ValueError: for a model of another type, or a name that is not a field of the configuration.
    """
    if config.model_type != "egmla":
        raise ValueError(f"This is the configuration of a {config.model_type} model; training makes EG-MLA models.")
    known = [item.name for item in dataclasses.fields(EGMLAConfig)]
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r}: a change of the configuration is written key=value, such as hidden_size=256.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise ValueError(f"{name!r} is not a field of the configuration; there is {', '.join(near)}.")
        changes[name] = parse_value(text)
    return EGMLAConfig(**{**config.to_dict(), **changes}), changes


def checked_size(size: int | None) -> int:
    """Return the size of a vocabulary; raise `ValueError` when it cannot hold all bytes and the end token."""
    if size is None or size < 257:
        raise ValueError(f"new_tokenizer={size}: must be at least 257: 256 bytes and one special token.")
    return size


def train_tokenizer(settings: TrainingSettings, size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the beginning of the data; its one special token ends documents.

    Args:
        settings (`TrainingSettings`): its `data` is read, including the part that is held out; `eval_data` is not.
        size (`int`): number of tokens, including the special one and 256 bytes.

    Raises:
        ValueError: for a size below 257, or too little data for the size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = checked_size(size)

    def texts():
        for name in settings.data:
            share, read = TOKENIZER_CHARACTERS // len(settings.data), 0
            for piece in itertools.chain.from_iterable(TextSource(name, settings.text_field).documents()):
                yield piece
                read += len(piece)
                if read >= share:  # a file may be one document
                    break

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(
            f"The data gives a tokenizer of {tokenizer.get_vocab_size()} tokens only, and {size} were asked for; use "
            "more text or a smaller new_tokenizer (--new-tokenizer)."
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
