"""`--device` of the commands that compute: a device that is not there is an error before any work."""

import pytest
from typer.testing import CliRunner

from egmla.commands import app


COMMANDS = {
    "bench": ["egmla-kv64-120m", "--output", "out"],
    "compare": ["source", "model", "--tasks", "egmla_quick", "--output", "out"],
    "convert": ["source", "out", "--exact"],
    "demo": ["--output", "out"],
    "eval": ["model", "--tasks", "egmla_quick"],
    "generate": ["me/model", "--prompt", "x"],
    "sweep": ["source", "out", "--cache", "0.5", "--calibration", "a.txt", "--evaluate", "b.txt"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "message"), [("cuda:99", "PyTorch sees"), ("gpu", "must be auto, cpu, cuda")])
def test_a_device_that_is_not_there(command, name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, *COMMANDS[command], "--device", name])
    assert result.exit_code == 1
    assert f"Error: --device {name}: {message}" in result.stderr
    assert not list(tmp_path.iterdir())
