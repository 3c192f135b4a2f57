"""What the source archive and the wheel hold, and that the wheel works in an environment of its own."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {name for name in listed.stdout.split("\n") if name and (REPOSITORY / name).is_file()}


@pytest.fixture(scope="module")
def archives(tracked, tmp_path_factory) -> dict[str, Path]:
    """Source archive and wheel, built from a copy of the tracked files."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    # The backend changes sys.argv.
    build = "import sys; from setuptools import build_meta as backend; target = sys.argv[1]\n"
    build += "backend.build_sdist(target)\nbackend.build_wheel(target)"
    result = subprocess.run([sys.executable, "-c", build, target], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def test_source_archive_holds_every_tracked_file(archives, tracked):
    with tarfile.open(archives["sdist"]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked if not name.startswith(".git")} <= held


def test_wheel_holds_the_package_alone(archives, tracked):
    with zipfile.ZipFile(archives["wheel"]) as archive:
        held = set(archive.namelist())
        metadata = archive.read(next(name for name in held if name.endswith("/METADATA"))).decode()
    modules = {name for name in tracked if name.endswith(".py")}
    for folder in ("configuration/", "conversion/", "model_cards/"):
        assert {f"egmla/{name}" for name in modules if name.startswith(folder)} <= held
    entry_point = "modeling_egmla/entry_point/"
    of_package = {name for name in modules if name.startswith("modeling_egmla/") and not name.startswith(entry_point)}
    assert {name[len("modeling_") :] for name in of_package} <= held
    assert "egmla_command/__init__.py" in held and not any(name.startswith("egmla/entry_point/") for name in held)
    assert {name.split("/")[0] for name in held if "dist-info" not in name} == {"egmla", "egmla_command"}
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert any(name.endswith("licenses/modeling_egmla/samples/README.md") for name in held)
    for line in (
        "Requires-Python: >=3.11",
        "Project-URL: Paper",
        "Classifier: Programming Language :: Python :: 3.11",
    ):
        assert line in metadata


def test_wheel_works_alone(archives, loaded_clean_python, tmp_path):
    with zipfile.ZipFile(archives["wheel"]) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    code = "from egmla_command import main; main()"
    for arguments, shown in ((["--help"], "convert"), (["presets"], "egmla-kv64-120m")):
        result = loaded_clean_python.run(code, *arguments, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert shown in result.stdout
