# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""An opt-in C++ kernel for decode attention on a CPU. README.md describes it, LOG.md has the measurements."""

import threading
from pathlib import Path
from typing import Any

import torch

from egmla import cpu_egmla

from .build import WITHOUT, compiled_library
from .self_check import check_results


_lock = threading.Lock()


def load_cpu_kernel() -> None:
    """Compile, check and switch on the CPU kernel for this process: decoding at long context becomes faster.

    The first call on a machine compiles it, which takes about half a minute. The library is kept in PyTorch's folder
    of extensions (`TORCH_EXTENSIONS_DIR` or `~/.cache/torch_extensions`). The call then loads the library and compares
    its results with PyTorch's. Further calls do nothing. Models whose code came with a checkpoint
    (`trust_remote_code`) use the kernel if they are loaded afterwards.

    The kernel serves decode steps of one new token per sequence, without gradients, from every cache of this package.
    It supports fp32, bf16 and fp16, and boolean masks. It also quantises new tokens to int8. Everything else stays
    with PyTorch: other steps, `attn_implementation="eager"`, exported and traced programs.

    Its results differ from PyTorch's by rounding only:

    - With AVX-512 BF16, attention weights on bf16 entries are rounded to bf16, as in PyTorch's own kernel.
    - With AVX-512 VNNI, queries on int8 and int4 codes are rounded to int8.
    - With either, exponentials have a relative error of 1e-4.

    It is written for g++ on Linux. Built with clang it runs on one thread. Other systems are untested.

    Raises:
        ImportError: if it cannot be compiled or loaded, or if its results are wrong on this machine.
    """
    with _lock:
        if cpu_egmla.OPERATORS is not None:
            return
        if not hasattr(torch.ops.egmla, "latent_attention"):
            _load(compiled_library())
        check_results()
        operators: Any = torch.ops.egmla
        operators.interface = cpu_egmla.INTERFACE
        cpu_egmla.OPERATORS = operators


def _load(library: Path) -> None:
    """Load the shared library and describe its operators to `torch.compile`."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{library} cannot be loaded ({error}). Delete it and try again. {WITHOUT}") from error
    for name in ("latent_attention", "latent_attention_int8", "latent_attention_int4", "latent_attention_allocated"):
        torch.library.register_fake(f"egmla::{name}", _shape_of_attention)
    torch.library.register_fake("egmla::write_int8", lambda *arguments: None)


def _shape_of_attention(query: torch.Tensor, *arguments) -> torch.Tensor:
    """Return an empty result `[B, H, 1, R]`. `R` is the last argument."""
    return query.new_empty(*query.shape[:3], arguments[-1])
