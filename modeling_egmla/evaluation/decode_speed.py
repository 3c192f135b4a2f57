"""Decode speed at a stated context: synthetic past, single-token steps, contestants taking turns.

A prompt of that length would take minutes to read and says nothing about decoding, so the cache is filled with random
entries of the size real ones have. Turns (A, B, C, A, B, C, ...) let a machine's drift hit all contestants alike.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from egmla import EGMLACache

from .accounting import cache_nbytes


@dataclass
class DecodeTiming:
    """What was timed for one contestant.

    Attributes:
        context (`int`): tokens in the cache when a turn starts.
        batch_size (`int`): sequences decoded at once.
        seconds (`list[float]`): each step, all turns.
        cache_used_bytes, cache_allocated_bytes (`int`): of the filled cache.
    """

    context: int
    batch_size: int = 1
    seconds: list[float] = field(default_factory=list)
    cache_used_bytes: int = 0
    cache_allocated_bytes: int = 0

    @property
    def median(self) -> float:
        """Seconds of a step, median."""
        return statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        """Seconds that a tenth of the steps stay below."""
        return self._decile(0)

    @property
    def p90(self) -> float:
        """Seconds that nine tenths of the steps stay below."""
        return self._decile(8)

    def _decile(self, index: int) -> float:
        if len(self.seconds) < 2:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=10, method="inclusive")[index]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole batch, from the median step."""
        return self.batch_size / self.median


@torch.no_grad()
def synthetic_cache(
    model: PreTrainedModel, context: int, batch_size: int = 1, seed: int = 0, max_cache_len: int | None = None
) -> Cache:
    """A cache of the model's own default kind holding `context` tokens of random entries.

    With `max_cache_len` it is a fixed-size one, which EG-MLA models have.

    The model reads one token, which shows each layer's shape, dtype and scale; normal noise of that scale follows.

    Raises:
        ValueError: when `context` or `batch_size` is not positive.
    """
    if context < 1 or batch_size < 1:
        raise ValueError(f"context={context} and batch_size={batch_size}: both must be at least 1.")
    ids = torch.zeros((batch_size, 1), dtype=torch.long, device=model.device)
    # Uncompiled: this is another graph than the step to be timed.
    model = getattr(model, "_orig_mod", model)
    config: Any = model.config
    fixed = None if max_cache_len is None else EGMLACache(config, max_cache_len=max_cache_len)
    cache = model(ids, use_cache=True, past_key_values=fixed).past_key_values
    if context == 1:
        return cache
    generator = torch.Generator(model.device).manual_seed(seed)
    for index, layer in enumerate(cache.layers):
        # DynamicCache holds keys and values, EGMLACache latents and rotary keys, under the same names.
        entries = [
            _noise_like(tensor, (*tensor.shape[:-2], context - 1, tensor.shape[-1]), generator)
            for tensor in (layer.keys, layer.values)
        ]
        if hasattr(cache, "append"):
            cache.append(*entries, index)
        else:
            cache.update(*entries, index)
    return cache


def _noise_like(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    scale = float(tensor.float().square().mean().sqrt()) if tensor.numel() else 0.0
    return torch.randn(shape, generator=generator, device=tensor.device).mul_(scale).to(tensor.dtype)


@torch.no_grad()
def time_decode(
    models: Mapping[str, PreTrainedModel],
    context: int,
    *,
    steps: int = 8,
    rounds: int = 4,
    warmup: int = 2,
    batch_size: int = 1,
    fixed_size: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, DecodeTiming]:
    """Times single-token decode steps of several models at one context, in turns.

    Args:
        models (`Mapping[str, PreTrainedModel]`): the contestants by name.
        context (`int`): tokens in each cache when a turn starts; a turn ends `warmup + steps` tokens further.
        steps (`int`): timed steps of a turn.
        rounds (`int`): turns of each contestant.
        warmup (`int`): steps before the timed ones of each turn (other contestants have used the processor's caches).
        batch_size (`int`): sequences decoded at once.
        fixed_size (`Collection[str]`): EG-MLA contestants that get a fixed-size cache, as compiled ones need it.
        progress (*optional*): called with (turns done, turns in all).

    Returns:
        `dict[str, DecodeTiming]`: the steps timed for each model.

    Raises:
        ValueError: when a count is not positive.
    """
    if steps < 1 or rounds < 1 or warmup < 0:
        raise ValueError(f"steps={steps}, rounds={rounds}, warmup={warmup}: at least 1, 1 and 0 are required.")
    room = context + warmup + steps
    caches = {
        name: synthetic_cache(model, context, batch_size, max_cache_len=room if name in fixed_size else None)
        for name, model in models.items()
    }
    timings = {}
    for name, cache in caches.items():
        used, allocated = cache_nbytes(cache)
        timings[name] = DecodeTiming(context, batch_size, [], used, allocated)
    done = 0
    for _ in range(rounds):
        for name, model in models.items():
            timings[name].seconds += _turn(model, caches[name], steps, warmup, batch_size)
            caches[name].crop(-(warmup + steps))
            done += 1
            if progress is not None:
                progress(done, rounds * len(models))
    return timings


def _turn(model: PreTrainedModel, cache: Cache, steps: int, warmup: int, batch_size: int) -> list[float]:
    """Seconds of each timed step: one forward pass and the choice of the next token, as greedy decoding does it."""
    token = torch.zeros((batch_size, 1), dtype=torch.long, device=model.device)
    seconds = []
    for step in range(warmup + steps):
        _synchronize(model.device)
        start = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
        _synchronize(model.device)
        if step >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
