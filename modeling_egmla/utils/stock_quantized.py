# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own quantised cache, as a peer: whether the libraries behind it are installed, and its bytes."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, QuantizedCache
from transformers.cache_utils import HQQQuantizedLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from .kivi_style import head_width


GROUP = 64  # numbers of a token and head that share a scale and a zero point, Transformers' default
TOKENS_PACKED = 4  # whose numbers HQQ packs into the same bytes, at the lowest of our bits
RECENT_TOKENS = 64  # held as they are on average: after 128 of them all are quantised anew


class Backend(NamedTuple):
    """A library that quantises.

    Attributes:
        package: its name on PyPI.
        is_available: tells whether it is installed.
        axis: along which Transformers' documentation advises to group with this library. Both mean the same.
    """

    package: str
    is_available: Callable[[], bool]
    axis: int


BACKENDS = {
    "hqq": Backend("hqq", is_hqq_available, 1),
    "quanto": Backend("optimum-quanto", is_optimum_quanto_available, 0),
}


def missing_package(backend: str) -> str | None:
    """Return the name of the package that a backend of `BACKENDS` needs, `None` where it is installed."""
    known = BACKENDS[backend]
    return None if known.is_available() else known.package


class _PaddedHQQLayer(HQQQuantizedLayer):
    """HQQ's layer for any number of tokens: HQQ packs four groups of 2 bits into a byte, and fails where one lacks."""

    def _quantize(self, tensor, axis):  # type: ignore[override]  # as in Transformers' own subclasses
        missing = -tensor.shape[-2] % TOKENS_PACKED
        last = tensor[..., -1:, :].expand(*tensor.shape[:-2], missing, -1)
        return super()._quantize(torch.cat((tensor, last), dim=-2), axis), tensor.shape[-2]

    def _dequantize(self, q_tensor):
        padded, tokens = q_tensor
        return super()._dequantize(padded)[..., :tokens, :]


class StockQuantizedCache(QuantizedCache):
    """`QuantizedCache` with groups within a head, which can be copied.

    Args:
        config (`PreTrainedConfig`): of a model with keys and values per head.
        backend (`str`): a key of `BACKENDS`.
        bits (`int`): bits of a code, 4 or 2.
    """

    def __init__(self, config: PreTrainedConfig, backend: str, bits: int):
        axis, group = BACKENDS[backend].axis, math.gcd(GROUP, head_width(config))
        super().__init__(backend, config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=group)
        if backend == "hqq":
            self.layers = [_PaddedHQQLayer(bits, axis, axis, group) for _ in self.layers]

    def __deepcopy__(self, memo: dict) -> "StockQuantizedCache":
        # Quanto's tensors cannot be copied. None has to be: an update replaces tensors and changes none in place.
        copied = copy.copy(self)
        copied.layers = [copy.copy(layer) for layer in self.layers]
        return copied


@torch.no_grad()
def stock_quantized_share(config: PreTrainedConfig, backend: str, bits: int, tokens: int) -> float:
    """Return the bytes of a `StockQuantizedCache` of one sequence as a share of the same cache in bf16.

    They are counted from the storages of a filled layer of one head: codes, scales, and the newest tokens as they are.

    Args:
        config, backend, bits: as of `StockQuantizedCache`.
        tokens (`int`): tokens in the cache, more than 64.
    """
    layer: Any = StockQuantizedCache(config, backend, bits).layers[0]
    width = head_width(config)
    generator = torch.Generator().manual_seed(0)
    for count in (tokens - RECENT_TOKENS, RECENT_TOKENS):
        entries = torch.randn((1, 1, count, width), generator=generator).to(torch.bfloat16)
        layer.update(entries, entries.clone())
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in _tensors(vars(layer))}
    return sum(storages.values()) / (2 * 2 * width * tokens)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in nested containers, and those that a tensor subclass is made of."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
