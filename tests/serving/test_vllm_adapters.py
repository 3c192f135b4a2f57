"""LoRA adapters, served by vLLM: the ids that Transformers has with the adapter merged into the weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from serving import assert_served_as_by_transformers, engine, prompts, saved_model, serve


RANK, ALPHA = 4, 8
SERVED = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}


def save_adapter(folder, model, targets: list[str]) -> None:
    """Write a random LoRA adapter of some linear layers, as PEFT does, and merge it into the model."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            down = torch.randn(RANK, module.in_features, generator=generator) * 0.2
            up = torch.randn(module.out_features, RANK, generator=generator) * 0.2
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += ALPHA / RANK * up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": targets}))


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        ("input-gate", ["q_proj", "kv_a_proj_with_mqa", "kv_gate_proj", "o_proj"]),
        ("table-gate", ["q_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("query-low-rank", ["q_a_proj", "q_b_proj", "o_proj"]),
    ],
)
def test_adapters(case, targets, tmp_path):
    """With the adapter, without it, and with it again."""
    from vllm.lora.request import LoRARequest

    plain, given = saved_model(tmp_path / "model", case), prompts(5, 17, 40)
    merged = saved_model(tmp_path / "again", case)
    save_adapter(tmp_path / "adapter", merged, targets)
    request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    with engine(tmp_path / "model", **SERVED) as served:
        for model, adapter in ((merged, request), (plain, None), (merged, request)):
            assert_served_as_by_transformers(model, given, serve(served, given, lora_request=adapter))


def test_what_is_absorbed_is_refused(tmp_path):
    from vllm.lora.request import LoRARequest

    from egmla.serving.vllm_model import EGMLAForCausalLM

    assert not EGMLAForCausalLM.packed_modules_mapping  # which quantisation reads, and does not expect a list of none
    model = saved_model(tmp_path / "model", "input-gate")
    save_adapter(tmp_path / "adapter", model, ["q_proj", "kv_b_proj"])
    request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    with engine(tmp_path / "model", **SERVED) as served, pytest.raises(ValueError, match=r"received.*kv_b_proj"):
        serve(served, prompts(5), lora_request=request)
