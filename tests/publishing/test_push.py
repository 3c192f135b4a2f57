"""`egmla push` and `model.push_to_hub` against a local server that speaks the Hub's API to the real client."""

import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from cases import tiny_model, token_ids
from command_line import save_tokenizer
from hub_server import READ_TOKEN, TOKEN, Fault, HubServer, hub_server
from safetensors.torch import load_file, save_file

from egmla.publishing import check_folder, check_loads_without_package, check_repo_id


pytestmark = pytest.mark.long  # in front, see conftest.py


CARD = (
    "---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n\n# A tiny model\n\nLoad it from `/path/to/model`.\n"
)
REPO = "tester/tiny"

# One process with the real client serves many commands: importing it anew for each would take most of the time. It
# reads a request in a line, answers in a line. Waiting between the client's retries is skipped.
CLIENT = """
import json, os, sys, time
time.sleep = lambda seconds: None
from typer.testing import CliRunner
import egmla.publishing.push as push
from egmla.commands import app
from egmla import EGMLAForCausalLM

checks = {True: push.check_loads_without_package, False: lambda folder: {}}
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if request["token"]:
        os.environ["HF_TOKEN"] = request["token"]
    if "model" in request:
        model = EGMLAForCausalLM.from_pretrained(request["model"])
        model.push_to_hub(request["repo_id"], max_shard_size="40KB")
        answer = {}
    else:
        push.check_loads_without_package = checks[request["load"]]
        result = CliRunner(env={"COLUMNS": "300"}).invoke(app, request["arguments"])
        answer = {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
    sys.__stdout__.write("\\n" + json.dumps(answer) + "\\n")
    sys.__stdout__.flush()
"""


class Client:
    """Runs commands in a process of their own, with the server as their Hub."""

    def __init__(self, server: HubServer, home: Path):
        environment = hub_environment(server, home)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError("the client ended")

    def push(self, folder: Path, repo_id: str = REPO, *options: str, token: str | None = TOKEN, load: bool = False):
        """`egmla push`; without `load` the check in a clean process is left out."""
        arguments = ["push", str(folder), repo_id, *options]
        return self.ask(arguments=arguments, token=token, load=load)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def hub_environment(server: HubServer, home: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    return environment | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # the server speaks the older LFS protocol
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def server():
    with hub_server() as running:
        yield running


@pytest.fixture(scope="module")
def shared_client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp("hf"))
    yield client
    client.close()


@pytest.fixture
def hub(server):
    """The server, with nothing on it."""
    server.repositories.clear()
    for record in (server.faults, server.requests, server.uploads):
        record.clear()
    return server


@pytest.fixture
def client(hub, shared_client):
    return shared_client


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole checkpoint: shards, code, tokenizer, card and report."""
    folder = tmp_path_factory.mktemp("finished") / "model"
    tiny_model("table-gate").save_pretrained(folder, max_shard_size="40KB")
    save_tokenizer(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "conversion.json").write_text('{"source": {"label": "some/model"}}\n')
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "model"))


def names(folder: Path, pattern: str = "*") -> set[str]:
    return {path.name for path in folder.glob(pattern)}


# the whole way


LOAD = """
import importlib.util, json, sys
assert importlib.util.find_spec("egmla") is None, "this environment has egmla"
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

ids = torch.tensor(json.loads(sys.argv[1]))
logits = []
for repo_id in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
    with torch.no_grad():
        logits.append(model(ids).logits.tolist())
