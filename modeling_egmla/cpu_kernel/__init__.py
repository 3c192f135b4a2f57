# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Compiles and loads `kernel/latent_attention.cpp`, a kernel for decode attention on a CPU.

PyTorch's fused kernel takes longer, and none of its kernels reads quantised entries (figures in
tests/benchmarks/README.md). It is opt-in, since it takes a C++ compiler and, once, half a minute; all works without.
"""

import itertools
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from egmla import cpu_kernel_egmla
from egmla.quantization_egmla import ElementGroups, TokenGroups, rotation


logger = logging.get_logger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "latent_attention.cpp"
# Sums are in another order than PyTorch's. With bf16 entries weights are rounded to bf16, with codes queries to bytes;
# with either exponentials are to 1e-4.
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 2e-3
WITHOUT = "Without the kernel everything works, slower."

_lock = threading.Lock()


def load_cpu_kernel() -> None:
    """Decodes on a CPU with a compiled kernel, from now on and in this process: faster at long context.

    Compiles it at the first call on a machine (about half a minute; kept in PyTorch's folder of extensions,
    `TORCH_EXTENSIONS_DIR` or `~/.cache/torch_extensions`), loads it, and compares its results with PyTorch's once.
    Further calls do nothing. Models whose code came with a checkpoint (`trust_remote_code`) use it too, if they are
    loaded afterwards.

    Its results are PyTorch's but for rounding: with AVX-512 BF16 weights of bf16 entries are rounded to bf16, as in
    PyTorch's own kernel; with AVX-512 VNNI queries on int8 and int4 codes are rounded to bytes. With either,
    exponentials are good to 1e-4.

    It serves steps of one new token per sequence, without gradients, in fp32, bf16 and fp16, with no mask or a boolean
    one, from each cache of this package, and turns new tokens into int8. All else stays with PyTorch's kernels, as do
    `attn_implementation="eager"`, exported and traced programs. Written for g++ on Linux; with clang it runs
    on one thread, and on other systems it is untried.

    Raises:
        ImportError: when it cannot be compiled or loaded, or its results are wrong on this machine.
    """
    with _lock:
        if cpu_kernel_egmla.OPERATORS is not None:
            return
        if not hasattr(torch.ops.egmla, "latent_attention"):
            library = _compiled_library()
            try:
                torch.ops.load_library(library)
            except OSError as error:
                raise ImportError(
                    f"{library} cannot be loaded ({error}). Delete it and try again. {WITHOUT}"
                ) from error
            for name in ("latent_attention", "latent_attention_int8", "latent_attention_int4"):
                torch.library.register_fake(f"egmla::{name}", _shape_of_attention)
            torch.library.register_fake("egmla::write_int8", lambda *arguments: None)
        _check()
        operators: Any = torch.ops.egmla
        operators.interface = cpu_kernel_egmla.INTERFACE
        cpu_kernel_egmla.OPERATORS = operators


def _shape_of_attention(query: torch.Tensor, *arguments) -> torch.Tensor:
    """`[B, H, 1, R]`; `R` is the last argument."""
    return query.new_empty(*query.shape[:3], arguments[-1])


def _compiled_library() -> Path:
    """The shared library for this source, PyTorch and processor; compiled if it is not there yet.

    It is written under a temporary name, so that a killed compiler leaves nothing that looks done.

    Raises:
        ImportError: when it is not there and cannot be made.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    intel = platform.machine().lower() in ("x86_64", "amd64")
    native = ("-march=native", "-mprefer-vector-width=512") if intel else ("-mcpu=native",)
    torch_folder = Path(torch.__file__).parent
    options = [
        *("-O3", *native, "-ffp-contract=fast", "-fno-math-errno", "-std=c++20", "-fPIC", "-shared"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{torch_folder / 'include'}",
    ]
    if platform.system() == "Darwin":
        options += ["-undefined", "dynamic_lookup"]
    elif "clang" not in compiler[0]:  # whose OpenMP is another than PyTorch's
        options.append("-fopenmp")
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    sources = [path.read_text() for path in sorted(SOURCE.parent.iterdir()) if path.suffix in (".cpp", ".h")]
    what = [*sources, torch.__version__, *compiler, *options, _processor()]
    name = f"latent_attention-{sha256('|'.join(what).encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions") / "egmla"
        if (folder / name).is_file():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError) as error:  # the latter where there is no home folder
        raise ImportError(
            f"There is no folder for the CPU kernel ({error}); name one that can be written to in the environment "
            f"variable TORCH_EXTENSIONS_DIR. {WITHOUT}"
        ) from error
    logger.warning(f"Compiling the CPU kernel into {folder}, once for this machine; it takes about half a minute.")
    with temporary:
        made = Path(temporary.name) / name
        command = [*compiler, *options, str(SOURCE), "-o", str(made), *libraries]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ImportError(
                f"The CPU kernel needs a C++ compiler, and {compiler[0]!r} cannot be run ({error}). Install g++, or "
                f"name a compiler in the environment variable CXX. {WITHOUT}"
            ) from error
        if result.returncode:
            raise ImportError(
                f"The CPU kernel could not be compiled; {shlex.join(command)} said:\n{result.stderr.strip()[-2000:]}\n"
                f"Another compiler can be named in the environment variable CXX. {WITHOUT}"
            )
        made.replace(folder / name)
    return folder / name


