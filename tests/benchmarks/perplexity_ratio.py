"""Measure perplexity of converted models against their source, on the same windows of a text.

    python tests/benchmarks/perplexity_ratio.py SOURCE CONVERTED --text wiki.test.raw --windows 9 --window 2048
    python tests/benchmarks/perplexity_ratio.py SOURCE HEALED --text stories.txt --windows 4 --window 1024 --divergence

--divergence adds the KL divergence from the source's predictions, and how often both have the same best token.
Several converted models are compared with the first: the mean difference of the windows' losses, with a 95 %
interval. The last line of the output is one JSON object.
"""

import argparse
import json
import math
import statistics
import sys

import torch
from transformers import AutoModelForCausalLM

import egmla  # noqa: F401  registers the architecture
from egmla.conversion import load_source
from egmla.utils.perplexity import perplexity, token_windows


def window_losses(model, windows) -> list[float]:
    """Return nats per token of each window."""
    return [math.log(perplexity(model, window[None])) for window in windows]


def paired_difference(losses: list[float], others: list[float]) -> tuple[float, float]:
    """Return the mean difference of the windows' losses in nats a token, and half of its 95 % interval."""
    differences = [one - other for one, other in zip(losses, others, strict=True)]
    return statistics.mean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))


@torch.inference_mode()
def divergence(source, converted, windows) -> tuple[float, float]:
    """Return the mean KL divergence from the source in nats, and how often the best token is the same."""
    total, same, count = 0.0, 0, 0
    for window in windows:
        ids = torch.as_tensor(window).view(1, -1)
        expected, given = (model(ids).logits[0].float().log_softmax(-1) for model in (source, converted))
        total += torch.nn.functional.kl_div(given, expected, reduction="sum", log_target=True).item()
        same += (expected.argmax(-1) == given.argmax(-1)).sum().item()
        count += ids.numel()
    return total / count, same / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--divergence", action="store_true")
    options = parser.parse_args()
    model, tokenizer = load_source(options.source)
    with open(options.text, encoding="utf-8") as file:
        windows = token_windows(tokenizer, file.read(), options.window, options.windows)
    result = {"window": options.window, "windows": len(windows)}
    result["source"] = math.exp(statistics.mean(window_losses(model, windows)))
    print(f"source     {result['source']:.3f}", flush=True)
    first: list[float] = []
    for path in options.converted:
        converted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        elements = converted.config.cache_elements_per_token / converted.config.num_hidden_layers
        losses = window_losses(converted, windows)
        value = math.exp(statistics.mean(losses))
        row = {"perplexity": value, "elements_per_token_and_layer": elements}
        result[path.rstrip("/").rsplit("/", 1)[-1]] = row
        ratio = value / result["source"]
        print(f"converted  {value:.3f}  {ratio:.3f} times  {elements:.0f} elements per token and layer")
        if first and len(windows) > 1:
            row["nats_beside_first"] = difference, error = paired_difference(losses, first)
            print(f"           {difference:+.5f} ± {error:.5f} nats a token beside the first one")
        first = first or losses
        if options.divergence:
            row["divergence"], row["same_token"] = divergence(model, converted, windows)
            print(f"           {row['divergence']:.4f} nats from the source, {row['same_token']:.1%} the same token")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
