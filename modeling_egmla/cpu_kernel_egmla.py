# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Where attention and caches find the operators of `kernel/latent_attention.cpp`, once the package has loaded them.

The package's `egmla.load_cpu_kernel()` compiles, loads and checks them; code that came with a checkpoint finds them if
that was done before.
"""

from typing import Any

import torch


# Formats of entries, before quantisation where they are, that the compiled kernel reads.
CPU_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Which arguments the operators take, and what of a cache's entries they are: code of another version, which came with
# a checkpoint, does without them.
INTERFACE = 2
# `torch.ops.egmla` once its results were found right, `None` before.
OPERATORS: Any = torch.ops.egmla if getattr(torch.ops.egmla, "interface", None) == INTERFACE else None


def cpu_operators() -> Any:
    """The kernel's operators, `None` without them."""
    return OPERATORS
