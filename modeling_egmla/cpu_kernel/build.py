# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Compile `csrc/latent_attention.cpp` once per machine into PyTorch's folder of extensions."""

import os
import platform
import shlex
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "latent_attention.cpp"
WITHOUT = "Without the kernel everything works, slower."


def compiled_library() -> Path:
    """Return the shared library for this source, PyTorch and processor. Compile it if it does not exist.

    The compiler writes to a temporary folder, and the result is moved atomically. A killed compiler leaves nothing
    that looks complete.

    Raises:
        ImportError: if the library does not exist and cannot be made.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    options = _compiler_options(compiler)
    sources = [path.read_text() for path in sorted(SOURCE.parent.iterdir()) if path.suffix in (".cpp", ".h")]
    identity = [*sources, torch.__version__, *compiler, *options, processor()]
    name = f"latent_attention-{sha256('|'.join(identity).encode()).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions") / "egmla"
        if (folder / name).is_file():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise ImportError(
            f"There is no folder for the CPU kernel ({error}); name one that can be written to in the environment "
            f"variable TORCH_EXTENSIONS_DIR. {WITHOUT}"
        ) from error
    logger.warning(f"Compiling the CPU kernel into {folder}, once for this machine; it takes about half a minute.")
    with temporary:
        made = Path(temporary.name) / name
        _compile(compiler, options, made)
        made.replace(folder / name)
    return folder / name


def _compiler_options(compiler: list[str]) -> list[str]:
    """Return the options for this processor, system and PyTorch."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    native = ("-march=native", "-mprefer-vector-width=512") if x86 else ("-mcpu=native",)
    options = [
        *("-O3", *native, "-ffp-contract=fast", "-fno-math-errno", "-std=c++20", "-fPIC", "-shared"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{Path(torch.__file__).parent / 'include'}",
    ]
    if platform.system() == "Darwin":
        options += ["-undefined", "dynamic_lookup"]
    elif "clang" not in compiler[0]:  # clang's OpenMP differs from PyTorch's
        options.append("-fopenmp")
    return options


def _compile(compiler: list[str], options: list[str], target: Path) -> None:
    """Run the compiler.

    Raises:
        ImportError: if the compiler cannot be run, or reports an error.
    """
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [*compiler, *options, str(SOURCE), "-o", str(target), *libraries]
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


def processor() -> str:
    """Return the processor's model and instruction sets: machines of several kinds may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
