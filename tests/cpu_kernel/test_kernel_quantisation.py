"""New tokens that the CPU kernel quantises to int8, against PyTorch's quantisation."""

import pytest
import torch
from cases import difference, needs_compiler
from kernel_cases import TOLERANCE

from egmla.quantization_egmla import quantize_elements, rotation, write_int8
from egmla.quantized_cache_egmla import Int8LatentLayer


pytestmark = needs_compiler


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "rank, rope, group", [(64, 64, 64), (64, 32, 32), (96, 48, 16), (512, 64, 64), (20, 4, 4), (5, 5, 5), (6, 0, 3)]
)
def test_new_tokens_are_quantised_as_in_pytorch(calls, rank, rope, group, dtype):
    """Into a part of a larger buffer, and nowhere else. Rotary keys have strides, as in attention."""
    n, width = 700, rank + rope
    latent, rope_key = torch.randn(3, n, rank, 1).movedim(3, 1), torch.randn(3, n, 1, rope).transpose(1, 2)
    sizes = torch.logspace(-3, 3, n)[:, None]
    latent, rope_key = (latent * sizes).to(dtype), (rope_key * sizes).to(dtype)
    latent[:, :, 2], rope_key[:, :, 2] = 0, 0
    buffer = torch.full((3, 1, n + 9, width), 7, dtype=torch.int8)
    factors = torch.full((3, 1, n + 9, width // group), 7, dtype=torch.bfloat16)
    torch.set_num_threads(3)
    try:
        write_int8(latent, rope_key, buffer, factors, 4)
    finally:
        torch.set_num_threads(1)
    assert calls["write_int8"] == 1
    for storage in (buffer, factors):
        assert (storage[:, :, :4] == 7).all() and (storage[:, :, n + 4 :] == 7).all()
    codes, scales = buffer[:, :, 4 : n + 4], factors[:, :, 4 : n + 4]
    entries = torch.cat((latent, rope_key), dim=-1)
    expected, expected_scales = quantize_elements(entries, rotation(rank, rope, entries.device), group)
    # Sums in another order may change the rounding of scales and codes. If the two largest elements have different
    # signs, either may give the scale.
    steps = expected_scales.double().abs()
    assert ((scales.double().abs() - steps).abs() <= 0.01 * steps).all()
    found, right = (
        c.double().unflatten(-1, (-1, group)) * s.double().unsqueeze(-1)
        for c, s in ((codes, scales), (expected, expected_scales))
    )
    off = (found - right).abs()
    assert (off <= 1.6 * steps.unsqueeze(-1)).all() and (off > 0).double().mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rank, rope, group", [(64, 32, 32), (96, 48, 48), (80, 40, 20), (7, 7, 7)])
def test_new_tokens_with_nan_or_infinity(calls, rank, rope, group, value):
    """Groups of whole Hadamard blocks and of several blocks; the last block has the value."""
    latent, rope_key = torch.randn(1, 1, 3, rank), torch.randn(1, 1, 3, rope)
    latent[0, 0, 1, -1] = value
    layer = Int8LatentLayer(rank, rope, group_size=group)
    entries = layer.append(latent, rope_key)
    of_latent, of_key = layer.scales[0, 0, 1].split([rank // group, rope // group])
    assert not of_latent.isfinite().all() and of_key.isfinite().all()
    assert layer.scales[0, 0, :3:2].isfinite().all() and calls["write_int8"] == 1
    assert not entries.attend(torch.randn(1, 5, 1, rank + rope), None, 0.1).isfinite().any()


@torch.no_grad()
def test_large_new_tokens_do_not_overflow(calls):
    layer = Int8LatentLayer(512, 64)
    entries = layer.append(1e37 * torch.ones(1, 1, 2, 512), torch.zeros(1, 1, 2, 64))
    assert difference(entries.to_tensor()[..., :512] / 1e37, torch.ones(1, 1, 2, 512)) <= 1e-2
    assert calls["write_int8"] == 1


@torch.no_grad()
def test_new_tokens_in_fp64_are_pytorchs(calls):
    codes, scales = torch.zeros(1, 1, 3, 24, dtype=torch.int8), torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)
    write_int8(torch.randn(1, 1, 3, 16).double(), torch.randn(1, 1, 3, 8), codes, scales, 0)
    write_int8(torch.randn(1, 1, 3, 16), torch.randn(1, 1, 3, 8).double(), codes, scales, 0)
    assert codes.abs().amax() > 100 and not calls


@torch.no_grad()
@pytest.mark.parametrize("batch, n", [(0, 3), (2, 0)])
def test_no_new_tokens(calls, batch, n):
    codes, scales = torch.ones(batch, 1, 5, 24, dtype=torch.int8), torch.ones(batch, 1, 5, 3, dtype=torch.bfloat16)
    write_int8(torch.zeros(batch, 1, n, 16), torch.zeros(batch, 1, n, 8), codes, scales, 5 - n)
    assert (codes == 1).all() and (scales == 1).all() and calls["write_int8"] == 1
