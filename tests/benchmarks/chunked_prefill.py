"""Measure peak memory while a long prompt is read in chunks, against weights + cache + one chunk's activations.

    python tests/benchmarks/chunked_prefill.py --tokens 32768 --chunk 512
    python tests/benchmarks/chunked_prefill.py --tokens 32768 --chunk 512 --config '{"num_hidden_layers": 2}'

The prompt goes through `generate(prefill_chunk_size=...)`. The last line of the output is one JSON object.
"""

import argparse
import gc
import json
import sys
import time

import torch

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.utils.accounting import cache_nbytes
from egmla.utils.machine import peak_resident_bytes, reset_peak_resident, resident_bytes


def activation_bytes(config: EGMLAConfig, chunk: int, itemsize: int) -> int:
    """Count the bytes alive at once while a chunk of `T` tokens after a past passes through a layer.

    - Hidden states `T D`: the residual, the normed input and the layer's output. Also three times the MLP's inner
      width (gate, up, product).
    - Queries `T H`: expanded `N + P`, absorbed `R + P`, and three outputs of that width (past, own tokens, merged).

    Nothing grows with the past: there are no scores and no mask. The chunk is too long for packed queries, and short
    enough for absorption to pay.
    """
    states = chunk * 3 * (config.hidden_size + config.intermediate_size)
    width = max(config.layer_kv_lora_ranks) + config.qk_rope_head_dim
    queries = chunk * config.num_attention_heads * (config.qk_head_dim + 4 * width)
    return (states + queries) * itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--config", type=json.loads, default={}, help="fields that differ from EGMLAConfig()")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()

    config = EGMLAConfig(**{"max_position_embeddings": options.tokens + 1, **options.config})
    dtype = getattr(torch, options.dtype)
    ids = torch.randint(config.vocab_size, (1, options.tokens))
    # Create threads, kernels and their buffers before the first reading.
    tiny = EGMLAForCausalLM(EGMLAConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64))
    tiny.to(dtype).generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=1, do_sample=False)
    del tiny
    gc.collect()
    before = resident_bytes()
    model = EGMLAForCausalLM(config).to(dtype).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gc.collect()
    reset_peak_resident()
    started = time.perf_counter()
    out = model.generate(
        ids,
        prefill_chunk_size=options.chunk,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    seconds = time.perf_counter() - started
    peak = peak_resident_bytes() - before
    cache, _ = cache_nbytes(out.past_key_values)
    activations = activation_bytes(config, options.chunk, dtype.itemsize)
    budget = weights + cache + activations
    result = {
        "tokens": options.tokens,
        "chunk": options.chunk,
        "dtype": options.dtype,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "activation_bytes": activations,
        "peak_bytes": peak,
        "peak_over_budget": peak / budget,
        "seconds": seconds,
    }
    print(
        f"peak {peak / 2**20:,.0f} MiB = {peak / budget:.2f} of weights {weights / 2**20:,.0f} + cache "
        f"{cache / 2**20:,.0f} + one chunk {activations / 2**20:,.0f} MiB; {seconds:.1f} s"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
