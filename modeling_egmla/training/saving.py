"""What a run saves of its model: a rehearsal before training, unchanged settings in checkpoints, the target folder."""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig, TrainerCallback

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.utils.files import write_json
from egmla.utils.folders import staged_folder
from egmla.utils.models import config_dtype
from egmla.utils.provenance import TRAINING_REPORT, weights_sha256

from .report import PLOT_NAME, plot_training
from .settings import TrainingSettings
from .stages import merge_lora


# Fields of the configuration that Trainer sets from the tokenizer.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_generation_config(model: str | Path, config: EGMLAConfig) -> GenerationConfig:
    """Return a checkpoint's generation config, or the one that follows from its configuration if it has none.

    Raises:
        ValueError: when `generation_config.json` holds values that Transformers refuses.
    """
    try:
        return GenerationConfig.from_pretrained(str(model))
    except OSError:  # there is none, or it is not JSON; `from_pretrained` of a model does the same
        return GenerationConfig.from_model_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"The generation_config.json of {model} cannot be used ({error}); correct or remove it. Training would "
            "fail when the model is loaded."
        ) from error


def check_saves(config: EGMLAConfig, generation_config: GenerationConfig, tokenizer: Any) -> None:
    """Save everything but the weights into a temporary folder, so that no checkpoint fails later because of it.

    Args:
        config (`EGMLAConfig`): of the model.
        generation_config (`GenerationConfig`): of the model.
        tokenizer: a Transformers tokenizer, or `None` where it is made from the data.

    Raises:
        ValueError: names the part that cannot be saved.
    """
    parts = {"configuration": config, "generation config": generation_config, "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            if part is None:
                continue
            try:
                copy.deepcopy(part).save_pretrained(folder)
            except OSError:
                raise
            except Exception as error:  # of any type: a library's, or one of a tokenizer's own code
                raise ValueError(
                    f"The model's {name} cannot be saved, so no checkpoint could be written "
                    f"({type(error).__name__}: {' '.join(str(error).split())}). Correct it in the folder of the model."
                ) from error


class KeepModelSettings(TrainerCallback):
    """Undo what Trainer changes in a model's settings before training: checkpoints then hold the model's own.

    Trainer sets ids of special tokens to those of the tokenizer. A generation config that differs from its file is
    validated strictly when it is saved, and sampling parameters without `do_sample` are then an error.

    Args:
        model: the model, before Trainer sees it.
    """

    def __init__(self, model: Any) -> None:
        self.special_tokens = {name: getattr(model.config, name) for name in SPECIAL_TOKENS}
        self.generation_config = copy.deepcopy(model.generation_config)

    def restore(self, model: Any) -> None:
        """Give a model its own ids and generation config back."""
        for name, value in self.special_tokens.items():
            setattr(model.config, name, value)
        model.generation_config = copy.deepcopy(self.generation_config)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Run after Trainer has aligned the tokens, and before its first checkpoint."""
        self.restore(model.get_base_model() if hasattr(model, "get_base_model") else model)


def write_target(
    trainer: Any,
    target: Path,
    config: EGMLAConfig,
    tokenizer: Any,
    settings: TrainingSettings,
    kept: KeepModelSettings,
    report: dict[str, Any],
    companions: list[Path],
) -> None:
    """Write the target folder atomically: weights, code, tokenizer, report and plot.

    Args:
        trainer (`DistillationTrainer`): after training.
        target (`Path`): a new or empty folder.
        config (`EGMLAConfig`): of the model.
        tokenizer: of the model.
        settings (`TrainingSettings`): of the run.
        kept (`KeepModelSettings`): the model's own settings.
        report (`dict`): the training report; `dtype` and `weights_sha256` are added.
        companions (`list[Path]`): files to copy into the target.
    """
    dtype = getattr(torch, settings.dtype) if settings.dtype else config_dtype(config)
    report["dtype"] = str(dtype).removeprefix("torch.")
    state = PartialState()
    # Gathering takes every process; what `save_model` writes depends on how checkpoints are written.
    gathered: Any = None
    sharded: Any = trainer.model
    if trainer.is_fsdp_enabled:
        gathered = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif trainer.is_deepspeed_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    state.wait_for_everyone()
    if state.is_main_process:
        model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if gathered is not None:
            model = EGMLAForCausalLM(copy.deepcopy(config))  # not from_config, which DeepSpeed would shard
            model.load_state_dict(gathered)
        elif settings.lora_rank is not None:
            model = merge_lora(model)
        model = model.to(dtype)
        model.config.dtype = dtype
        model.config.use_cache = config.use_cache
        kept.restore(model)
        with staged_folder(target) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for file in companions:
                shutil.copy(file, folder / file.name)
            report["weights_sha256"] = weights_sha256(folder)
            write_json(folder / TRAINING_REPORT, report, default=str)
            plot_training(report, folder / PLOT_NAME)
    state.wait_for_everyone()
