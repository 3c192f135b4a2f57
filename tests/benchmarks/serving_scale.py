"""Compute how many tokens and requests fit beside the weights of an 8B and a 70B model, before and after conversion.

    python tests/benchmarks/serving_scale.py --gpu-gb 80 --use 0.9 --tokens 8192

Arithmetic only: no model is loaded and no GPU is used. bf16. Tensor parallelism splits weights and grouped keys and
values. It replicates latents, because all heads read the same one. Decode context parallelism splits latents by token.
The output is a Markdown table.
"""

import argparse
from dataclasses import dataclass


BF16 = 2
WORKSPACE_GB = 4.0  # activations and the engine's own, per GPU


@dataclass(frozen=True)
class Shape:
    """Llama's published shapes: parameters, layers, and keys and values of a token and layer in elements."""

    name: str
    parameters: float
    layers: int
    key_value_heads: int
    head_dim: int

    @property
    def elements(self) -> int:
        return 2 * self.key_value_heads * self.head_dim


SHAPES = (Shape("8B", 8.03e9, 32, 8, 128), Shape("70B", 70.6e9, 80, 8, 128))


def row(shape: Shape, share: float | None, gpus: int, context_parallel: int, options) -> str:
    """Return one line of the table; `share` is of the source's cache, `None` for the source."""
    elements = shape.elements if share is None else round(shape.elements * share)
    per_token = elements * shape.layers * BF16
    splits = min(gpus, shape.key_value_heads) if share is None else context_parallel
    weights = shape.parameters * BF16 / gpus / 1e9
    room = options.gpu_gb * options.use - weights - WORKSPACE_GB
    what = (
        "source" if share is None else f"EG-MLA, {100 * share:g} % of the cache" + (", split by token" * (splits > 1))
    )
    if room <= 0:
        return f"| {shape.name} | {gpus} | {what} | {per_token:,} | - | 0 | 0 |"
    tokens = int(room * 1e9 * splits / per_token)
    held = per_token // splits
    return f"| {shape.name} | {gpus} | {what} | {per_token:,} | {held:,} | {tokens:,} | {tokens // options.tokens:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-gb", type=float, default=80.0, help="memory of a GPU, in GB")
    parser.add_argument("--use", type=float, default=0.9, help="share of it that the engine may use")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a request, prompt and answer")
    parser.add_argument("--shares", default="0.25,0.125", help="shares of the source's cache")
    options = parser.parse_args()
    shares = [float(share) for share in options.shares.split(",")]
    print(
        "| model | GPUs | what | cache of a token, bytes | of it on each GPU | tokens that fit | requests in flight |"
    )
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for shape in SHAPES:
        for gpus in (1, 8):
            print(row(shape, None, gpus, 1, options))
            for share in shares:
                print(row(shape, share, gpus, 1, options))
                if gpus > 1:
                    print(row(shape, share, gpus, gpus, options))


if __name__ == "__main__":
    main()
