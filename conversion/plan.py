"""What a conversion will do, decided and checked before it starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .families.base import AttentionShape
from .recipes import Recipe


LEAST_SHARE = 0.05  # of the source's bytes that a cache with bits can be asked for
NARROW_ROPE_BELOW = 0.11  # such a share, for which the rotary key is narrower


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


def rank_note(plan: Plan) -> str | None:
    """Return what to know of a plan whose cache is smaller by its rank, `None` for others."""
    if plan.kept >= 1:
        return None
    return (
        "This cache is smaller by its rank, which cost SmolLM2 more perplexity than fewer bits did "
        "(tests/benchmarks/LOG.md). egmla convert SOURCE TARGET --cache SHARE, without more, cuts bits."
    )


def plan_conversion(
    config: PreTrainedConfig,
    shape: AttentionShape,
    exact: bool = False,
    kv_lora_rank: int | list[int] | None = None,
    qk_rope_head_dim: int | None = None,
    cache: float | None = None,
    recipe: Recipe | None = None,
) -> Plan:
    """Checks the widths asked for against the source and fills in those left open.

    Raises:
        ValueError: for widths the source does not allow, or contradictory ones.
    """
    layers, width, recipe = config.num_hidden_layers, shape.rope_width, recipe or Recipe()
    full = 2 * shape.kv_width
    if exact:
        _no_widths(full - width, width, kv_lora_rank, qk_rope_head_dim, cache)
        return Plan(True, [full - width] * layers, width, full * layers, full * layers)
    chosen = qk_rope_head_dim is None
    if cache is not None:
        elements = _elements_kept(cache, kv_lora_rank, full)
        if qk_rope_head_dim is None:
            # A third of the cache: best of three at 50 % and 31 % (tests/benchmarks/LOG.md).
            qk_rope_head_dim = _default_rope_dim(shape, elements // 3, recipe)
        kv_lora_rank = elements - qk_rope_head_dim
    if kv_lora_rank is None:
        raise ValueError("Say how small the cache shall be: kv_lora_rank and qk_rope_head_dim, or cache, or exact.")
    if qk_rope_head_dim is None:
        rank = max(kv_lora_rank) if isinstance(kv_lora_rank, list) else kv_lora_rank
        qk_rope_head_dim = _default_rope_dim(shape, rank, recipe)
    if qk_rope_head_dim < 0 or qk_rope_head_dim % 2 or qk_rope_head_dim > width:
        raise ValueError(
            f"qk_rope_head_dim={qk_rope_head_dim}: must be even and from 0 to {width}, the width of all keys of this "
            f"source that rotate ({shape.kv_heads} key heads of {shape.rotary_head_dim})."
        )
    if qk_rope_head_dim not in (allowed := recipe.rope_widths(shape)):
        raise ValueError(
            f"qk_rope_head_dim={qk_rope_head_dim}: with slots={recipe.slots!r} and freqfold={recipe.freqfold} it must "
            f"be one of {', '.join(map(str, allowed))} for this source."
        )
    if cache is not None:
        why = f"the narrowest with slots={recipe.slots!r} and freqfold={recipe.freqfold}" if chosen else "as asked for"
        _check_share(cache, elements, full, qk_rope_head_dim, why)
    holds = (
        f"what keys and values of this source hold beside qk_rope_head_dim={qk_rope_head_dim} ({shape.kv_heads} "
        f"key/value heads of {shape.head_dim}: {full} elements)"
    )
    ranks = _layer_ranks(kv_lora_rank, [full - qk_rope_head_dim] * layers, holds)
    return Plan(False, ranks, qk_rope_head_dim, full * layers, sum(ranks) + layers * qk_rope_head_dim)


def plan_bits(
    config: PreTrainedConfig, shape: AttentionShape, cache: float, qk_rope_head_dim: int | None, recipe: Recipe
) -> Plan:
    """The plan of a conversion whose cache gets bits by importance: all of the rank beside a wide rotary key.

    Raises:
        ValueError: for a share or widths that the source does not allow.
    """
    check_share_of_bytes(cache)
    if qk_rope_head_dim is None:
        # Two thirds of all keys that rotate lose nothing, and what is weak in them gets few bits. Where few bits are
        # left for anything, a narrow rotary key that loses something is better (LOG, 2026-11-30).
        thirds = 1 if cache < NARROW_ROPE_BELOW else 2
        widths = recipe.rope_widths(shape)
        qk_rope_head_dim = max(width for width in widths if width <= max(thirds * shape.rope_width // 3, widths[0]))
    rank = 2 * shape.kv_width - qk_rope_head_dim
    return plan_conversion(config, shape, False, rank, qk_rope_head_dim, None, recipe)


def check_share_of_bytes(cache: float) -> None:
    """Raises `ValueError` for a share of the source's bytes that no cache with bits has."""
    if not 0 < cache <= 1:
        raise ValueError(f"cache={cache}: the share of the source's cache to keep must be above 0 and at most 1.")
    if cache < LEAST_SHARE:
        raise ValueError(
            f"cache={cache}: with bits a cache has at least {LEAST_SHARE} of the source's bytes; give a larger share, "
            "or cache_dtype='bf16' for a cache of few elements (--cache-dtype bf16)."
        )


