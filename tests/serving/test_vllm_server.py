"""vLLM's OpenAI server on an EG-MLA folder, in a process of its own, asked by the real client from many threads."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import make_tokenizer
from serving import expected, saved_model


MODEL = "tiny"
START_SECONDS = 300
AS_IT_IS = {"ignore_eos": True, "skip_special_tokens": False}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class Server:
    """vLLM's server on a free port of the loopback address."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "16"]
        self.log = (folder / "server.log").open("a+", encoding="utf-8")
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=environment, start_new_session=True, cwd=folder
        )

    def wait(self) -> None:
        """Wait until the server answers."""
        for _ in range(START_SECONDS):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            time.sleep(1)
        self.stop()
        self.log.seek(0)
        raise AssertionError(f"the server did not start:\n{self.log.read()[-3000:]}")

    def client(self):
        """A client as users have it."""
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def stop(self, kind: signal.Signals = signal.SIGTERM) -> None:
        """End the server and the engine's process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = saved_model(folder, "table-gate", vocab_size=128)
    tokenizer.save_pretrained(folder)
    server = Server(folder)
    server.wait()
    yield server, model, folder
    server.stop()


def some_prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 60 random ids."""
    draw = random.Random(0)
    return [[draw.randint(3, 120) for _ in range(draw.randint(1, 60))] for _ in range(count)]


def ask(client, ids: list[int], stream: bool, tokens: int = 8) -> tuple[str, list[float]]:
    """The text and the log-probabilities of a greedy answer."""
    answer = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=tokens, temperature=0, logprobs=1, stream=stream, extra_body=AS_IT_IS
    )
    if not stream:
        return answer.choices[0].text, answer.choices[0].logprobs.token_logprobs
    text, logprobs = "", []
    for event in answer:
        for choice in event.choices:
            text += choice.text
            logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
    return text, logprobs


def assert_answers(model, client, given) -> None:
    tokenizer = make_tokenizer()
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda job: ask(client, job[1], stream=job[0] % 2 == 0), enumerate(given)))
    for ids, (text, logprobs) in zip(given, answers, strict=True):
        right, right_logprobs = expected(model, ids, 8)
        assert text.replace(" ", "") == tokenizer.decode(right).replace(" ", "")
        assert float((torch.tensor(logprobs) - right_logprobs).abs().max()) <= 1e-4


def test_hundred_requests_from_twelve_threads(served):
    server, model, _ = served
    assert_answers(model, server.client(), some_prompts(100))


def test_chat_and_stop_words(served):
    """The chat template is the folder's; an answer ends before a stop word."""
    server, model, _ = served
    client, content = server.client(), "What is it?"
    message = {"role": "user", "content": content}
    settings = {"model": MODEL, "messages": [message], "max_tokens": 8, "temperature": 0, "extra_body": AS_IT_IS}
    right = make_tokenizer().decode(expected(model, [ord(letter) for letter in content], 8)[0])
    whole = client.chat.completions.create(**settings).choices[0].message.content
    assert whole.replace(" ", "") == right.replace(" ", "")
    word = whole[-1]
    stopped = client.chat.completions.create(**settings, stop=[word]).choices[0]
    assert stopped.message.content == whole.partition(word)[0] and stopped.finish_reason == "stop"


def test_bad_requests_leave_the_server_as_it_was(served):
    """A prompt beyond the context, a malformed request, and a client that hangs up while its answer streams."""
    import openai

    server, model, _ = served
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="128"):
        client.completions.create(model=MODEL, prompt=[5] * 200, max_tokens=8)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[5], max_tokens=8, temperature=-3)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt=[5], max_tokens=8)
    stream = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    assert_answers(model, client, some_prompts(5))


def test_killed_in_the_middle(served):
    """A server killed while it answers gives the same answers after it is started again."""
    _, model, folder = served
    server = Server(folder)
    server.wait()
    stream = server.client().completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=100, stream=True)
    next(iter(stream))
    server.stop(signal.SIGKILL)
    again = Server(folder)
    try:
        again.wait()
        assert_answers(model, again.client(), some_prompts(5))
    finally:
        again.stop()
