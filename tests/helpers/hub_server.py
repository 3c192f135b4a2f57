"""A small Hub for tests: a real HTTP server on 127.0.0.1 that speaks to the real huggingface_hub client.

It covers what pushing a model needs: whoami, creating a repository and a branch, validating a card, preupload, LFS
batch, upload and verification, and commits as NDJSON. Loading needs information, revisions and trees, and files with
ranges. A `Fault` makes any of it fail, or cuts the connection in the middle of an upload or download.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


# Obviously no real token, and in two pieces so that scanners of this repository do not stop at it.
TOKEN = "hf_" + "fake" * 8
READ_TOKEN = "hf_" + "read" * 8
MAX_REGULAR_BYTES = 10 * 1024**2
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Fault:
    """Answers matching requests with `status`. Without a status it cuts the connection in the middle of what is sent.

    That is the request's body if it has one, else the answer's.

    Args:
        method (`str`): such as PUT.
        path (`str`): regular expression searched in the path.
        status (`int`, *optional*): HTTP status of the answer.
        times (`int`): how many requests fail; a negative number means all.
        skip (`int`): how many matching requests pass first.
    """

    method: str
    path: str
    status: int | None = None
    times: int = -1
    skip: int = 0


@dataclass
class Repository:
    """Commits of one model: every commit is a whole tree of path -> (is_lfs, content)."""

    private: bool = False
    commits: dict[str, dict[str, tuple[bool, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)  # verified; the others wait
    waiting: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, tuple[bool, bytes]], message: str) -> str:
        """Puts a tree on a branch; returns the commit's id."""
        seed = json.dumps([len(self.commits), branch, message])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        """Commit of a branch or of a commit's id."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """The server and all it knows; `requests` and `uploads` record what clients do."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.users = {
            TOKEN: {"name": "tester", "role": "write", "orgs": [{"name": "readers", "roleInOrg": "read"}]},
            READ_TOKEN: {"name": "tester", "role": "read", "orgs": []},
        }
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of all files of a revision."""
        repository = self.repositories[repo_id]
        return {path: data for path, (_, data) in repository.commits[repository.branches[revision]].items()}

    def snapshot(self) -> dict:
        """All that clients can see: branches and commits of every repository, not the LFS objects in waiting."""
        return {name: (dict(repo.branches), list(repo.commits)) for name, repo in self.repositories.items()}

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path) and fault.times != 0:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request, client_address) -> None:
        """Connections that clients or faults cut are no news."""


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server; it stops with the block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_oid(data: bytes) -> str:
    """Name git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{NAME}/branch/(?P<revision>[^/]+)", "create_branch"),
    ("DELETE", rf"/api/models/{NAME}/branch/(?P<revision>[^/]+)", "delete_branch"),
    ("GET", rf"/api/models/{NAME}/refs", "refs"),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
    ("GET", rf"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?", "information"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", rf"/lfs/{NAME}/(?P<oid>[0-9a-f]{{64}})", "lfs_upload"),
    ("POST", rf"/lfs/{NAME}/verify", "lfs_verify"),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: the second would wait 40 ms for an answer
    server: HubServer

    def log_message(self, format, *args) -> None:
        """Tests read `requests` instead."""

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def dispatch(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        with self.server.lock:
            self.server.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.server.take_fault(self.command, path)
        self.cut = fault is not None and fault.status is None
        if self.cut and length:
            self.rfile.read(length // 2)
            self.hang_up()
            return
        self.body = self._read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else b""
        self.body += self.rfile.read(length)
        try:
            if fault is not None and not self.cut:
                code = {404: "RepoNotFound"}.get(fault.status or 0)
                raise _HubError(fault.status or 500, f"asked to fail with {fault.status}", code)
            for verb, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == method and match:
                    arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**arguments)
                    return
            raise _HubError(404, f"no such page: {path}")
        except _HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer({"error": str(error)}, error.status, headers)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        if self.cut:
            self.hang_up()

    def hang_up(self) -> None:
        """Ends the connection where it is."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    # who asks

    def user(self) -> dict | None:
        return self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def writer(self, namespace: str) -> None:
        user = self.user()
        if user is None:
            raise _HubError(401, "Invalid username or password.")
        owned = {user["name"]} | {org["name"] for org in user["orgs"] if org["roleInOrg"] != "read"}
        if user["role"] != "write" or namespace not in owned:
            raise _HubError(403, f"You don't have the rights to write to {namespace}.")

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise _HubError(401, "Invalid credentials in Authorization header")
        token = {"displayName": "test", "role": user["role"]}
        self.answer({"type": "user", "name": user["name"], "orgs": user["orgs"], "auth": {"accessToken": token}})

    def repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.user() is None):
            raise _HubError(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        return repository

    def tree_of(self, name: str, revision: str) -> tuple[str, dict[str, tuple[bool, bytes]]]:
        repository = self.repository(name)
        oid = repository.find(revision)
        if oid is None:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # repositories

    def create(self) -> None:
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or (self.user() or {}).get("name", "")
        self.writer(namespace)
        name = f"{namespace}/{wanted['name']}"
        answer = {"url": f"{self.server.endpoint}/{name}", "id": name, "name": name}
        with self.server.lock:
            if name in self.server.repositories:
                self.answer({**answer, "error": "You already created this model repo"}, 409)
                return
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            repository = self.server.repositories[name] = Repository(private=private)
            attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            repository.commit("main", {".gitattributes": (False, attributes)}, "initial commit")
        self.answer(answer)

    def create_branch(self, repo: str, revision: str) -> None:
        repository = self.repository(repo)
        self.writer(repo.split("/")[0])
        if revision in repository.branches:
            raise _HubError(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self.answer({})

    def delete_branch(self, repo: str, revision: str) -> None:
        self.writer(repo.split("/")[0])
        del self.repository(repo).branches[revision]
        self.answer({})

    def refs(self, repo: str) -> None:
        branches = self.repository(repo).branches.items()
        entries = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        self.answer({"branches": entries, "converts": [], "tags": []})

    def information(self, repo: str, revision: str = "main") -> None:
        oid, tree = self.tree_of(repo, revision)
        private = self.repository(repo).private
        siblings = [{"rfilename": path} for path in tree]
        self.answer({"_id": "0", "id": repo, "sha": oid, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        _, tree = self.tree_of(repo, revision)
        inside = {name: entry for name, entry in tree.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise _HubError(404, f"{path} does not exist", "EntryNotFound")
        entries = []
        for name, (is_lfs, data) in inside.items():
            entry: dict = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            if is_lfs:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.answer(entries)

    # uploads

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            yaml.safe_load(block.group(1) if block else "")
        except yaml.YAMLError as error:
            self.answer({"errors": [{"message": str(error)}]}, 400)
            return
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        _, tree = self.tree_of(repo, revision)
        self.writer(repo.split("/")[0])
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > MAX_REGULAR_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in tree:
                is_lfs, data = tree[file["path"]]
                answer["oid"] = hashlib.sha256(data).hexdigest() if is_lfs else git_oid(data)
            answers.append(answer)
        self.answer({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        repository = self.repository(repo)
        self.writer(repo.split("/")[0])
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.lfs:
                base = f"{self.server.endpoint}/lfs/{repo}"
                header = {"Authorization": self.headers["Authorization"]}
                answer["actions"] = {
                    "upload": {"href": f"{base}/{wanted['oid']}", "header": header},
                    "verify": {"href": f"{base}/verify", "header": header},
                }
            objects.append(answer)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, repo: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _HubError(400, "the content is not what its name says")
        with self.server.lock:
            self.server.repositories[repo].waiting[oid] = self.body
            self.server.uploads.append(oid)
        self.answer({})

    def lfs_verify(self, repo: str) -> None:
        wanted = json.loads(self.body)
        repository = self.repository(repo)
        if len(repository.waiting.get(wanted["oid"], b"")) != wanted["size"]:
            raise _HubError(404, "Object does not exist")
        repository.lfs[wanted["oid"]] = repository.waiting.pop(wanted["oid"])
        self.answer({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        repository = self.repository(repo)
        self.writer(repo.split("/")[0])
        parent, tree = self.tree_of(repo, revision)
        tree, message = dict(tree), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise _HubError(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                tree[value["path"]] = (False, base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in repository.lfs:
                    raise _HubError(400, f"{value['path']} was never uploaded")
                tree[value["path"]] = (True, repository.lfs[value["oid"]])
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                raise _HubError(400, f"unknown operation {line['key']}")
        with self.server.lock:
            oid = repository.commit(revision, tree, message)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}"})

    # downloads

    def resolve(self, repo: str, revision: str, path: str) -> None:
        oid, tree = self.tree_of(repo, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in tree:
            # The client reads the commit also where a file is missing, to remember that it is.
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"{path} does not exist"}
            self.answer({"error": "Entry not found"}, 404, headers)
            return
        is_lfs, data = tree[path]
        # The Hub sends large files from another host after a redirect; the client reads the same headers either way.
        self.send_file(data, hashlib.sha256(data).hexdigest() if is_lfs else git_oid(data), headers)

    def send_file(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | headers
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self.answer(data, 200, headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        part = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        self.answer(part, 206, headers)
