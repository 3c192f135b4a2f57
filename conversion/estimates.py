"""What a conversion will take, from its plan and the speed of this machine; rough, to tell minutes from days."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from egmla import EGMLAConfig
from egmla.utils.matmul_speed import matmul_speed

from .bits import SENSITIVITY_TOKENS
from .calibration import ROWS, measured_sequences
from .families.base import AttentionShape
from .plan import Plan
from .refinement import ERROR_SEQUENCES, Refinement


# Besides matrix products: softmax, norms, copies. From runs of SmolLM2-135M on two cores (tests/benchmarks/LOG.md).
OVERHEAD = 2.0
# An element of an attention map is made, put through softmax and summed up, as long as so many multiplications.
MAP_COST = 50
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Disk:
    """
    Attributes:
        weights_bytes: of the converted model's weights.
        needed_bytes: most that is there at once, weights in parts and in shards and hidden states of the calibration.
    """

    weights_bytes: int
    needed_bytes: int


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        seconds: rough duration on this machine, idle.
        memory_bytes: rough peak of memory besides Python's own and, for GGUF files, the source.
    """

    seconds: float
    memory_bytes: int


def disk(
    shapes: Iterable[torch.Size], dtype: torch.dtype, states: tuple[int, int, int], refinement: Refinement
) -> Disk:
    """What a conversion will write.

    Args:
        shapes: of the converted model's tensors.
        dtype (`torch.dtype`): of most of them.
        states (`tuple`): sequences, tokens of each and hidden size, `(0, 0, 0)` where there is no calibration.
        refinement (`Refinement`): its settings.
    """
    weights = dtype.itemsize * sum(shape.numel() for shape in shapes)
    count, T, D = states
    streams = 4 * (count + (count if refinement.steps else min(count, ERROR_SEQUENCES))) * T * D
    # The states behind a layer are written before those in front of it go; those behind the last are there to the end.
    return Disk(weights, max(weights + 2 * streams, 2 * weights + streams))


def _mlp_weights(config: EGMLAConfig) -> tuple[list[int], list[int]]:
    """Weights of each layer's MLP: all that it has, and those that a token passes through."""
    D, moe = config.hidden_size, config.moe_config or {}
    held = [3 * D * config.intermediate_size] * config.num_hidden_layers
    used = list(held)
    for layer_idx in config.moe_layers or ():
        expert, shared = 3 * D * moe["moe_intermediate_size"], moe.get("n_shared_experts") or 0
        held[layer_idx] = expert * (moe["n_routed_experts"] + shared)
        used[layer_idx] = expert * (moe["num_experts_per_tok"] + shared)
    return held, used


def estimate(
    config: EGMLAConfig,
    shape: AttentionShape,
    plan: Plan,
    sequences: torch.Tensor,
    refinement: Refinement,
    allocates_bits: bool = False,
) -> Estimate:
    """Time and memory of a calibrated conversion.

    Args:
        config (`EGMLAConfig`): the converted model's configuration.
        shape (`AttentionShape`): widths of its attention.
        plan (`Plan`): what will be done.
        sequences (`torch.Tensor`): calibration ids `[sequences, T]`.
        refinement (`Refinement`): its settings.
        allocates_bits (`bool`): whether gradients of the converted model follow, as bits are allocated by.
    """
    count, T = sequences.shape
    D, H, d = shape.hidden_size, shape.heads, shape.head_dim
    rank, layers = max(plan.ranks), len(plan.ranks)
    attention = 2 * D * (H + shape.kv_heads) * d
    held, used = _mlp_weights(config)
    mlp = sum(used) / layers
    converted = H * (2 * d + plan.rope_dim) * D + (rank + plan.rope_dim) * D + rank * H * 2 * d
    scores = H * d * T  # multiplications per token with the keys, and the same with the values, half of them masked

    measured = measured_sequences(sequences, refined=bool(refinement.steps))
    mapped = (T + min(ROWS, T)) / 2  # numbers in a row of a map, on average: it ends with its block
    source = count * T * (attention + mlp + scores) + measured * T * (H * mapped * MAP_COST + D * D)
    trained = converted + H * (d + plan.rope_dim) * T
    refined = 3 * refinement.steps * refinement.batch_size * T * trained + count * T * (trained + mlp)
    seconds = source / matmul_speed(CPU, torch.float32)
    if refinement.steps:
        seconds += refined / matmul_speed(CPU, getattr(torch, refinement.dtype))
    if allocates_bits:
        # Forwards, and backwards to the entries; sums of products of entries and gradients.
        passed = 3 * (converted + mlp + H * (d + plan.rope_dim) * T + D * config.vocab_size / layers)
        seconds += SENSITIVITY_TOKENS * (passed + 3 * (rank + plan.rope_dim) ** 2) / matmul_speed(CPU, torch.float32)
    # fp32: embeddings, hidden states of both runs before and after a layer, outputs; fp64: moments and weights.
    streams = (6 if refinement.steps else 4) * count * T * D * 4
    moments = 8 * (3 * D * D + 2 * (2 * shape.kv_width) ** 2 + H * d * d)
    weights = 8 * (attention + converted) + 4 * (2 * max(held) + 4 * converted)
    return Estimate(OVERHEAD * layers * seconds, streams + moments + weights + 4 * config.vocab_size * D)
