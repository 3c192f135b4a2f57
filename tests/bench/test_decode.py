"""Timing of decode steps: synthetic caches of known size, interleaved contestants, statistics by hand."""

import pytest
import torch
from shapes import CONFIGS, build

from egmla.bench.decode import DecodeTiming, synthetic_cache, time_decode
from egmla.utils.accounting import cache_nbytes


@pytest.fixture(params=CONFIGS)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("context", [1, 2, 700])
def test_synthetic_cache_has_the_stated_length(kind, context):
    cache = synthetic_cache(build(kind), context, batch_size=2)
    assert cache.get_seq_length() == context
    used, allocated = cache_nbytes(cache)
    assert used == 2 * context * 2 * CONFIGS[kind][1] * 4
    assert used <= allocated <= 1.25 * used + 2 * 2 * 64 * CONFIGS[kind][1] * 4
    assert all(torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all() for layer in cache.layers)


def test_synthetic_cache_wants_positive_numbers():
    with pytest.raises(ValueError, match="context=0"):
        synthetic_cache(build("egmla"), 0)


def test_contestants_are_interleaved():
    models = {kind: build(kind) for kind in CONFIGS}
    order = []
    for kind, model in models.items():
        model.register_forward_pre_hook(lambda *_, kind=kind: order.append(kind))
    done = []
    timings = time_decode(
        models, 50, steps=3, rounds=2, warmup=1, batch_size=2, progress=lambda *counts: done.append(counts)
    )
    # One forward each to make a cache, then rounds of 1 + 3 steps each.
    assert order == list(CONFIGS) + [kind for _ in range(2) for kind in CONFIGS for _ in range(4)]
    assert done[-1] == (6, 6)
    for kind, timing in timings.items():
        assert len(timing.seconds) == 6
        assert timing.p10 <= timing.median <= timing.p90
        assert timing.cache_used_bytes == 2 * 50 * 2 * CONFIGS[kind][1] * 4


def test_timing_figures():
    rounds = [[0.1 * step for step in steps] for steps in (range(1, 6), range(6, 12))]
    timing = DecodeTiming(context=10, batch_size=3, rounds=rounds)
    assert timing.median == pytest.approx(0.6)
    assert (timing.p10, timing.p90) == (pytest.approx(0.2), pytest.approx(1.0))
    assert timing.tokens_per_second == pytest.approx(5.0)
    with pytest.raises(ValueError, match="rounds=0"):
        time_decode({}, 10, rounds=0)
