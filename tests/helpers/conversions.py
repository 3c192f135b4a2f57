"""What tests of conversions share: small random sources of every family, and a random attention layer."""

import copy

import pytest
import torch
from cases import make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
)

from egmla.conversion import FAMILIES, Refinement
from egmla.conversion.calibration import LayerStatistics
from egmla.conversion.families import AttentionShape, AttentionWeights


# fp32 sums in another order than the source's: a few units in the last place of logits of size 10.
EXACT_TOLERANCE = 1e-4

CLOSED_FORM = Refinement(steps=0)

SHRUNK = {"kv_lora_rank": 12, "qk_rope_head_dim": 6, "calibration_tokens": 4096, "refinement": Refinement(steps=3)}

SMALL = {
    "vocab_size": 128,
    "hidden_size": 60,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}

SOURCES = {
    "llama-gqa-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-mha": (LlamaForCausalLM, LlamaConfig, {"num_attention_heads": 5, "num_key_value_heads": 5}),
    "llama-mqa": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "llama-dropout": (LlamaForCausalLM, LlamaConfig, {"attention_dropout": 0.5}),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "mistral-wide-heads": (MistralForCausalLM, MistralConfig, {"head_dim": 16, "sliding_window": None}),
}


@pytest.fixture(scope="module")
def make_source(tmp_path_factory):
    """Builds a random source checkpoint on disk by its name in `SOURCES`."""

    def make(name: str, **save):
        model_class, config_class, special = SOURCES[name]
        torch.manual_seed(0)
        shape = {"num_attention_heads": 6, "num_key_value_heads": 3, **SMALL, **special}
        model = model_class(config_class(**shape)).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, **save)
        make_tokenizer().save_pretrained(folder)
        GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=1).save_pretrained(folder)
        return model, folder

    return make


def random_layer(shape: AttentionShape) -> tuple[AttentionWeights, LayerStatistics, torch.Tensor]:
    """A random attention layer, statistics of random inputs through it, and those inputs."""
    generator = torch.Generator().manual_seed(3)
    rand = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    H, g, d, D = shape.heads, shape.kv_heads, shape.head_dim, shape.hidden_size
    weights = AttentionWeights(
        rand(H * d, D), rand(g * d, D), rand(g * d, D), rand(D, H * d), rand(H * d), rand(g * d), rand(g * d), rand(D)
    )
    inputs = rand(500, D) @ rand(D, D) + rand(D)
    keys, values = inputs @ weights.k.T + weights.k_bias, inputs @ weights.v.T + weights.v_bias
    features = torch.cat((keys, values), dim=1)
    queries = (inputs @ weights.q.T + weights.q_bias).view(-1, H, d).transpose(0, 1)
    statistics = LayerStatistics(
        key_moment=keys.T @ keys / 500,
        query_moment=queries.transpose(1, 2) @ queries / 500,
        mean=features.mean(dim=0),
        raw_moment=features.T @ features / 500,
        rotation=torch.polar(torch.rand(H, d // 2, generator=generator, dtype=torch.float64), rand(H, d // 2)),
    )
    return weights, statistics, inputs


LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}

# The frequencies of the first change beyond 64 tokens, those of the second beyond 128.
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}

LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}

PARTIAL = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.7}

MQA = {"num_key_value_heads": 1}

MHA = {"num_attention_heads": 5, "num_key_value_heads": 5}

UNTIED = {"tie_word_embeddings": False}

GROUPED = {
    "llama linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 64}),
    "llama llama3, wide heads": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 14}),
    "llama yarn, biases": ("llama", {"rope_parameters": YARN_ROPE, "attention_bias": True, **MHA}),
    "mistral, window of the whole context": ("mistral", {"sliding_window": 256, "head_dim": 14, **UNTIED}),
    "mistral tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral yarn mqa": ("mistral", {"sliding_window": None, "rope_parameters": YARN_ROPE, **MQA}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 mqa yarn": ("qwen2", {"rope_parameters": YARN_ROPE, **MQA, **UNTIED}),
    "qwen2 mha, window in no layer": ("qwen2", {**MHA, "use_sliding_window": True, "sliding_window": 8}),
    "qwen2, wide heads": ("qwen2", {"head_dim": 14, **UNTIED}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "phi3 partial tied": ("phi3", {"rope_parameters": PARTIAL, "head_dim": 12, "tie_word_embeddings": True}),
    # 9 dimensions a head of which 6 rotate: an odd width is no obstacle.
    "phi3 partial, odd heads": ("phi3", {"rope_parameters": PARTIAL, "hidden_size": 54}),
    "phi3 longrope": (
        "phi3",
        {
            "rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.5},
            "hidden_size": 54,
            "original_max_position_embeddings": 128,
            **MQA,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "smollm3, wide heads": ("smollm3", {"no_rope_layers": [1, 0], "head_dim": 14}),
    "smollm3 yarn biases": (
        "smollm3",
        {"no_rope_layers": [0, 1], "rope_parameters": YARN_ROPE, "attention_bias": True, "mlp_bias": True, **UNTIED},
    ),
    "smollm3 without rotation": ("smollm3", {"no_rope_layers": [0, 0], "rope_parameters": YARN_ROPE, **MHA}),
}

NORMED = {
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen3 mha biases": ("qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True, **MHA}),
    "qwen3 mqa yarn": ("qwen3", {"head_dim": 12, "rope_parameters": YARN_ROPE, **MQA}),
}

NORMED |= {
    "olmo2": ("olmo2", {}),
    "olmo2 mha biases tied": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, **MHA}),
    "olmo2 mqa yarn": ("olmo2", {"rope_parameters": YARN_ROPE, "rms_norm_eps": 1e-3, **MQA}),
}

