"""Compiling, checking and loading the CPU kernel."""

import importlib.util
import subprocess

import pytest
import torch
from cases import needs_compiler

from egmla import cpu_egmla, load_cpu_kernel
from egmla.cpu_kernel import build, self_check


pytestmark = needs_compiler


def test_the_library_is_compiled_once(folder, monkeypatch):
    (library,) = folder.iterdir()  # and no incomplete file

    def refuse(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder.parent))
    monkeypatch.setattr(subprocess, "run", refuse)
    assert build.compiled_library() == library
    monkeypatch.setattr(build, "processor", lambda: "another")
    with pytest.raises(AssertionError, match="compiled again"):
        build.compiled_library()


@pytest.mark.parametrize(
    "compiler, message",
    [
        ("no-such-compiler", "needs a C\\+\\+ compiler, and 'no-such-compiler' cannot be run"),
        ("false", "not be compiled"),
    ],
)
def test_no_compiler(folder, tmp_path, monkeypatch, compiler, message):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(
        ImportError, match="(?s)" + message + ".*in the environment variable CXX.*Without the kernel everything"
    ):
        build.compiled_library()
    assert not list((tmp_path / "egmla").iterdir())


@pytest.mark.parametrize("place", ["no home", "a file"])
def test_no_folder_to_compile_into(folder, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "" if place == "no home" else str(tmp_path / "file"))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", no_home)
    with pytest.raises(ImportError, match=r"no folder .*TORCH_EXTENSIONS_DIR\. Without the kernel everything"):
        build.compiled_library()


def test_a_damaged_library_is_named(folder, loaded_python, tmp_path):
    """In a process that has not loaded the library. The message says to delete it."""
    (library,) = folder.iterdir()
    (tmp_path / "egmla").mkdir()
    (tmp_path / "egmla" / library.name).write_bytes(b"not a library")
    code = "from egmla import load_cpu_kernel; load_cpu_kernel()"
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = loaded_python.run(code, env=environment)
    assert "ImportError" in done.stderr and f"{library.name} cannot be loaded" in done.stderr
    assert "Delete it and try again" in done.stderr


def test_wrong_results_keep_the_kernel_off(folder, monkeypatch):
    monkeypatch.setattr(torch.ops.egmla, "interface", None)
    monkeypatch.setattr(cpu_egmla, "OPERATORS", None)
    monkeypatch.setattr(self_check, "TOLERANCE", 0.0)
    with pytest.raises(ImportError, match=r"wrong on this machine.*differ by .*it is not used"):
        load_cpu_kernel()
    assert cpu_egmla.OPERATORS is None
    assert copy_of_the_code().cpu_operators() is None


def test_code_of_a_checkpoint_finds_the_kernel(folder, monkeypatch):
    assert copy_of_the_code().cpu_operators() is torch.ops.egmla
    monkeypatch.setattr(torch.ops.egmla, "interface", cpu_egmla.INTERFACE + 1)  # another version
    assert copy_of_the_code().cpu_operators() is None


def copy_of_the_code():
    """Return a copy of the module, as `trust_remote_code` makes one."""
    specification = importlib.util.spec_from_file_location("copy_of_it", cpu_egmla.__file__)
    copy = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copy)
    return copy


def test_the_command_line_switches_the_kernel_on(folder, loaded_python):
    """In a process of its own. Without a compiler the command fails before it does anything else."""
    environment = {"TORCH_EXTENSIONS_DIR": str(folder.parent), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    environment |= {"OMP_NUM_THREADS": "1"}
    code = "import runpy; runpy.run_module('egmla', run_name='__main__', alter_sys=True)"
    command = [code, "--cpu-kernel", "presets"]
    done = loaded_python.run(*command, env=environment)
    assert done.returncode == 0, done.stderr
    environment |= {"CXX": "no-such-compiler"}
    done = loaded_python.run(*command, env=environment)
    assert done.returncode and "no-such-compiler" in done.stderr and "Traceback" not in done.stderr
