"""How the command line starts: without PyTorch where nothing is computed, and with the model registered elsewhere."""

import os
import re
import subprocess
import sys

import pytest

import egmla


SCRIPT = ["-c", "from egmla_command import main; main()"]  # what the console script does
MODULE = ["-m", "egmla"]
SLOW_IMPORTS = {"torch", "transformers", "huggingface_hub", "numpy"}


def start(*arguments: str, **environment: str) -> tuple[str, set[str]]:
    """Run Python and return what it printed and the names of all modules it imported."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, **environment},
    )
    return result.stdout, set(re.findall(r"^import time: .*\|\s*(\S+)$", result.stderr, re.MULTILINE))


@pytest.mark.parametrize("form", [SCRIPT, MODULE], ids=["script", "module"])
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(("--help",), "convert"), (("--version",), f"egmla {egmla.__version__}"), (("heal", "--help"), "--tokens")],
    ids=["help", "version", "help of a command"],
)
def test_help_and_version_do_without_pytorch(form, arguments, shown):
    printed, imported = start(*form, *arguments)
    assert shown in printed
    assert "typer" in imported  # the listing was read
    assert not imported & SLOW_IMPORTS


@pytest.mark.parametrize(
    ("before", "arguments", "starts"),
    [
        (["-m", "egmla"], ["heal", "--help"], True),
        (["-m", "egmla"], ["-m", "other"], True),
        (["-megmla"], ["egmla"], True),
        (["-Bm", "egmla"], [], True),
        (["-X", "dev", "-Bmegmla"], ["--help"], True),
        (["-megmla.evaluation.lm_eval"], ["egmla"], False),
        (["-m", "egmla.evaluation.lm_eval"], ["-m", "egmla"], False),
        (["-m", "pytest"], ["-m", "egmla"], False),
    ],
)
def test_the_module_that_runs_is_told_from_its_arguments(before, arguments, starts, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", *before, *arguments])
    monkeypatch.setattr(sys, "argv", ["-m", *arguments])  # as it is while Python looks up the module
    assert egmla._command_line_starts() == starts


def test_an_argv_that_somebody_changed_is_no_start(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", [])
    monkeypatch.setattr(sys, "argv", ["-m", "egmla"])
    assert not egmla._command_line_starts()


def test_module_and_option_in_one_word_do_without_pytorch():
    printed, imported = start("-megmla", "heal", "--help")
    assert "--tokens" in printed
    assert not imported & SLOW_IMPORTS


def test_completion_does_without_pytorch():
    completion = {"_EGMLA_COMPLETE": "complete_bash", "COMP_WORDS": "egmla pres", "COMP_CWORD": "1"}
    wrapper = "import sys; sys.argv[0] = 'egmla'; from egmla_command import main; main()"
    printed, imported = start("-c", wrapper, **completion)
    assert printed.split() == ["presets"]
    assert not imported & SLOW_IMPORTS


@pytest.mark.parametrize("form", [SCRIPT, MODULE], ids=["script", "module"])
def test_a_command_registers_the_model(form, tmp_path):
    egmla.configuration_egmla.EGMLAConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    printed, imported = start(*form, "inspect", str(tmp_path))
    assert "EGMLAForCausalLM" in printed
    assert "torch" in imported


@pytest.mark.parametrize("before", ["", "import egmla_command\n"], ids=["alone", "beside the entry point"])
def test_import_registers_the_model(before, loaded_python):
    """A process started by the command line imports the entry point too; it runs no command and needs the model."""
    code = f"{before}import egmla, transformers\nprint(type(transformers.AutoConfig.for_model('egmla')).__name__)"
    assert loaded_python.run(code, check=True).stdout.split() == ["EGMLAConfig"]


def test_public_names_are_reached_from_the_command_line():
    code = (
        "import egmla_command\negmla_command.starting = True\nimport egmla, sys\nassert 'torch' not in sys.modules\n"
    )
    code += "for name in egmla.__all__: print(getattr(egmla, name).__name__)\nassert not hasattr(egmla, 'nothing')"
    assert start("-c", code)[0].split() == egmla.__all__