def deal_ranks(spectra: Sequence[torch.Tensor], rank: int) -> list[int]:
    """Ranks of `rank` on average, each further one given to the layer that has most of its own energy left.

    Args:
        spectra (`Sequence[torch.Tensor]`): of each layer's latent, largest eigenvalue first.
        rank (`int`): mean of the ranks; each will be from half to twice of it.
    """
    low, high = max(1, rank // 2), min(2 * rank, *(len(spectrum) for spectrum in spectra))
    shares = [spectrum.clamp_min(0) / spectrum.clamp_min(0).sum() for spectrum in spectra]
    wanted = sorted(
        (-float(share[number]), number, layer) for layer, share in enumerate(shares) for number in range(low, high)
    )
    ranks = [low] * len(spectra)
    for _, _, layer in wanted[: (rank - low) * len(spectra)]:
        ranks[layer] += 1
    return ranks


def full_widths(shape: AttentionShape) -> tuple[int, int]:
    """Latent and rotary width of exact mode."""
    return 2 * shape.kv_width - shape.rope_width, shape.rope_width


def latent_ranks(config: PreTrainedConfig) -> list[int]:
    """Latent width of each layer of an MLA source."""
    ranks = config.kv_lora_rank
    return list(ranks) if isinstance(ranks, list) else [ranks] * config.num_hidden_layers


def is_full_latent(
    config: PreTrainedConfig, kv_lora_rank: int | list[int] | None, qk_rope_head_dim: int | None
) -> bool:
    """Whether these widths are all that an MLA source has."""
    own = latent_ranks(config)
    ranks = kv_lora_rank if isinstance(kv_lora_rank, list) else [kv_lora_rank] * len(own)
    return ranks == own and qk_rope_head_dim in (None, config.qk_rope_head_dim)


def plan_latent(
    config: PreTrainedConfig,
    exact: bool = False,
    kv_lora_rank: int | list[int] | None = None,
    qk_rope_head_dim: int | None = None,
    cache: float | None = None,
) -> Plan:
    """The plan of an MLA source: its own widths, or a smaller latent beside its rotary key.

    Raises:
        ValueError: for widths the source does not allow, or contradictory ones.
    """
    rope_dim, layers = config.qk_rope_head_dim, config.num_hidden_layers
    own = latent_ranks(config)
    elements = sum(own) + layers * rope_dim
    if exact:
        _no_widths(config.kv_lora_rank, rope_dim, kv_lora_rank, qk_rope_head_dim, cache)
        return Plan(True, own, rope_dim, elements, elements)
    if qk_rope_head_dim not in (None, rope_dim):
        raise ValueError(
            f"qk_rope_head_dim={qk_rope_head_dim}: the rotary key of an MLA source stays as it is, {rope_dim} wide; "
            "leave it out."
        )
    if cache is not None:
        elements_kept = [_elements_kept(cache, kv_lora_rank, rank + rope_dim) for rank in own]
        _check_share(cache, min(elements_kept), min(own) + rope_dim, rope_dim, "which stays as it is in an MLA source")
        kv_lora_rank = [kept - rope_dim for kept in elements_kept]
    if kv_lora_rank is None:
        raise ValueError("Say how small the cache shall be: kv_lora_rank, or cache, or exact.")
    ranks = _layer_ranks(kv_lora_rank, own, f"the latent of this source beside its {rope_dim} rotary elements")
    return Plan(False, ranks, rope_dim, elements, sum(ranks) + layers * rope_dim)


def _elements_kept(cache: float, kv_lora_rank: int | list[int] | None, full: int) -> int:
    """Elements per token and layer that a share of `full` elements is."""
    if kv_lora_rank is not None:
        raise ValueError("Give either cache or kv_lora_rank: each decides the size of the cache.")
    if not 0 < cache <= 1:
        raise ValueError(f"cache={cache}: the share of the source's cache to keep must be above 0 and at most 1.")
    return round(cache * full)


def _check_share(cache: float, kept: int, full: int, rope_dim: int, why: str) -> None:
    """Raises `ValueError` for a share of the cache that leaves no latent beside the rotary key."""
    if kept <= rope_dim:
        least = math.ceil(1000 * (rope_dim + 1) / full) / 1000
        raise ValueError(
            f"cache={cache}: of {full} elements per token and layer that keeps {kept}, and the rotary key takes "
            f"{rope_dim}, {why}; a latent needs at least 1 more, so the share must be at least {least}."
        )


def _layer_ranks(kv_lora_rank: int | list[int], largest: list[int], holds: str) -> list[int]:
    """One rank per layer, each checked against the largest of its layer; `holds` says what that is."""
    layers = len(largest)
    ranks = kv_lora_rank if isinstance(kv_lora_rank, list) else [kv_lora_rank] * layers
    if len(ranks) != layers:
        raise ValueError(
            f"kv_lora_rank has {len(ranks)} entries and the source {layers} layers; give one number or {layers}."
        )
    for rank, most in zip(ranks, largest, strict=True):
        if not 1 <= rank <= most:
            raise ValueError(
                f"kv_lora_rank={rank}: must be from 1 to {most}, {holds}. For the source's own function use exact."
            )
    return list(ranks)


def _no_widths(rank: int | list[int], rope_dim: int, kv_lora_rank, qk_rope_head_dim, cache) -> None:
    if kv_lora_rank is not None or qk_rope_head_dim is not None or cache is not None:
        raise ValueError(
            f"exact mode keeps everything (kv_lora_rank={rank}, qk_rope_head_dim={rope_dim}); leave --kv-lora-rank, "
            "--qk-rope-head-dim and --cache out, or leave --exact out."
        )


def _default_rope_dim(shape: AttentionShape, most: int, recipe: Recipe) -> int:
    """The widest rotary key of the recipe of at most `most` dimensions and one head's width; its narrowest if none."""
    widths = recipe.rope_widths(shape)
    return max((width for width in widths if width <= min(most, shape.rotary_head_dim)), default=widths[0])