DENSE = {"first_k_dense_replace": 2}

LATENT_SHAPE = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}

MSCALE_ROPE = {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.3}

LATENT = {
    "deepseek_v3": ("deepseek_v3", {"q_lora_rank": 18, **DENSE}),
    "deepseek_v3 full query, half split, yarn": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "rope_parameters": MSCALE_ROPE, **DENSE},
    ),
    "deepseek_v3 biases tied": (
        "deepseek_v3",
        {"q_lora_rank": 18, "attention_bias": True, "tie_word_embeddings": True, **DENSE},
    ),
    "deepseek_v2": ("deepseek_v2", {"q_lora_rank": None, **DENSE}),
    "deepseek_v2 tied": ("deepseek_v2", {"q_lora_rank": 18, "tie_word_embeddings": True, **DENSE}),
    "deepseek_v2 yarn biases": (
        "deepseek_v2",
        {"q_lora_rank": 18, "attention_bias": True, "mlp_bias": True, "rope_parameters": MSCALE_ROPE, **DENSE},
    ),
    "youtu": ("youtu", {"q_lora_rank": 18}),
    "youtu half split, untied": ("youtu", {"q_lora_rank": None, "rope_interleave": False, **UNTIED}),
    "youtu yarn": ("youtu", {"q_lora_rank": 18, "rope_parameters": MSCALE_ROPE}),
    "minicpm3 tied": ("minicpm3", {"q_lora_rank": 18, "dim_model_base": 20, "tie_word_embeddings": True}),
    "minicpm3 untied": ("minicpm3", {"q_lora_rank": None, "scale_depth": 2.3, "dim_model_base": 20, **UNTIED}),
    "minicpm3 longrope": (
        "minicpm3",
        {
            "q_lora_rank": 18,
            "dim_model_base": 20,
            "rope_parameters": {
                **LONG_ROPE,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [2.0, 3.0, 5.0],
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "glm4_moe_lite yarn": (
        "glm4_moe_lite",
        {"q_lora_rank": 18, "mlp_layer_types": ["dense", "dense"], "rope_parameters": MSCALE_ROPE, **UNTIED},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {"q_lora_rank": 18, "mlp_layer_types": ["dense", "dense"]}),
    "glm4_moe_lite biases": (
        "glm4_moe_lite",
        {"q_lora_rank": None, "attention_bias": True, "mlp_layer_types": ["dense", "dense"]},
    ),
}

EXPERTS = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}

GROUPS = {"n_group": 4, "topk_group": 2}

LATENT |= {
    "deepseek_v3 experts": (
        "deepseek_v3",
        {"q_lora_rank": 18, "first_k_dense_replace": 1, "norm_topk_prob": True, **GROUPS, **EXPERTS},
    ),
    "deepseek_v2 experts": ("deepseek_v2", {"q_lora_rank": None, "first_k_dense_replace": 1, **EXPERTS}),
    "deepseek_v2 experts in groups": (
        "deepseek_v2",
        {"q_lora_rank": 18, "first_k_dense_replace": 0, "topk_method": "group_limited_greedy", **GROUPS, **EXPERTS},
    ),
    "glm4_moe_lite experts": (
        "glm4_moe_lite",
        {"q_lora_rank": 18, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1, **EXPERTS},
    ),
}

# EG-MLA checkpoints, to be made smaller again: a latent with a norm, one per layer without, one behind an encoder.
LATENT |= {
    "egmla": ("egmla", {"q_lora_rank": 18}),
    "egmla, ranks and slots per layer": (
        "egmla",
        {
            "kv_latent_norm": False,
            "kv_lora_rank": [20, 14],
            "rope_table_dim": 8,
            "rope_slots": [[3, 0, 1], [2, 2, 0]],
            "nope_layers": [1],
            "query_bias": True,
            "kv_gate_embedding_dim": 7,
        },
    ),
    "egmla with encoder": (
        "egmla",
        {
            "kv_latent_norm": False,
            "kv_encoder_dim": 30,
            "kv_encoder_norm_dim": 10,
            "kv_encoder_norm_groups": 2,
            "query_norm_dim": 8,
            "rope_interleave": False,
            "post_norm": True,
            "kv_gate": None,
            **UNTIED,
        },
    ),
}

ALL = {**GROUPED, **NORMED, **LATENT}


def source_config(model_type: str, special: dict) -> PreTrainedConfig:
    shape = {"num_attention_heads": 6, "num_key_value_heads": 3, "pad_token_id": None, **SMALL, "eos_token_id": None}
    if FAMILIES[model_type].latent:
        shape |= LATENT_SHAPE
    shape |= special
    shape["rope_parameters"] = dict(shape["rope_parameters"])
    return AutoConfig.for_model(model_type, **shape)


@pytest.fixture(scope="module")
def make_family_source(tmp_path_factory):
    """Builds a random checkpoint of the real class by its name in `ALL`: biases and norms all matter."""
    made = {}

    def make(name: str):
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(source_config(*ALL[name])).eval()
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if parameter.ndim == 1 and "kv_gate" not in parameter_name:
                        parameter.add_(0.3 * torch.randn(parameter.shape))
                for buffer_name, buffer in model.named_buffers():
                    if buffer_name.endswith("e_score_correction_bias"):
                        buffer.add_(0.3 * torch.randn(buffer.shape))
            folder = tmp_path_factory.mktemp(name.partition(" ")[0])
            model.save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            made[name] = model, folder
        model, folder = made[name]
        return copy.deepcopy(model), folder  # dynamic frequencies depend on what a model has seen before

    return make
