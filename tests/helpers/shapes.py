"""Small models of three kinds with known cache sizes, and a tokenizer of characters."""

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from egmla import EGMLAConfig


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
# Name: configuration, and elements that a layer caches per token.
CONFIGS = {
    "egmla": (EGMLAConfig(**SHAPE, **LATENT), 8 + 4),
    "llama": (LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=8), 2 * 2 * 8),
    "deepseek": (
        DeepseekV3Config(**SHAPE, **LATENT, q_lora_rank=None, num_key_value_heads=4, first_k_dense_replace=2),
        8 + 4,
    ),
}


class CharacterTokenizer:
    """A token per character."""

    def __call__(self, text, **kwargs):
        return {"input_ids": torch.tensor([[ord(character) % SHAPE["vocab_size"] for character in text]])}


def build(kind: str):
    return AutoModelForCausalLM.from_config(CONFIGS[kind][0]).eval()
