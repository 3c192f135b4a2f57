# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""The model as vLLM runs it: our modules, with vLLM's linear layers, embeddings and paged attention in their places.

All variants share `EGMLAAttention.project`, which makes queries, gated latents and rotary keys. vLLM caches what it
returns, and attends.
"""

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.platforms import current_platform

from egmla.attention_egmla import EGMLAAttention
from egmla.configuration_egmla import EGMLAConfig
from egmla.cpu_egmla import linear
from egmla.modeling_egmla import EGMLAModel, EGMLARotaryEmbedding

from .vllm_backends import CPUBackend


logger = init_logger(__name__)
# The narrowest rotary key that the Triton kernel takes: its products are of 16 elements at least.
TRITON_MIN_ROPE = 16
LINEAR_CLASSES = {"colwise": ColumnParallelLinear, "rowwise": RowParallelLinear}


def check_config(config: EGMLAConfig, vllm_config: VllmConfig) -> None:
    """Refuse what cannot be served with latents in pages.

    Raises:
        ValueError: it says what the model or the settings have, and what to do.
    """
    if config.kv_gate == "expanded":
        raise ValueError(
            "kv_gate='expanded': this model's gates act on keys and values of all cached tokens, and this plug-in's "
            "pages hold latents; serve with --model-impl transformers, and VLLM_MLA_DISABLE=1 in the environment."
        )
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if config.qk_rope_head_dim and rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type={rope_type!r}: its frequencies change with the length of a sequence, and a batch of vLLM "
            "holds sequences of many lengths. Generate with Transformers, or set another rope_type in config.json."
        )
    heads, ranks = config.num_attention_heads, vllm_config.parallel_config.tensor_parallel_size
    if heads % ranks:
        raise ValueError(
            f"tensor_parallel_size={ranks}: must divide the {heads} attention heads of this model; use "
            f"{', '.join(str(size) for size in range(1, heads + 1) if heads % size == 0)}."
        )
    splits = any(".self_attn." in name for name in config.base_model_tp_plan)
    if ranks > 1 and not splits:
        raise ValueError(
            f"tensor_parallel_size={ranks}: a norm of this model spans several heads, so its attention cannot be "
            "split; use tensor_parallel_size=1."
        )
    if current_platform.is_cuda_alike() and vllm_config.model_config.dtype == torch.float32:
        raise ValueError("dtype=float32 on a GPU: vLLM's latent attention there takes bfloat16 and float16; use one.")


@support_torch_compile
class EGMLAForCausalLM(nn.Module, SupportsLoRA):
    """The language model, for vLLM."""

    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        # A packed module without parts: vLLM refuses adapters of this layer, which decoding absorbs, by its name. Only
        # adapters are loaded by the instance's mapping; quantisation reads the class's.
        self.packed_modules_mapping: dict[str, list[str]] = {"kv_b_proj": []}
        config: EGMLAConfig = vllm_config.model_config.hf_config
        check_config(config, vllm_config)
        if config.kv_cache_bits is not None:
            logger.warning_once(
                "This checkpoint allocates bits to its cache (kv_cache_bits). vLLM's pages hold entries as they are: "
                "R + P elements a token and layer, in the model's dtype."
            )
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.gates_by_id = config.kv_gate is not None and config.kv_gate_embedding_dim is not None
        with torch.device("meta"):  # shapes and names; vLLM's layers take the places of the large ones
            self.model = EGMLAModel(config)
        for layer_idx in config.moe_layers or ():  # torch.compile cannot trace the default, a loop over experts
            self.model.layers[layer_idx].mlp.experts.config._experts_implementation = "grouped_mm"
        self._replace_linear_layers()
        self.model.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=self.quant_config, prefix="model.embed_tokens"
        )
        self._materialise()
        for layer_idx, layer in enumerate(self.model.layers):
            serve_from_pages(layer.self_attn, vllm_config, f"model.layers.{layer_idx}.self_attn")
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=self.quant_config, prefix="lm_head"
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def _style(self, name: str) -> str | None:
        """Return how the configuration's plan splits a module or parameter over tensor-parallel ranks."""
        plan = self.config.base_model_tp_plan.items()
        return next((style for pattern, style in plan if fnmatch(name, pattern)), None)

    def _replace_linear_layers(self) -> None:
        """Put vLLM's linear layers in the places of ours, split as the configuration's plan says."""
        for name, module in list(self.model.named_modules()):
            if type(module) is not nn.Linear:
                continue
            parent, _, attribute = name.rpartition(".")
            replacement = LINEAR_CLASSES.get(self._style(name), ReplicatedLinear)(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                quant_config=self.quant_config,
                prefix=f"model.{name}",
                # vLLM's attention calls this one itself, and expects a pair.
                return_bias=attribute == "kv_b_proj",
            )
            setattr(self.model.get_submodule(parent), attribute, replacement)

    def _materialise(self) -> None:
        """Give memory to what is left without, and values to what is computed from the configuration."""
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        if self.config.qk_rope_head_dim:
            self.model.rotary_emb = EGMLARotaryEmbedding(self.config)
        ranks = get_tensor_model_parallel_world_size()
        for module_name, module in self.model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                shape, split = list(parameter.shape), self._style(f"{module_name}.{name}") == "colwise"
                if split:
                    shape[0] //= ranks
                given = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
                if split:
                    given.weight_loader = load_own_rows
                setattr(module, name, given)
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:
                    persistent = name not in module._non_persistent_buffers_set
                    setattr(module, name, nn.Buffer(torch.zeros_like(buffer, device=device), persistent=persistent))
        for layer in self.model.layers:
            layer.self_attn.reset_own_parameters()  # rotary slots, which no checkpoint has

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings `[T, D]` of ids `[T]`."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return final hidden states `[T, D]` of the tokens of all sequences of a batch, one after another."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        elif self.gates_by_id and input_ids is None:
            raise ValueError("Prompts of embeddings: this model's gates read token ids; send the ids instead.")
        hidden_states = inputs_embeds.unsqueeze(0)
        gate_input = input_ids.unsqueeze(0) if self.gates_by_id else hidden_states
        position_embeddings = self.model.embed_positions(hidden_states, positions.unsqueeze(0))
        for layer in self.model.layers:
            hidden_states = layer(hidden_states, gate_input=gate_input, position_embeddings=position_embeddings)
        return self.model.norm(hidden_states).squeeze(0)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return logits `[T, vocab_size]` of hidden states `[T, D]`."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors by their names.

        Returns:
            The names that were loaded.

        Raises:
            ValueError: for a tensor that the model has no place for.
        """
        places: dict[str, torch.Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        loaded = set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if name not in places:
                raise ValueError(
                    f"The checkpoint has {name!r}, and a model of this configuration has no such tensor; save both "
                    "with save_pretrained."
                )
            place = places[name]
            getattr(place, "weight_loader", default_weight_loader)(place, tensor)
            loaded.add(name)
        return loaded


def load_own_rows(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Load this rank's rows of a parameter that is split by heads."""
    rows = parameter.shape[0]
    default_weight_loader(parameter, tensor.narrow(0, get_tensor_model_parallel_rank() * rows, rows))


