"""Send a checkpoint folder to the Hub as one commit. The branch changes only when all files have arrived."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from egmla.model_cards.metadata import check_repo_id
from egmla.utils.provenance import CONVERSION_FIGURE, CONVERSION_REPORT, TRAINING_REPORT

from .loading import check_loads_without_package
from .preflight import FolderReport, check_folder


DEFAULT_MESSAGE = "Upload EG-MLA model"
# Files of an earlier push that this push removes: old shards would be loaded in place of the new ones, and old scores
# and reports would be taken for the new model's.
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")
REPORTS = {CONVERSION_REPORT, CONVERSION_FIGURE, TRAINING_REPORT} | {
    f"evaluation/{name}" for name in ("results.json", "source_results.json", "comparison.json", "scores.png")
}
HASH_BLOCK = 2**20


@dataclass
class PushedFile:
    """One file of the commit.

    Args:
        path (`str`): in the repository.
        size (`int`): bytes.
        state (`str`): `"new"`, `"changed"`, `"unchanged"`, `"unknown"` (the Hub was not asked) or `"stale"` (removed
            from the repository). After a real push, files are `"stale"` or `"sent"`.
    """

    path: str
    size: int
    state: str


@dataclass
class PushReport:
    """Files that were sent or, in a dry run, would be sent.

    Args:
        repo_id (`str`): the repository.
        exists (`bool`, *optional*): whether it existed before; None if the Hub was not asked (no token).
        files (`list[PushedFile]`): all files.
        left_out (`list[str]`): files of the folder that are not sent.
        warnings (`list[str]`): messages for the user.
        url (`str`): address of the repository; empty in a dry run.
        commit (`str`): hash of the commit; empty in a dry run.
        changed (`bool`): whether there was anything to commit.
    """

    repo_id: str
    exists: bool | None
    files: list[PushedFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    url: str = ""
    commit: str = ""
    changed: bool = True


@dataclass
class _Remote:
    exists: bool
    has_revision: bool = False
    head: str | None = None
    # path -> (size, hash of the content: SHA-256 for large files, git's hash for others)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    allow: Iterable[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> PushReport:
    """Check a checkpoint folder, then send it to the Hub as one commit.

    The same call resumes an interrupted upload: the Hub keeps the large files that have arrived. The branch does not
    change before the final commit.

    Args:
        folder (`str` or `Path`): the checkpoint.
        repo_id (`str`): `namespace/name`; created if it does not exist.
        private (`bool`, *optional*): visibility of a new repository.
        revision (`str`, *optional*): branch, created if it does not exist; the main branch by default.
        message (`str`, *optional*): commit message.
        dry_run (`bool`): check and compare, send nothing.
        allow (`Iterable[str]`): texts that look like a secret or a local path, but are not.
        token (`str`, *optional*): by default the token of `hf auth login` or HF_TOKEN.
        say (`Callable`): called with a message at each step.

    Raises:
        ValueError: when the folder cannot be published or the name is invalid.
        OSError: when the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    folder = Path(folder)
    check_repo_id(repo_id)
    token = token or get_token()
    if token is None and not dry_run:
        raise PermissionError(
            "There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to a token with write right "
            "(huggingface.co/settings/tokens)."
        )
    say("Checking the folder")
    checked = check_folder(folder, [token] if token else [], allow)
    api = HfApi(token=token)
    remote = None
    if token is not None:
        say("Asking the Hub for the right to write")
        with _clear_errors(repo_id):
            _check_write_right(api.whoami(), repo_id)
            remote = _read_remote(api, repo_id, revision, private)
    say("Loading the model in a clean process, without the egmla package")
    check_loads_without_package(folder)
    report = PushReport(
        repo_id, remote.exists if remote else None, left_out=checked.left_out, warnings=list(checked.warnings)
    )
    report.warnings += _other_names(folder, repo_id)
    if remote is None:
        report.warnings.append("There is no token, so the Hub was not asked what it already has.")
    stale = _stale_files(checked, remote)
    report.files = [
        PushedFile(path, size, _state(folder / path, path, size, remote) if dry_run else "sent")
        for path, size in checked.files.items()
    ] + stale
    if not dry_run:
        say("Sending")
        _send(api, folder, report, remote or _Remote(False), private, revision, message or DEFAULT_MESSAGE)
    return report


def _check_write_right(user: dict, repo_id: str) -> None:
    namespace = repo_id.split("/")[0]
    name = user.get("name")
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PermissionError(
            f"The token of {name} may only read: make one with write right (huggingface.co/settings/tokens) and use "
            "it with `hf auth login` or HF_TOKEN."
        )
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None:
        writable = {
            scope.get("entity", {}).get("name")
            for scope in scopes
            if {"repo.write", "repo.content.write"} & set(scope.get("permissions", []))
        }
        if not writable & {namespace, repo_id}:
            raise PermissionError(f"The fine-grained token of {name} has no write right on {namespace} or {repo_id}.")
    if namespace != name:
        roles = {org.get("name"): org.get("roleInOrg") for org in user.get("orgs", [])}
        if namespace not in roles or roles[namespace] == "read":
            where = [str(name), *(str(org) for org, role in roles.items() if role != "read")]
            raise PermissionError(f"{name} has no right to write to {namespace}; choose one of {', '.join(where)}.")


