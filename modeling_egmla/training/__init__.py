"""Training: healing of converted models by self-distillation, and training from scratch, on Transformers' Trainer."""

from .conversion_and_healing import convert_and_heal
from .from_scratch import scratch_settings, train_from_scratch
from .healing import heal_checkpoint
from .losses import distillation_loss
from .settings import TrainingSettings
from .stages import STAGES, add_lora, lora_targets, merge_lora, set_trainable
from .trainer import DistillationTrainer, DivergedError


__all__ = [
    "STAGES",
    "DistillationTrainer",
    "DivergedError",
    "TrainingSettings",
    "add_lora",
    "convert_and_heal",
    "distillation_loss",
    "heal_checkpoint",
    "lora_targets",
    "merge_lora",
    "scratch_settings",
    "set_trainable",
    "train_from_scratch",
]
