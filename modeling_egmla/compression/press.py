# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Presses: while one is on, prompts leave only the more important tokens' entries in the cache.

A press scores tokens; this file decides how many stay in each layer, and drops the others. Their bytes are free.

Shapes: B batch, T new tokens, S entries held, R latent and P rotary key width, D hidden size.

Source: the interface of NVIDIA's kvpress, `with press(model): ...`. There, entries are masked or heads differ; on one
latent for all heads they are dropped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from egmla.cache_egmla import EGMLACache, holds_latents
from egmla.cache_layers_egmla import GrowingLatentLayer
from egmla.eviction_egmla import drop_entries
from egmla.quantized_cache_egmla import QuantizedLatentLayer


SINKS = 4  # first tokens of a text, which much attention goes to (StreamingLLM, arXiv 2309.17453)
WINDOW = 16  # newest tokens
LAYER_BUDGETS = ("global", "equal")


@dataclass
class Reading:
    """What a layer has just read, as presses score it.

    Attributes:
        attention: the layer's attention module.
        hidden_states (`torch.Tensor`): normed inputs `[B, T, D]` of the new tokens.
        gate_input (`torch.Tensor`): what their gates are made of, or `None`.
        position_embeddings (`tuple`): their cosines and sines, or `None`.
        entries (`torch.Tensor`): `[B, 1, S, R + P]` of all tokens held, the new ones last.
        older (`torch.Tensor`): scores `[B, S - T]` of the older ones, given when they were new.
    """

    attention: Any
    hidden_states: torch.Tensor
    gate_input: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    entries: torch.Tensor
    older: torch.Tensor

    @property
    def new_tokens(self) -> int:
        return self.hidden_states.shape[1]

    def keys(self) -> torch.Tensor:
        """Return keys of all heads `[B, H, S, N + P]`."""
        return self.attention.expand_kv(*self.attention.split(self.entries))[0]

    def new_keys(self) -> torch.Tensor:
        """Return keys of all heads `[B, H, T, N + P]` of the new tokens."""
        return self.attention.expand_kv(*self.attention.split(self.entries[:, :, -self.new_tokens :]))[0]

    def weights(self, newest: int) -> torch.Tensor:
        """Return attention weights `[B, H, n, S]` in fp32 of the newest `n` queries of the new tokens."""
        newest = min(newest, self.new_tokens)
        hidden = self.hidden_states[:, -newest:]
        gate_input = None if self.gate_input is None else self.gate_input[:, -newest:]
        tables = self.position_embeddings
        tables = tables and (tables[0][:, :, -newest:], tables[1][:, :, -newest:])
        nope, rope, _, _ = self.attention.project(hidden, gate_input, tables)
        scores = torch.matmul(torch.cat((nope, rope), dim=-1), self.keys().transpose(2, 3)) * self.attention.scaling
        S = scores.shape[-1]
        ahead = torch.ones(newest, S, dtype=torch.bool, device=scores.device).triu(S - newest + 1)
        return scores.float().masked_fill(ahead, -torch.inf).softmax(dim=-1)


