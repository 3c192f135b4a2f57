"""What tests of quantised caches share: the oracle, a dense cache whose entries are rounded by definition."""

import torch
from cases import difference, plain_attention
from cases import tiny_model as tied_model

from egmla import EGMLACache
from egmla.cache_layers_egmla import GrowingLatentLayer
from egmla.entries_egmla import DenseEntries
from egmla.quantization_egmla import quantize_elements, rotation
from egmla.quantized_cache_egmla import KEPT_FIRST_TOKENS, Int8LatentLayer


# fp32 sums in another order.
TOLERANCE = 1e-5
# bf16 results of attention over values around 1: a few roundings of 2^-8 each.
BF16_TOLERANCE = 0.03
# Logits, around 3 in magnitude, of random tiny models with int8 entries against those with fp32 entries.
INT8_TOLERANCE = 0.15
# Groups of few tokens, so that short texts fill several.
OPTIONS = {"int8": {"quantization": "int8"}, "int4": {"quantization": "int4", "quantization_group_size": 8}}


def tiny_model(case="input-gate", **overrides):
    """Untied: a tied head of random weights likes to repeat the last token, which many a defect does as well."""
    return tied_model(case, tie_word_embeddings=False, **overrides)


def rounded(entries: torch.Tensor, layer) -> torch.Tensor:
    """What a layer makes of all entries `[B, 1, S, R + P]` it was given, by the definition of its rounding."""
    entries = entries.double()
    if isinstance(layer, Int8LatentLayer):
        matrix = rotation(layer.kv_lora_rank, layer.qk_rope_head_dim, entries.device)
        codes, scales = quantize_elements(entries.float(), matrix, layer.group_size)
        scales = scales.double().repeat_interleave(layer.group_size, dim=-1)
        return ((codes.double() * scales) @ matrix.double()).to(layer.dtype)
    entries = entries.clone()
    first, size = KEPT_FIRST_TOKENS, layer.group_size
    for start in range(first, entries.shape[2] - size + 1, size):
        group = entries[:, :, start : start + size]
        zeros = group.amin(2, keepdim=True).bfloat16().double()
        scales = ((group.amax(2, keepdim=True).float() - zeros.float()) / 15).bfloat16().double()
        codes = ((group - zeros).float() / scales.float().clamp(min=1e-37)).round().clamp(0, 15)
        entries[:, :, start : start + size] = codes * scales + zeros
    return entries.to(layer.dtype)


class RoundedLayer(GrowingLatentLayer):
    """The reference: a dense layer that gives back what a quantised one would."""

    def __init__(self, layer):
        super().__init__(layer.kv_lora_rank, layer.qk_rope_head_dim, layer.layer_idx)
        self.layer = layer

    def append(self, latent, rope_key):
        self.layer.dtype = latent.dtype
        entries = super().append(latent, rope_key).to_tensor()
        return DenseEntries(rounded(entries, self.layer), self.kv_lora_rank)


def rounded_cache(config, quantization) -> EGMLACache:
    cache = EGMLACache(config, **OPTIONS[quantization])
    cache.layers = [RoundedLayer(layer) for layer in cache.layers]
    return cache


def assert_attended_in_pieces(entries, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Attention to entries 24 wide, 16 of them latent, is attention to the tensor that they stand for."""
    query = (3 * torch.randn(entries.shape[0], 1, 5, 24)).to(dtype)
    expected = plain_attention(query, exact, None, 0.3)[..., :16]
    given = entries.attend_rows(query, None, 0.3)
    assert given.dtype == dtype
    assert difference(given, expected) <= (TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE)
