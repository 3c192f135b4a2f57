"""Engines of vLLM on tiny models, and what Transformers generates from the same weights."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import torch
from cases import perturb, tiny_model


NEW_TOKENS = 12
PROCESS_SECONDS = 420
SCRIPT = """
import json, sys
from serving import engine, serve

if __name__ == "__main__":  # vLLM's processes import this file
    folders, given, options = json.loads(sys.argv[1])
    for folder in folders:
        with engine(folder, **options) as served:
            print(json.dumps([(ids, chosen.tolist()) for ids, chosen, _ in serve(served, given)]), flush=True)
"""


def prompts(*lengths: int) -> list[list[int]]:
    """Random ids, another seed for each length."""
    return [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def saved_model(folder, case: str, **overrides):
    """A tiny model of a case, away from its initial values, saved in a folder."""
    model = tiny_model(case, **overrides).eval()
    perturb(model)
    model.save_pretrained(folder)
    return model


@contextmanager
def engine(folder, **options):
    """vLLM's engine in this process, fp32 and eager unless told otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8, **options}
    served = LLM(str(folder), skip_tokenizer_init=True, **settings)
    try:
        yield served
    finally:
        served.llm_engine.engine_core.shutdown()
        del served
        cleanup_dist_env_and_memory()


def serve(served, given: list[list[int]], tokens: int = NEW_TOKENS, lora_request=None):
    """Greedy ids, their log-probabilities and the number of prompt tokens found in the cache, for each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in given]
    answers = served.generate(prompts, sampling, use_tqdm=False, lora_request=lora_request)
    results = []
    for answer in answers:
        ids = list(answer.outputs[0].token_ids)
        chosen = [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, ids, strict=True)]
        results.append((ids, torch.tensor(chosen), answer.num_cached_tokens))
    return results


def serve_in_another_process(tmp_path, folders, given: list[list[int]], environment=None, **options):
    """What `serve` gives for each folder, of engines in a process of their own with more environment variables."""
    script = tmp_path / "serve_elsewhere.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
    arguments = json.dumps([[str(folder) for folder in folders], given, options])
    process = subprocess.Popen(
        [sys.executable, str(script), arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=PROCESS_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # vLLM may leave workers behind
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in output.splitlines() if line.startswith("[[")]
    if len(lines) != len(folders):
        raise AssertionError(f"{len(lines)} of {len(folders)} engines answered:\n{errors[-3000:]}")
    return [[(ids, torch.tensor(chosen), None) for ids, chosen in json.loads(line)] for line in lines]


@torch.no_grad()
def expected(model, ids: list[int], tokens: int = NEW_TOKENS) -> tuple[list[int], torch.Tensor]:
    """Greedy ids of Transformers, one at a time without a cache, and their log-probabilities."""
    found, chosen = list(ids), []
    for _ in range(tokens):
        logits = model(torch.tensor([found]), use_cache=False).logits[0, -1].log_softmax(-1)
        found.append(int(logits.argmax()))
        chosen.append(logits[found[-1]])
    return found[len(ids) :], torch.stack(chosen)


def assert_served_as_by_transformers(model, given, results, tolerance: float = 1e-4) -> None:
    """Same ids, log-probabilities within the tolerance, and answers varied enough for that to mean something."""
    seen = set()
    for ids, (tokens, logprobs, _) in zip(given, results, strict=True):
        right, right_logprobs = expected(model, ids, len(tokens))
        assert tokens == right
        assert float((logprobs - right_logprobs).abs().max()) <= tolerance
        seen |= set(right)
    assert len(seen) >= 5, "these weights say the same whatever they are given"