def _read_remote(api: Any, repo_id: str, revision: str | None, private: bool | None) -> _Remote:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return _Remote(False)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, so --private cannot be kept: make it private in its settings first, or "
            "choose another name."
        )
    remote = _Remote(True, True, info.sha)
    if revision is not None:
        try:
            remote.head = api.model_info(repo_id, revision=revision).sha
        except RevisionNotFoundError:
            remote.has_revision = False  # a new branch starts as a copy of the main branch
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision if remote.has_revision else None):
        if hasattr(entry, "blob_id"):
            remote.files[entry.path] = (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
    return remote


def _other_names(folder: Path, repo_id: str) -> list[str]:
    """Warn when the card's examples load another repository."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    others = {name for name in re.findall(r"from_pretrained\(\"([\w.-]+/[\w.-]+)\"", text) if name != repo_id}
    if not others:
        return []
    remedy = f"`egmla card {folder} --repo-id {repo_id}` writes it anew"
    return [f"README.md loads {', '.join(sorted(others))} in its examples, not {repo_id}: {remedy}."]


def _stale_files(checked: FolderReport, remote: _Remote | None) -> list[PushedFile]:
    files = remote.files.items() if remote else ()
    return [
        PushedFile(path, size, "stale")
        for path, (size, _) in files
        if (path.endswith(WEIGHT_SUFFIXES) and "/" not in path) or path in REPORTS
        if path not in checked.files
    ]


def _state(file: Path, path: str, size: int, remote: _Remote | None) -> str:
    if remote is None:
        return "unknown"
    if path not in remote.files:
        return "new"
    remote_size, name = remote.files[path]
    if size != remote_size:
        return "changed"
    # Git's hash of a file is the SHA-1 of a header and the content; large files have the SHA-256 of their content.
    digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with file.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return "unchanged" if digest.hexdigest() == name else "changed"


def _send(
    api: Any,
    folder: Path,
    report: PushReport,
    remote: _Remote,
    private: bool | None,
    revision: str | None,
    message: str,
) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id = report.repo_id
    with _clear_errors(repo_id):
        if not remote.exists:
            api.create_repo(repo_id, private=private, exist_ok=True)
    new_branch = revision not in (None, "main") and not remote.has_revision and not str(revision).startswith("refs/")
    try:
        with _clear_errors(repo_id, sending=True, created=not remote.exists):
            if new_branch:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            operations: list[Any] = [
                CommitOperationDelete(file.path)
                if file.state == "stale"
                else CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=str(folder / file.path))
                for file in report.files
            ]
            # Not upload_folder: with Xet it sends large folders as several commits. The parent commit makes a push by
            # someone else in the meantime an error, instead of a mixture of two models.
            info = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=remote.head
            )
    except BaseException:
        if new_branch:
            with contextlib.suppress(Exception):
                api.delete_branch(repo_id, branch=revision)
        raise
    report.url = f"{api.endpoint}/{repo_id}"
    report.commit = info.oid
    report.changed = info.oid != remote.head


@contextlib.contextmanager
def _clear_errors(repo_id: str, sending: bool = False, created: bool = False) -> Iterator[None]:
    """Convert the client's errors for bad answers and lost connections to an `OSError` that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)  # type: ignore[arg-type]
        again = " Run the same command again: large files that have arrived are not sent twice." if sending else ""
        for link in chain:
            if isinstance(link, HfHubHTTPError):
                status = link.response.status_code
                state = "is there, without files of yours" if created else "is as it was"
                kept = f" Nothing was committed, {repo_id} {state}.{again}" if sending else " Nothing was sent."
                detail = f" (its words: {link.server_message})" if link.server_message else ""
                raise OSError(f"{_explain(status, repo_id)}{detail}{kept}") from error
        for link in chain:
            if type(link).__module__.partition(".")[0] in ("httpx", "httpx2"):
                raise OSError(f"The connection to the Hub failed ({link}).{again}") from error
        raise


def _explain(status: int, repo_id: str) -> str:
    texts = {
        401: "the token is not valid (any more): log in again with `hf auth login`, or set HF_TOKEN",
        403: f"the token has no right to write to {repo_id}: use one with write right, or another namespace",
        404: f"it knows no {repo_id}, or this token may not see it: check the name",
        409: f"something else is changing {repo_id} at the moment",
        412: f"someone else has pushed to {repo_id} in the meantime",
        429: "too many requests, wait a while",
    }
    text = texts.get(status, "the trouble is on its side, try again later" if status >= 500 else "it refused")
    return f"The Hub answered {status}: {text}."