def _processor() -> str:
    """What instructions the code may use: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _check() -> None:
    """Compares the kernel with PyTorch's attention, several times: threads in each other's way may not show at once.

    Raises:
        ImportError: when they differ.
    """
    generator = torch.Generator().manual_seed(0)
    operators = torch.ops.egmla
    B, scaling = 2, 0.02
    # What is left beside whole vectors; vectors in pairs, and one alone, with groups of more tokens than a block. Each
    # number of heads.
    shapes = itertools.product(
        ((41 * 76, 228, 152, 76), (20 * 48, 144, 96, 48), (12 * 80, 160, 80, 80)), (3, 6, 12, 29)
    )
    numbers = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    for (S, W, R, group), H in shapes:
        query = numbers(B, H, 1, W)
        mask = torch.rand(B, 1, 1, S, generator=generator) > 0.3
        entries = numbers(B, 1, S, W)
        matrix = rotation(R, W - R, entries.device)

        codes = torch.randint(-128, 128, (B, 1, S, W), dtype=torch.int8, generator=generator)
        scales = numbers(B, 1, S, W // group).bfloat16() / 128
        of_int8 = ElementGroups(codes, scales, S, matrix, R, torch.float32).dequantize()
        new_codes, new_scales = torch.empty_like(codes), torch.empty_like(scales)
        operators.write_int8(*entries.split([R, W - R], dim=-1), new_codes, new_scales, 0)
        # In steps: half of one is lost, and up to 1.5 where the largest are of both signs.
        steps = new_scales.float().repeat_interleave(group, dim=-1)
        written = ElementGroups(new_codes, new_scales, S, matrix, R, torch.float32).dequantize()
        off = (written - entries) @ matrix / steps

        packed = torch.randint(0, 256, (B, 1, S // group, group * W // 2), dtype=torch.uint8, generator=generator)
        factors = numbers(B, 1, S // group, 2 * W).bfloat16() / 16
        groups = entries[:, :, :0], 0, packed, factors, S // group
        of_int4 = TokenGroups(*groups, group, R).dequantize()

        rest = mask, scaling, R
        rounded, pairs = query.bfloat16(), entries.bfloat16()
        for found, expected, tolerance in (
            (operators.latent_attention(query, entries, *rest), _attention(query, entries, *rest), TOLERANCE),
            (operators.latent_attention(rounded, pairs, *rest), _attention(rounded, pairs, *rest), ROUNDED_TOLERANCE),
            (
                operators.latent_attention_int8(query, codes, scales, S, *rest),
                _attention(query, of_int8, *rest),
                ROUNDED_TOLERANCE,
            ),
            (
                operators.latent_attention_int4(query, *groups, *rest),
                _attention(query, of_int4, *rest),
                ROUNDED_TOLERANCE,
            ),
            (off, torch.zeros(()), 1.6),
            (off.abs().mean(), torch.tensor(0.25), 0.05),  # codes are the nearest ones
        ):
            difference = (found - expected).abs().max().item()
            if not difference < tolerance:
                raise ImportError(
                    f"The CPU kernel is wrong on this machine: its results differ by {difference:.1e} from PyTorch's, "
                    f"by more than {tolerance}, so it is not used. Please report processor and compiler. {WITHOUT}"
                )


def _attention(
    query: torch.Tensor, entries: torch.Tensor, mask: torch.Tensor, scaling: float, rank: int
) -> torch.Tensor:
    """What the operators give, in fp32 and by definition; each sequence sees something."""
    scores = (query.float() @ entries.float().mT * scaling).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ entries[..., :rank].float()
