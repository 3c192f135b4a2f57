# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Scores by reconstruction: a token matters if the model looks at it while it repeats its context.

Nothing is known of later questions, so one compressed context serves all of them. It costs a second reading of the
prompt, each part behind the whole of it. Gates (`gate.py`) learn to predict these scores.

Source: KVzip (arXiv 2505.23416), equation 2, with the softmax over the whole context. Heads are summed: one entry
serves all of them.
"""

from collections.abc import Callable
from typing import Any

import torch

from egmla.cache_egmla import EGMLACache
from egmla.utils.reading import read_in_chunks

from .press import Press, Reading, find_decoder


INSTRUCTION = "\n\nRepeat the previous context exactly.\n\n"
PART_TOKENS = 512  # of the context, repeated at a time


@torch.no_grad()
def reconstruction_scores(
    model: Any,
    ids: torch.Tensor,
    instruction: torch.Tensor,
    part: int = PART_TOKENS,
    observe: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Return how much each token of a context is looked at, at most, while the context is repeated.

    Args:
        model: an EG-MLA model.
        ids (`torch.Tensor`): the context `[1, T]`.
        instruction (`torch.Tensor`): ids `[1, I]` that ask to repeat it, `INSTRUCTION` by the model's tokenizer.
        part (`int`): tokens repeated at a time.
        observe (`Callable`, *optional*): called with (layer index, normed inputs `[n, D]`) while the context is read.

    Returns:
        `torch.Tensor`: `[layers, T]` in fp32, largest attention weights, summed over heads.

    Raises:
        ValueError: for more than one sequence.
    """
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"ids has shape {tuple(ids.shape)}: one context at a time, [1, T].")
    config, context = model.config, ids.shape[1]
    cache = EGMLACache(config, bits=16, expected_tokens=context + instruction.shape[1] + part)
    found = torch.zeros(config.num_hidden_layers, config.num_attention_heads, context, device=ids.device)

    def look(attention: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        layer_idx, hidden = attention.layer_idx, kwargs["hidden_states"]
        if cache.layers[layer_idx].stored <= context:
            if observe is not None:
                observe(layer_idx, hidden[0])
            return
        held = cache.layers[layer_idx].entries.to_tensor()
        tables, gate_input = kwargs.get("position_embeddings"), kwargs.get("gate_input")
        reading = Reading(attention, hidden, gate_input, tables, held, found.new_empty(1, 0))
        most = reading.weights(hidden.shape[1])[0, :, :, :context].amax(dim=1)
        torch.maximum(found[layer_idx], most, out=found[layer_idx])

    hooks = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in find_decoder(model).layers]
    try:
        read_in_chunks(model, ids, cache, part)
        for piece in ids.split(part, dim=1):
            again = torch.cat((instruction.to(ids.device), piece), dim=1)
            model(again, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-again.shape[1])
    finally:
        for hook in hooks:
            hook.remove()
    return found.sum(dim=1)


class GivenScoresPress(Press):
    """Keeps the tokens with the largest of given scores, such as `reconstruction_scores`.

    Args:
        scores (`torch.Tensor`): `[layers, T]` of the prompt that will be read, one sequence.
        options: as of `Press`.
    """

    default_layers = "global"

    def __init__(self, scores: torch.Tensor, **options: Any):
        super().__init__(**options)
        self.scores = scores
        self._read: dict[int, int] = {}  # tokens that each layer has read

    def score(self, reading: Reading) -> torch.Tensor:
        # Once some were dropped, tokens held are fewer than tokens read.
        layer_idx, new = reading.attention.layer_idx, reading.new_tokens
        start = self._read.get(layer_idx, 0) if reading.older.shape[1] else 0
        if start + new > self.scores.shape[1]:
            raise ValueError(
                f"The prompt has more than the {self.scores.shape[1]} tokens that scores were given for; give scores "
                "of this prompt."
            )
        self._read[layer_idx] = start + new
        own = self.scores[layer_idx, start : start + new].to(reading.entries.device)
        return torch.cat((reading.older, own.expand(reading.older.shape[0], -1)), dim=1)
