"""Decode speed of the kv64 preset against Transformers' DeepSeek-V3 of the same shape and a Llama of the same size.

Contestants take turns in one run; medians and their ratios are reported. A parity gate comes first: EG-MLA with its
gate at identity and DeepSeek-V3 with the same weights must give the same logits, else nothing is timed.

    python tests/benchmarks/decode_against_peers.py --context 8192 --batch 1 8 --dtype float32 bfloat16

The last line of the output is one JSON object.
"""

import argparse
import json
import platform
import sys

import torch
import torch._inductor.config
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from egmla import EGMLACache, EGMLAForCausalLM
from egmla.configuration import load_preset
from egmla.conversion.families import KEPT_FIELDS
from egmla.evaluation.decode_speed import time_decode


# fp32 logits of size 1: sums in another order.
PARITY_TOLERANCE = 1e-4
COMPILED = "EG-MLA compiled"


def build_contestants(preset: str) -> dict[str, PreTrainedModel]:
    """EG-MLA of a preset, DeepSeek-V3 (all dense) with its weights, and a Llama with full multi-head attention."""
    torch.manual_seed(0)
    config = load_preset(preset)
    egmla = EGMLAForCausalLM(config).eval()
    shared = {name: getattr(config, name) for name in KEPT_FIELDS}
    deepseek = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **shared,
            num_key_value_heads=config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            rope_interleave=config.rope_interleave,
            first_k_dense_replace=config.num_hidden_layers,
            num_nextn_predict_layers=0,
        )
    ).eval()
    weights = {name: tensor for name, tensor in egmla.state_dict().items() if "kv_gate_" not in name}
    deepseek.load_state_dict(weights)
    llama = LlamaForCausalLM(LlamaConfig(**shared, num_key_value_heads=config.num_attention_heads)).eval()
    return {"EG-MLA": egmla, COMPILED: compile_for_decoding(egmla), "DeepseekV3": deepseek, "Llama MHA": llama}


def compile_for_decoding(model: PreTrainedModel) -> PreTrainedModel:
    """The model compiled as one graph when first called; in bf16 with weights laid out for the processor."""
    torch._dynamo.reset()
    # Not by `options`: tracing, which comes before they count, must already treat weights as constants. In fp32 the
    # other layout costs time at batch 1 (35 against 26 ms).
    torch._inductor.config.freezing = model.dtype == torch.bfloat16
    return torch.compile(model, fullgraph=True)


@torch.no_grad()
def parity(models: dict[str, PreTrainedModel]) -> float:
    """Largest logit difference of EG-MLA, also compiled with a fixed cache, and DeepSeek-V3 over prompt and step."""
    ids = torch.randint(models["EG-MLA"].config.vocab_size, (1, 65), generator=torch.Generator().manual_seed(0))
    difference = 0.0
    outputs = {}
    for name, model in models.items():
        if name == COMPILED:
            cache = EGMLACache(model.config, max_cache_len=72)
            first = models["EG-MLA"](ids[:, :64], past_key_values=cache)
        elif name != "Llama MHA":
            first = model(ids[:, :64], use_cache=True)
        else:
            continue
        outputs[name] = (first.logits, model(ids[:, 64:], past_key_values=first.past_key_values).logits)
    for name in ("EG-MLA", COMPILED):
        for ours, theirs in zip(outputs[name], outputs["DeepseekV3"], strict=True):
            difference = max(difference, float((ours - theirs).abs().max()))
    return difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="egmla-kv64-120m")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    models = build_contestants(options.preset)
    difference = parity(models)
    print(f"parity of EG-MLA and DeepseekV3 with the same weights: max logit difference {difference:.1e}")
    if difference > PARITY_TOLERANCE:
        print(f"above {PARITY_TOLERANCE}: nothing is timed", file=sys.stderr)
        return 1
    print("dtype     batch  contestant       ms/step       p10       p90 cache MiB  times  x compiled")
    rows = []
    for dtype in options.dtype:
        for name, model in models.items():
            if name != COMPILED:
                model.to(getattr(torch, dtype))
        models[COMPILED] = compile_for_decoding(models["EG-MLA"])
        for batch in options.batch:
            timings = time_decode(
                models,
                options.context,
                steps=options.steps,
                rounds=options.rounds,
                warmup=1,
                batch_size=batch,
                fixed_size=[COMPILED],
            )
            ours = timings["EG-MLA"].median
            for name, timing in timings.items():
                row = {
                    "dtype": dtype,
                    "batch": batch,
                    "contestant": name,
                    "ms_median": timing.median * 1e3,
                    "ms_p10": timing.p10 * 1e3,
                    "ms_p90": timing.p90 * 1e3,
                    "cache_used_bytes": timing.cache_used_bytes,
                    "times_slower": timing.median / ours,
                    "times_slower_than_compiled": timing.median / timings[COMPILED].median,
                }
                rows.append(row)
                figures = (row["ms_median"], row["ms_p10"], row["ms_p90"], row["cache_used_bytes"] / 2**20)
                columns = " ".join(f"{figure:9.1f}" for figure in figures)
                ratios = f"{row['times_slower']:6.2f} {row['times_slower_than_compiled']:10.2f}"
                print(f"{dtype:9} {batch:5}  {name:15} {columns} {ratios}", flush=True)
    environment = {
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "context": options.context,
        "preset": options.preset,
        "rounds": options.rounds,
        "steps": options.steps,
        "parity": difference,
    }
    print(json.dumps({"environment": environment, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