tokens = AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)("Alice")["input_ids"]
print(json.dumps({"logits": logits, "module": type(model).__module__, "tokens": tokens}))
"""


@torch.no_grad()
def test_pushed_models_load_elsewhere(hub, client, finished, clean_python, tmp_path):
    """`egmla push` and `push_to_hub`, then `from_pretrained` from the server without the package: the same logits."""
    result = client.push(finished, REPO, load=True)
    assert result["code"] == 0, result["stderr"]
    assert hub.endpoint in result["stdout"] and "Warning" not in result["stderr"]
    pushed = hub.files(REPO)
    assert {name: data for name, data in pushed.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in finished.iterdir()
    }
    assert hub.repositories[REPO].messages == ["initial commit", "Upload EG-MLA model"]

    client.ask(model=str(finished), repo_id="tester/plain", token=TOKEN)
    plain = set(hub.files("tester/plain"))
    assert names(finished, "*.py") | {"config.json", "generation_config.json", "README.md"} < plain
    assert sum(name.endswith(".safetensors") for name in plain) > 1, plain

    ids = token_ids(2, 6)
    cut = Fault("GET", r"/resolve/.*/model-00001", times=1)  # the client asks for it again
    hub.faults.append(cut)
    command = [str(clean_python), "-I", "-c", LOAD, json.dumps(ids.tolist()), REPO, "tester/plain"]
    done = subprocess.run(command, capture_output=True, text=True, env=hub_environment(hub, tmp_path), timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert cut.times == 0
    assert loaded["module"].startswith("transformers_modules.") and loaded["tokens"]
    expected = tiny_model("table-gate")(ids).logits
    for logits in loaded["logits"]:
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)


def test_server_sends_ranges(hub, client, finished):
    """What a client asks for that goes on with half a download; ours are too small for it to keep a half."""
    assert client.push(finished)["code"] == 0
    shard = sorted(finished.glob("model-*.safetensors"))[0]
    url = f"{hub.endpoint}/{REPO}/resolve/main/{shard.name}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=100-"})) as answer:
        assert answer.status == 206 and answer.read() == shard.read_bytes()[100:]
        assert answer.headers["X-Repo-Commit"] == hub.repositories[REPO].branches["main"]


def test_dry_run_lists_and_sends_nothing(hub, client, finished):
    result = client.push(finished, REPO, "--dry-run")
    assert result["code"] == 0, result["stderr"]
    for name in names(finished):
        assert name in result["stdout"]
    assert "would be created" in result["stdout"] and "new" in result["stdout"]
    assert {method for method, _ in hub.requests} == {"GET"} and not hub.repositories

    # Afterwards it tells what has changed from what the Hub already has.
    assert client.push(finished)["code"] == 0
    result = client.push(finished, REPO, "--dry-run")
    assert "nothing would be sent" in result["stdout"] and "unchanged" in result["stdout"]
    again = client.push(finished)
    assert again["code"] == 0 and "no new commit" in again["stdout"]
    assert len(hub.repositories[REPO].commits) == 2
    # Without a token the folder is still checked.
    result = client.push(finished, REPO, "--dry-run", token=None)
    assert result["code"] == 0 and "not asked" in result["stderr"] and "unknown" in result["stdout"]


def test_private_branch_and_message(hub, client, finished):
    result = client.push(finished, REPO, "--private", "--revision", "trial", "--message", "First try")
    assert result["code"] == 0, result["stderr"]
    repository = hub.repositories[REPO]
    assert repository.private and set(repository.branches) == {"main", "trial"}
    assert "model.safetensors.index.json" in hub.files(REPO, "trial") and set(hub.files(REPO)) == {".gitattributes"}
    assert repository.messages[-1] == "First try"
    repository.private = False
    result = client.push(finished, REPO, "--private")
    assert result["code"] == 1 and "exists and is public" in result["stderr"]


def test_weights_of_an_earlier_push_do_not_stay(hub, client, finished, tmp_path):
    """Old weights beside new ones could be what loads: `model.safetensors` wins over an index."""
    assert client.push(finished)["code"] == 0
    single = tmp_path / "single"
    tiny_model("table-gate").save_pretrained(single)
    result = client.push(single, REPO, "--dry-run")
    assert result["stdout"].count("remove, of an earlier push") == len(names(finished, "*.safetensors*"))
    assert client.push(single)["code"] == 0
    weights = {name for name in hub.files(REPO) if ".safetensors" in name}
    assert weights == {"model.safetensors"}
    assert "README.md" in hub.files(REPO)


# failures on the way


def test_cut_connection_then_resume(hub, client, finished):
    """What arrived before the cut is not sent again; until the end the branch does not move."""
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in finished.glob("*.safetensors")}
    assert len(shards) > 3
    hub.faults.append(Fault("PUT", "/lfs/", skip=2))
    result = client.push(finished)
    assert result["code"] == 1
    assert "connection" in result["stderr"] and "same command again" in result["stderr"]
    assert "Traceback" not in result["stderr"]
    arrived = set(hub.uploads)
    assert len(arrived) == 2 and set(hub.files(REPO)) == {".gitattributes"}

    hub.faults.clear()
    hub.uploads.clear()
    result = client.push(finished)
    assert result["code"] == 0, result["stderr"]
    assert set(hub.uploads) == shards - arrived and len(hub.uploads) == len(shards) - 2
    assert names(finished) < set(hub.files(REPO))


def test_one_cut_is_mended_by_the_client(hub, client, finished):
    hub.faults.append(Fault("PUT", "/lfs/", times=1))
    assert client.push(finished)["code"] == 0
    assert names(finished) < set(hub.files(REPO))


@pytest.mark.parametrize(
    ("method", "path", "status", "hint"),
    [
        ("GET", "whoami", 401, "log in again"),
        ("GET", "whoami", 500, "try again later"),
        ("GET", "api/models/[^/]*/[^/]*$", 403, "right"),
        ("POST", "preupload", 403, "no right to write"),
        ("POST", "preupload", 404, "check the name"),
        ("POST", "lfs/objects/batch", 401, "log in again"),
        ("PUT", "/lfs/", 403, "no right to write"),
        ("PUT", "/lfs/", 500, "try again later"),
        ("POST", "verify", 404, "check the name"),
        ("POST", "/commit/", 401, "log in again"),
        ("POST", "/commit/", 412, "someone else has pushed"),
        ("POST", "/commit/", 500, "try again later"),
    ],
)
def test_refusals_leave_the_remote_as_it_was(hub, client, finished, tmp_path, method, path, status, hint):
    small = tmp_path / "small"
    tiny_model().save_pretrained(small)
    assert client.push(small)["code"] == 0
    before, files = hub.snapshot(), hub.files(REPO)
    hub.faults.append(Fault(method, path, status))
    for options in ((), ("--revision", "trial")):
        result = client.push(finished, REPO, *options)
        assert result["code"] == 1
        assert str(status) in result["stderr"] and hint in result["stderr"], result["stderr"]
        assert "Traceback" not in result["stderr"]
        assert hub.snapshot() == before and hub.files(REPO) == files


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_creation_refused(hub, client, finished, status):
    hub.faults.append(Fault("POST", "repos/create", status))
    result = client.push(finished)
    assert result["code"] == 1 and str(status) in result["stderr"]
    assert not hub.repositories


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, REPO, "There is no token"),
        ("hf_" + "wrong" * 7, REPO, "401"),
        (READ_TOKEN, REPO, "may only read"),
        (TOKEN, "stranger/tiny", "no right to write to stranger"),
        (TOKEN, "readers/tiny", "no right to write to readers"),
    ],
)
def test_no_right_to_write(hub, client, finished, token, repo_id, message):
    """Known before the model is loaded, let alone sent."""
    result = client.push(finished, repo_id, token=token, load=True)
    assert result["code"] == 1 and message in result["stderr"]
    assert "clean process" not in result["stderr"] and not hub.repositories


# what is not fit to be sent


@pytest.mark.parametrize(
    "repo_id", ["tiny", "a/b/c", "tester/", "tester/ti ny", "tester/a--b", "tester/x.git", "./model"]
)
def test_malformed_repo_id(repo_id):
    with pytest.raises(ValueError, match=r"no repository id.*my-name/my-model"):
        check_repo_id(repo_id)


def test_malformed_repo_id_is_found_first(hub, client, finished):
    result = client.push(finished, "tiny", token=None)
    assert result["code"] == 1 and "NAMESPACE/NAME" in result["stderr"]
    assert not hub.requests


def test_does_not_load(hub, client, folder):
    """The code is there and looks right, but asks for something that others do not have."""
    code = folder / "modeling_egmla.py"
    code.write_text(code.read_text().replace("import torch\n", "import torch\nimport egmla.evaluation\n", 1))
    result = client.push(folder, load=True)
    assert result["code"] == 1 and "does not load in a clean process" in result["stderr"]
    assert "egmla" in result["stderr"] and not hub.repositories


def test_weights_that_do_not_fit_the_code(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys"):
        check_loads_without_package(folder)


def spoil_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")


def spoil_disguised_pickle(folder: Path) -> None:
    torch.save({}, folder / "state.dat")


def spoil_secret(folder: Path) -> None:
    (folder / "notes.md").write_text("nothing here\nlogin with " + "hf_" + "x1" * 17 + "\n")


def spoil_key_file(folder: Path) -> None:
    (folder / ".env").write_text("A=1\n")


def spoil_path(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/" + "someone/model"}, indent=2))


def spoil_header(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "extra.safetensors", metadata={"note": "hf_" + "abcdefghij" * 4})


def spoil_latin(folder: Path) -> None:
    (folder / "notes.txt").write_bytes("Für mich: /home/someone/models".encode("latin-1"))


def spoil_utf16(folder: Path) -> None:
    (folder / "notes.txt").write_bytes(("hf_" + "abcdefghij" * 4).encode("utf-16"))


def spoil_link(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text("mine")
    (folder / "notes.txt").symlink_to(outside)


def spoil_old_pickle(folder: Path) -> None:
    (folder / "state.dat").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=0))


def spoil_compressed(folder: Path) -> None:
    (folder / "state.gz").write_bytes(gzip.compress(b"anything"))


def spoil_any_root(folder: Path) -> None:
    (folder / "report.json").write_text('{"data": "/nowhere/usual/me"}')


def spoil_share(folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({"data": r"\\server\me\text.txt"}))


def spoil_home(folder: Path) -> None:
    (folder / "report.json").write_text('{"data": "~/private"}')


def spoil_windows_drive(folder: Path) -> None:
    (folder / "notes.md").write_text(r"It lies in D:\models\me on my machine.")


def spoil_own_path(folder: Path) -> None:
    (folder / "report.yaml").write_text(f"target: {folder}\n")


def spoil_auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))


def spoil_code(folder: Path) -> None:
    (folder / "cache_egmla.py").unlink()


def spoil_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def spoil_half_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def spoil_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def spoil_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [apache-2.0\n---\n# A model\n")


def spoil_card_results(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\nmodel-index: 7\n---\n# A model\n")


def spoil_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


REFUSALS = {
    spoil_pickle: r"safetensors.*remove pytorch_model\.bin",
    spoil_disguised_pickle: r"pickles can run code.*state\.dat",
    spoil_secret: r"notes\.md, line 2, holds a Hugging Face token",
    spoil_key_file: r"hold secrets: remove \.env",
    spoil_path: r"config\.json, line \d+, holds a path of this machine \(/home/someone",
    spoil_header: r"extra\.safetensors, line 1, holds a Hugging Face token",
    spoil_latin: r"notes\.txt, line 1, holds a path of this machine \(/home/someone",
    spoil_utf16: r"notes\.txt, line 1, holds a Hugging Face token",
    spoil_link: r"Links to files outside of the folder: replace notes\.txt",
    spoil_old_pickle: r"pickles can run code.*state\.dat",
    spoil_compressed: r"pickles can run code.*state\.gz",
    spoil_any_root: r"report\.json, line 1, holds a path of this machine \(/nowhere/usual/me",
    spoil_share: r"report\.json, line 1, holds a path of this machine",
    spoil_home: r"report\.json, line 1, holds a path of this machine \(~/private",
    spoil_windows_drive: r"notes\.md, line 1, holds a path of this machine \(D:",
    spoil_own_path: r"report\.yaml, line 1, holds a path of this machine",
    spoil_auto_map: r"auto_map in config\.json lacks AutoModel: load the folder",
    spoil_code: r"cache_egmla\.py is not there",
    spoil_shard: r"names shards that are not there: model-00001",
    spoil_half_shard: r"model-00001.* is damaged or incomplete",
    spoil_weights: r"no weights",
    spoil_card: r"README\.md are no valid card",
    spoil_card_results: r"README\.md are no valid card",
    spoil_model_type: r"EG-MLA models only",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_unfit_folder(folder, spoil):
    spoil(folder)
    with pytest.raises(ValueError, match="was not sent.*" + REFUSALS[spoil]):
        check_folder(folder)


def test_unfit_folder_is_not_sent(hub, client, folder):
    """All problems at once, exit code 1, and not one request; a secret is not repeated in the message."""
    spoil_pickle(folder)
    spoil_secret(folder)
    spoil_path(folder)
    result = client.push(folder)
    assert result["code"] == 1 and "(3)" in result["stderr"] and "x1x1" not in result["stderr"]
    assert not hub.requests


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("an AWS access key", "AKIA" + "FAKE" * 4),
        ("an AWS secret key", "aws_secret_access_key = " + "fake" * 10),
        ("a private key", "-----BEGIN " + "RSA PRIVATE KEY-----"),
        ("a GitHub token", "ghp_" + "fake" * 9),
        ("a GitLab token", "glpat-" + "fake" * 5),
        ("an API key", "sk-" + "fake" * 12),
        ("a Google API key", "AIza" + "fakes" * 7),
        ("a Slack token", "xoxb-" + "fake" * 4),
        ("a JSON web token", "eyJ" + "fake" * 4 + ".eyJ" + "fake" * 4 + "." + "fake" * 4),
        ("a password in an address", "https://someone:" + "fake@example.com/x"),
        ("the token in use", "token-" + "in-use"),
        ("a path of this machine", "saved to /mnt/" + "disk/model"),
        ("a path of this machine", "file:///Users/" + "someone/x"),
        ("a path of this machine", "C:\\\\Users\\\\" + "someone"),
    ],
)
def test_private_text(folder, kind, text):
    (folder / "notes.txt").write_text(f"first line\n{text}\n")
    with pytest.raises(ValueError, match=f"notes.txt, line 2, holds {kind}"):
        check_folder(folder, ["token-" + "in-use"])


def test_harmless_text(folder):
    """Addresses, relative paths, placeholders and vocabularies are no private text."""
    (folder / "notes.md").write_text(
        "https://example.com/home/someone/x and http://127.0.0.1:8080/data/x, /path/to/model, data/content/x,\n"
        "and/or, hf_home, hf_token, ~/models, Q: why?\\nA:\\n, risk-" + "a" * 40 + ", /home, 1/2\n"
    )
    (folder / "vocab.json").write_text(json.dumps({"/usr/local/": 1, "/home/" + "someone": 2}))
    report = check_folder(folder)
    assert not report.warnings and "notes.md" in report.files


def test_escaped_line_ends_are_no_paths(folder):
    (folder / "extra.json").write_text(json.dumps({"template": "Q:\nwhy\nA:\nso", "more": "\\n\\n", "end": "</s>"}))
    (folder / "chat.jinja").write_text("{{ 'Q:\\nwhy\\n' }}")
    check_folder(folder)


def test_what_is_allowed(folder):
    spoil_path(folder)
    (folder / "notes.md").write_text("docker run -v /data/models:/data\n")
    with pytest.raises(ValueError, match=r"notes\.md"):
        check_folder(folder, allow=["/home/someone"])
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        check_folder(folder)
    found = re.search(r"this machine \((/home/[^)]*)\)", str(refused.value))[1]
    check_folder(folder, allow=[found, "/data/models"])


def test_what_is_left_out_and_warned_of(folder):
    (folder / "README.md").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"\x00")
    (folder / ".DS_Store").write_bytes(b"\x00")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "piqa.yaml").write_text("- value: 1\n")
    report = check_folder(folder)
    assert report.left_out == [".DS_Store"] and ".eval_results/piqa.yaml" in report.files
    assert any("egmla card" in warning for warning in report.warnings)
    assert any("tokenizer" in warning for warning in report.warnings)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        check_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        check_folder(tmp_path)
