"""What is trained: stages, groups of parameters for the optimiser, and LoRA adapters."""

import difflib
import importlib.util
from typing import Any

from torch import nn
from transformers import PreTrainedModel


STAGES = {
    "gate": "the gates alone",
    "attention": "attention, gates and norms; MLP and embeddings stay as they are",
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
# A gate starts with the weight of its norm at 0: until that moves, nothing before it has an effect.
GATE_NORM = "kv_gate_norm"


def check_stage(stage: str, has_gate: bool) -> None:
    """Raises `ValueError` for an unknown stage, or for the stage `gate` of a model without gates."""
    if stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"stage={stage!r}: must be one of {', '.join(STAGES)}{hint}")
    if stage == "gate" and not has_gate:
        raise ValueError("stage='gate' trains the gates, and this model has none (kv_gate is off); use attention.")


def set_trainable(model: PreTrainedModel, stage: str) -> None:
    """Freezes what a stage of `STAGES` does not train, and nothing else.

    Raises:
        ValueError: for an unknown stage, or the gate stage of a model without gates.
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
    """Raises `ImportError` saying how to install PEFT when it is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("LoRA needs PEFT, which is not installed; run: pip install 'egmla[train]'")


def lora_targets(model: PreTrainedModel, stage: str) -> list[str]:
    """Names of the modules that get an adapter in a stage: the low-rank maps of attention, the gates' maps, the MLP.

    Embeddings and the head get none: tied, they could not be merged apart.
    """
    wanted = set(GATE_TARGETS)
    if stage in ("attention", "all"):
        wanted |= set(ATTENTION_TARGETS)
    if stage == "all":
        wanted |= set(MLP_TARGETS)
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(wanted & present)


def add_lora(model: PreTrainedModel, stage: str, rank: int, alpha: float | None = None, dropout: float = 0.0) -> Any:
    """Wraps a model in LoRA adapters; only they and the norms of the gates are trained.

    Args:
        model (`PreTrainedModel`): an EG-MLA model.
        stage (`str`): one of `STAGES`; says which modules get adapters.
        rank (`int`): width of the adapters.
        alpha (`float`, *optional*): scale, `2 * rank` by default.
        dropout (`float`): dropout of the adapters' inputs.

    Returns:
        The `peft.PeftModel`; `merge_lora` turns it back.

    Raises:
        ImportError: without PEFT.
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
    """The plain model that computes what a `PeftModel` does, to rounding.

    Raises:
        ValueError: when an adapter holds values that are not finite; the weights are then left as they were.
    """
    return model.merge_and_unload(safe_merge=True)


def parameter_groups(
    model: nn.Module, decayed: set[str], weight_decay: float, learning_rate: float, gate_learning_rate: float
) -> list[dict[str, Any]]:
    """Groups of trainable parameters for an optimiser: weights that decay, the rest, and gates.

    Trainer logs the first one's rate.

    Args:
        model (`nn.Module`): the model, adapters included.
        decayed (`set[str]`): names of parameters that weight decay applies to; never to a gate.
        weight_decay (`float`): their decay.
        learning_rate, gate_learning_rate (`float`): rates of the gates and of all others.

    Returns:
        `list[dict]`: groups that are not empty, each with its `name`.
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
