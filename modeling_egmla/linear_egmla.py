# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""The linear layer of EG-MLA models: `nn.Linear` with faster products for inference on a CPU.

A decode step of one sequence reads every weight once, and PyTorch's own product with one row reads them at half the
speed of memory on some processors (figures in tests/benchmarks/README.md). Parameters, names and results (to rounding)
are those of `nn.Linear`; everything but inference with plain weights on a CPU goes to it.
"""

import platform
from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad


# oneDNN's product on weights as they lie, without a copy in a layout of its own.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Up to this many rows it is 1.5 to 2 times as fast on AMD's processors. At hundreds it is 1.1 to 1.4 times as fast and
# less exact: long prompts keep PyTorch's kernel, and with it the very logits of a source that was converted exactly.
FEW_ROWS = 32


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "Intel" in platform.processor()


# Up to this many it is not: on Intel's processors MKL, which PyTorch chooses, reads weights at the speed of memory.
ROWS_OF_MKL = 4 if torch.backends.mkl.is_available() and _is_intel() else 0
# Their sums in fp32 are as exact as those of the usual kernels.
SUMMED_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


def is_traced() -> bool:
    """Whether a program is being exported or traced, or forward-mode derivatives are taken, which `no_grad` leaves on.

    Kernels that PyTorch knows little of stay out of these.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.compiler, "is_exporting", lambda: False)()
    return forward_ad._current_level >= 0 or torch.jit.is_tracing()


def inference_product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear` of plain dense tensors, without derivatives; oneDNN's kernel for fp32 on a CPU."""
    if input.dtype != torch.float32 or input.device.type != "cpu" or ONEDNN_LINEAR is None:
        return nn.functional.linear(input, weight, bias)
    # It heeds the strides of the other two.
    return ONEDNN_LINEAR(input, weight, None if bias is None else bias.contiguous(), "none", [], "")


class EGMLALinear(nn.Linear):
    """`nn.Linear`; without gradients, on a CPU, with plain weights:

    - eager fp32, few rows: oneDNN's kernel instead of the one PyTorch chooses, where it is the faster one;
    - compiled, one row: products and a sum in fp32, which the compiler turns into one pass over the weights.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., out_features]` of `[..., in_features]`."""
        if not self._is_plain_inference(input):
            return super().forward(input)
        if torch.compiler.is_compiling():
            if input.numel() != self.in_features or input.dtype not in SUMMED_IN_FP32:
                return super().forward(input)
            # Each output is a sum over one row of the weight.
            output = (self.weight.float() * input.reshape(1, -1).float()).sum(dim=-1)
            if self.bias is not None:
                output = output + self.bias.float()
            return output.to(input.dtype).reshape(*input.shape[:-1], self.out_features)
        rows = input.numel() // self.in_features
        if not ROWS_OF_MKL < rows <= FEW_ROWS or type(input) is not torch.Tensor:
            return super().forward(input)
        return inference_product(input, self.weight, self.bias)

    def _is_plain_inference(self, input: torch.Tensor) -> bool:
        """Whether products are of plain dense tensors in one format, on a CPU, with nothing to record or to cast."""
        weight = self.weight
        return (
            input.device.type == "cpu"
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter
            and weight.layout == torch.strided
            and input.dtype == weight.dtype
            and input.numel() > 0
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not is_traced()
        )
