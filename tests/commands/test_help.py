"""Help of all commands: options in groups, examples that parse, defaults, and nothing cut at 80 columns."""

import shlex
import textwrap

import pytest
import typer
from typer.testing import CliRunner

from egmla.commands import app
from egmla.commands.command import group_of
from egmla.commands.help_texts import EXAMPLES, GROUP_OF


GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
RUN_YAML = {
    "convert": "source: a\ntarget: b\nexact: true\n",
    "heal": "data: text.txt\ntokens: 5M\n",
}


def shown(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*arguments, "--help"], prog_name="egmla")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    return result.stdout


def letters(text: str) -> str:
    """A text without white space: wrapping changes nothing else."""
    return "".join(text.split())


def options(command: str):
    return [param for param in GROUP.commands[command].params if param.param_type_name == "option"]


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_cut_at_80_columns(command):
    text = letters(shown(command))
    assert letters(GROUP.commands[command].help) in text
    for param in GROUP.commands[command].params:
        assert letters(param.help) in text
        names = param.opts if param.param_type_name == "option" else [param.metavar or param.name]
        assert all(name in text for name in map(letters, names))


def test_the_list_of_commands_shows_whole_sentences():
    text = letters(shown())
    for name, command in GROUP.commands.items():
        assert letters(f"{name} {command.help.splitlines()[0]}") in text


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_in_groups(command):
    headings = [line.rstrip(":") for line in shown(command).splitlines() if line.endswith(":") and line[0] != " "]
    assert len(headings) == len(set(headings))
    for param in options(command):
        groups = {GROUP_OF[name] for name in param.opts if name in GROUP_OF}
        assert len(groups) == 1, f"{param.opts} has no group in help_texts.py"
        assert group_of(command, param) in headings
    assert "Options" not in headings and headings[-1] == "Examples"


def test_an_option_that_is_another_one_in_a_command():
    """`heal --temperature` divides the logits of the loss; nothing is generated."""
    group = shown("heal").partition("Teacher and loss:")[2].partition("Training:")[0]
    assert "--temperature" in group and "Generation:" not in shown("heal")
    assert "--temperature" in shown("generate").partition("Generation:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_shown(command):
    text = letters(shown(command))
    defaults = [param.default for param in options(command) if param.default not in (None, False, True, [])]
    for default in defaults:
        assert letters(f"default: {default}") in text


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_YAML.get(command, "{}"))
    lines = textwrap.dedent(EXAMPLES[command]).replace("\\\n", "").strip().splitlines()
    assert lines and letters(EXAMPLES[command]) in letters(shown(command))
    for line in lines:
        program, name, *arguments = shlex.split(line)
        assert (program, name) == ("egmla", command)
        GROUP.commands[command].make_context(command, arguments)
