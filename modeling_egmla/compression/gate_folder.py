# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Fit an eviction gate to texts, and save it beside a model's weights with a report: what `egmla gate` does."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from egmla.utils.files import check_writable, write_json
from egmla.utils.perplexity import token_windows
from egmla.utils.progress import Progress, stage_progress
from egmla.utils.provenance import machine, software_versions, weights_sha256
from egmla.utils.streaming import load_model

from .gate import GATE_FILE, LEAST_CONTEXTS, fit_gate
from .reconstruction import INSTRUCTION


GATE_REPORT = "eviction_gate.json"
CONTEXTS, CONTEXT_TOKENS = 24, 512  # of each text


def make_gate(
    folder: Path,
    texts: Mapping[str, str],
    contexts: int = CONTEXTS,
    context_tokens: int = CONTEXT_TOKENS,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit an eviction gate to a model, and save it in the model's folder.

    Args:
        folder (`Path`): of an EG-MLA checkpoint with a tokenizer.
        texts (`Mapping[str, str]`): a plain text of each domain that the gate will serve, by name.
        contexts (`int`): contexts of each text, spread evenly over it.
        context_tokens (`int`): tokens of each.
        device (`str`, *optional*): where to run, by default the GPU if there is one.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `dict`: the report, also written as `eviction_gate.json`: for each text "r2" and "recall" on held-out contexts
        (see `fit_gate`), and what they depend on.

    Raises:
        ValueError: for a model that is no EG-MLA model, too few contexts, and texts that do not fill them.
        OSError: for a folder that is no checkpoint, or cannot be written to.
    """
    if contexts < LEAST_CONTEXTS or context_tokens < 64:
        raise ValueError(
            f"contexts={contexts}, context_tokens={context_tokens}: give at least {LEAST_CONTEXTS} contexts of each "
            "text, of at least 64 tokens."
        )
    if not texts:
        raise ValueError("A gate is fitted to texts: give one of each domain that it will serve.")
    check_writable(folder / GATE_FILE)
    model, tokenizer = load_model(folder, device=device)
    if not hasattr(model.config, "layer_kv_lora_ranks"):
        raise ValueError(f"{folder} holds a {type(model).__name__}: gates are for EG-MLA models; convert it first.")
    chosen = {}
    for name, text in texts.items():
        windows = token_windows(tokenizer, text, context_tokens)
        if len(windows) < contexts:
            raise ValueError(
                f"{name} fills {len(windows)} contexts of {context_tokens} tokens, and {contexts} were asked for: "
                "give a longer text, fewer contexts or shorter ones."
            )
        places = torch.linspace(0, len(windows) - 1, contexts).long()
        chosen[name] = [windows[place : place + 1].to(model.device) for place in places.tolist()]
    instruction = tokenizer(INSTRUCTION, add_special_tokens=False, return_tensors="pt")["input_ids"]
    started = time.perf_counter()
    gate, figures = fit_gate(model, chosen, instruction, stage_progress("score contexts", progress))
    report = {
        "texts": {
            name: {"sha256": hashlib.sha256(text.encode()).hexdigest(), "contexts": contexts, **figures[name]}
            for name, text in texts.items()
        },
        "context_tokens": context_tokens,
        "shares_at_half": [round(share, 4) for share in gate.shares.tolist()],
        "seconds": round(time.perf_counter() - started, 1),
        "weights_sha256": weights_sha256(folder),
        "versions": software_versions(),
        "machine": machine(),
    }
    gate.save(folder)
    write_json(folder / GATE_REPORT, report)
    return report
