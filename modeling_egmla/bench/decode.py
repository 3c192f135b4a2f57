"""Time decoding and prefill: single-token steps at a given context, with contestants interleaved.

Reading a prompt of that length would take minutes and says nothing about decoding. So the cache is filled with random
entries of realistic size. Contestants are interleaved (A, B, C, A, B, C, ...), so that a machine's drift hits all of
them alike. Times of one round make pairs.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from egmla.cache_egmla import holds_latents
from egmla.utils.accounting import cache_id_bytes, cache_nbytes
from egmla.utils.timing import Timer


# Makes an empty cache of a model, for a number of tokens; None stands for the model's own default.
CacheMaker = Callable[[PreTrainedModel, int], Cache]


@dataclass
class DecodeTiming:
    """Times of one contestant.

    Attributes:
        context (`int`): tokens in the cache at the start of each round.
        batch_size (`int`): sequences decoded at once.
        rounds (`list[list[float]]`): seconds of each step of each round.
        cache_used_bytes, cache_allocated_bytes (`int`): bytes of the filled cache.
    """

    context: int
    batch_size: int = 1
    rounds: list[list[float]] = field(default_factory=list)
    cache_used_bytes: int = 0
    cache_allocated_bytes: int = 0

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step, of all rounds."""
        return [step for round_ in self.rounds for step in round_]

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        """Tenth percentile of the seconds of a step."""
        return self._decile(0)

    @property
    def p90(self) -> float:
        """Ninetieth percentile of the seconds of a step."""
        return self._decile(8)

    def _decile(self, index: int) -> float:
        if len(self.seconds) < 2:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=10, method="inclusive")[index]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole batch, from the median step."""
        return self.batch_size / self.median


def pair_ratios(ours: DecodeTiming, theirs: DecodeTiming) -> list[float]:
    """Ratio of their median step time to ours, one per round."""
    pairs = zip(ours.rounds, theirs.rounds, strict=True)
    return [statistics.median(their_steps) / statistics.median(our_steps) for our_steps, their_steps in pairs]


@torch.no_grad()
def synthetic_cache(
    model: PreTrainedModel, context: int, batch_size: int = 1, seed: int = 0, cache: Cache | None = None
) -> Cache:
    """Fill a cache with `context` tokens of random entries, the same for each sequence.

    The model reads one token, which shows each layer's shape, dtype and scale. Normal noise of that scale follows.

    Args:
        model (`PreTrainedModel`): the model that will read the cache.
        context (`int`): tokens.
        batch_size (`int`): sequences.
        seed (`int`): seed of the noise.
        cache (`Cache`, *optional*): an empty cache to fill; by default a new one of the model's default class.

    Raises:
        ValueError: when `context` or `batch_size` is not positive.
    """
    if context < 1 or batch_size < 1:
        raise ValueError(f"context={context} and batch_size={batch_size}: both must be at least 1.")
    ids = torch.zeros((batch_size, 1), dtype=torch.long, device=model.device)
    # Uncompiled: this would be another graph than the step to be timed.
    model = getattr(model, "_orig_mod", model)
    filled: Any = model(ids, use_cache=True, past_key_values=cache).past_key_values
    if context == 1:
        return filled
    generator = torch.Generator(model.device).manual_seed(seed)
    if cache_id_bytes(model.config):
        shape = (batch_size, context - 1)
        filled.append_token_ids(
            torch.randint(model.config.vocab_size, shape, generator=generator, device=model.device)
        )
    for index, layer in enumerate(filled.layers):
        # DynamicCache holds keys and values, EGMLACache latents and rotary keys, under the same names. Static layers
        # have empty slots after them.
        entries = [_noise_like(tensor[..., :1, :], context - 1, generator) for tensor in (layer.keys, layer.values)]
        if holds_latents(filled):
            filled.append(*entries, index)
        else:
            filled.update(*entries, index)
    return filled


def _noise_like(tensor: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Make `tokens` tokens of noise at the scale of `tensor` `[B, H, 1, width]`; all sequences share its memory."""
    scale = float(tensor.float().square().mean().sqrt()) if tensor.numel() else 0.0
    shape = (1, *tensor.shape[1:-2], tokens, tensor.shape[-1])
    noise = torch.randn(shape, generator=generator, device=tensor.device).mul_(scale).to(tensor.dtype)
    return noise.expand(tensor.shape[0], *shape[1:])


def rewind(cache: Cache, tokens: int) -> None:
    """Drop the last `tokens` tokens of a cache. Static caches too, which Transformers cannot crop."""
    layers: Any = cache.layers
    for layer in layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(tokens)  # in place: compiled graphs hold its address
        else:
            layer.crop(-tokens)


