"""Tensor parallelism on two processes: heads are split, latents are held by both."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from serving import assert_served_as_by_transformers, prompts, saved_model


SCRIPT = """
import json, sys
from serving import engine, serve

if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    with engine(sys.argv[1], tensor_parallel_size=2, distributed_executor_backend="mp") as served:
        print(json.dumps([(ids, logprobs.tolist()) for ids, logprobs, _ in serve(served, given)]), flush=True)
"""
TIME_LIMIT = 420


@pytest.mark.parametrize("case", ["rank-per-layer", "encoder, normed queries"])
def test_two_processes(case, tmp_path):
    model, given = saved_model(tmp_path, case), prompts(5, 17, 40)
    script = tmp_path / "serve_on_two.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(script), str(tmp_path), json.dumps(given)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=TIME_LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):  # vLLM may leave workers behind
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in output.splitlines() if line.startswith("[[")]
    assert lines, errors[-3000:]
    results = [(ids, torch.tensor(logprobs), None) for ids, logprobs in json.loads(lines[-1])]
    assert_served_as_by_transformers(model, given, results)
