"""Records for reports: versions, commit, hash of weights, public names, peak memory."""

import hashlib
import subprocess
from importlib.metadata import version

import pytest
import torch

from egmla.utils import provenance


def test_versions_of_installed_packages_only():
    found = provenance.software_versions("pytest", "no-such-package")
    assert found["torch"] == version("torch") and found["pytest"] == version("pytest")
    assert "no-such-package" not in found


def test_the_machine_as_far_as_it_changes_rounding():
    found = provenance.machine()
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_commit_of_a_repository_and_of_none(tmp_path, monkeypatch):
    module = tmp_path / "package" / "provenance.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.source_commit() is None

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    # A repository that holds an installed copy is not this package's.
    git("commit", "-q", "--allow-empty", "-m", "another project")
    assert provenance.source_commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert provenance.source_commit() == git("rev-parse", "HEAD")
    module.write_text("changed = True\n")
    assert provenance.source_commit() == git("rev-parse", "HEAD") + "+changes"


def test_hash_of_weights_counts_names_and_bytes(tmp_path, monkeypatch):
    assert provenance.weights_sha256(tmp_path) is None
    files = {"model-00001-of-00002.safetensors": b"first", "model-00002-of-00002.safetensors": b"second one"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    expected = hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
    assert provenance.weights_sha256(tmp_path) == expected
    monkeypatch.setattr(provenance, "HASH_BLOCK", 3)
    assert provenance.weights_sha256(tmp_path) == expected
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "model-2.safetensors")
    assert provenance.weights_sha256(tmp_path) != expected


def test_public_names(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    assert provenance.public_name(str(tmp_path / "mine")) == "mine"
    assert provenance.public_name("owner/model") == "owner/model"
    monkeypatch.chdir(tmp_path / "mine")
    assert provenance.public_name(".") == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert provenance.public_name(str(tmp_path / "link")) == "link"


def test_peak_memory_without_proc(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("peak memory is the GPU's here")

    def refuse():
        raise OSError

    before = provenance.peak_bytes()
    monkeypatch.setattr(provenance, "peak_resident_bytes", refuse)
    # The system's other counter starts at the parent's peak.
    assert provenance.peak_bytes() >= before // 2 > 2**20
