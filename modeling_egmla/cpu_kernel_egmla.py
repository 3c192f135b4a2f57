# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Where attention and caches find the operators of `kernel/latent_attention.cpp`, once the package has loaded them.

The package's `egmla.load_cpu_kernel()` compiles, loads and checks them; code that came with a checkpoint finds them if
that was done before.
"""

from typing import Any

import torch


# `torch.ops.egmla` once its results were found right, `None` before.
OPERATORS: Any = torch.ops.egmla if getattr(torch.ops.egmla, "checked", False) else None


def cpu_operators() -> Any:
    """The kernel's operators, `None` without them."""
    return OPERATORS
