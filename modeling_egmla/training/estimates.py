"""What a run will take, before it starts: parameters, floating point operations, memory."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from egmla.utils.accounting import matrix_parameters


FLOAT32 = 4


def attention_flops_per_token(config: PreTrainedConfig, length: int) -> float:
    """Floating point operations per token of one forward pass that grow with the sequence: scores and their use.

    Over a causal sequence a token sees half of it on average; a multiplication and an addition count as two.
    """
    heads = config.num_attention_heads
    query = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    value = getattr(config, "v_head_dim", None) or query
    return config.num_hidden_layers * heads * (query + value) * length


def training_flops(
    model: PreTrainedModel, tokens: int, length: int, teacher: PreTrainedConfig | None = None, teacher_matrix: int = 0
) -> float:
    """Floating point operations of a run, to the leading terms.

    Forward 2 per matrix parameter and token, backward 2 to the activations and 2 to each trained weight, attention as
    `attention_flops_per_token` and twice that backward; a teacher's forward pass. Derived; recomputation by gradient
    checkpointing is not counted.

    Args:
        model (`PreTrainedModel`): the model, with what is trained marked.
        tokens (`int`): tokens of the run.
        length (`int`): tokens in a sequence.
        teacher (`PreTrainedConfig`, *optional*): configuration of a teacher.
        teacher_matrix (`int`): its `matrix_parameters`.
    """
    every, trained = matrix_parameters(model), matrix_parameters(model, trainable=True)
    per_token = 4 * every + 2 * trained + 3 * attention_flops_per_token(model.config, length)
    if teacher is not None:
        per_token += 2 * teacher_matrix + attention_flops_per_token(teacher, length)
    return float(per_token * tokens)


def training_bytes(
    model: PreTrainedModel,
    micro_batch_tokens: int,
    chunk: int,
    teacher_parameters: int = 0,
    teacher_itemsize: int = FLOAT32,
    itemsize: int = FLOAT32,
    checkpointing: bool = False,
) -> dict[str, int]:
    """Memory of one process in bytes, by part; an estimate, without what the allocator and the libraries take.

    Weights, gradients and both moments of Adam in fp32. Activations of a layer: some sixteen hidden states and four
    widths of the MLP a token (one hidden state with gradient checkpointing, plus one layer in full); six copies of a
    chunk's logits. Derived from what autograd keeps of this model's layers.
    """
    config = model.config
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    layer = micro_batch_tokens * (16 * hidden + 4 * inner) * itemsize
    layers = config.num_hidden_layers
    activations = layer + layers * micro_batch_tokens * hidden * itemsize if checkpointing else layers * layer
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "weights": FLOAT32 * model.num_parameters(),
        "gradients and optimizer": 3 * FLOAT32 * trainable,
        "teacher": teacher_itemsize * teacher_parameters,
        "activations": activations,
        "logits": 6 * FLOAT32 * min(chunk, micro_batch_tokens) * config.vocab_size,
    }


def run_plan(
    model: Any, settings: Any, steps: int, length: int, micro_batch: int, teacher: Any = None
) -> dict[str, Any]:
    """Parameters, operations and memory of a run in one dictionary, as reports and commands show them.

    Args:
        model: the model with what is trained marked; adapters may be on it.
        settings: settings with `batch_size`, `bf16`, `gradient_checkpointing` and `chunk`.
        steps (`int`): optimiser steps.
        length (`int`): tokens in a sequence.
        micro_batch (`int`): sequences in one pass of one process.
        teacher (*optional*): the loaded teacher.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = steps * settings.batch_size * length
    teacher_parameters = 0 if teacher is None else teacher.num_parameters()
    memory = training_bytes(
        plain,
        micro_batch * length,
        settings.chunk,
        teacher_parameters,
        FLOAT32 if teacher is None else teacher.dtype.itemsize,
        2 if settings.bf16 else FLOAT32,
        settings.gradient_checkpointing,
    )
    teacher_matrix = 0 if teacher is None else matrix_parameters(teacher)
    return {
        "parameters": plain.num_parameters(),
        "trained_parameters": sum(item.numel() for item in plain.parameters() if item.requires_grad),
        "teacher_parameters": teacher_parameters,
        "steps": steps,
        "tokens": tokens,
        "flops": training_flops(plain, tokens, length, None if teacher is None else teacher.config, teacher_matrix),
        "memory_bytes": memory,
    }
