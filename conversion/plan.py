"""What a conversion will do, decided and checked before it starts."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .family import AttentionShape


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, known before it starts.

    Attributes:
        exact: keep the function exactly instead of shrinking the cache.
        ranks: latent width of each layer.
        rope_dim: rotary width `P`.
        source_elements: elements the source caches per token, all layers.
        target_elements: elements the converted model will cache.
    """

    exact: bool
    ranks: list[int]
    rope_dim: int
    source_elements: int
    target_elements: int

    @property
    def kept(self) -> float:
        """Share of the cache that is kept."""
        return self.target_elements / self.source_elements


def plan_conversion(
    config: PreTrainedConfig,
    shape: AttentionShape,
    exact: bool = False,
    kv_lora_rank: int | list[int] | None = None,
    qk_rope_head_dim: int | None = None,
    cache: float | None = None,
) -> Plan:
    """Checks the widths asked for against the source and fills in those left open.

    Raises:
        ValueError: for widths the source does not allow, or contradictory ones.
    """
    layers, width = config.num_hidden_layers, shape.rope_width
    full = 2 * shape.kv_width
    if exact:
        _no_widths(full - width, width, kv_lora_rank, qk_rope_head_dim, cache)
        return Plan(True, [full - width] * layers, width, full * layers, full * layers)
    if cache is not None:
        if kv_lora_rank is not None:
            raise ValueError("Give either cache or kv_lora_rank: each decides the size of the cache.")
        if not 0 < cache <= 1:
            raise ValueError(f"cache={cache}: the share of the source's cache to keep must be above 0 and at most 1.")
        elements = round(cache * full)
        if qk_rope_head_dim is None:
            qk_rope_head_dim = _default_rope_dim(shape, elements)
        kv_lora_rank = elements - qk_rope_head_dim
    if kv_lora_rank is None:
        raise ValueError("Say how small the cache shall be: kv_lora_rank and qk_rope_head_dim, or cache, or exact.")
    if qk_rope_head_dim is None:
        rank = max(kv_lora_rank) if isinstance(kv_lora_rank, list) else kv_lora_rank
        qk_rope_head_dim = min(shape.rotary_head_dim, width, 2 * (rank // 2))
    if qk_rope_head_dim < 0 or qk_rope_head_dim % 2 or qk_rope_head_dim > width:
        raise ValueError(
            f"qk_rope_head_dim={qk_rope_head_dim}: must be even and from 0 to {width}, the width of all keys of this "
            f"source that turn ({shape.kv_heads} key heads of {shape.rotary_head_dim})."
        )
    ranks = kv_lora_rank if isinstance(kv_lora_rank, list) else [kv_lora_rank] * layers
    if len(ranks) != layers:
        raise ValueError(
            f"kv_lora_rank has {len(ranks)} entries and the source {layers} layers; give one number or {layers}."
        )
    largest = full - qk_rope_head_dim
    for rank in ranks:
        if not 1 <= rank <= largest:
            raise ValueError(
                f"kv_lora_rank={rank}: must be from 1 to {largest}, what keys and values of this source hold beside "
                f"qk_rope_head_dim={qk_rope_head_dim} ({shape.kv_heads} key/value heads of {shape.head_dim}: {full} "
                "elements). For the source's own function use exact."
            )
    return Plan(False, list(ranks), qk_rope_head_dim, full * layers, sum(ranks) + layers * qk_rope_head_dim)


def full_widths(shape: AttentionShape) -> tuple[int, int]:
    """Latent and rotary width of exact mode."""
    return 2 * shape.kv_width - shape.rope_width, shape.rope_width


def plan_copy(config: PreTrainedConfig, kv_lora_rank, qk_rope_head_dim, cache) -> Plan:
    """The plan of an MLA source: its own widths.

    Raises:
        ValueError: when widths are given.
    """
    rank, rope_dim, layers = config.kv_lora_rank, config.qk_rope_head_dim, config.num_hidden_layers
    _no_widths(rank, rope_dim, kv_lora_rank, qk_rope_head_dim, cache)
    return Plan(True, [rank] * layers, rope_dim, layers * (rank + rope_dim), layers * (rank + rope_dim))


def _no_widths(rank: int, rope_dim: int, kv_lora_rank, qk_rope_head_dim, cache) -> None:
    if kv_lora_rank is not None or qk_rope_head_dim is not None or cache is not None:
        raise ValueError(
            f"exact mode keeps everything (kv_lora_rank={rank}, qk_rope_head_dim={rope_dim}); leave --kv-lora-rank, "
            "--qk-rope-head-dim and --cache out, or leave --exact out."
        )


def _default_rope_dim(shape: AttentionShape, elements: int) -> int:
    """A third of the cache, at most one head's width: best of three at 50 % and 31 % (conversion/README.md)."""
    return min(shape.rotary_head_dim, shape.rope_width, elements // 6 * 2)
