# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Serve EG-MLA checkpoints with vLLM, which finds `register` through the entry point `vllm.general_plugins`."""

from typing import Any

from egmla import EGMLAForCausalLM


def register() -> None:
    """Make the model known to vLLM. vLLM calls this in each of its processes, so it may run several times.

    `import egmla` has registered the configuration with Transformers by then.
    """
    import transformers
    from vllm import ModelRegistry
    from vllm.transformers_utils import model_arch_config_convertor as architectures

    class EGMLAConvertor(architectures.ModelArchConfigConvertorBase):
        """What vLLM's planning reads of an `EGMLAConfig`: one entry of `R + P` elements a token and layer."""

        def get_head_size(self) -> int:
            config: Any = self.hf_text_config
            return max(config.layer_kv_lora_ranks) + config.qk_rope_head_dim

    architectures.MODEL_ARCH_CONFIG_CONVERTORS["egmla"] = EGMLAConvertor
    # For `--model-impl transformers`: vLLM looks for the class in Transformers' own module.
    stock: Any = transformers
    stock.EGMLAForCausalLM = EGMLAForCausalLM
    # By name: the class is imported in the process that runs the model, after that process has set up its devices.
    ModelRegistry.register_model("EGMLAForCausalLM", "egmla.serving.vllm_model:EGMLAForCausalLM")
