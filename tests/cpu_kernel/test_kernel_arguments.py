"""The CPU kernel's operators: arguments they refuse, and their description for `torch.compile`."""

import pytest
import torch
from cases import needs_compiler


pytestmark = needs_compiler


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent": (2, 1, 5, 17)}, "latents must be"),
        ({"latent": (2, 1, 4, 16)}, "latents must be"),
        ({"latent": (2, 5, 16)}, "latents must be"),
        ({"rope_key": (1, 1, 5, 8)}, "latents must be"),
        ({"start": -1}, "latents must be"),
        ({"start": 5}, r"codes must be \[B, 1, 10 or more, W\]"),
        ({"codes": (2, 9, 24)}, "codes must be"),
        ({"codes": (1, 1, 9, 24)}, "codes must be"),
        ({"scales": (2, 1, 8, 3)}, "scales must be"),
        ({"scales": (2, 1, 9, 5)}, "groups divide"),
        ({"scales": (2, 1, 9, 0)}, "scales must be"),
    ],
)
def test_write_int8_refuses_other_shapes(folder, change, message):
    shapes = {"latent": (2, 1, 5, 16), "rope_key": (2, 1, 5, 8), "codes": (2, 1, 9, 24), "scales": (2, 1, 9, 3)}
    dtypes = {"codes": torch.int8, "scales": torch.bfloat16}
    given = {name: torch.zeros(change.get(name, shape), dtype=dtypes.get(name)) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.egmla.write_int8(*given.values(), change.get("start", 4))


def test_write_int8_refuses_rows_that_are_not_contiguous(folder):
    codes, scales = torch.zeros(2, 1, 10, 24, dtype=torch.int8), torch.zeros(2, 1, 5, 3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="codes must be"):
        torch.ops.egmla.write_int8(torch.zeros(2, 1, 5, 16), torch.zeros(2, 1, 5, 8), codes[:, :, ::2], scales, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"entries": torch.zeros(2, 1, 50, 23)}, "queries must be"),
        ({"entries": torch.zeros(3, 1, 50, 24)}, "entries must be"),
        ({"entries": torch.zeros(2, 1, 24, 50).mT}, "entries must be"),
        ({"entries": torch.zeros(2, 50, 24)}, "entries must be"),
        ({"entries": torch.zeros(2, 1, 50, 24, dtype=torch.float64)}, "must be of float32"),
        ({"mask": torch.ones(2, 1, 1, 49, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 50, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 1, 1, 50)}, "mask must be"),
        ({"query": torch.zeros(2, 4, 2, 24)}, "queries must be"),
        ({"query": torch.zeros(2, 4, 24)}, "queries must be"),
        ({"rank": 25}, "the latent no wider"),
        ({"rank": 0}, "the latent no wider"),
    ],
)
def test_latent_attention_refuses_other_shapes(folder, change, message):
    given = {"query": torch.zeros(2, 4, 1, 24), "entries": torch.zeros(2, 1, 50, 24), "mask": None} | change
    rank = given.pop("rank", 16)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.egmla.latent_attention(*given.values(), 0.3, rank)


@pytest.mark.parametrize(
    "codes, scales, tokens",
    [
        ((1, 1, 5, 8), (1, 1, 5, 0), 5),
        ((1, 1, 5, 8), (1, 1, 4, 2), 5),
        ((1, 1, 5, 8), (1, 1, 5, 3), 5),
        ((1, 1, 5, 8), (1, 1, 5, 2), 6),
        ((1, 1, 5, 8), (1, 1, 5, 2), -1),
        ((1, 5, 8), (1, 5, 2), 5),
    ],
)
def test_latent_attention_int8_refuses_other_shapes(folder, codes, scales, tokens):
    given = torch.zeros(codes, dtype=torch.int8), torch.zeros(scales, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="egmla: "):
        torch.ops.egmla.latent_attention_int8(torch.zeros(1, 4, 1, 8), *given, tokens, None, 0.3, 4)


