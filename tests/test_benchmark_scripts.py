"""Scripts in tests/benchmarks: each imports what it needs and describes its options."""

import runpy
import sys
from pathlib import Path

import pytest


SCRIPTS = sorted(Path(__file__).parent.joinpath("benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(script, monkeypatch, capsys):
    """In this process: importing PyTorch and Transformers again for each script would take minutes."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))  # scripts import each other
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    assert done.value.code == 0
    assert output.startswith(f"usage: {script.name}") and "--" in output.partition("options:")[2]


def test_documented_commands_name_scripts_that_exist():
    """Every script in a command of the benchmarks' documents exists, and every script is in one of them."""
    documents = [*Path(__file__).parent.joinpath("benchmarks").glob("*.md")]
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents)
    named = {word.rsplit("/", 1)[1] for word in text.replace("`", " ").split() if word.startswith("tests/benchmarks/")}
    scripts = {script.name for script in SCRIPTS}
    kernel = {"cpu_kernel.py", "decode_slope.py"}  # documented in the kernel's log
    assert {name for name in named if name.endswith(".py")} == scripts - kernel
