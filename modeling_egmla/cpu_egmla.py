# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""All that is special on a CPU: faster matmuls for inference, and where the compiled kernel's operators are found.

Readers on a GPU may skip this file. Everything here gives the results of PyTorch's own functions, to rounding.

A decode step of one sequence reads every weight once. On some processors PyTorch's matmul with one row reads weights
at half the memory bandwidth ("GEMV" in tests/benchmarks/LOG.md). `linear` picks a faster kernel there.
"""

import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks


# Dtypes of cache entries, before quantisation, that the compiled kernel reads.
CPU_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The version of the operators' arguments. Code of another version, which came with a checkpoint, does without them.
INTERFACE = 3
# `torch.ops.egmla` once `egmla.load_cpu_kernel()` has compiled, loaded and checked it; `None` before. Code that came
# with a checkpoint finds the operators if they were loaded before.
OPERATORS: Any = torch.ops.egmla if getattr(torch.ops.egmla, "interface", None) == INTERFACE else None

# oneDNN's matmul on weights in their own layout. It makes no copy in a layout of oneDNN.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Up to this many rows it is 1.5 to 2 times as fast on AMD's processors. At hundreds of rows it is 1.1 to 1.4 times as
# fast, but less exact. Long prompts keep PyTorch's kernel, and so the exact logits of a source converted exactly.
FEW_ROWS = 32


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


# Up to this many rows MKL, which PyTorch chooses, is as fast: on Intel it reads weights at full bandwidth.
ROWS_OF_MKL = 4 if torch.backends.mkl.is_available() and _is_intel() else 0
# Sums of these dtypes in fp32 are as exact as those of the usual kernels.
SUMMED_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


def cpu_operators() -> Any:
    """Return the operators of the compiled kernel, or `None` where it is not loaded."""
    return OPERATORS


@torch.compiler.assume_constant_result
def cpu_threads() -> int:
    """Return the number of threads, in compiled code that of its compilation."""
    return torch.get_num_threads()


def is_traced() -> bool:
    """Tell whether a program is exported or traced, or forward-mode derivatives are taken (`no_grad` keeps those).

    Kernels that PyTorch cannot trace or differentiate must not run then.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.compiler, "is_exporting", lambda: False)()
    return forward_ad._current_level >= 0 or torch.jit.is_tracing()


def is_plain_linear(layer: nn.Module) -> bool:
    """Tell whether a layer is exactly `nn.Linear`, its weight a plain parameter, with nothing put around its forward.

    Hooks, a replaced `forward` (accelerate), subclasses and wrappers (PEFT, quantisation) are not plain.
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not (
            layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        )
        and "forward" not in layer.__dict__
    )


def hooks_on_every_module() -> list[Any]:
    """Return the hooks that are installed on every module at once."""
    kinds = (
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_backward_hooks,
        module_hooks._global_backward_pre_hooks,
    )
    return [hook for hooks in kinds for hook in hooks.values()]


def inference_matmul(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `nn.functional.linear` of plain dense tensors without derivatives, in fp32 on a CPU by oneDNN."""
    if input.dtype != torch.float32 or input.device.type != "cpu" or ONEDNN_LINEAR is None:
        return nn.functional.linear(input, weight, bias)
    # The kernel heeds the strides of the input and the weight, but not of the bias.
    return ONEDNN_LINEAR(input, weight, None if bias is None else bias.contiguous(), "none", [], "")


def linear(layer: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Compute `layer(input)`, by a faster kernel for inference on a CPU with plain weights.

    - Eager fp32 with few rows: oneDNN's kernel, where it is faster than the one PyTorch chooses.
    - Compiled with one row: a product and a sum in fp32, which the compiler fuses into one pass over the weights.

    The layer stays an `nn.Linear`, so every tool that looks for one (bitsandbytes, torch.ao, FP8) finds it.

    Args:
        layer (`nn.Module`): an `nn.Linear`, or whatever a tool has put in its place, which is called.
        input (`torch.Tensor`): `[..., in_features]`.

    Returns:
        `torch.Tensor`: `[..., out_features]`.
    """
    if torch.is_grad_enabled() or input.device.type != "cpu" or not _is_plain_inference(layer, input):
        return layer(input)
    weight, bias = layer.weight, layer.bias
    if torch.compiler.is_compiling():
        if input.numel() != layer.in_features or input.dtype not in SUMMED_IN_FP32:
            return layer(input)
        output = (weight.float() * input.reshape(1, -1).float()).sum(dim=-1)  # a sum over each row of the weight
        if bias is not None:
            output = output + bias.float()
        return output.to(input.dtype).reshape(*input.shape[:-1], -1)
    rows = input.numel() // layer.in_features
    if input.dtype != torch.float32 or not ROWS_OF_MKL < rows <= FEW_ROWS or type(input) is not torch.Tensor:
        return layer(input)
    return inference_matmul(input, weight, bias)


def _is_plain_inference(layer: nn.Module, input: torch.Tensor) -> bool:
    """Tell whether a matmul is of plain dense tensors in one dtype on a CPU, with nothing to record, cast or hook."""
    if not is_plain_linear(layer):
        return False
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.layout == torch.strided
        and input.dtype == weight.dtype
        and input.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
        and not hooks_on_every_module()
    )
