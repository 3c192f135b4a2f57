"""JSON files: read with a remedy, written atomically, and paths checked before work."""

import json
import os

import pytest

from egmla.utils import files
from egmla.utils.files import check_writable, read_json, write_json, write_text


def test_json_round_trip_creates_the_folder(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_json(path, {"name": "Zürich", "broken": "\udce9", "values": [1, 2.5, None]})
    assert read_json(path) == {"name": "Zürich", "broken": "\udce9", "values": [1, 2.5, None]}
    assert path.read_text().endswith("}\n")
    assert os.listdir(path.parent) == ["report.json"]


def test_values_that_json_lacks(tmp_path):
    write_json(tmp_path / "a.json", {"names": {"one"}}, default=sorted)
    assert json.loads((tmp_path / "a.json").read_text()) == {"names": ["one"]}
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        write_json(tmp_path / "a.json", {"names": {"two"}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"names": ["one"]}


def test_an_interruption_leaves_the_earlier_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "earlier")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "later")
    assert (tmp_path / "a.txt").read_text() == "earlier"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("text", "reason"), [("{", "is no valid JSON"), ("[1]", "must hold a JSON object")])
def test_broken_json_names_the_file_and_the_remedy(tmp_path, text, reason):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.json {reason}.*; download it again\."):
        read_json(path, "download it again")


def test_paths_are_checked_before_work(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "file.json")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file")
    with pytest.raises(PermissionError, match="is no folder with write permission"):
        check_writable(tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written"):
            check_writable(tmp_path / "file")
    finally:
        tmp_path.chmod(0o700)
