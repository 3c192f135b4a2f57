"""Codes with a bit width for each channel: packing bit by bit, what rounding may cost, what is no finite number."""

import pytest
import torch

from egmla.channel_codes_egmla import (
    CLIPPED_RANGE,
    PLANES,
    dequantize_channels,
    encode,
    highest_code,
    pack,
    quantize_channels,
    steps_and_starts,
    unpack,
    unpack_ranges,
    unpack_runs,
)


RUNS = ((8, 3), (6, 4), (4, 5), (3, 7), (2, 2), (1, 1), (0, 2))
WIDTHS = sorted(PLANES)


def dequantized(entries, bits):
    codes, stored = quantize_channels(entries, bits)
    steps, starts = steps_and_starts(stored, highest_code(bits))
    return codes.double() * steps.double() + starts.double()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", [8, 24, 64])
def test_packing_bit_by_bit(group, bits):
    """Each plane's fields are where the docstring says, in no more bytes than bits; unpacking is the inverse."""
    codes = torch.randint(2**bits, (2, 3, group, 5), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, group * bits // 8, 5)
    found, first_row, place = torch.zeros_like(codes, dtype=torch.int), 0, 0
    for width in PLANES[bits]:
        rows = group * width // 8
        for token in range(group):
            byte = packed[:, :, first_row + token % rows].int()
            found[:, :, token] += byte // 2 ** (width * (token // rows)) % 2**width * 2**place
        first_row, place = first_row + rows, place + width
    assert first_row == packed.shape[2] and place == bits
    assert torch.equal(found, codes.int())
    given = torch.full_like(codes, 255)
    unpack(packed, bits, given)
    assert torch.equal(given, codes)


def test_runs_are_coded_each_by_itself():
    """Channels in runs give what each run gives alone, and fill the bytes of their bits."""
    entries = torch.randn(2, 3, 16, 24) * torch.logspace(-2, 2, 24)
    packed, ranges = encode(entries, RUNS)
    assert packed.shape == (2, 3, sum(16 * bits // 8 * count for bits, count in RUNS))
    assert ranges.shape == (2, 3, 48) and ranges.dtype == torch.uint8
    out = torch.empty(2, 3, 16, 24)
    given = dequantize_channels(unpack_runs(packed, RUNS, 16), *unpack_ranges(ranges, RUNS), out)
    assert given is out
    runs = entries.split([count for _, count in RUNS], dim=-1)
    expected = torch.cat([dequantized(run, bits) for (bits, _), run in zip(RUNS, runs, strict=True)], dim=-1)
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_runs_are_no_bytes():
    packed, ranges = encode(torch.randn(2, 3, 16, 0), ())
    assert packed.shape == ranges.shape == (2, 3, 0)
    assert all(tensor.shape == (2, 3, 1, 0) for tensor in unpack_ranges(ranges, ()))
    assert unpack_runs(packed, (), 16).shape == (2, 3, 16, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", sorted(set(PLANES) - set(CLIPPED_RANGE) - {0}))
def test_wide_codes_are_within_half_a_scale(bits, dtype):
    """Everywhere, and a step is at most a fifth wider than the range divided; wider where the mean is very far."""
    entries = torch.randn(50, 64, 12) * torch.logspace(-2, 2, 12) + 3 * torch.arange(-25, 25).view(-1, 1, 1)
    entries = entries.to(dtype)
    codes, stored = quantize_channels(entries, bits)
    steps, starts = (tensor.double() for tensor in steps_and_starts(stored, 2**bits - 1))
    assert codes.amin() >= 0 and codes.amax() <= 2**bits - 1
    error = (codes.double() * steps + starts - entries.double()).abs()
    assert (error <= 0.5 * steps * 1.001).all()
    values = entries.double()
    lowest, highest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    far = (lowest + highest).abs() / 15.5
    assert (steps <= 1.2 * torch.maximum(highest - lowest, far) / (2**bits - 1)).all()
    assert (steps >= (highest - lowest) / (2**bits - 1)).all()


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e4])
def test_without_bits_a_group_is_its_mean(size):
    """Within half a percent, wherever it is, in two bytes a channel."""
    entries = torch.randn(50, 64, 12) + size * torch.randn(50, 1, 12)
    codes, stored = quantize_channels(entries, 0)
    assert not codes.any() and pack(codes, 0).numel() == 0 and stored.shape == (50, 2, 12)
    steps, starts = steps_and_starts(stored, highest_code(0))
    assert steps.isfinite().all()
    means = entries.double().mean(1, keepdim=True)
    assert ((starts - means).abs() <= 0.005 * means.abs() + 1e-6).all()
    assert torch.equal(dequantized(torch.zeros(1, 64, 1), 0), torch.zeros(1, 64, 1, dtype=torch.double))
    entries[3, 5, 7] = torch.nan
    assert torch.equal(dequantized(entries, 0).isfinite().all(1), entries.isfinite().all(1))


@pytest.mark.parametrize("bits", sorted(CLIPPED_RANGE))
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "far from zero"])
def test_narrow_codes_beat_codes_over_the_whole_range(kind, bits):
    """By the squared error, although ranges are rounded; the best fit to the same codes is hardly better."""
    entries = torch.randn(300, 64, 8)
    if kind == "heavy tails":
        entries = torch.distributions.StudentT(4.0).sample(entries.shape)
    if kind == "far from zero":
        entries = entries + 3
    given = (dequantized(entries, bits) - entries).square().mean()
    lowest, highest = entries.amin(1, keepdim=True), entries.amax(1, keepdim=True)
    step = (highest - lowest) / (2**bits - 1)
    plain = (((entries - lowest) / step).round() * step + lowest - entries).square().mean()
    assert given <= {1: 0.2, 2: 0.7, 3: 0.95, 4: 1.08}[bits] * plain
    codes = quantize_channels(entries, bits)[0].double()
    design = torch.stack((codes, torch.ones_like(codes)), dim=-1).transpose(1, 2)  # [300, 8, 64, 2]
    fitted = torch.linalg.lstsq(design, entries.double().transpose(1, 2).unsqueeze(-1), driver="gelsd").solution
    best = (design @ fitted).squeeze(-1).transpose(1, 2) - entries
    assert given <= 1.08 * best.square().mean()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 7.3, -7.3, 1e6, -1e-3])
def test_equal_elements_stay_equal(value, bits):
    """As near as the half range that such a mean needs, a fifteenth of it, divided by the codes."""
    entries = torch.full((2, 16, 3), value)
    given = dequantized(entries, bits)
    assert (given - entries).abs().max() <= 1.13 * max(abs(value) / 15.5, 2**-18) / highest_code(bits)
    assert (given == given[:, :1]).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e12])
def test_no_finite_number_does_not_turn_into_one(value, bits):
    """Nor does one beyond the largest half range, 2e7."""
    entries = torch.randn(1, 16, 3)
    entries[:, 5, 1] = value
    given = dequantized(entries, bits)
    assert not torch.isfinite(given[:, 5, 1]).any()
    assert torch.isfinite(given[:, :, [0, 2]]).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_depend_on_nothing_beside_the_group(bits):
    """Bitwise: among others, alone, and whatever the channel's neighbours are."""
    entries = torch.randn(4, 5, 16, 6)
    codes, stored = quantize_channels(entries, bits)
    for row, group in ((0, 0), (3, 4)):
        alone = quantize_channels(entries[row : row + 1, group : group + 1, :, 2:3], bits)
        assert torch.equal(codes[row, group, :, 2:3], alone[0][0, 0])
        assert torch.equal(stored[row, group, :, 2:3], alone[1][0, 0])
