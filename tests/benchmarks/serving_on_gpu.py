"""Check the plug-in for vLLM on a GPU, and time Triton's kernel at converted widths. Under ten minutes.

    pip install '.[vllm]' pytest && python tests/benchmarks/serving_on_gpu.py

Every model case that is not refused is served in bf16, eagerly, with a prefix from the cache. The first token's
log-probability is compared with Transformers in fp32 on the CPU, within `--tolerance`. Two cases in fp16 and one
compiled follow. The kernel reads pages of latents, as a decode step does. It is compared with plain products in fp32
first. The output is a line for each check, and a Markdown table. The exit status is 1 if a check failed.
"""

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
LENGTHS = (5, 17, 40, 3)
# Latent and rotary widths of a layer: DeepSeek's own, and conversions to a half and an eighth of a Llama's cache.
WIDTHS = ((512, 64), (256, 64), (96, 32), (24, 16))
PAGE, SPLITS = 16, 4
STEPS = 50  # timed together


def check_case(case: str, tolerance: float, **options) -> None:
    """Serve a tiny model twice, the second time from the cache, and compare the first token with Transformers."""
    import torch
    from serving import engine, prompts, saved_model, serve

    with tempfile.TemporaryDirectory() as folder:
        model, given = saved_model(folder, case), prompts(*LENGTHS)
        with engine(folder, enable_prefix_caching=True, **options) as served:
            rounds = [serve(served, given, tokens=4), serve(served, given, tokens=4)]
        if not rounds[1][2][2]:
            raise ValueError("no prefix of 40 tokens was found in the cache")
        for results in rounds:
            for ids, (tokens, logprobs, _) in zip(given, results, strict=True):
                with torch.no_grad():
                    right = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
                error = abs(float(logprobs[0] - right[tokens[0]]))
                best = float(right.max() - right[tokens[0]])
                if max(error, best) > tolerance:
                    raise ValueError(f"log-probability off by {error:.3f}, chosen {best:.3f} below the best one")


def time_kernel(rank: int, rope: int, options) -> str:
    """Return a line of the table: milliseconds of the kernel for one layer, and the bandwidth that it reads with."""
    import torch
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    from egmla.utils.timing import Timer

    batch, heads, tokens = options.batch, options.heads, options.context
    place = {"device": "cuda", "dtype": torch.bfloat16}
    pages = batch * tokens // PAGE
    cache, query = torch.randn(pages, PAGE, rank + rope, **place), torch.randn(batch, heads, rank + rope, **place)
    table = torch.randperm(pages, device="cuda").view(batch, -1).int()
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    output, sums = torch.zeros(batch, heads, rank, **place), torch.zeros(batch, heads, **place)
    parts = torch.empty(batch, heads, SPLITS, rank + 1, device="cuda", dtype=torch.float32)
    entries, scale = cache.unsqueeze(2), (rank + rope) ** -0.5
    values = entries[..., :rank]

    def step() -> None:
        arguments = (query, entries, values, output, sums, table, lengths, parts, SPLITS, scale, PAGE)
        decode_attention_fwd(*arguments, is_mla=True)

    step()
    seen = cache[table[0].long()].flatten(0, 1).float()
    right = (query[0].float() @ seen.T * scale).softmax(-1) @ seen[:, :rank]
    error = float((output[0].float() - right).abs().max())
    if error > 0.02:
        raise ValueError(f"the kernel at R={rank}, P={rope} is off by {error:.3f}")
    _, seconds = Timer("cuda").measure(lambda: [step() for _ in range(STEPS)])
    milliseconds = 1e3 * seconds / STEPS
    return f"| {rank} | {rope} | {milliseconds:.3f} | {cache.numel() * 2 / milliseconds / 1e6:.0f} | {error:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tolerance", type=float, default=0.1, help="allowed error of a log-probability")
    parser.add_argument("--batch", type=int, default=32, help="sequences of the kernel's timing")
    parser.add_argument("--heads", type=int, default=32, help="query heads of it")
    parser.add_argument("--context", type=int, default=8192, help="tokens of each sequence of it")
    options = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "helpers")]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    from cases import EXPANDED_CASES, MODEL_CASES

    jobs = [(case, {"dtype": "bfloat16"}) for case in MODEL_CASES if case not in EXPANDED_CASES]
    jobs += [(case, {"dtype": "float16"}) for case in ("input-gate", "no-rope")]
    jobs += [("table-gate", {"dtype": "bfloat16", "enforce_eager": False})]
    failed = 0
    for case, settings in jobs:
        try:
            check_case(case, options.tolerance, block_size=PAGE, gpu_memory_utilization=0.3, **settings)
            print("equal", case, settings, flush=True)
        except Exception:
            failed += 1
            print("FAILED", case, settings, traceback.format_exc(limit=-2), flush=True)
    print("\n| R | P | ms | GB/s | largest error |\n| ---: | ---: | ---: | ---: | ---: |")
    for rank, rope in WIDTHS:
        try:
            print(time_kernel(rank, rope, options), flush=True)
        except Exception as error:
            failed += 1
            print("FAILED", rank, rope, error, flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
