"""Conversions give the tensors and logits that they gave before the package was restructured.

Weights and texts follow a formula, so that they are the same with every version of PyTorch. `golden.json` holds the
expected values and says which commit made them:

    PYTHONPATH=tests python tests/conversion/test_golden.py golden.json
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from cases import make_tokenizer
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from egmla.conversion import Refinement, convert_checkpoint


GOLDEN = Path(__file__).with_name("golden.json")
LOGIT_TOLERANCE = 1e-5
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
SOURCES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5}},
    "qwen3": {"head_dim": 8},
    "olmo2": {},
    "deepseek_v3": LATENT,
}
CLOSED_FORM = Refinement(steps=0)
NARROW = {"kv_lora_rank": 14, "qk_rope_head_dim": 6, "refinement": CLOSED_FORM}
LOW_RANK = {
    "llama": NARROW,
    "phi3": NARROW,
    "qwen3": NARROW,
    "olmo2": NARROW,
    "deepseek_v3": {"kv_lora_rank": 7, "refinement": CLOSED_FORM},
}


def hashed(count: int, start: int) -> torch.Tensor:
    """Numbers from -1 to 1 that integers are hashed to, the same on every machine."""
    numbers = (torch.arange(start, start + count) * 2654435761 + 12345) % 2**32
    numbers = ((numbers ^ (numbers >> 15)) * 2246822519) % 2**32
    return ((numbers >> 8).float() - 2**23) / 2**23


def write_source(folder: Path, model_type: str) -> Path:
    """Writes a checkpoint with hashed weights and a tokenizer of one token per character."""
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **SOURCES[model_type]})
    model = AutoModelForCausalLM.from_config(config)
    start = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = hashed(parameter.numel(), start).view(parameter.shape)
            parameter.copy_(1 + values / 4 if "norm" in name else values / 4)
            start += parameter.numel()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path) -> Path:
    """Writes a text of 60 hashed words in hashed order."""
    letters = ((hashed(300, 7) + 1) * 13).long().clamp_max(25)
    words = ["".join(chr(97 + int(letter)) for letter in word) for word in letters.view(60, 5)]
    order = ((hashed(1500, 9000) + 1) * 30).long().clamp_max(59)
    path.write_text(" ".join(words[int(number)] for number in order))
    return path


def tensor_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint's tensors but the gates' random projections, which depend on PyTorch's generator."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        if not name.endswith("kv_gate_proj.weight"):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def some_logits(folder: Path) -> list[list[float]]:
    """Logits of the first 8 tokens at three positions of a fixed sequence."""
    ids = ((hashed(40, 31) + 1) * 60).long()[None] + 2
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    return logits[0, [0, 17, 39], :8].tolist()


def convert(folder: Path, model_type: str) -> dict:
    """What is compared of the conversions of one source."""
    source = write_source(folder / "source", model_type)
    convert_checkpoint(source, folder / "exact", exact=True)
    text = {"calibration": write_text(folder / "text.txt"), "calibration_tokens": 2048}
    convert_checkpoint(source, folder / "low rank", **LOW_RANK[model_type], **text)
    return {
        "exact_sha256": tensor_hash(folder / "exact"),
        "exact_logits": some_logits(folder / "exact"),
        "low_rank_logits": some_logits(folder / "low rank"),
    }


@pytest.mark.parametrize("model_type", SOURCES)
def test_conversions_are_those_before_the_restructuring(tmp_path, model_type):
    expected, found = json.loads(GOLDEN.read_text())["sources"][model_type], convert(tmp_path, model_type)
    assert found["exact_sha256"] == expected["exact_sha256"]
    for name in ("exact_logits", "low_rank_logits"):
        difference = torch.tensor(found[name]) - torch.tensor(expected[name])
        assert difference.abs().max() < LOGIT_TOLERANCE


def test_low_rank_logits_are_not_the_exact_ones():
    """The stored conversions differ from their sources, so that equal values say something."""
    for stored in json.loads(GOLDEN.read_text())["sources"].values():
        exact, low_rank = (torch.tensor(stored[f"{name}_logits"]) for name in ("exact", "low_rank"))
        assert (exact - low_rank).abs().max() > 100 * LOGIT_TOLERANCE


def write_golden(path: Path) -> None:
    from egmla.utils.provenance import software_versions, source_commit

    sources = {}
    for model_type in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            sources[model_type] = convert(Path(folder), model_type)
    content = {
        "command": "PYTHONPATH=tests python tests/conversion/test_golden.py golden.json",
        "commit": source_commit(),
        "versions": software_versions(),
        "sources": sources,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