class Press:
    """Keeps the best-scored tokens of a prompt in an `EGMLACache`; subclasses say how to score.

    Args:
        keep (`float`, *optional*): share of the tokens that stays, on average over layers, above 0 and at most 1.
        budget (`int`, *optional*): tokens that stay, on average over layers, in place of `keep`.
        sinks (`int`): first tokens that always stay.
        window (`int`): newest tokens that always stay.
        layers (`str` or sequence of `float`): "global" keeps the best of all layers together, for one sequence.
            "equal" keeps as many in each. Numbers, one a layer, keep in proportion to them; `layer_shares` measures
            them.

    Raises:
        ValueError: for a share, a budget or numbers that leave nothing or make no sense.

    Example:

    ```python
    >>> with SnapKVPress(keep=0.5)(model):
    ...     model(ids, past_key_values=cache)
    >>> cache.nbytes
    ```"""

    # By default each layer keeps as many. Scores that can be compared between layers set "global".
    default_layers = "equal"

    def __init__(
        self,
        keep: float | None = None,
        budget: int | None = None,
        sinks: int = SINKS,
        window: int = WINDOW,
        layers: str | Sequence[float] | None = None,
    ):
        if (keep is None) == (budget is None):
            raise ValueError(f"keep={keep}, budget={budget}: give one of them, a share such as 0.5 or tokens.")
        if keep is not None and not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: must be above 0 and at most 1, the share of tokens that stays.")
        if min(sinks, window) < 0 or sinks + window < 1:
            raise ValueError(f"sinks={sinks}, window={window}: must be 0 or more each, and one token together.")
        if budget is not None and budget < sinks + window:
            raise ValueError(
                f"budget={budget} tokens, and the first {sinks} (sinks) and newest {window} (window) always stay: "
                f"give at least {sinks + window}, or fewer of those."
            )
        layers = self.default_layers if layers is None else layers
        if isinstance(layers, str) and layers not in LAYER_BUDGETS:
            raise ValueError(f"layers={layers!r}: must be 'global', 'equal', or a positive number for each layer.")
        if not isinstance(layers, str) and min(layers, default=0) <= 0:
            raise ValueError(f"layers={list(layers)}: must be a positive number for each layer.")
        self.keep, self.budget, self.sinks, self.window, self.layers = keep, budget, sinks, window, layers

    def score(self, reading: Reading) -> torch.Tensor:
        """Return scores `[B, S]` of all tokens held, the larger the more important."""
        raise NotImplementedError

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Press each prompt that `model` reads into a cache, until the block ends.

        A prompt may come in parts. It ends with the first single token, or with the block: a quantised cache gets
        what is left of it then. Until then it is held as it came.

        Raises:
            ValueError: for a model that is under a press already.
        """
        check_model(model, self)
        base = find_decoder(model)
        if getattr(base, "is_pressed", False):
            raise ValueError("This model is under a press already: end that block first, one press drops the tokens.")
        prompt = _Prompt(self, base)
        hooks = [
            base.register_forward_pre_hook(prompt.before, with_kwargs=True),
            base.register_forward_hook(prompt.after, with_kwargs=True),
        ]
        for layer in base.layers:
            hooks.append(layer.self_attn.register_forward_hook(prompt.read_layer, with_kwargs=True))
        base.is_pressed = True
        try:
            yield
        finally:
            base.is_pressed = False
            for hook in hooks:
                hook.remove()
            prompt.end()

    def tokens(self, seen: int) -> float:
        """Return how many tokens stay of `seen`, on average over layers."""
        wanted = float(self.budget) if self.budget is not None else (self.keep or 0) * seen
        return min(seen, max(wanted, self.sinks + self.window))


def check_model(model: Any, press: Press) -> None:
    """Refuse models whose caches cannot be pressed.

    Raises:
        TypeError: for another model than one of this package.
        ValueError: for a gate on expanded keys and values, and for numbers of another number of layers.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "layer_kv_lora_ranks"):
        raise TypeError(f"A press needs an EG-MLA model and got {type(model).__name__}.")
    if config.kv_gate == "expanded":
        raise ValueError(
            "kv_gate='expanded': the gates of all cached tokens are computed from their ids, which are stored once "
            "for all layers, so no layer can drop tokens of its own."
        )
    if not isinstance(press.layers, str) and len(press.layers) != config.num_hidden_layers:
        raise ValueError(f"layers has {len(press.layers)} numbers, and this model {config.num_hidden_layers} layers.")


def find_decoder(model: Any) -> Any:
    """Return the module with the layers: the model itself, or inside of heads and adapters."""
    return next(module for module in model.modules() if hasattr(module, "embed_positions"))


