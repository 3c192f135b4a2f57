"""Measure time and peak memory of converting a random checkpoint of a 7B model's shape, in a process of its own.

    python tests/benchmarks/large_conversion.py FOLDER --tokens 512

The checkpoint in FOLDER (14.5 GB in bf16) is kept for the next run, and the conversion is removed at the end. The last
line of the output is one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast


# Mistral 7B v0.3: 32 layers, 8 key/value heads of 128, no sliding window.
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
CONVERT = """
import json, sys
from egmla.commands.common import progress_bars
from egmla.conversion import Recipe, Refinement, convert_checkpoint
source, target, text, tokens, steps = sys.argv[1:]
with progress_bars() as progress:
    report = convert_checkpoint(
        source, target, cache=0.28125, cache_dtype="bf16", calibration=text, calibration_tokens=int(tokens),
        recipe=Recipe(sequence_length=int(tokens) // 4), refinement=Refinement(steps=int(steps), batch_size=1),
        dtype="bfloat16", progress=progress,
    )
print(json.dumps({"seconds": report["seconds"], "peak_bytes": report["peak_bytes"], "plan": report["plan"]}))
"""


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint with random weights, shard by shard: the whole is never in memory."""
    config = MistralConfig(**SHAPE, tie_word_embeddings=False)
    config.architectures, config.dtype = ["MistralForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(f"layer-{int(parts[2]):02d}" if parts[1] == "layers" else "ends", []).append(name)
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for number, (group, names) in enumerate(sorted(groups.items()), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {}
        for name in names:
            if "norm" in name:
                tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            else:
                tensors[name] = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        print(f"wrote {group}", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    words = {word: number for number, word in enumerate(["<unk>", *(chr(97 + i) for i in range(26))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=512, help="calibration tokens, in four sequences")
    parser.add_argument("--refine-steps", type=int, default=0)
    options = parser.parse_args()
    source, target, text = (options.folder / name for name in ("source", "target", "text.txt"))
    if not (source / "config.json").is_file():
        source.mkdir(parents=True, exist_ok=True)
        make_checkpoint(source)
    letters = torch.randint(26, (options.tokens + 8,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(chr(97 + int(letter)) for letter in letters))
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-c", CONVERT, str(source), str(target), str(text)]
    command += [str(options.tokens), str(options.refine_steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    layer = max(
        sum(file.stat().st_size for file in source.glob(f"model-{number:05d}-of-*.safetensors"))
        for number in range(2, SHAPE["num_hidden_layers"] + 2)
    )
    peak = f"peak {result['peak_bytes'] / 1e9:.2f} GB, largest layer {layer / 1e9:.2f} GB as stored"
    print(f"{peak}, {result['seconds']} s")
    shutil.rmtree(target)
    print(json.dumps(result | {"layer_bytes": layer}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
