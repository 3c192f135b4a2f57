"""Measure bytes, perplexity and decode time of a model's quantised caches against its full cache.

    python tests/benchmarks/quantized_cache.py FOLDER --text wiki.test.raw --windows 4 --window 2048

Without a folder it is a random model of SmolLM2-135M's shape, for bytes and time. Each window goes through the cache
in chunks: every token reads its past as the cache holds it. With `--chunk 1` and `--cpu-kernel`, chunks are decode
steps of the compiled kernel, which also rounds queries and weights. The last line of the output is one JSON object.
"""

import argparse
import json
import math
import statistics
import sys
import time

import torch
from transformers import AutoTokenizer

from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM, load_cpu_kernel
from egmla.utils.perplexity import token_windows


QUANTIZED = {"int8": {"quantization": "int8"}, "int4": {"quantization": "int4"}}


def uniform_bits(config, bits: int) -> dict:
    """Return an allocation that gives all channels the same bits."""
    pairs = config.qk_rope_head_dim // 2
    rope = [[bits, pairs]] if pairs else []
    layers = [{"latent": [[bits, rank]], "rope": rope} for rank in config.layer_kv_lora_ranks]
    return {"group_tokens": 64, "first_tokens": 4, "layers": layers}


def falling_bits(config, share: float) -> dict:
    """Return an allocation of the kind that conversions make: 6 bits to none, for a share of bf16's bytes."""
    mixes = {
        0.25: ([(6, 0.1), (4, 0.42), (3, 0.2), (2, 0.2)], [(6, 0.08), (4, 0.5), (3, 0.25), (2, 0.1)]),
        0.125: ([(6, 0.03), (4, 0.15), (3, 0.2), (2, 0.25)], [(4, 0.2), (3, 0.16), (2, 0.1)]),
    }
    latent, rope = mixes[share]

    def runs(mix, most):
        return [[bits, round(part * most)] for bits, part in mix if round(part * most)]

    layers = [
        {"latent": runs(latent, rank), "rope": runs(rope, config.qk_rope_head_dim // 2)}
        for rank in config.layer_kv_lora_ranks
    ]
    return {"group_tokens": 64, "first_tokens": 4, "recent_tokens": 64, "layers": layers}


def contestants(config) -> dict[str, dict]:
    """Return the arguments of `EGMLACache` for each cache to measure."""
    found = {"full": {"bits": 16}, **QUANTIZED}
    found |= {f"uniform {bits} bits": {"bits": uniform_bits(config, bits)} for bits in (4, 3, 2)}
    found |= {f"falling, {share:g}": {"bits": falling_bits(config, share)} for share in (0.25, 0.125)}
    if config.kv_cache_bits is not None:
        found["allocated"] = {}
        found |= {f"allocated, {share:g}": {"bits": share} for share in config.bit_allocation().budgets}
    return found


def smollm2_shape(layers: int) -> EGMLAForCausalLM:
    """Return a random model of SmolLM2-135M's shape, `R` = 256 and `P` = 128; fewer layers for machines in use."""
    config = EGMLAConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        kv_lora_rank=256,
        qk_rope_head_dim=128,
        kv_gate=None,
        max_position_embeddings=65536,
    )
    return EGMLAForCausalLM(config).eval()


@torch.no_grad()
def perplexity_through_cache(model, windows: torch.Tensor, chunk: int, **options) -> float:
    """Return perplexity of `windows` `[windows, window]`, read in chunks by a cache with these options."""
    total, scored = 0.0, 0
    for ids in windows:
        cache = EGMLACache(model.config, **options)
        for start in range(0, ids.numel() - 1, chunk):
            targets = ids[start + 1 : start + chunk + 1]
            logits = model(ids[None, start : start + targets.numel()], past_key_values=cache).logits[0].float()
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            scored += targets.numel()
    return math.exp(total / scored)


def filled_cache(config, context: int, dtype: torch.dtype, **options) -> EGMLACache:
    """Return a cache with random entries of `context` tokens."""
    cache = EGMLACache(config, **options)
    for layer_idx, rank in enumerate(config.layer_kv_lora_ranks):
        latent, rope_key = torch.randn(1, 1, context, rank), torch.randn(1, 1, context, config.qk_rope_head_dim)
        cache.append(latent.to(dtype), rope_key.to(dtype), layer_idx)
    return cache


@torch.no_grad()
def attention_milliseconds(context: int, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Return one thread's median processor time for attention of one token: 12 heads, one layer, 64 + 64 elements."""
    config = EGMLAConfig(num_hidden_layers=1, kv_lora_rank=64, qk_rope_head_dim=64)
    caches = contestants(config)
    layers = {name: filled_cache(config, context, dtype, **options).layers[0] for name, options in caches.items()}
    query = torch.randn(1, 12, 1, 128).to(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(steps + 2):
        for name, layer in layers.items():
            start = time.thread_time()
            layer.entries.attend(query, None, 0.1)
            if step >= 2:
                seconds[name].append(time.thread_time() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def decode_milliseconds(model, context: int, steps: int) -> dict[str, float]:
    """Return median milliseconds of a decode step at `context` tokens, with interleaved contestants."""
    caches = {
        name: filled_cache(model.config, context, model.dtype, **options)
        for name, options in contestants(model.config).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    token = torch.tensor([[5]])
    for step in range(steps + 2):
        for name, cache in caches.items():
            start = time.perf_counter()
            model(token, past_key_values=cache)
            if step >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
            cache.crop(-1)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="an EG-MLA checkpoint; none for random weights in SmolLM2's shape")
    parser.add_argument("--layers", type=int, default=30, help="of the model with random weights")
    parser.add_argument("--text", help="UTF-8 text to measure perplexity on; without one, only bytes and time")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="contexts to time decode steps at")
    parser.add_argument("--attention", type=int, nargs="*", default=[], help="contexts to time attention alone at")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-kernel", action="store_true", help="decode with the compiled kernel")
    options = parser.parse_args()
    if options.cpu_kernel:
        load_cpu_kernel()
    if options.folder is None:
        model = smollm2_shape(options.layers).to(getattr(torch, options.dtype))
    else:
        model = EGMLAForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype)).eval()
    bf16_bytes = model.config.cache_bytes_per_token()
    result: dict = {"window": options.window, "chunk": options.chunk, "dtype": options.dtype}
    result |= {"threads": torch.get_num_threads(), "bf16_bytes_per_token": bf16_bytes}
    caches = contestants(model.config)
    for name, cache_options in caches.items():
        shares = {}
        for context in sorted({options.window, 8192, 32768}):
            nbytes = filled_cache(model.config, context, torch.bfloat16, **cache_options).nbytes
            shares[str(context)] = nbytes / (context * bf16_bytes)
            print(f"{name}  {nbytes} bytes at {context}, {100 * shares[str(context)]:.2f} % of bf16", flush=True)
        result[name] = {"share_of_bf16_bytes": shares}
    if options.text:
        tokenizer = AutoTokenizer.from_pretrained(options.folder)
        with open(options.text, encoding="utf-8") as file:
            windows = token_windows(tokenizer, file.read(), options.window, options.windows)
        result["windows"] = len(windows)
        for name, cache_options in caches.items():
            value = perplexity_through_cache(model, windows, options.chunk, **cache_options)
            cost = value / result.get("full", {}).get("perplexity", value) - 1
            result[name] |= {"perplexity": value, "cost": cost}
            print(f"{name}  perplexity {value:.4f}, {100 * cost:+.3f} %", flush=True)
    for context in options.contexts:
        for name, milliseconds in decode_milliseconds(model, context, options.steps).items():
            result[name].setdefault("decode_ms", {})[str(context)] = milliseconds
            print(f"{name}  {milliseconds:.1f} ms per token at {context}", flush=True)
    torch.set_num_threads(1)
    for context in options.attention:
        for dtype in (torch.float32, torch.bfloat16):
            for name, milliseconds in attention_milliseconds(context, dtype, options.steps).items():
                result[name].setdefault("attention_ms", {})[f"{context} {dtype}"] = milliseconds
                print(f"{name}  {milliseconds:.2f} ms for attention over {context} tokens in {dtype}", flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
