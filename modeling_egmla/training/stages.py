"""Choose what to train: stages, parameter groups of the optimiser, LoRA adapters."""

import difflib
import importlib.util
from typing import Any

from torch import nn
from transformers import PreTrainedModel


STAGES = {
    "gate": "the gates alone",
    "attention": "attention, gates and norms; MLP and embeddings stay frozen",
    "all": "every weight",
}
GATE = "kv_gate_"
FROZEN_IN_ATTENTION = ("mlp.", "embed_tokens.", "lm_head.")
ATTENTION_TARGETS = (
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_encoder_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
)
GATE_TARGETS = ("kv_gate_proj", "kv_gate_embedding")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
# A gate starts with its norm's weight at 0: until that changes, the layers before it have no effect.
GATE_NORM = "kv_gate_norm"


def check_stage(stage: str, has_gate: bool) -> None:
    """Raise `ValueError` for an unknown stage, or for the stage `gate` when the model has no gates."""
    if stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"stage={stage!r}: must be one of {', '.join(STAGES)}{hint}")
    if stage == "gate" and not has_gate:
        raise ValueError("stage='gate' trains the gates, and this model has none (kv_gate is off); use attention.")


def set_trainable(model: PreTrainedModel, stage: str) -> None:
    """Mark the weights that a stage of `STAGES` trains, and freeze all others.

    Raises:
        ValueError: for an unknown stage, or the stage `gate` when the model has no gates.
    """
    check_stage(stage, any(GATE in name for name, _ in model.named_parameters()))
    for name, parameter in model.named_parameters():
        if stage == "gate":
            parameter.requires_grad = GATE in name
        elif stage == "attention":
            parameter.requires_grad = not any(part in name for part in FROZEN_IN_ATTENTION)
        else:
            parameter.requires_grad = True


def check_peft() -> None:
    """Raise `ImportError` with the command that installs PEFT when it is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("LoRA needs PEFT, which is not installed; run: pip install 'egmla[train]'")


def lora_targets(model: PreTrainedModel, stage: str) -> list[str]:
    """Return the names of the modules that get an adapter in a stage.

    These are the gates' projections and tables, the low-rank maps of attention, and in stage `all` the MLP.
    Embeddings and the output embedding get none: where they are tied, adapters could not be merged into each.
    """
    wanted = set(GATE_TARGETS)
    if stage in ("attention", "all"):
        wanted |= set(ATTENTION_TARGETS)
    if stage == "all":
        wanted |= set(MLP_TARGETS)
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(wanted & present)


def add_lora(model: PreTrainedModel, stage: str, rank: int, alpha: float | None = None, dropout: float = 0.0) -> Any:
    """Wrap a model in LoRA adapters; only these and the norms of the gates are trained.

    Args:
        model (`PreTrainedModel`): an EG-MLA model.
        stage (`str`): one of `STAGES`; decides which modules get adapters.
        rank (`int`): rank of the adapters.
        alpha (`float`, *optional*): LoRA's alpha, `2 * rank` by default.
        dropout (`float`): dropout of the adapters' inputs.

    Returns:
        `peft.PeftModel`: `merge_lora` makes a plain model of it.

    Raises:
        ImportError: when PEFT is missing.
        ValueError: for a rank below 1, or an unknown stage.
    """
    check_peft()
    if rank < 1:
        raise ValueError(f"lora_rank={rank}: must be at least 1; 16 is usual, or leave it out to train the weights.")
    has_gate = any(GATE in name for name, _ in model.named_parameters())
    check_stage(stage, has_gate)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # its hint says int, it divides
        lora_dropout=dropout,
        target_modules=lora_targets(model, stage),
        modules_to_save=[GATE_NORM] if has_gate else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merge_lora(model: Any) -> PreTrainedModel:
    """Merge the adapters into the weights; the plain model computes the same up to rounding.

    Raises:
        ValueError: when an adapter holds values that are not finite; the weights then stay unchanged.
    """
    return model.merge_and_unload(safe_merge=True)


def parameter_groups(
    model: nn.Module, decayed: set[str], weight_decay: float, learning_rate: float, gate_learning_rate: float
) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups: weights that decay, weights that do not, gates.

    Trainer logs the learning rate of the first group.

    Args:
        model (`nn.Module`): the model, including adapters.
        decayed (`set[str]`): names of parameters with weight decay; gates have none.
        weight_decay (`float`): their weight decay.
        learning_rate, gate_learning_rate (`float`): learning rate of all other weights, and of the gates.

    Returns:
        `list[dict]`: the groups that are not empty, each with its `name`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "name": "decayed",
            "params": [parameter for name, parameter in named if GATE not in name and name in decayed],
            "lr": learning_rate,
            "weight_decay": weight_decay,
        },
        {
            "name": "not decayed",
            "params": [parameter for name, parameter in named if GATE not in name and name not in decayed],
            "lr": learning_rate,
            "weight_decay": 0.0,
        },
        {
            "name": "gate",
            "params": [parameter for name, parameter in named if GATE in name],
            "lr": gate_learning_rate,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
