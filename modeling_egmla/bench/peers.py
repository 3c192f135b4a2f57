"""The caches that `egmla sweep --peers` compares: the source's own, what a user does to it otherwise, and EG-MLA's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from egmla import EGMLACache, EGMLAConfig
from egmla.utils.kivi_style import FIRST_TOKENS, KiviStyleCache, kivi_style_share
from egmla.utils.sink_window import SinkWindowCache
from egmla.utils.stock_quantized import BACKENDS, StockQuantizedCache, missing_package, stock_quantized_share


SOURCE = "source"
SERIES = (
    SOURCE,
    "KIVI-style",
    "QuantizedCache, hqq",
    "QuantizedCache, quanto",
    "EG-MLA",
    "window with sinks",
    "rank only",
)
KIVI_BITS = (4, 3, 2)
STOCK_BITS = (4, 2)  # what both backends run with


@dataclass(frozen=True)
class Peer:
    """A cache to measure, by default the source's own. Bytes are those of one sequence in bf16, everything counted.

    Attributes:
        name (`str`): its name in the table.
        series (`str`): its line in the plots, one of `SERIES`.
        folder (`Path`, *optional*): the conversion that it is a cache of; `None` for the source.
        timed (`bool`): whether decoding is timed; not where a cache only imitates its numbers.
    """

    name: str = SOURCE
    series: str = SOURCE
    folder: Path | None = None
    timed: bool = True

    @property
    def skipped(self) -> str | None:
        """Why it cannot be measured here, if so."""
        return None

    def make_cache(self, model: Any, tokens: int) -> Cache:
        """Make an empty cache that will hold about `tokens` tokens."""
        return DynamicCache(config=model.config)

    def share(self, config: PreTrainedConfig, tokens: int) -> float:
        """Return its bytes at `tokens` tokens as a share of the source's; `config` is the source's."""
        return 1.0


@dataclass(frozen=True)
class KiviStyle(Peer):
    """The source's cache at `bits` bits, see `KiviStyleCache`."""

    bits: int = 0

    def make_cache(self, model: Any, tokens: int) -> Cache:
        return KiviStyleCache(model.config, self.bits)

    def share(self, config: PreTrainedConfig, tokens: int) -> float:
        return kivi_style_share(config, self.bits, tokens)


@dataclass(frozen=True)
class StockQuantized(Peer):
    """Transformers' `QuantizedCache` at `bits` bits, by one of `BACKENDS`."""

    backend: str = ""
    bits: int = 0

    @property
    def skipped(self) -> str | None:
        package = missing_package(self.backend)
        return package and f"{package} is not installed; pip install {package}"

    def make_cache(self, model: Any, tokens: int) -> Cache:
        return StockQuantizedCache(model.config, self.backend, self.bits)

    def share(self, config: PreTrainedConfig, tokens: int) -> float:
        return stock_quantized_share(config, self.backend, self.bits, tokens)


@dataclass(frozen=True)
class AllocatedBits(Peer):
    """EG-MLA's cache with bits, at one of the sizes that one conversion serves.

    Attributes:
        size (`float`): share of the source's bytes that it may take.
        source_bytes (`int`): the source's bytes per token.
    """

    size: float = 0.0
    source_bytes: int = 0

    def make_cache(self, model: Any, tokens: int) -> Cache:
        return EGMLACache(model.config, bits=self.size)

    def share(self, config: PreTrainedConfig, tokens: int) -> float:
        stored: Any = EGMLAConfig.from_pretrained(self.folder).bit_allocation()  # type: ignore[arg-type]
        return stored.at_most(self.size).nbytes(tokens) / (self.source_bytes * tokens)


@dataclass(frozen=True)
class RankOnly(Peer):
    """EG-MLA's cache of a conversion that reaches its size by rank alone.

    Attributes:
        source_bytes (`int`): the source's bytes per token.
    """

    source_bytes: int = 0

    def make_cache(self, model: Any, tokens: int) -> Cache:
        return EGMLACache(model.config)

    def share(self, config: PreTrainedConfig, tokens: int) -> float:
        elements = EGMLAConfig.from_pretrained(self.folder).cache_elements_per_token  # type: ignore[arg-type]
        return 2 * elements / self.source_bytes


@dataclass(frozen=True)
class Window(Peer):
    """The source's cache without its middle, as many bytes as another peer takes at the length at hand.

    Attributes:
        beside (`Peer`): the other peer.
    """

    beside: Peer = Peer()

    def newest(self, config: PreTrainedConfig, tokens: int) -> int:
        """Return how many of the newest tokens are held; `config` is the source's."""
        return max(1, int(self.beside.share(config, tokens) * tokens) - FIRST_TOKENS)

    def make_cache(self, model: Any, tokens: int) -> Cache:
        return SinkWindowCache(model.config, self.newest(model.config, tokens))

    def share(self, config: PreTrainedConfig, tokens: int) -> float:
        return min(1.0, (FIRST_TOKENS + self.newest(config, tokens)) / tokens)


def bits_folder(target: Path, caches: Sequence[float]) -> Path:
    """Return the folder of the one conversion with bits."""
    return target / f"bits-{max(caches):g}"


def rank_folder(target: Path, size: float) -> Path:
    """Return the folder of the conversion that reaches a size by rank alone."""
    return target / f"rank-{size:g}"


def list_peers(target: Path, caches: Sequence[float], source_elements: int) -> list[Peer]:
    """List what is compared, in the order in which it is measured.

    Args:
        target (`Path`): the folder of the conversions.
        caches (`Sequence[float]`): shares of the source's bytes that EG-MLA is measured at.
        source_elements (`int`): elements that the source caches per token, all layers.
    """
    sizes, source_bytes = sorted(set(caches), reverse=True), 2 * source_elements
    folder = bits_folder(target, sizes)
    ours = [
        AllocatedBits(f"EG-MLA, {100 * size:g} %", "EG-MLA", folder, size=size, source_bytes=source_bytes)
        for size in sizes
    ]
    return [
        Peer(),
        *(KiviStyle(f"KIVI-style, {bits} bits", "KIVI-style", timed=False, bits=bits) for bits in KIVI_BITS),
        *(
            StockQuantized(
                f"QuantizedCache, {backend}, {bits} bits",
                f"QuantizedCache, {backend}",
                timed=False,
                backend=backend,
                bits=bits,
            )
            for backend in BACKENDS
            for bits in STOCK_BITS
        ),
        *ours,
        *(
            Window(f"window with sinks, {100 * own.size:g} %", "window with sinks", timed=False, beside=own)
            for own in ours
        ),
        *(
            RankOnly(f"rank only, {100 * size:g} %", "rank only", rank_folder(target, size), source_bytes=source_bytes)
            for size in sizes
        ),
    ]
