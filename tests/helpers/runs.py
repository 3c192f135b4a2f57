"""Shared by tests of whole training runs: a small source, its conversion, texts, and settings of twelve steps."""

import json
from pathlib import Path

import torch
from command_line import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from egmla import EGMLAForCausalLM
from egmla.conversion import Refinement, convert_checkpoint
from egmla.samples import sample_text
from egmla.training import TrainingSettings, heal_checkpoint
from egmla.training.from_scratch import train_tokenizer


VOCABULARY = 320
# 12 steps of 4 sequences of 32 tokens, a checkpoint every four
SMALL = {
    "tokens": 1500,
    "sequence_length": 32,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "save_every": 4,
    "eval_every": 6,
    "eval_tokens": 256,
}


def make_models(root: Path) -> Path:
    """Make a small Llama, its conversion to half the cache, and two texts in a folder."""
    torch.manual_seed(0)
    (root / "text.txt").write_text(sample_text("calibration")[:80_000])
    (root / "other.txt").write_text(sample_text("evaluation")[:30_000])
    shape = {**SHAPE, "vocab_size": VOCABULARY, "initializer_range": 0.3, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, head_dim=8)).save_pretrained(root / "source")
    train_tokenizer(TrainingSettings([str(root / "text.txt")], 1), VOCABULARY).save_pretrained(root / "source")
    convert_checkpoint(
        root / "source",
        root / "half",
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        calibration=root / "text.txt",
        calibration_tokens=4096,
        refinement=Refinement(steps=0),
    )
    # Dropout draws random numbers: a resumed run then differs unless their state was restored.
    config = json.loads((root / "half" / "config.json").read_text())
    (root / "half" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return root


def settings(models: Path, **changes) -> TrainingSettings:
    return TrainingSettings(**{"data": [str(models / "text.txt")], **SMALL, **changes})


def heal(models: Path, target: Path, *, teacher="source", model="half", places=None, **changes) -> dict:
    teacher = None if teacher is None else models / teacher
    converted = models / model if (models / model).is_dir() else model
    return heal_checkpoint(converted, target, settings(models, **changes), teacher=teacher, **(places or {}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return EGMLAForCausalLM.from_pretrained(folder).state_dict()


def same_weights(left: Path, right: Path) -> bool:
    one, two = weights(left), weights(right)
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
