"""Count the facts that a model retrieves from contexts whose cache was pressed, for each press.

    egmla convert SmolLM2-135M-Instruct.Q4_1.gguf eighth --cache 0.125 --calibration wikitext2-raw-train-first1mb.txt
    egmla gate eighth --data wikitext2-raw-train-first1mb.txt --data gutenberg-children-valid.txt
    python tests/benchmarks/presses.py eighth --length 512 --keep 0.5,0.3

Each context is read once, pressed, and asked eight questions that the press has not seen. With `--bits 0.125` what is
kept is quantised afterwards; by default entries are held as they are. Presses that need a gate take that of the
folder. The last line of the output is one JSON object.
"""

import argparse
import copy
import json
import time
from contextlib import nullcontext

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from egmla import EGMLACache
from egmla.compression import (
    INSTRUCTION,
    PRESSES,
    EvictionGate,
    GatePress,
    GivenScoresPress,
    reconstruction_scores,
)
from egmla.samples import sample_text
from egmla.utils.provenance import software_versions
from egmla.utils.reading import read_in_chunks
from egmla.utils.retrieval import ask, make_passages, token_counter


def make_presses(model, instruction, contexts, gate, keep: float) -> dict:
    """Return, by name, a function of a context's number that makes its press."""
    scores: dict[int, torch.Tensor] = {}

    def given(number: int, **options) -> GivenScoresPress:
        if number not in scores:
            scores[number] = reconstruction_scores(model, contexts[number], instruction)
        return GivenScoresPress(scores[number], keep=keep, **options)

    presses = {
        "reconstruction": given,
        "reconstruction, equal layers": lambda number: given(number, layers="equal"),
        **{name: lambda number, kind=kind: kind(keep=keep) for name, kind in PRESSES.items()},
    }
    if gate is not None:
        presses["gate"] = lambda number: GatePress(gate, keep=keep)
        presses["gate, its shares"] = lambda number: GatePress(gate, keep=keep, layers=gate.shares.tolist())
    return presses


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="an EG-MLA checkpoint with a tokenizer")
    parser.add_argument("--length", type=int, default=512, help="tokens of a context")
    parser.add_argument("--passages", type=int, default=6, help="contexts, eight questions each")
    parser.add_argument("--keep", default="0.5,0.3", help="shares of the tokens")
    parser.add_argument("--bits", type=float, default=16, help="of EGMLACache")
    parser.add_argument("--presses", default="", help="names, with commas; all by default")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    count = token_counter(tokenizer)
    passages = make_passages(sample_text("evaluation"), options.length, options.passages, count_tokens=count)
    contexts = [tokenizer(passage.context, return_tensors="pt", verbose=False)["input_ids"] for passage in passages]
    instruction = tokenizer(INSTRUCTION, add_special_tokens=False, return_tensors="pt")["input_ids"]
    try:
        gate = EvictionGate.load(options.folder, model.config)
    except FileNotFoundError:
        gate = None

    def measure(make_press) -> dict:
        hits, nbytes, started = [], 0, time.perf_counter()
        for number, (passage, ids) in enumerate(zip(passages, contexts, strict=True)):
            cache = EGMLACache(model.config, bits=options.bits)
            with nullcontext() if make_press is None else make_press(number)(model):
                read_in_chunks(model, ids, cache, options.length)
            nbytes += cache.nbytes
            hits += [ask(model, tokenizer, copy.deepcopy(cache), question) for question in passage.questions]
        return {
            "hits": sum(hits),
            "questions": len(hits),
            "bytes": nbytes,
            "seconds": round(time.perf_counter() - started),
        }

    rows = {"whole cache": measure(None)}
    wanted = [name.strip() for name in options.presses.split(",") if name.strip()]
    for keep in map(float, options.keep.split(",")):
        presses = make_presses(model, instruction, contexts, gate, keep)
        if unknown := set(wanted) - presses.keys():
            parser.error(f"unknown presses {sorted(unknown)}; known are {', '.join(presses)}")
        for name in wanted or presses:
            rows[f"{name}, keep {keep:g}"] = measure(presses[name])
            print(f"{name}, keep {keep:g}: {rows[f'{name}, keep {keep:g}']}", flush=True)
    print(json.dumps({"settings": vars(options), "rows": rows, "software": software_versions()}))


if __name__ == "__main__":
    main()
