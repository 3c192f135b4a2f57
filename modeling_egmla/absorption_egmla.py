# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Absorption: when `kv_b_proj` may be multiplied into queries and outputs, which matrix it is, and attention with it.

Absorbed attention never expands the cache. It needs the up-projection as an affine map, the same for every token.
PEFT, quantisation and other tools put anything around `kv_b_proj`. `is_affine` asks the module itself, so no list of
such tools is needed here.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from .cpu_egmla import hooks_on_every_module, is_plain_linear, is_traced
from .entries_egmla import Entries


# Allowed deviation from an affine map, in units of the dtype's epsilon and relative to the outputs' root mean square.
AFFINE_EPSILONS = 3
# The least deviation to allow: sums over a latent's elements in fp32.
AFFINE_TOLERANCE = 1e-5
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def absorption_pays(new_tokens: int, kv_lora_rank: int, qk_nope_head_dim: int, v_head_dim: int) -> bool:
    """Tell whether `T` new tokens after a long past take fewer operations in the latent space than expanded.

    Per head, absorbed attention takes `T S (2R + P)` multiplications. Expanded attention takes `T S (N + P + V)`, plus
    `S R (N + V)` for the expansion. So absorbed wins while `T < R (N + V) / (2R - N - V)`, always where `2R <= N + V`.
    Derived from these counts.
    """
    excess = 2 * kv_lora_rank - qk_nope_head_dim - v_head_dim
    return excess <= 0 or new_tokens * excess < kv_lora_rank * (qk_nope_head_dim + v_head_dim)


def can_absorb(layers: Iterable[nn.Module], width: int, like: torch.Tensor) -> bool:
    """Tell whether every one of these up-projections is an affine map, the same for all tokens.

    Args:
        layers: the modules `kv_b_proj`, as they are now.
        width (`int`): a latent's width, or that of several: a layer's own `in_features` counts where it has them.
        like (`torch.Tensor`): an activation of the dtype that the modules are given.
    """
    if _is_every_module_hooked():
        return False
    wrapped = [layer for layer in layers if not is_plain_linear(layer)]
    if not wrapped:
        return True
    wrapped = [layer for layer in wrapped if not _is_quantized_linear(layer)]
    # A wrapper draws dropout in training. A traced program cannot branch on the result of a probe.
    if any(layer.training for layer in wrapped) or (wrapped and (is_torchdynamo_compiling() or is_traced())):
        return False
    if any(_is_hooked(module) for layer in wrapped for module in layer.modules()):
        return False  # hooks see, and may change, real activations; PEFT tells each sequence's adapter by one
    verdicts = [is_affine(layer, getattr(layer, "in_features", width), like) for layer in wrapped]
    return not verdicts or bool(torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all())


def _is_every_module_hooked() -> bool:
    """Tell whether hooks on every module may see or change activations. PyTorch's own only name and count them."""
    makers = (getattr(hook, "__module__", None) or "" for hook in hooks_on_every_module())
    return any(not maker.startswith("torch.") for maker in makers)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_quantized_linear(layer: nn.Module) -> bool:
    """Tell whether a layer is linear by construction: an `nn.Linear` alone, its weight quantised or distributed.

    Such a layer may round its inputs. Absorption then uses its weight without that rounding.
    """
    if not isinstance(layer, nn.Linear) or any(True for _ in layer.children()):
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return not hooked and (type(layer.weight) is not nn.Parameter or layer.weight.dtype not in FLOAT_DTYPES)


@torch.no_grad()
def is_affine(layer: nn.Module, width: int, like: torch.Tensor) -> torch.Tensor:
    """Tell, as a boolean scalar tensor, whether a module maps each token `[width]` by the same affine map.

    It is given `0, a, b, a + b, -2a` in one call, the elements of `a` at even and of `b` at odd places, so that no sum
    is rounded. An affine map has `f(a + b) = f(a) + f(b) - f(0)` and `f(-2a) = 3 f(0) - 2 f(a)`.
    """
    device = next((p.device for p in layer.parameters() if p.device.type != "meta"), like.device)
    values = torch.arange(width, dtype=torch.float64, device="cpu")
    values = ((values + 1) * 2.3999632297).cos().mul(1.5).to(device, like.dtype)
    even = torch.arange(width, device=device) % 2 == 0
    a, b = values * even, values * ~even
    found = layer(torch.stack((torch.zeros_like(a), a, b, a + b, -2 * a))[None])[0].double()
    zero, of_a, of_b, of_sum, of_double = found
    deviations = torch.stack((of_sum - of_a - of_b + zero, of_double + 2 * of_a - 3 * zero))
    epsilon = torch.finfo(like.dtype).eps
    if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        epsilon = max(epsilon, 2**-10)
    tolerance = max(AFFINE_EPSILONS * epsilon, AFFINE_TOLERANCE)
    return deviations.square().mean().sqrt() <= tolerance * found.square().mean().sqrt()