def attention_backend() -> type:
    """Return the backend of this machine's kind.

    Raises:
        ValueError: for a platform that is neither CPU nor CUDA.
    """
    if current_platform.is_cpu():
        return CPUBackend
    if current_platform.is_cuda_alike():
        from .vllm_triton import TritonBackend  # its kernel is compiled for GPUs

        return TritonBackend
    raise ValueError(
        f"EG-MLA models are served on CPUs and on CUDA GPUs, and vLLM runs on {current_platform.device_name} here; "
        "use generate() of Transformers on this machine."
    )


def serve_from_pages(attention: EGMLAAttention, vllm_config: VllmConfig, prefix: str) -> None:
    """Let a layer keep its latents in vLLM's pages, and attend there."""
    heads = attention.num_heads // get_tensor_model_parallel_world_size()
    P, V = attention.qk_rope_head_dim, attention.v_head_dim
    padding = max(0, TRITON_MIN_ROPE - P) if current_platform.is_cuda_alike() else 0
    attention.num_heads = heads
    attention.paged = MLAAttention(
        num_heads=heads,
        scale=attention.scaling,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=P + padding,
        v_head_dim=V,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        kv_b_proj=attention.kv_b_proj,
        cache_config=vllm_config.cache_config,
        quant_config=None,
        prefix=f"{prefix}.paged",
        attn_backend=attention_backend(),
    )

    def forward(hidden_states, gate_input=None, position_embeddings=None, **kwargs):
        """Return the output `[1, T, D]`, and `None` for the weights."""
        nope, rope, latents, rope_keys = attention.project(hidden_states, gate_input, position_embeddings)
        if padding:
            rope, rope_keys = (nn.functional.pad(part, (0, padding)) for part in (rope, rope_keys))
        query = torch.cat((nope, rope), dim=-1)[0].transpose(0, 1).contiguous()  # [T, H, N + P]
        tokens = query.shape[0]
        output = attention.paged(
            query, latents[0, 0], rope_keys[0].transpose(0, 1), output_shape=torch.Size((tokens, heads * V))
        )
        return linear(attention.o_proj, output).unsqueeze(0), None

    attention.forward = forward