class _Prompt:
    """The prompt that is being read, and the hooks that follow it."""

    def __init__(self, press: Press, base: Any):
        self.press, self.base = press, base
        self.cache: Any = None
        self.scores: list[torch.Tensor] = []
        self.quantized: list[Any] = []  # what takes the place of the staged layers

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds")) if not args else args[0]
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if cache is None or inputs is None:
            self.end()
            return
        if not holds_latents(cache):
            raise TypeError(
                f"A press drops entries of an EGMLACache and got a {type(cache).__name__}; leave past_key_values out "
                "of generate(), or pass EGMLACache(model.config)."
            )
        seen = cache.get_seq_length()
        if not seen:
            self.end()
            self.begin(cache, inputs.shape[0], kwargs.get("attention_mask"))
        elif cache is not self.cache or inputs.shape[1] == 1:
            self.end()

    def begin(self, cache: Any, batch_size: int, attention_mask: Any) -> None:
        """Note a new prompt, and put unquantised layers in the place of quantised ones."""
        if isinstance(attention_mask, torch.Tensor) and not (attention_mask.ndim == 2 and attention_mask.all()):
            raise ValueError(
                "attention_mask hides tokens of the prompt: a press takes sequences of one length, without padding. "
                "Press them one by one."
            )
        if self.press.layers == "global" and batch_size > 1:
            raise ValueError(
                f"{batch_size} sequences with layers='global': each would leave another number of entries in a layer. "
                "Give layers='equal', or the numbers of layer_shares(model, ids, press)."
            )
        if not all(isinstance(layer, GrowingLatentLayer) for layer in cache.layers):
            raise ValueError("A press needs a growing cache: build it without max_cache_len.")
        self.cache, self.scores = cache, [torch.empty(batch_size, 0) for _ in cache.layers]
        self.quantized = []
        if any(isinstance(layer, QuantizedLatentLayer) for layer in cache.layers) and self.press.keep != 1:
            self.quantized = cache.layers
            cache.layers = [
                GrowingLatentLayer(layer.kv_lora_rank, layer.qk_rope_head_dim, layer.layer_idx)
                for layer in cache.layers
            ]

    def read_layer(self, attention: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or cache is not self.cache or self.press.keep == 1:
            return
        held = cache.layers[attention.layer_idx].entries.to_tensor()
        older = self.scores[attention.layer_idx].to(held.device)
        hidden, tables = kwargs["hidden_states"], kwargs.get("position_embeddings")
        reading = Reading(attention, hidden, kwargs.get("gate_input"), tables, held, older)
        with torch.no_grad():
            self.scores[attention.layer_idx] = self.press.score(reading).float()
        if self.press.layers != "global":
            self.drop(attention.layer_idx, self.count(attention.layer_idx))

    def after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Drop entries by one threshold for all layers."""
        if self.cache is None or self.press.layers != "global" or self.press.keep == 1:
            return
        layers = self.cache.layers
        wanted = round(self.press.tokens(layers[0].seen) * len(layers))
        scores = torch.cat([self.protected(layer_idx)[0] for layer_idx in range(len(layers))])
        if wanted >= len(scores):
            return
        best = scores.topk(wanted).indices
        chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        chosen[best] = True
        for layer_idx, own in enumerate(chosen.split([layer.stored for layer in layers])):
            self.drop(layer_idx, max(1, int(own.sum())))

    def count(self, layer_idx: int) -> int:
        """Return how many entries a layer keeps, where that is known beforehand."""
        seen, numbers = self.cache.layers[layer_idx].seen, self.press.layers
        wanted = self.press.tokens(seen)
        if not isinstance(numbers, str):
            wanted = spread(wanted, numbers, self.press.sinks + self.press.window, seen)[layer_idx]
        return round(wanted)

    def protected(self, layer_idx: int) -> torch.Tensor:
        """Return a layer's scores `[B, S]`, infinite where tokens always stay."""
        scores = self.scores[layer_idx].clone()
        scores[:, : self.press.sinks] = torch.inf
        scores[:, max(0, scores.shape[1] - self.press.window) :] = torch.inf
        return scores

    def drop(self, layer_idx: int, count: int) -> None:
        layer = self.cache.layers[layer_idx]
        if count >= layer.stored:
            return
        kept = self.protected(layer_idx).topk(count, dim=1).indices.sort(dim=1).values
        drop_entries(layer, kept)
        self.scores[layer_idx] = self.scores[layer_idx].gather(1, kept)

    def end(self) -> None:
        """Forget the prompt; a quantised cache gets what was kept of it."""
        cache, quantized = self.cache, self.quantized
        self.cache, self.scores, self.quantized = None, [], []
        if cache is None or not quantized:
            return
        staged, cache.layers = cache.layers, quantized
        for idx, (layer, kept) in enumerate(zip(quantized, staged, strict=True)):
            if kept.is_initialized:
                with torch.no_grad():
                    layer.append(*(part.contiguous() for part in kept.entries.split()))
                layer.seen, layer.evicted, layer.first_whole = kept.seen, kept.evicted, kept.first_whole
            staged[idx] = layer  # frees the memory of a layer at a time


def spread(mean: float, numbers: Sequence[float], least: int, most: int) -> list[float]:
    """Return tokens a layer in proportion to numbers, each from `least` to `most`, `mean` on average if it can be."""
    least = min(least, most)
    low, high = 0.0, most * len(numbers) / min(numbers) * len(numbers)
    for _ in range(80):  # the factor by bisection
        factor = (low + high) / 2
        tokens = [min(most, max(least, factor * number)) for number in numbers]
        low, high = (factor, high) if sum(tokens) < mean * len(numbers) else (low, factor)
    return tokens


@torch.no_grad()
def layer_shares(model: Any, sequences: Sequence[torch.Tensor], press: Press, chunk: int = 2048) -> list[float]:
    """Return each layer's share of the tokens that a press keeps by one threshold for all layers, averaged over texts.

    With them lengths are known beforehand, so that batches and beams can be pressed: `Press(layers=shares)`.

    Args:
        model: an EG-MLA model.
        sequences (`Sequence[torch.Tensor]`): ids `[1, T]` of texts.
        press (`Press`): with `layers="global"`.
        chunk (`int`): tokens read at a time.

    Raises:
        ValueError: without texts, or for a press of another kind.
    """
    if press.layers != "global" or not sequences:
        raise ValueError("layer_shares needs texts, and a press with layers='global'.")
    found = torch.zeros(model.config.num_hidden_layers)
    for ids in sequences:
        cache: Any = EGMLACache(model.config, bits=16)
        with press(model):
            for part in ids.split(chunk, dim=1):
                model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found += torch.tensor([layer.stored / ids.shape[1] for layer in cache.layers])
    return (found / len(sequences)).tolist()
