"""Estimates of a run before it starts: parameters, floating point operations, memory, time."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from egmla.utils.accounting import matrix_parameters
from egmla.utils.matmul_speed import matmul_speed


FLOAT32 = 4
# A run takes roughly this many times as long as its matmuls alone: norms, softmax, the optimiser, evaluations,
# checkpoints. The healing in model_cards (half cache, fp32, one thread) did 39e9 operations per second.
OVERHEAD = 2.0


def attention_flops_per_token(config: PreTrainedConfig, length: int) -> float:
    """Count the floating point operations of attention scores and sums, per token of one forward pass.

    These grow with the sequence. Causal, a token sees half of it on average. A multiplication with an addition counts
    as two operations.

    Args:
        config (`PreTrainedConfig`): of the model.
        length (`int`): tokens in a sequence.
    """
    heads = config.num_attention_heads
    query = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    value = getattr(config, "v_head_dim", None) or query
    return config.num_hidden_layers * heads * (query + value) * length


def training_flops(
    model: PreTrainedModel, tokens: int, length: int, teacher: PreTrainedConfig | None = None, teacher_matrix: int = 0
) -> float:
    """Count the floating point operations of a run, to the leading terms.

    Per token and matrix parameter: 2 forward, 2 backward to the activations, and 2 more if the weight is trained.
    Attention takes `attention_flops_per_token` forward and twice that backward. A teacher adds its forward pass.
    Recomputation by gradient checkpointing is not counted. Source: derived.

    Args:
        model (`PreTrainedModel`): the model; weights to train are marked by `requires_grad`.
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
    """Estimate the memory of one process in bytes, by part; allocator and libraries come on top.

    Weights, gradients and both moments of Adam are in fp32. A layer keeps about 16 hidden states and 4 widths of the
    MLP per token. With gradient checkpointing it keeps one hidden state, and one layer is held in full. Six copies of
    a chunk's logits exist at once. Source: derived from what autograd keeps of this model's layers.

    Args:
        model (`PreTrainedModel`): the model; weights to train are marked by `requires_grad`.
        micro_batch_tokens (`int`): tokens in one pass of one process.
        chunk (`int`): positions whose logits exist at one time.
        teacher_parameters (`int`): parameters of a teacher.
        teacher_itemsize, itemsize (`int`): bytes of an element of the teacher, and of activations.
        checkpointing (`bool`): whether gradient checkpointing is on.
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


def seconds_of(flops: float, device: torch.device, bf16: bool = False) -> float:
    """Estimate the seconds that a run takes on a device: `flops` at the measured speed of matmuls, times `OVERHEAD`.

    Args:
        flops (`float`): floating point operations of the run, see `training_flops`.
        device (`torch.device`): where it runs.
        bf16 (`bool`): whether matmuls are in bf16.
    """
    return OVERHEAD * flops / (2 * matmul_speed(device, torch.bfloat16 if bf16 else torch.float32))


def run_plan(
    model: Any,
    settings: Any,
    micro_batch: int,
    teacher: Any = None,
    device: torch.device | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Return parameters, operations, memory and time of a run in one dictionary, for reports and commands.

    Args:
        model: the model; weights to train are marked by `requires_grad`, adapters may be on it.
        settings (`TrainingSettings`): settings of the run.
        micro_batch (`int`): sequences in one pass of one process.
        teacher (*optional*): the teacher; its weights are not needed.
        device (`torch.device`, *optional*): where the run is; time is estimated only if it is given.
        processes (`int`): number of processes that share the work.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    length = settings.sequence_length
    tokens = settings.steps * settings.batch_size * length
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
    flops = training_flops(plain, tokens, length, None if teacher is None else teacher.config, teacher_matrix)
    return {
        "parameters": plain.num_parameters(),
        "trained_parameters": sum(item.numel() for item in plain.parameters() if item.requires_grad),
        "teacher_parameters": teacher_parameters,
        "steps": settings.steps,
        "tokens": tokens,
        "flops": flops,
        "memory_bytes": memory,
        "estimated_seconds": None if device is None else seconds_of(flops, device, settings.bf16) / processes,
    }