def affine_map(layer: nn.Module, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight `[out, width]` and bias `[out]` (or `None`) of an up-projection.

    A plain `nn.Linear` has them. Any other module is applied to the identity and to zero, in the dtype and on the
    device of the activation `like`. So its weights need no attribute and are never raw or stale.
    """
    if is_plain_linear(layer):
        return layer.weight, layer.bias
    inputs = torch.cat((torch.eye(width, dtype=like.dtype, device=like.device), like.new_zeros((1, width))))
    outputs = layer(inputs[None])[0]
    bias = outputs[-1]
    return (outputs[:-1] - bias).transpose(0, 1), bias


def up_projections(
    layer: nn.Module, rank: int, parts: list[int], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return `W_UK` `[H, N, R]`, `W_UV` `[H, V, R]` and the values' bias `[H, V]`; `parts` are `[N, V]`.

    A bias on keys adds the same to every score of a query, which the softmax cancels. `like` is an activation.
    """
    weight, bias = affine_map(layer, rank, like)
    key_up, value_up = weight.view(-1, sum(parts), rank).split(parts, dim=1)
    return key_up, value_up, None if bias is None else bias.view(-1, sum(parts))[:, parts[0] :]


def absorbed_attention(
    nope: torch.Tensor,
    rope: torch.Tensor,
    entries: Entries,
    attention_mask: torch.Tensor | None,
    scaling: float,
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    eager: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend in the latent space: queries are multiplied by `W_UK`, mean latents by `W_UV`.

    Heads are the batch of both matmuls, so the weights are read once for all sequences.

    Args:
        nope (`torch.Tensor`): queries without position `[B, H, T, N]`.
        rope (`torch.Tensor`): rotated queries `[B, H, T, P]`.
        entries (`Entries`): of `S` tokens, `R + P` wide.
        attention_mask: as of `Entries.attend`.
        scaling (`float`): factor on the scores.
        maps: `W_UK` `[H, N, R]`, `W_UV` `[H, V, R]` and the values' bias `[H, V]` or `None`.
        eager (`bool`): whether weights are wanted too, from plain matmuls.

    Returns:
        Output `[B, T, H, V]` and, if `eager`, weights `[B, H, T, S]`.
    """
    B, H, T, _ = nope.shape
    key_up, value_up, value_bias = maps
    R = key_up.shape[-1]
    absorbed = torch.bmm(nope.transpose(0, 1).reshape(H, B * T, -1), key_up)  # [H, B T, R]
    query = torch.cat((absorbed.view(H, B, T, R).transpose(0, 1), rope), dim=-1)
    weights = None
    if eager:
        output, weights = _eager_attention(query, entries.to_tensor(), attention_mask, scaling, R)
    else:
        output = entries.attend(query, attention_mask, scaling)
    output = torch.bmm(output.transpose(0, 1).reshape(H, B * T, R), value_up.transpose(1, 2))  # [H, B T, V]
    if value_bias is not None:  # weights of a row sum to one
        output = output + value_bias.unsqueeze(1)
    return output.view(H, B, T, -1).permute(1, 2, 0, 3), weights


def _eager_attention(query, entries, attention_mask, scaling: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean latents `[B, H, T, R]` and weights `[B, H, T, S]` by plain matmuls."""
    B, H, T, _ = query.shape
    # As `eager_attention_forward`, heads beside one another: broadcasting would copy the cache for each.
    scores = torch.matmul(query.reshape(B, 1, H * T, -1), entries.transpose(2, 3)) * scaling
    scores = scores.view(B, H, T, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output = torch.matmul(weights.view(B, 1, H * T, -1), entries[..., :rank])
    return output.view(B, H, T, -1), weights
