# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Where attention and caches find the operators of `latent_attention.cpp`, once the package has loaded them.

The package's `egmla.load_cpu_kernel()` compiles and loads them; code that came with a checkpoint finds them if they
were there before it.
"""

from typing import Any

import torch


# `torch.ops.egmla`, `None` where nothing is loaded or the kernel is not wanted.
OPERATORS: Any = torch.ops.egmla if hasattr(torch.ops.egmla, "latent_attention") else None


def cpu_operators() -> Any:
    """The kernel's operators, `None` without them."""
    return OPERATORS
