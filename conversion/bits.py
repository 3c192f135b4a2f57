"""A cache with bits by importance: the step behind a conversion that has kept (nearly) all of the rank.

The model's function does not change here, only the numbers that its cache holds:

1. `measure_sensitivity` says what rounding costs at every layer's entries.
2. The latent gets the basis in which rounding is cheapest: that in which both Fisher's information and the covariance
   of the latent are diagonal. No other basis has a smaller product of weighted variances, which the cost at a given
   number of bits grows with (Hadamard's inequality). The mean goes into the output's bias.
3. Channels and rotary pairs are sorted by importance, and bits allocated over all layers (`allocation.py`).

Behind a trained gate the basis stays, and channels change places with their gates. Channels that are not stored stay
in the weights: a prompt and the first tokens are read with all channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from egmla import EGMLAConfig
from egmla.utils.models import config_dtype
from egmla.utils.progress import Progress, stage_progress

from .allocation import LayerBits, Storage, allocate_bits, allocation_cost, as_config, cache_bytes
from .sensitivity import Sensitivity, measure_sensitivity
from .shards import save_tensors


BUDGET_TOKENS = 32768  # context that a share of the source's cache is counted at
SENSITIVITY_TOKENS = 8192  # calibration tokens that gradients are of
# Further shares that a cache of a checkpoint can be used at: prefixes of its allocation.
SMALLER_SHARES = (0.5, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
# Information overrates errors of rotary keys, which reach the output through a softmax alone (LOG, 2026-11-30).
PAIR_WEIGHT = 0.15
# What has a number, or a row, for each channel of the latent.
CHANNEL_BY_CHANNEL = {"kv_a_layernorm.weight", "kv_gate_proj.weight", "kv_gate_norm.weight", "kv_gate_norm.bias"}
DAMPING = 0.01  # share of the mean eigenvalue added to Fisher's information, which it saw too little text of


@dataclass(frozen=True)
class Budget:
    """What a cache may take.

    Attributes:
        share: of the bytes of the source's cache in bf16.
        smaller: further shares, each of which gets an allocation of its own.
        source_elements: elements that the source caches per token, all layers.
        max_rank: most latent channels of a layer, or `None`.
    """

    share: float
    smaller: tuple[float, ...]
    source_elements: int
    max_rank: int | None = None

    def bytes(self, share: float) -> float:
        """Bytes of a share at `BUDGET_TOKENS`."""
        return share * 2 * self.source_elements * BUDGET_TOKENS


@dataclass(frozen=True)
class Basis:
    """New numbers of a layer's entries, most important first.

    Attributes:
        down: `[R, R]`, new channels of the latent, less its mean, from old ones; up is its inverse.
        mean: old latent's mean `[R]`, folded away.
        pairs: old numbers of the rotary pairs, in their new order.
        latent_importance: of the channels `[R]`; pair_importance `[P / 2]`.
    """

    down: torch.Tensor
    up: torch.Tensor
    mean: torch.Tensor
    pairs: torch.Tensor
    latent_importance: torch.Tensor
    pair_importance: torch.Tensor


def cheapest_basis(found: Sensitivity, rank: int, damping: float = DAMPING) -> Basis:
    """Return the basis of a layer's latent in which rounding is cheapest, and its rotary pairs by importance.

    Args:
        found (`Sensitivity`): of the layer's entries, latent before rotary key, first members of its pairs first.
        rank (`int`): width `R` of the latent.
        damping (`float`): share of the mean eigenvalue added to Fisher's information.
    """
    information, covariance = found.gradient[:rank, :rank], found.covariance[:rank, :rank]
    values, vectors = torch.linalg.eigh((information + information.T) / 2)
    values = values.clamp_min(0)
    roots = (values + damping * values.mean() + 1e-30).sqrt()
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    _, turned = torch.linalg.eigh(root @ covariance @ root)
    turned = turned.flip(1)
    down, up = turned.T @ root, inverse @ turned
    # Rounding is measured in the same unit for every channel, whatever the information says of it: rows of length 1.
    length = down.norm(dim=1, keepdim=True)
    down, up = down / length, up * length.T
    importance = (up.T @ found.gradient[:rank, :rank] @ up).diagonal() * (
        down @ found.spread[:rank, :rank] @ down.T
    ).diagonal()
    order = importance.argsort(descending=True)
    pair_order, pairs = _pairs_by_importance(found, rank)
    return Basis(down[order], up[:, order], found.mean[:rank], pair_order, importance[order].clamp_min(0), pairs)


def permuted_basis(found: Sensitivity, rank: int) -> Basis:
    """Return the channels of a layer's latent, and its rotary pairs, by importance: for latents behind a gate.

    A gate multiplies each channel by a number of its own, so channels may change places, and nothing else.
    """
    importance = (found.gradient.diagonal() * found.spread.diagonal())[:rank].clamp_min(0)
    order = importance.argsort(descending=True)
    down = torch.eye(rank, dtype=found.gradient.dtype)[order]
    pair_order, pairs = _pairs_by_importance(found, rank)
    return Basis(down, down.T, torch.zeros_like(found.mean[:rank]), pair_order, importance[order], pairs)


def _pairs_by_importance(found: Sensitivity, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return old numbers of the rotary pairs, most important first, and their importance."""
    pairs = PAIR_WEIGHT * (found.gradient.diagonal() * found.spread.diagonal())[rank:].view(2, -1).sum(dim=0)
    order = pairs.argsort(descending=True)
    return order, pairs[order]


