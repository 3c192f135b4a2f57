"""Transformers' Trainer with a distillation loss, and checks that stop a run before it spoils its weights."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from egmla.utils.head import loss_in_place_of_logits, states_for_head

from .losses import CHUNK, distillation_loss
from .rounded_entries import RoundedEntries
from .stages import parameter_groups


STATE_NAME = "trainer_state.json"


class DivergedError(ValueError):
    """Error for a loss or gradients that are not finite."""


class DistillationTrainer(Trainer):
    """`transformers.Trainer` whose loss is the forward KL divergence to a frozen teacher, cross entropy, or both.

    Evaluation is cross entropy, logged with its perplexity. With `kl_weight=0` no teacher is needed.

    Args:
        teacher (`PreTrainedModel`, *optional*): model with the student's vocabulary; it is frozen.
        kl_weight, ce_weight (`float`): weights of the two terms, see `distillation_loss`.
        temperature (`float`): temperature of the KL term.
        gate_learning_rate (`float`, *optional*): learning rate of the gates, on the same schedule;
            `args.learning_rate` by default.
        chunk (`int`): positions whose logits exist at one time.
        rounded (`RoundedEntries`, *optional*): entries as the model's cache will have rounded them; exact by default.
        *arguments, **more: passed to `transformers.Trainer`.

    Raises:
        ValueError: when both weights are 0, or for a KL term without a teacher of the same vocabulary.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: PreTrainedModel | None = None,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        gate_learning_rate: float | None = None,
        chunk: int = CHUNK,
        rounded: RoundedEntries | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self.rounded = rounded
        check_weights(kl_weight, ce_weight, temperature)
        if kl_weight and teacher is None:
            raise ValueError("A KL term needs a teacher; pass one, or kl_weight=0 and ce_weight=1 for cross entropy.")
        if teacher is not None and kl_weight:
            check_vocabulary(self.causal_model.config.vocab_size, teacher.config.vocab_size)
            teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.teacher = teacher if kl_weight else None
        self.kl_weight, self.ce_weight, self.temperature, self.chunk = kl_weight, ce_weight, temperature, chunk
        self.gate_learning_rate = self.args.learning_rate if gate_learning_rate is None else gate_learning_rate

    @property
    def causal_model(self) -> PreTrainedModel:
        """The language model without the wrappers of accelerate and PEFT."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean loss per predicted token.

        The mean is over the tokens of a whole optimiser step where Trainer gives their number. The model is called
        through its wrapper, so that DDP and FSDP see the call. Its output embedding returns the loss, not logits.
        """
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        student = self.causal_model
        training = student.training and torch.is_grad_enabled()
        teacher_hidden = None
        if training and self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = states_for_head(self.teacher, **given)
        head = student.get_output_embeddings()
        if training and num_items_in_batch is not None:
            # DDP averages gradients over its ranks; the number counts the tokens of all ranks.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            share = ranks / num_items_in_batch
        else:
            share = 1 / (labels[:, 1:] != -100).sum()

        def loss_of(hidden: torch.Tensor) -> torch.Tensor:
            total = distillation_loss(
                head,
                hidden,
                labels,
                None if self.teacher is None else self.teacher.get_output_embeddings(),
                teacher_hidden,
                kl_weight=self.kl_weight if training else 0.0,
                ce_weight=self.ce_weight if training else 1.0,
                temperature=self.temperature,
                chunk=self.chunk,
            )
            return total * share

        with loss_in_place_of_logits(head, loss_of) as exact:
            loss = model(**given, **self.cache_arguments(labels)).logits.float()
        loss = loss + (exact[0] - loss.detach())  # FSDP rounds outputs to the dtype of mixed precision
        return (loss, {"loss": loss}) if return_outputs else loss

    def cache_arguments(self, labels: torch.Tensor) -> dict[str, Any]:
        """Return what the model is told about caches, for sequences without padding `[B, T]`."""
        if self.rounded is None:
            return {"use_cache": False}  # a cache would not be used
        mask = self.rounded.mask(labels.shape[1], labels.device)
        return {"use_cache": True, "past_key_values": self.rounded, "attention_mask": mask}

    def training_step(self, *arguments, **more):
        """Do the step of `Trainer`, but stop at a loss that is not finite, before it reaches the weights.

        Raises:
            DivergedError: names the step.
        """
        loss = super().training_step(*arguments, **more)
        if not torch.isfinite(loss):
            raise DivergedError(f"The loss of optimiser step {self.state.global_step + 1} is {loss.item()}.")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # Called by Trainer after clipping and before the optimiser's step.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm) and not self.accelerator.scaler:
            raise DivergedError(f"The gradient of optimiser step {self.state.global_step + 1} has the norm {norm}.")
        return norm

    def create_optimizer(self, model=None):
        """Create the optimiser; gates are a separate group with their own learning rate and no weight decay."""
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        optimizer_class, keywords = self.get_optimizer_cls_and_kwargs(self.args, model)
        if is_optimizer_factory(optimizer_class) or {"params", "model", "optimizer_dict"} & set(keywords):
            raise ValueError(
                f"optim={self.args.optim} makes its own groups of parameters, so gates cannot have their own learning "
                "rate; use an optimiser that takes groups, such as adamw_torch or adafactor."
            )
        groups = parameter_groups(
            model,
            set(self.get_decay_parameter_names(model)),
            self.args.weight_decay,
            self.args.learning_rate,
            self.gate_learning_rate,
        )
        self.optimizer = optimizer_class(groups, **keywords)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, and add the perplexity to an evaluation's loss."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
        super().log(logs, start_time)


def check_weights(kl_weight: float, ce_weight: float, temperature: float) -> None:
    """Raise `ValueError` for weights that are negative or all zero, or a temperature that is not positive."""
    if kl_weight < 0 or ce_weight < 0 or not kl_weight + ce_weight > 0:
        raise ValueError(
            f"kl_weight={kl_weight:g} and ce_weight={ce_weight:g}: neither may be negative, and one must be above 0."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature:g}: must be above 0; 1 compares the distributions as they are.")


def check_vocabulary(student: int, teacher: int) -> None:
    """Raise `ValueError` when two vocabulary sizes differ."""
    if student != teacher:
        raise ValueError(
            f"The teacher has a vocabulary of {teacher:,} and the student one of {student:,}: their predictions "
            "cannot be compared. The teacher must be the model this one was converted from, or a larger one with the "
            "same tokenizer."
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; a kill or a full disk leaves incomplete ones behind."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_complete(path)
    ]
    return max(found)[1] if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:  # Trainer writes this file last
        return json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))["global_step"] > 0
    except (OSError, ValueError, KeyError):
        return False


class ProgressReport(TrainerCallback):
    """Report progress to one function, and the result of each evaluation to another.

    Args:
        progress (`Progress`, *optional*): called with (stage, done, total).
        say (`Say`, *optional*): called with one line per evaluation.
        tokens_per_step (`int`): tokens of an optimiser step.
    """

    def __init__(self, progress, say, tokens_per_step: int) -> None:
        self.progress, self.say, self.tokens_per_step = progress, say, tokens_per_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None and state.is_world_process_zero:
            self.progress("train", state.global_step, state.max_steps)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.say is not None and state.is_world_process_zero:
            losses = [row["loss"] for row in state.log_history if "loss" in row]
            loss = f", training loss {losses[-1]:.4f}" if losses else ""
            perplexity = math.exp(min(kwargs["metrics"]["eval_loss"], 700.0))
            self.say(f"{state.global_step * self.tokens_per_step:,} tokens: perplexity {perplexity:.3f}{loss}")
