"""Processes of their own without the seconds that importing Transformers takes: forks of one that has done it.

`LoadedPython(python)` starts a server: that Python, with torch and Transformers imported, and nothing of this package.
Each `run` and `start` forks it, gives the fork its environment, folder, arguments and streams, and runs code there as
`python -c` does. Tests of how Python starts, or of variables that libraries read when they are imported, use
`subprocess` instead.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class Child:
    """A fork: what tests use of `subprocess.Popen`.

    Args:
        connection (`socket.socket`): to the server, which sends the process id, and later the exit code.
        stdout: a text stream of what the fork prints, or `None`.
    """

    def __init__(self, connection: socket.socket, stdout=None):
        self.connection, self.stdout = connection, stdout
        self.pid = self._number()
        self.returncode: int | None = None

    def _number(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            received = self.connection.recv(1)
            assert received, "the process that forks has ended"
            line += received
        return int(line)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._number()
            self.connection.close()
            if self.stdout:
                self.stdout.close()
        return self.returncode


class LoadedPython:
    """A server, and its client.

    Args:
        python: the interpreter; this one by default.
    """

    def __init__(self, python: str | Path = sys.executable):
        self.folder = tempfile.TemporaryDirectory(prefix="loaded-python-")
        self.path = os.path.join(self.folder.name, "socket")  # in a short folder: addresses have 108 bytes at most
        # Transformers reads this when it is imported: code of checkpoints goes there, not to the user's cache.
        environment = {**os.environ, "HF_MODULES_CACHE": os.path.join(self.folder.name, "modules")}
        command = [str(python), "-P", __file__, self.path]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.server.stdout is not None and self.server.stdout.readline() == "ready\n"

    def start(self, code: str, *arguments, **options) -> Child:
        """Run code in a fork, whose prints are read from `stdout`; its errors are dropped."""
        read, write = os.pipe()
        with open(write, "wb") as stdout, open(os.devnull, "wb") as stderr:
            return Child(self._fork(code, arguments, stdout, stderr, **options), open(read))

    def run(self, code: str, *arguments, check: bool = False, **options) -> subprocess.CompletedProcess:
        """Run code in a fork to its end, 10 minutes at most. `env`, `cwd` and `check` are as in `subprocess.run`."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            child = Child(self._fork(code, arguments, stdout, stderr, **options))
            try:
                returncode = child.wait(timeout=600)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
            printed = []
            for stream in (stdout, stderr):
                stream.seek(0)
                printed.append(stream.read())
        done = subprocess.CompletedProcess(code, returncode, *printed)
        if check:
            assert returncode == 0, done.stderr[-4000:]
        return done

    def _fork(self, code: str, arguments, stdout, stderr, env=None, cwd=None) -> socket.socket:
        arguments = ["-c", *map(str, arguments)]
        request = {"code": code, "argv": arguments, "env": dict(env or os.environ), "cwd": str(cwd or os.getcwd())}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        socket.send_fds(connection, [b"."], [stdout.fileno(), stderr.fileno()])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        return connection

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()
        self.server.stdout.close()
        self.folder.cleanup()


def serve(path: str) -> None:
    """Answer requests until terminated: a process for each, which forks and waits for its fork."""
    # Names, not modules: Transformers imports what stands behind them when they are first asked for.
    import torch
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationMixin,
        LlamaForCausalLM,
        PreTrainedModel,
        Trainer,
    )

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the first of the two processes
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
            os._exit(0)
        connection.close()


def answer(connection: socket.socket) -> None:
    _, streams, _, _ = socket.recv_fds(connection, 1, 2)
    request = json.loads(connection.makefile("rb").read())
    pid = os.fork()
    if pid == 0:
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        for descriptor in (*streams, connection.fileno()):
            os.close(descriptor)
        os._exit(run_code(request))
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{code}\n".encode())


def run_code(request: dict) -> int:
    """Run the code as `__main__`, and return the exit code that Python would end with."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.path[:0] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(request["code"], "<string>", "exec"), main.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
