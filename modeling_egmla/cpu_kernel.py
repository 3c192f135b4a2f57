# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Compiles and loads `latent_attention.cpp`, a kernel for decode attention on a CPU.

PyTorch's fused kernel takes 1.7 times as long, and none of its kernels reads quantised entries (figures in
tests/benchmarks/README.md). It is opt-in, since it takes a C++ compiler and, once, half a minute; all works without.
"""

import os
import platform
import shlex
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

import torch

from . import cpu_kernel_egmla


SOURCE = Path(__file__).with_name("latent_attention.cpp")
# Sums are in another order than PyTorch's.
TOLERANCE = 1e-4


def load_cpu_kernel() -> None:
    """Decodes on a CPU with a compiled kernel, from now on and in this process: faster at long context.

    Compiles it at the first call on a machine (about half a minute; kept in PyTorch's folder of extensions,
    `TORCH_EXTENSIONS_DIR` or `~/.cache/torch_extensions`), loads it, and compares its results with PyTorch's once.
    Further calls do nothing. Models whose code came with a checkpoint (`trust_remote_code`) use it too, if they are
    loaded afterwards.

    It serves one new token per sequence, without gradients, with no mask or a boolean one, from every kind of cache.
    All else stays with PyTorch's kernels.

    Raises:
        ImportError: when there is no C++ compiler that works, or the kernel's results are wrong on this machine.
    """
    if cpu_kernel_egmla.OPERATORS is not None:
        return
    if not hasattr(torch.ops.egmla, "latent_attention"):
        torch.ops.load_library(_compiled_library())
        for name in ("latent_attention", "latent_attention_int8", "latent_attention_int4"):
            torch.library.register_fake(f"egmla::{name}", _shape_of_attention)
        torch.library.register_fake("egmla::quantize_int8", _shapes_of_codes)
    _check()
    cpu_kernel_egmla.OPERATORS = torch.ops.egmla


def _shape_of_attention(query: torch.Tensor, *arguments) -> torch.Tensor:
    """`[B, rows, R]`; `R` is the last argument."""
    return query.new_empty(*query.shape[:2], arguments[-1])


def _shapes_of_codes(entries: torch.Tensor, matrix: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = entries.new_empty(entries.shape[0], groups, dtype=torch.bfloat16)
    return torch.empty_like(entries, dtype=torch.int8), scales


def _compiled_library() -> Path:
    """The shared library for this source, PyTorch and processor; compiled if it is not there yet.

    It is written under a temporary name, so that a killed compiler leaves nothing that looks done.
    """
    from torch.utils import cpp_extension  # seconds to import

    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    intel = platform.machine().lower() in ("x86_64", "amd64")
    native = ("-march=native", "-mprefer-vector-width=512") if intel else ("-mcpu=native",)
    options = [
        *("-O3", *native, "-ffp-contract=fast", "-fno-math-errno", "-std=c++20", "-fPIC", "-shared"),
        *(["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-fopenmp"]),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{folder}" for folder in cpp_extension.include_paths()),
        *(f"-L{folder}" for folder in cpp_extension.library_paths()),
        *("-ltorch_cpu", "-lc10"),
    ]
    what = [SOURCE.read_text(), torch.__version__, *compiler, *options, _processor()]
    digest = sha256("\0".join(what).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions") / "egmla"
    library = folder / f"latent_attention-{digest}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / library.name
        command = [*compiler, *options[:-2], str(SOURCE), "-o", str(made), *options[-2:]]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ImportError(
                f"The CPU kernel needs a C++ compiler, and {compiler[0]!r} cannot be run ({error}). Install g++ or "
                "clang++, or name one in the environment variable CXX; without the kernel everything works, slower."
            ) from error
        if result.returncode:
            raise ImportError(
                f"The CPU kernel could not be compiled; {shlex.join(command)} said:\n{result.stderr.strip()[-2000:]}\n"
                "Another compiler can be named in the environment variable CXX; without the kernel everything works, "
                "slower."
            )
        made.replace(library)
    return library


def _processor() -> str:
    """What instructions the code may use: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _check() -> None:
    """Compares the kernel with PyTorch's attention.

    Raises:
        ImportError: when they differ.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 5, 24, generator=generator)
    entries = torch.randn(2, 700, 24, generator=generator)
    mask = torch.rand(2, 700, generator=generator) > 0.3
    found = torch.ops.egmla.latent_attention(query, entries, mask, 0.2, 16)
    expected = torch.softmax((query @ entries.mT * 0.2).masked_fill(~mask[:, None], -torch.inf), -1) @ entries
    difference = (found - expected[..., :16]).abs().max().item()
    if not difference < TOLERANCE:
        raise ImportError(
            f"The CPU kernel is wrong on this machine: its results differ by {difference:.1e} from PyTorch's, which "
            f"is more than {TOLERANCE}. It is not used. Please report the processor and the compiler."
        )
