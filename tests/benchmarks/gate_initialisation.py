"""Set gates from calibration statistics, without training, and compare them with gates at identity.

    python tests/benchmarks/gate_initialisation.py SOURCE CONVERTED --calibration wiki.train.raw --text wiki.test.raw \
        --text stories.txt

One pass over the calibration text gives the gradient of the divergence from the source with respect to each gate's
values. A linear regression of these gradients on the tokens' embeddings is the direction of the gates. Each
channel is divided by its curvature, the mean square of its gradients plus the average over channels, as in natural
gradients. Steps of several lengths along the direction are measured on other texts. A length is the root mean
square of the gates' difference from 1. The mean of every gate over the tokens stays 1: another mean is a scale of
the up-projection and needs no gate. The last line of the output is one JSON object.
"""

import argparse
import itertools
import json
import math
import statistics
import sys

import torch
from perplexity_ratio import paired_difference, window_losses
from transformers import AutoModelForCausalLM

import egmla  # noqa: F401  registers the architecture
from egmla.conversion import load_source
from egmla.utils.perplexity import token_windows


def gradients_of_gates(model, source, windows):
    """Return embeddings `[tokens, D]` and each layer's gradients `[tokens, R]` of the divergence from the source."""
    gates, layers, embeddings = {}, [layer.self_attn for layer in model.model.layers], []

    def as_leaf(idx):
        def hook(module, args, output):
            gates[idx] = output.detach().requires_grad_()
            return gates[idx]

        return hook

    hooks = [layer.kv_gate_norm.register_forward_hook(as_leaf(idx)) for idx, layer in enumerate(layers)]
    gradients: list[list[torch.Tensor]] = [[] for _ in layers]
    model.requires_grad_(False)
    for number, window in enumerate(windows):
        ids = torch.as_tensor(window).view(1, -1)
        with torch.no_grad():
            wanted = source(ids).logits[0].float().log_softmax(-1)
        given = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        torch.nn.functional.kl_div(given, wanted, reduction="sum", log_target=True).backward()
        # Without the first token: all tokens attend to it, whatever it is.
        embeddings.append(model.get_input_embeddings()(ids)[0, 1:])
        for idx in range(len(layers)):
            gradients[idx].append(gates[idx].grad[0, 1:])
        print(f"\rcalibration window {number + 1} of {len(windows)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for hook in hooks:
        hook.remove()
    return torch.cat(embeddings), [torch.cat(windows) for windows in gradients]


def directions(embeddings: torch.Tensor, gradients: list[torch.Tensor], ridge: float):
    """Return each layer's gate projection `[R, D]` to channels of variance 1, and each channel's length `[R]`.

    The root mean square of all lengths is 1. `ridge` is in units of the embeddings' mean variance.
    """
    centred = (embeddings - embeddings.mean(0)).double()
    covariance = centred.T @ centred / len(centred)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    curvatures = [gradient.double().square().mean(0) for gradient in gradients]
    damping = torch.cat(curvatures).mean()
    projections, lengths = [], []
    for gradient, curvature in zip(gradients, curvatures, strict=True):
        slopes = torch.cholesky_solve(centred.T @ gradient.double() / len(centred), factor) / -(curvature + damping)
        lengths.append((centred @ slopes).std(0).clamp_min(1e-30))
        projections.append((slopes / lengths[-1]).T.float())
    scale = torch.cat(lengths).square().mean().sqrt()
    return [(projection, (length / scale).float()) for projection, length in zip(projections, lengths, strict=True)]


@torch.no_grad()
def set_gates(model, embeddings, found, step: float):
    """Set every gate to 1 plus `step` times its direction, with mean 1 over the tokens of `embeddings`."""
    for layer, (projection, length) in zip(model.model.layers, found, strict=True):
        attention = layer.self_attn
        attention.kv_gate_proj.weight.copy_(projection)
        attention.kv_gate_norm.weight.copy_(step * length)
        attention.kv_gate_norm.bias.fill_(1)
        attention.kv_gate_norm.bias.sub_(attention.gate(embeddings).mean(0) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("converted")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, action="append")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--ridge", type=float, nargs="+", default=[0.01, 0.1, 1.0, 10.0])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration-windows", type=int, default=48)
    options = parser.parse_args()
    source, tokenizer = load_source(options.source)
    model = AutoModelForCausalLM.from_pretrained(options.converted, dtype=torch.float32).eval()

    def windows_of(path: str, count: int) -> torch.Tensor:
        with open(path, encoding="utf-8") as file:
            return token_windows(tokenizer, file.read(2**23), options.window, count)

    texts = {path: windows_of(path, options.windows) for path in options.text}
    calibration = windows_of(options.calibration, options.calibration_windows)
    identity = {path: window_losses(model, windows) for path, windows in texts.items()}
    for path, losses in identity.items():
        print(f"identity       {math.exp(statistics.mean(losses)):9.3f}  {path}", flush=True)
    embeddings, gradients = gradients_of_gates(model, source, calibration)
    rows = []
    for ridge in options.ridge:
        found = directions(embeddings, gradients, ridge)
        for step, (path, windows) in itertools.product(options.steps, texts.items()):
            set_gates(model, embeddings, found, step)
            losses = window_losses(model, windows)
            value, (difference, error) = math.exp(statistics.mean(losses)), paired_difference(losses, identity[path])
            row = {"ridge": ridge, "step": step, "text": path, "perplexity": value}
            rows.append({**row, "nats_beside_identity": [difference, error]})
            print(f"{ridge:<8} {step:<5} {value:9.3f}  {difference:+.5f} ± {error:.5f} nats  {path}", flush=True)
    perplexities = {path: math.exp(statistics.mean(losses)) for path, losses in identity.items()}
    result = {"calibration_tokens": len(embeddings), "identity": perplexities, "rows": rows}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
