"""A checkpoint loads where the package is not installed: `trust_remote_code` in clean processes."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cases import CODE_FILES, EXPERTS, tiny_model, token_ids

from egmla import EGMLACache, EGMLAForCausalLM, EGMLAForSequenceClassification, EGMLAForTokenClassification, EGMLAModel


pytestmark = pytest.mark.long  # in front, see conftest.py


CASES = ("input-gate", "table-gate", "rank-per-layer", "rope-slots", "experts")
NEW_TOKENS = 8

# Run first in every clean process: what it finds must not be this package.
PRELUDE = """
import importlib.util, json, sys
assert importlib.util.find_spec("egmla") is None, "this environment has egmla"
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
)

assert "egmla" not in sys.modules
"""


@pytest.fixture
def clean_process(loaded_clean_python, tmp_path):
    """Runs code in a process of its own; returns what it prints last, as JSON."""

    def run(code: str, *arguments) -> dict:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        code = PRELUDE + textwrap.dedent(code)
        result = loaded_clean_python.run(code, *arguments, env=environment, cwd=tmp_path, check=True)
        return json.loads(result.stdout.splitlines()[-1])

    return run


# Loads each folder as a language model and as a trunk, generates, counts the cache's storages, saves again.
ROUND_TRIP = """
report = {}
for folder in sys.argv[2:]:
    ids = torch.tensor(json.loads(sys.argv[1]))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids).logits
        trunk = AutoModel.from_pretrained(folder, trust_remote_code=True)
        hidden = trunk(ids).last_hidden_state
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    fixed = type(cache)(model.config, max_cache_len=cache.get_seq_length())
    again = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=fixed)
    storages = [layer.buffer.untyped_storage().nbytes() for layer in fixed.layers]
    model.save_pretrained(folder + "-again", max_shard_size="40KB")
    report[folder] = {
        "tokens": out.sequences.tolist(),
        "tokens_fixed": again.tolist(),
        "logits": logits.tolist(),
        "hidden": hidden.tolist(),
        "cache": type(cache).__name__,
        "module": type(model).__module__.split(".")[0],
        "classes": [type(model).__name__, type(trunk).__name__, type(config).__name__],
        "elements_per_token": sum(storages) // 4 / ids.shape[0] / fixed.get_seq_length(),
        "used": cache.nbytes,
        "config_elements": config.cache_elements_per_token,
    }
print(json.dumps(report))
"""


@torch.no_grad()
def test_language_model_round_trip(clean_process, tmp_path):
    """Same logits and tokens, the latent cache, every case in one process; saved again, loaded in another."""
    ids, expected, folders = token_ids(2, 6), {}, []
    for name in CASES:
        model = tiny_model(**EXPERTS) if name == "experts" else tiny_model(name)
        folder = str(tmp_path / name)
        model.save_pretrained(folder)
        folders.append(folder)
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
        assert type(out.past_key_values) is EGMLACache
        expected[folder] = (model, out)
    for suffix in ("", "-again"):
        report = clean_process(ROUND_TRIP, json.dumps(ids.tolist()), *[folder + suffix for folder in folders])
        assert len(report) == len(CASES)
        for folder, (model, out) in expected.items():
            got = report[folder + suffix]
            assert got["module"] == "transformers_modules"
            assert got["classes"] == ["EGMLAForCausalLM", "EGMLAModel", "EGMLAConfig"]
            assert got["cache"] == "EGMLACache"
            assert got["tokens"] == got["tokens_fixed"] == out.sequences.tolist()
            elements = model.config.cache_elements_per_token
            assert got["elements_per_token"] == got["config_elements"] == elements
            assert got["used"] == out.past_key_values.nbytes
            # One thread or two may sum in another order.
            torch.testing.assert_close(torch.tensor(got["logits"]), model(ids).logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                torch.tensor(got["hidden"]), model.model(ids).last_hidden_state, atol=1e-5, rtol=0
            )
    saved_again = Path(folders[0] + "-again")
    assert len(list(saved_again.glob("*.safetensors"))) > 1
    assert {path.name for path in saved_again.glob("*.py")} == {path.name for path in Path(folders[0]).glob("*.py")}
    auto_map = json.loads((saved_again / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((Path(folders[0]) / "config.json").read_text())["auto_map"]
    # What a process without the package saved, the installed package loads.
    loaded = EGMLAForCausalLM.from_pretrained(saved_again)
    assert torch.equal(loaded(ids).logits, tiny_model(CASES[0])(ids).logits)


HEADS = """
report = {}
classes = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel]
for auto_class, folder in zip(classes, sys.argv[2:]):
    ids = torch.tensor(json.loads(sys.argv[1]))
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        first = model(ids, attention_mask=(ids != 0).long())[0]
        model.save_pretrained(folder + "-again")
        again = auto_class.from_pretrained(folder + "-again", trust_remote_code=True)
        second = again(ids, attention_mask=(ids != 0).long())[0]
    assert torch.equal(first, second)
    report[folder] = {"class": type(model).__name__, "output": first.tolist()}
print(json.dumps(report))
"""


@torch.no_grad()
def test_heads_and_trunk(clean_process, tmp_path):
    """They build their trunk themselves: the generic heads ask AutoModel, which knows no remote code."""
    ids = token_ids(2, 6)
    ids[1, 4:] = 0
    models = [
        tiny_model("table-gate", EGMLAForSequenceClassification, num_labels=3),
        tiny_model("input-gate", EGMLAForTokenClassification, num_labels=5),
        tiny_model("rank-per-layer", EGMLAModel),
    ]
    folders = [str(tmp_path / type(model).__name__) for model in models]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    report = clean_process(HEADS, json.dumps(ids.tolist()), *folders)
    for model, folder in zip(models, folders, strict=True):
        assert report[folder]["class"] == type(model).__name__
        expected = model(ids, attention_mask=(ids != 0).long())[0]
        torch.testing.assert_close(torch.tensor(report[folder]["output"]), expected, atol=1e-5, rtol=0)


def test_without_trust_the_code_does_not_run(clean_process, tmp_path):
    """The clean environment really has no EG-MLA: without `trust_remote_code` nothing loads."""
    tiny_model().save_pretrained(tmp_path / "model")
    report = clean_process(
        """
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
            print(json.dumps({"error": None}))
        except ValueError as error:
            print(json.dumps({"error": str(error)}))
        """,
        tmp_path / "model",
    )
    assert "trust_remote_code" in report["error"]


def test_the_code_needs_only_what_a_checkpoint_may_ask_for():
    """These files travel in every checkpoint: flat relative imports, and of what is installed only these."""
    import ast

    import egmla

    allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    siblings = {Path(name).stem for name in CODE_FILES}
    for name in CODE_FILES:
        tree = ast.parse((Path(egmla.__file__).parent / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in siblings
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in allowed


def test_importing_is_light(loaded_python):
    """No command-line, plotting or evaluation library comes with `import egmla`."""
    code = "import sys, egmla; print([m for m in ('typer', 'matplotlib', 'lm_eval', 'gguf') if m in sys.modules])"
    assert loaded_python.run(code, check=True).stdout.strip() == "[]"
