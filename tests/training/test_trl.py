"""Fine-tuning with TRL: its trainers on a checkpoint in a folder, as its own documentation has them used."""

from itertools import pairwise

import pytest
import torch
from cases import difference, make_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import egmla  # registers the Auto classes, by which TRL loads a folder


datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

# Sums in other orders: rows of another length, adapters merged into weights.
TOLERANCE = 2e-5
SENTENCES = ("the cat sat on the mat. ", "a dog. ", "go on, and on, ", "it was late ")


@pytest.fixture(params=["input-gate", "table-gate", "expanded gate"])
def folder(request, tmp_path):
    """A small checkpoint with a tokenizer; its gates are not at identity."""
    tiny_model(request.param, vocab_size=128).save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "\x02"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def options(folder, **more):
    return {
        "output_dir": str(folder.parent / "out"),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


def rows(*made):
    return datasets.Dataset.from_list([row for row in made for _ in range(8)])


TEXTS = [{"text": sentence * times} for times, sentence in enumerate(SENTENCES, 1)]
PAIRS = [{"prompt": sentence, "completion": "so it is"} for sentence in SENTENCES]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


PACKED = {"packing": True, "max_length": 64}


@pytest.mark.parametrize(
    ("given", "more"),
    [(TEXTS, {}), (PAIRS, {}), (TEXTS, PACKED), (TEXTS, {"gradient_checkpointing": True})],
    ids=["text", "completions", "packed", "checkpointed"],
)
def test_sft(folder, given, more):
    trainer = trl.SFTTrainer(
        model=str(folder), args=trl.SFTConfig(**options(folder, **more)), train_dataset=rows(*given)
    )
    assert type(trainer.model) is egmla.EGMLAForCausalLM
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.3
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("kv_gate_proj" in name for name in changed) and any("kv_a_proj" in name for name in changed)


@torch.no_grad()
def test_packed_texts_do_not_see_each_other(folder):
    config = trl.SFTConfig(**options(folder, **PACKED))
    trainer = trl.SFTTrainer(model=str(folder), args=config, train_dataset=rows(*TEXTS))
    batch = next(iter(trainer.get_train_dataloader()))
    ids, positions = batch["input_ids"], batch["position_ids"]
    assert len(ids) == 1  # a row of several texts each of which starts at position 0
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    assert len(starts) > 4
    model = trainer.model.eval()
    given = {name: value for name, value in batch.items() if name != "labels"}
    together = model(**given, use_cache=False).logits  # as SFTTrainer's loss
    for start, end in pairwise(starts):
        assert difference(model(ids[:, start:end]).logits, together[:, start:end]) <= TOLERANCE


def test_sft_of_adapters(folder):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=4, target_modules="all-linear")
    config = trl.SFTConfig(**options(folder))
    trainer = trl.SFTTrainer(model=str(folder), args=config, train_dataset=rows(*TEXTS), peft_config=adapters)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    tuned = folder.parent / "tuned"
    ids = AutoTokenizer.from_pretrained(folder)(SENTENCES[0], return_tensors="pt").input_ids
    expected = trainer.model.eval()(ids).logits
    # As in the README.
    model = trainer.model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(tuned)
    trainer.processing_class.save_pretrained(tuned)
    loaded = AutoModelForCausalLM.from_pretrained(tuned)
    assert torch.equal(AutoTokenizer.from_pretrained(tuned)(SENTENCES[0], return_tensors="pt").input_ids, ids)
    assert type(loaded(ids).past_key_values) is egmla.EGMLACache
    assert difference(loaded(ids).logits, expected) <= TOLERANCE
    assert (AutoModelForCausalLM.from_pretrained(folder)(ids).logits - expected).abs().max() > 100 * TOLERANCE


def test_dpo(folder):
    preferences = [{"prompt": sentence, "chosen": "yes", "rejected": "never"} for sentence in SENTENCES]
    config = trl.DPOConfig(**options(folder))
    trainer = trl.DPOTrainer(model=str(folder), args=config, train_dataset=rows(*preferences))
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-3) and margins[-1] > 0.5


def test_grpo(folder):
    """A reward for one letter makes that letter more frequent."""

    def share_of_e(completions, **_):
        return [text.count("e") / max(1, len(text)) for text in completions]

    prompts = [{"prompt": sentence} for sentence in SENTENCES]
    more = {"num_generations": 8, "per_device_train_batch_size": 16, "max_completion_length": 12, "max_steps": 12}
    config = trl.GRPOConfig(**options(folder, **more))
    trainer = trl.GRPOTrainer(model=str(folder), reward_funcs=share_of_e, args=config, train_dataset=rows(*prompts))
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])