@torch.no_grad()
def time_decode(
    models: Mapping[str, PreTrainedModel],
    context: int,
    *,
    caches: Mapping[str, CacheMaker | None] | None = None,
    steps: int = 8,
    rounds: int = 4,
    warmup: int = 2,
    first_warmup: int | None = None,
    batch_size: int = 1,
    turn_seconds: float = math.inf,
    before_round: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, DecodeTiming]:
    """Time single-token decode steps of several models at one context, interleaved.

    Args:
        models (`Mapping[str, PreTrainedModel]`): the contestants by name.
        context (`int`): tokens in each cache at the start of a round, which adds `warmup + steps` tokens.
        caches (`Mapping[str, CacheMaker]`, *optional*): makes a contestant's cache; the model's default without one.
        steps (`int`): timed steps of a contestant in a round.
        rounds (`int`): rounds, in each of which every contestant is timed once.
        warmup (`int`): untimed steps before them, as other contestants have used the processor's caches.
        first_warmup (`int`, *optional*): the same in the first round, which needs more.
        batch_size (`int`): sequences decoded at once.
        turn_seconds (`float`): a contestant that takes longer in a round stops after the current step, with at
            least one timed step.
        before_round (*optional*): called before each round.
        progress (*optional*): called with (contestants timed, in total) of all rounds.

    Returns:
        `dict[str, DecodeTiming]`: the steps timed for each model.

    Raises:
        ValueError: when a count is not positive.
    """
    first_warmup = warmup if first_warmup is None else first_warmup
    if steps < 1 or rounds < 1 or min(warmup, first_warmup) < 0:
        raise ValueError(
            f"steps={steps}, rounds={rounds}, warmup={warmup}, first_warmup={first_warmup}: at least 1, 1, 0 and 0 "
            "are required."
        )
    room = context + max(warmup, first_warmup) + steps
    filled, timings = {}, {}
    for name, model in models.items():
        maker = (caches or {}).get(name)
        cache = None if maker is None else maker(getattr(model, "_orig_mod", model), room)
        filled[name] = synthetic_cache(model, context, batch_size, cache=cache)
        timings[name] = DecodeTiming(context, batch_size, [], *cache_nbytes(filled[name]))
    done = 0
    for round_ in range(rounds):
        if before_round is not None:
            before_round()
        for name, model in models.items():
            unmeasured = warmup if round_ else first_warmup
            timings[name].rounds.append(time_steps(model, filled[name], steps, unmeasured, batch_size, turn_seconds))
            rewind(filled[name], int(filled[name].get_seq_length()) - context)
            done += 1
            if progress is not None:
                progress(done, rounds * len(models))
    return timings


@torch.no_grad()
def time_steps(
    model: PreTrainedModel, cache: Cache, steps: int, warmup: int, batch_size: int = 1, turn_seconds: float = math.inf
) -> list[float]:
    """Time the steps of one contestant in one round, in seconds.

    A step is a forward pass and the greedy choice of the next token.
    """
    timer = Timer(model.device)
    token = torch.zeros((batch_size, 1), dtype=torch.long, device=model.device)

    def step(token: torch.Tensor) -> torch.Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)

    timed: list[float] = []
    spent = 0.0
    for index in range(warmup + steps):
        token, seconds = timer.measure(lambda token=token: step(token))  # type: ignore[misc]
        spent += seconds
        if index >= warmup:
            timed.append(seconds)
            if spent > turn_seconds:
                break
    return timed


@torch.no_grad()
def time_prefill(
    models: Mapping[str, PreTrainedModel],
    tokens: int,
    *,
    caches: Mapping[str, CacheMaker | None] | None = None,
    rounds: int = 3,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Time how each model reads a prompt of `tokens` tokens into an empty cache, interleaved.

    Args:
        models, caches, batch_size, progress: as in `time_decode`.
        tokens (`int`): tokens of each prompt.
        rounds (`int`): timed rounds, after an untimed one.

    Returns:
        `dict[str, list[float]]`: seconds of each round.

    Raises:
        ValueError: when a count is not positive.
    """
    if tokens < 1 or rounds < 1 or batch_size < 1:
        raise ValueError(f"tokens={tokens}, rounds={rounds}, batch_size={batch_size}: all must be at least 1.")
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    done = 0
    for round_ in range(rounds + 1):
        for name, model in models.items():
            ids = torch.randint(model.config.vocab_size, (batch_size, tokens), generator=generator)
            ids = ids.to(model.device)
            maker = (caches or {}).get(name)
            cache = None if maker is None else maker(model, tokens)
            work = _reading(model, ids, cache)
            _, taken = Timer(model.device).measure(work)
            if round_:
                seconds[name].append(taken)
            done += 1
            if progress is not None:
                progress(done, (rounds + 1) * len(models))
    return seconds


def _reading(model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None) -> Callable[[], None]:
    def read() -> None:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return read
