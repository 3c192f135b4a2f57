"""What a run saves: generation configs and special tokens of every kind, in checkpoints and in the target."""

import json
import shutil

import pytest
from cases import tiny_config
from runs import heal
from test_from_scratch import scratch
from transformers import AutoTokenizer, GenerationConfig

from egmla import EGMLAConfig
from egmla.training.saving import check_saves


pytest.importorskip("matplotlib")

# As Llama-2-7b's: sampling parameters that greedy decoding ignores.
SAMPLING = {"eos_token_id": 0, "pad_token_id": 3, "temperature": 0.9, "top_p": 0.6}


def converted(models, folder, generation_config, **tokens):
    """Copy the conversion, with another generation config, and another pad token of its tokenizer if asked for."""
    shutil.copytree(models / "half", folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def fields(folder) -> dict:
    return GenerationConfig.from_pretrained(folder).to_diff_dict()


@pytest.mark.parametrize(
    "generation_config",
    [
        SAMPLING,
        {"top_k": 5},
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 1, "length_penalty": 2.0},
        {"pad_token_id": -1},
        {"eos_token_id": [0, 7], "output_scores": True},
        {},
    ],
    ids=lambda value: ",".join(value) or "empty",
)
@pytest.mark.parametrize("lora_rank", [None, 2], ids=["weights", "adapters"])
def test_generation_configs_are_kept(models, tmp_path, generation_config, lora_rank):
    """The tokenizer's pad token differs, and Trainer would take it over."""
    folder = converted(models, tmp_path / "model", generation_config, pad_token="!")
    places = {"keep_checkpoints": True}
    heal(models, tmp_path / "healed", model=folder, tokens=600, eval_every=100, places=places, lora_rank=lora_rank)
    assert fields(tmp_path / "healed") == fields(folder)
    checkpoint = tmp_path / "healed.checkpoints" / "checkpoint-4"
    if lora_rank is None:
        assert fields(checkpoint) == fields(folder)
    for place in (tmp_path / "healed", *([] if lora_rank else [checkpoint])):
        config = EGMLAConfig.from_pretrained(place)
        assert config.pad_token_id == EGMLAConfig.from_pretrained(folder).pad_token_id
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "healed").pad_token_id == pad != config.pad_token_id


def test_a_resumed_run_keeps_its_generation_config(models, tmp_path, monkeypatch):
    folder = converted(models, tmp_path / "model", SAMPLING, pad_token="!")

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("egmla.training.trainer.ProgressReport.on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        heal(models, tmp_path / "healed", model=folder)
    monkeypatch.undo()
    assert heal(models, tmp_path / "healed", model=folder)["resumed_at_step"] == 4
    assert fields(tmp_path / "healed") == fields(folder)


def test_training_from_new_weights_keeps_the_tokens_of_its_tokenizer(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models / "source")
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    scratch(models, tmp_path / "new", {"tokenizer": str(tmp_path / "tokenizer")})
    config = EGMLAConfig.from_pretrained(tmp_path / "new")
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert fields(tmp_path / "new")["pad_token_id"] == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("generation_config", "message"),
    [
        ({"early_stopping": "maybe"}, "early_stopping"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"cache_implementation": "none such"}, "cache_implementation"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
        ([1], "mapping"),
    ],
)
def test_generation_configs_that_cannot_be_saved_are_refused_before_training(
    models, tmp_path, generation_config, message
):
    folder = converted(models, tmp_path / "model", {})
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    with pytest.raises(ValueError, match=rf"generation_config.json of .* cannot be used \(.*{message}"):
        heal(models, tmp_path / "healed", model=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class BrokenTokenizer:
    def save_pretrained(self, folder):
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"tokenizer": BrokenTokenizer()}, r"tokenizer cannot be saved.*RuntimeError: not today"),
        ({"generation_config": GenerationConfig(temperature=0.5)}, "generation config cannot be saved.*temperature"),
    ],
)
def test_the_rehearsal_names_what_cannot_be_saved(part, message):
    given = {"config": tiny_config(), "generation_config": GenerationConfig(), "tokenizer": None}
    check_saves(**given)
    with pytest.raises(ValueError, match=message):
        check_saves(**given | part)