@pytest.mark.parametrize(
    "kept, codes, scales, first, groups",
    [
        ((1, 1, 5, 8), (1, 1, 3, 15), (1, 1, 3, 16), 4, 3),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 3, 15), 4, 3),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 2, 16), 4, 3),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 3, 16), 4, 4),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 3, 16), 6, 3),
        ((1, 1, 5, 8), (2, 1, 3, 16), (2, 1, 3, 16), 4, 3),
        ((1, 1, 5, 6), (1, 1, 3, 16), (1, 1, 3, 16), 4, 3),
    ],
)
def test_latent_attention_int4_refuses_other_shapes(folder, kept, codes, scales, first, groups):
    given = torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="egmla: "):
        torch.ops.egmla.latent_attention_int4(
            torch.zeros(1, 4, 1, 8), torch.zeros(kept), first, *given, groups, None, 0.3, 4
        )


@pytest.mark.parametrize(
    "change",
    [
        {"kept": torch.zeros(1, 1, 5, 4)},
        {"kept": torch.zeros(3, 1, 5, 5)},
        {"kept": torch.zeros(2, 1, 1, 5)},
        {"dropped": torch.zeros(2, 1, 2, 2)},
        {"dropped": torch.zeros(2, 1, 3, 3)},
        {"dropped": torch.zeros(2, 1, 2, 3).bfloat16()},
        {"order": torch.arange(1, 9)},
        {"order": torch.arange(7)},
        {"first": 6},
        {"first": -1},
        {"codes": torch.zeros(2, 1, 3, 17, dtype=torch.uint8)},
        {"ranges": torch.zeros(2, 1, 3, 9, dtype=torch.uint8)},
        {"groups": 4},
        {"size": 12},
        {"size": 0},
        {"runs": [4, 3, 2, 1]},
        {"runs": [3, 3, 2, 2]},
        {"runs": [5, 2, 2, 3]},
        {"runs": [4, 3, 2, 3, 1, -1]},
        {"runs": [4, 3, 2]},
        {"latents": 5},
        {"latents": 2},
    ],
)
def test_latent_attention_allocated_refuses_other_shapes(folder, change):
    given = {"query": torch.zeros(2, 4, 1, 8), **allocated_arguments()} | change
    with pytest.raises(RuntimeError, match="egmla: "):
        torch.ops.egmla.latent_attention_allocated(*given.values(), None, 0.3, 4)


def allocated_arguments():
    """Arguments between query and mask: three of four latent channels, one of two rotary pairs, two first tokens."""
    return {
        "kept": torch.randn(2, 1, 5, 5),
        "dropped": torch.randn(2, 1, 2, 3),
        "order": torch.tensor([0, 1, 2, 4, 6, 3, 5, 7]),
        "first": 2,
        "codes": torch.randint(0, 256, (2, 1, 3, 16), dtype=torch.uint8),
        "ranges": torch.randint(90, 130, (2, 1, 3, 10), dtype=torch.uint8),
        "groups": 2,
        "size": 8,
        "runs": [4, 3, 2, 2],
        "latents": 3,
    }


def test_operators_are_described_correctly(folder):
    """Arguments that are written to, shapes of results, and sizes that may change between calls."""
    query = torch.randn(2, 4, 1, 24)
    codes = torch.randint(-128, 128, (2, 1, 9, 24), dtype=torch.int8)
    scales = torch.rand(2, 1, 9, 3).bfloat16()
    packed = torch.randint(0, 256, (2, 1, 3, 8 * 12), dtype=torch.uint8)
    factors = torch.rand(2, 1, 3, 48).bfloat16()
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    for name, arguments in {
        "latent_attention": (query, torch.randn(2, 1, 9, 24), mask, 0.3, 16),
        "latent_attention_int8": (query, codes, scales, 7, None, 0.3, 16),
        "latent_attention_int4": (query, torch.randn(2, 1, 5, 24), 4, packed, factors, 2, None, 0.3, 16),
        "latent_attention_allocated": (torch.randn(2, 4, 1, 8), *allocated_arguments().values(), None, 0.3, 4),
        "write_int8": (torch.randn(2, 1, 3, 16), torch.randn(2, 1, 3, 8), codes, scales, 4),
    }.items():
        torch.library.opcheck(getattr(torch.ops.egmla, name).default, arguments)
