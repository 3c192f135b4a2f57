"""Measure perplexity of closed-form conversions at several cache sizes, with one choice of the recipe changed each.

    python tests/benchmarks/closed_form_ablations.py SOURCE --calibration wiki.train.txt --text wiki.test.raw \
        --cache 0.5,0.3125,0.1875 --output ablations.json

The source runs over the calibration text once per weighting of its tokens. All choices then use the same statistics.
The output file keeps finished rows, and the same command resumes. The last line of the output is one JSON object.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from egmla import EGMLAForCausalLM
from egmla.conversion import find_recipe
from egmla.conversion.calibration import LayerStatistics, SourceRun
from egmla.conversion.families import find_family
from egmla.conversion.families.base import Family
from egmla.conversion.layers import gate_at_identity, low_rank_layer, smaller_latent_layer, target_config
from egmla.conversion.plan import Plan, deal_ranks, plan_conversion, plan_latent
from egmla.conversion.recipes import RECIPES, Recipe
from egmla.conversion.source import Source
from egmla.conversion.sources import load_source, open_source
from egmla.conversion.texts import open_calibration
from egmla.utils.perplexity import perplexity, token_windows


# Each choice: a recipe, and its changes.
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "rotary components by key energy": ("default", {"rope_metric": "key"}),
    "no mean rotation": ("default", {"mean_rotation": "none"}),
    "mean rotation per layer": ("default", {"mean_rotation": "layer"}),
    "not centred": ("default", {"centred": False}),
    "tokens weighted equally": ("default", {"weighting": "uniform"}),
    "tokens weighted equally, not centred": ("default", {"weighting": "uniform", "centred": False}),
    "output metric": ("default", {"metric": "output"}),
    "output metric, damping 0.1": ("default", {"metric": "output", "damping": 0.1}),
    "metric of the weights": ("default", {"metric": "weights"}),
    "keys and values not balanced": ("default", {"balance_by": "none"}),
    "balance 2": ("default", {"balance": 2.0}),
    "balance 0.5": ("default", {"balance": 0.5}),
    "ranks by energy": ("default", {"ranks": "energy"}),
    "latent norm": ("default", {"latent_norm": True}),
    "uniform slots, folds of 4": ("default", {"slots": "uniform", "freqfold": 4}),
    "latent norm, uniform slots": ("default", {"latent_norm": True, "slots": "uniform", "freqfold": 4}),
    "transmla-like": ("transmla-like", {}),
    "mha2mla-like": ("mha2mla-like", {}),
}
# Choices for a source that already has a latent.
LATENT_CHOICES = ("default", "not centred", "tokens weighted equally", "output metric", "metric of the weights")


def converted(source: Source, family: Family, plan: Plan, recipe: Recipe, statistics: list[LayerStatistics]):
    """Return the converted model in fp32, and the spectrum of each layer's latent."""
    compute = smaller_latent_layer if family.latent else low_rank_layer
    tensors = {name: source.read(rows) for name, rows in family.passthrough_tensors(source.config, None).items()}
    slots, spectra = [], []
    for layer_idx, layer in enumerate(statistics):
        attention, layer_slots, spectrum = compute(source, family, layer_idx, layer, plan, recipe)
        attention |= gate_at_identity(plan.ranks[layer_idx], source.config, layer_idx)
        tensors |= {f"model.layers.{layer_idx}.self_attn.{name}": tensor for name, tensor in attention.items()}
        tensors |= {
            name: source.read(rows) for name, rows in family.passthrough_tensors(source.config, layer_idx).items()
        }
        slots.append(layer_slots)
        spectra.append(spectrum)
    config = target_config(source.config, family, plan, slots, recipe.latent_norm)
    config.dtype = torch.float32
    model = EGMLAForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"The converted tensors are not the model's: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model, spectra


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--cache", default="0.5,0.3125,0.1875", help="fractions of the source's cache")
    parser.add_argument("--choices", help="names of choices, separated by semicolons; all by default")
    parser.add_argument("--output", help="JSON file for the rows; rows in it are not computed again")
    options = parser.parse_args()
    source = open_source(options.source)
    family = find_family(source.config)
    names = options.choices.split(";") if options.choices else LATENT_CHOICES if family.latent else CHOICES
    if unknown := [name for name in names if name not in CHOICES]:
        parser.error(f"unknown choices {unknown}; there are: {'; '.join(CHOICES)}")
    text = Path(options.text).read_text(encoding="utf-8")
    windows = token_windows(source.tokenizer, text, 2048, options.windows)
    output = Path(options.output) if options.output else None
    rows: dict[str, Any] = json.loads(output.read_text()) if output and output.is_file() else {}

    def note(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        print(f"{name:60} {row}", flush=True)
        if output:
            output.write_text(json.dumps(rows, indent=2) + "\n")

    if "source" not in rows:
        note("source", {"perplexity": perplexity(load_source(options.source)[0], windows)})
    measured: dict[tuple[str, int], list[LayerStatistics]] = {}

    def statistics(recipe: Recipe) -> list[LayerStatistics]:
        key = recipe.weighting, recipe.sequence_length
        if key not in measured:
            sequences, _ = open_calibration(
                source, [options.calibration], options.calibration_tokens, recipe.sequence_length, None
            )
            with torch.no_grad():
                run = SourceRun(source, family, sequences, recipe.weighting)
                measured[key] = [run.measure(layer).statistics for layer in range(source.config.num_hidden_layers)]
        return measured[key]

    for cache in map(float, options.cache.split(",")):
        for name in names:
            if f"{cache} {name}" in rows:
                continue
            base, changes = CHOICES[name]
            recipe = find_recipe(RECIPES[base], changes)
            if family.latent:
                plan = plan_latent(source.config, cache=cache)
            else:
                plan = plan_conversion(source.config, family.shape(source.config), cache=cache, recipe=recipe)
            with torch.no_grad():
                model, spectra = converted(source, family, plan, recipe, statistics(recipe))
                if name == "ranks by energy":
                    plan = replace(plan, ranks=deal_ranks(spectra, plan.ranks[0]))
                    model, _ = converted(source, family, plan, recipe, statistics(recipe))
            ranks = sorted(set(plan.ranks))
            row = {"rope": plan.rope_dim, "rank": ranks[0] if len(ranks) == 1 else [ranks[0], ranks[-1]]}
            note(f"{cache} {name}", row | {"perplexity": perplexity(model, windows)})
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