def layer_in_basis(
    tensors: Mapping[str, torch.Tensor], basis: Basis, config: EGMLAConfig, keeps_channels: bool = False
) -> dict[str, torch.Tensor]:
    """Return a layer's attention tensors in a new basis, fp64; the layer's function stays.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): those of the layer before: with biases and the gate at identity, unless
            the basis only changes the places of channels (`permuted_basis`).
        basis (`Basis`): its new numbers.
        config (`EGMLAConfig`): of the model.
        keeps_channels (`bool`): whether the basis is a permutation, which norms and gates follow.
    """
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    rank, order = len(basis.mean), basis.pairs
    changed = {name: tensor.double() for name, tensor in tensors.items()}
    # Where a pair's two numbers stand in the rows of projections.
    rows = torch.stack((2 * order, 2 * order + 1), dim=1).flatten() if config.rope_interleave else None
    rows = torch.cat((order, order + rope // 2)) if rows is None else rows

    weight, bias = changed["kv_a_proj_with_mqa.weight"], changed.get("kv_a_proj_with_mqa.bias")
    changed["kv_a_proj_with_mqa.weight"] = torch.cat((basis.down @ weight[:rank], weight[rank:][rows]))
    if bias is not None:
        changed["kv_a_proj_with_mqa.bias"] = torch.cat((basis.down @ (bias[:rank] - basis.mean), bias[rank:][rows]))
    if basis.mean.any():
        # A constant in all keys changes no softmax, and one in all values is one in the output.
        values = changed["kv_b_proj.weight"].view(heads, -1, rank)[:, nope:] @ basis.mean
        changed["o_proj.bias"] = changed["o_proj.bias"] + changed["o_proj.weight"] @ values.flatten()
    changed["kv_b_proj.weight"] = changed["kv_b_proj.weight"] @ basis.up
    if keeps_channels:
        for name in CHANNEL_BY_CHANNEL & changed.keys():
            changed[name] = changed[name][basis.down.argmax(dim=1)]
    if "q_rope_scale" in changed:
        changed["q_rope_scale"] = changed["q_rope_scale"][:, order]
        return changed
    queries = "q_proj" if "q_proj.weight" in changed else "q_b_proj"
    for name in (f"{queries}.weight", f"{queries}.bias"):
        if name in changed:
            per_head = changed[name].unflatten(0, (heads, nope + rope))
            kept = torch.cat((per_head[:, :nope], per_head[:, nope:][:, rows]), dim=1)
            changed[name] = kept.flatten(0, 1)
    return changed


def spend_bits(
    folder: Path,
    sequences: torch.Tensor,
    budget: Budget,
    storage: Storage | None = None,
    keeps_channels: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Give a checkpoint of (nearly) full rank a cache with allocated bits; rewrites its weights and configuration.

    Args:
        folder (`Path`): the checkpoint, attention tensors with biases, the gate at identity unless `keeps_channels`.
            Weights are written in the dtype that its configuration names.
        sequences (`torch.Tensor`): calibration ids `[sequences, T]`.
        budget (`Budget`): what the cache may take.
        storage (`Storage`, *optional*): how it lays out its tokens.
        keeps_channels (`bool`): channels change places only, since their gates are trained.
        device (`str`, *optional*): where the gradients are computed, by default the GPU if there is one.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `dict`: what a report says of the cache.

    Raises:
        ValueError: for a budget that no cache of this model meets.
    """
    storage = storage or Storage()
    config = EGMLAConfig.from_pretrained(folder)  # the loaded model's names the dtype that it was loaded in
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    count = -(-SENSITIVITY_TOKENS // sequences.shape[1])
    with torch.enable_grad():
        found = measure_sensitivity(
            model,
            sequences[:count],
            storage.group_tokens,
            storage.first_tokens,
            stage_progress("measure gradients", progress),
        )
    ranks = config.layer_kv_lora_ranks
    del model
    find_basis = permuted_basis if keeps_channels else cheapest_basis
    bases = [find_basis(layer, rank) for layer, rank in zip(found, ranks, strict=True)]
    allocations = {share: _allocation(bases, budget, share, storage) for share in (budget.share, *budget.smaller)}
    _rewrite(folder, bases, config, as_config(allocations, storage), keeps_channels)
    return describe_cache(bases, allocations, budget, storage)


def _allocation(bases: Sequence[Basis], budget: Budget, share: float, storage: Storage) -> list[LayerBits]:
    latents = [basis.latent_importance for basis in bases]
    pairs = [basis.pair_importance for basis in bases]
    return allocate_bits(latents, pairs, budget.bytes(share), BUDGET_TOKENS, storage, budget.max_rank)


def _rewrite(
    folder: Path, bases: Sequence[Basis], config: EGMLAConfig, bits: dict[str, Any], keeps_channels: bool
) -> None:
    """Write the weights of a folder anew, in the new bases, and its configuration."""
    dtype = config_dtype(config)
    prefix = "model.layers.{}.self_attn."
    for path in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(path)
        for layer_idx, basis in enumerate(bases):
            own = prefix.format(layer_idx)
            before = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
            if before:  # a layer is in one shard whole
                after = layer_in_basis(before, basis, config, keeps_channels)
                tensors |= {f"{own}{name}": tensor.to(dtype).contiguous() for name, tensor in after.items()}
        save_tensors(tensors, path)
    slots = [config.layer_rope_slots(layer_idx) for layer_idx in range(len(bases))]
    config.rope_slots = [
        [(list(range(len(basis.pairs))) if own is None else own)[number] for number in basis.pairs.tolist()]
        for basis, own in zip(bases, slots, strict=True)
    ]
    config.kv_cache_bits = bits
    config.save_pretrained(folder)


def describe_cache(
    bases: Sequence[Basis], allocations: Mapping[float, Sequence[LayerBits]], budget: Budget, storage: Storage
) -> dict[str, Any]:
    """Return what a report says of a cache: its bytes, how many numbers have how many bits, and the expected cost."""
    source = 2 * budget.source_elements
    latents = [basis.latent_importance for basis in bases]
    pairs = [basis.pair_importance for basis in bases]
    widths = [len(latent) + 2 * len(pair) for latent, pair in zip(latents, pairs, strict=True)]
    found = []
    for share, layers in allocations.items():
        numbers = [bits for layer in layers for bits in layer.numbers]
        sizes = {tokens: cache_bytes(layers, widths, storage, tokens) for tokens in (2048, BUDGET_TOKENS)}
        found.append(
            {
                "share": share,
                "bytes": {str(tokens): size for tokens, size in sizes.items()},
                "shares": {str(tokens): round(size / tokens / source, 4) for tokens, size in sizes.items()},
                "channels": {str(bits): numbers.count(bits) for bits in sorted(set(numbers), reverse=True)},
                "channels_of_latents": [len(layer.latent) for layer in layers],
                "rotary_pairs": [len(layer.rope) for layer in layers],
                "expected_kl": allocation_cost(layers, latents, pairs) / 2,
            }
        )
    return {"source_bytes_per_token": source, "budgets": found}
