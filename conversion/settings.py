"""The settings of a conversion, their checks, and the command that repeats it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch

from egmla.samples import sample_path
from egmla.utils.provenance import public_name

from .deepseek_export import check_layout
from .recipes import Recipe, find_recipe, nearest_recipe, recipe_options, refinement_options
from .refinement import Refinement
from .texts import text_paths


BITS, RANK_ONLY = "bits", "bf16"  # values of `cache_dtype`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ConversionSettings:
    """Settings of a conversion.

    Attributes:
        exact (`bool`): same function and cache size as the source; needs no calibration.
        kv_lora_rank (`int` or `list[int]`, *optional*): latent width `R`, one for all layers or one per layer.
        qk_rope_head_dim (`int`, *optional*): rotary width `P`.
        cache (`float`, *optional*): share of the source's cache to keep, instead of `kv_lora_rank`: of its bytes in
            bf16 at 32,768 tokens, everything counted. With `cache_dtype="bf16"`, of its elements.
        cache_dtype (`str`, *optional*): `"bits"` keeps the rank and gives each channel bits by importance; `"bf16"`
            cuts the rank. By default bits where `cache` is given, but for the peers' recipes, a latent norm
            and layout `"deepseek_v3"`.
        max_rank (`int`, *optional*): with bits, most latent channels of a layer: each costs time in decoding.
        calibration (`str`, `Path` or a sequence of them, *optional*): plain texts, one for each domain; required
            where the rank is cut. Equally many tokens of each are used. Never the evaluation text.
        shipped_text (`bool`): with bits, use the text that ships with the package beside those of `calibration`.
        calibration_tokens (`int`, *optional*): most tokens to use of all; 65,536 by default, 196,608 with refinement,
            16,384 for a cache with bits.
        evaluate (`str` or `Path`, *optional*): a plain text to measure perplexity on, of the source and the result.
        evaluation_windows (`int`): most windows to use of it, of 2,048 tokens or the source's whole context.
        recipe (`str` or `Recipe`, *optional*): choices of the closed form, or a name in `RECIPES`.
        latent_norm (`bool`): normalise the latent, as layout `"deepseek_v3"` requires; a choice of the recipe too.
        refinement (`Refinement`, *optional*): choices of the refinement after the closed form. `Refinement(steps=0)`
            leaves it out, which is the default of the peers' recipes.
        layout (`str`): `"egmla"`, or `"deepseek_v3"` for a checkpoint of Transformers' own DeepSeek-V3 class.
        dtype (`str`, *optional*): dtype to write, `"float32"`, `"bfloat16"` or `"float16"`; the source's by default.
        device (`str`, *optional*): where everything is computed, such as `"cpu"` or `"cuda:1"`. By default
            calibration and refinement use the GPU if there is one, and perplexity is measured on the CPU.
        resume (`bool`): continue an interrupted conversion into the same target with the same settings.
        dry_run (`bool`): check everything and return the plan, bytes on disk, and an estimate; write nothing.
    """

    exact: bool = False
    kv_lora_rank: int | list[int] | None = None
    qk_rope_head_dim: int | None = None
    cache: float | None = None
    cache_dtype: str | None = None
    max_rank: int | None = None
    calibration: str | Path | Sequence[str | Path] | None = None
    shipped_text: bool = True
    calibration_tokens: int | None = None
    evaluate: str | Path | None = None
    evaluation_windows: int = 9
    recipe: str | Recipe | None = None
    latent_norm: bool = False
    refinement: Refinement | None = None
    layout: str = "egmla"
    dtype: str | None = None
    device: str | None = None
    resume: bool = True
    dry_run: bool = False

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype to write, or `None` for the source's."""
        return None if self.dtype is None else DTYPES[self.dtype]

    def made_exact(self) -> Self:
        """Return the settings of an exact conversion, which takes no widths."""
        return replace(self, exact=True, kv_lora_rank=None, qk_rope_head_dim=None)


@dataclass(frozen=True)
class CheckedSettings(ConversionSettings):
    """Settings whose texts, recipe and refinement are chosen; `check_settings` makes them."""

    calibration: tuple[Path, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    refinement: Refinement = field(default_factory=Refinement)
    refinement_given: bool = False

    @property
    def allocates_bits(self) -> bool:
        """Whether the cache gets bits by importance."""
        return self.cache_dtype == BITS


def find_settings(settings: ConversionSettings | None, options: Mapping[str, Any]) -> ConversionSettings:
    """Join settings and single options, which win.

    Raises:
        TypeError: for options that are not settings.
    """
    known = [item.name for item in fields(ConversionSettings)]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"convert_checkpoint has no option {', '.join(unknown)}; it has {', '.join(known)}.")
    return replace(settings or ConversionSettings(), **options)


def check_settings(settings: ConversionSettings) -> CheckedSettings:
    """Fill in recipe and refinement, and check what needs no look at the source.

    Raises:
        ValueError, TypeError: for unknown names and values, and for settings that contradict one another.
    """
    recipe = find_recipe(settings.recipe, {"latent_norm": True} if settings.latent_norm else None)
    own = nearest_recipe(recipe) == "default"
    cache_dtype = _checked_cache_dtype(settings, own, recipe)
    refinement = settings.refinement
    if refinement is None:
        refinement = Refinement() if own and cache_dtype != BITS else Refinement(steps=0)
    check_layout(settings.layout, refinement)
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise ValueError(
            f"dtype={settings.dtype!r}: must be one of {', '.join(DTYPES)}, or left out for the source's own."
        )
    given = {item.name: getattr(settings, item.name) for item in fields(ConversionSettings)}
    refined = settings.refinement is not None and settings.refinement.steps > 0
    given |= {"recipe": recipe, "refinement": refinement, "cache_dtype": cache_dtype}
    given["calibration"] = _calibration_texts(settings, cache_dtype)
    return CheckedSettings(**given, refinement_given=refined)


def _calibration_texts(settings: ConversionSettings, cache_dtype: str | None) -> tuple[Path, ...]:
    """Return the texts to calibrate with: what ships with the package, where bits are allocated, and what is given."""
    shipped = (sample_path("calibration"),) if cache_dtype == BITS and settings.shipped_text else ()
    return (*shipped, *(path for path in text_paths(settings.calibration) if path not in shipped))


def _checked_cache_dtype(settings: ConversionSettings, own_recipe: bool, recipe: Recipe) -> str | None:
    """Return how the cache shrinks, `None` where its widths are given.

    Raises:
        ValueError: for an unknown way, and what contradicts it.
    """
    asked, cache = settings.cache_dtype, settings.cache
    if asked not in (None, BITS, RANK_ONLY):
        raise ValueError(f"cache_dtype={asked!r}: must be {BITS!r} or {RANK_ONLY!r}, or left out.")
    reasons = {
        "the recipe of a peer": not own_recipe,
        "a latent norm": recipe.latent_norm,
        f"ranks={recipe.ranks!r}": recipe.ranks != "uniform",
        f"layout={settings.layout!r}": settings.layout != "egmla",
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if asked == BITS and against:
        raise ValueError(
            f"cache_dtype={BITS!r} with {against[0]}: this fixes what is cached, and bits need a basis of their own; "
            f"leave it out, or use cache_dtype={RANK_ONLY!r} (--cache-dtype {RANK_ONLY})."
        )
    chosen = asked if asked is not None or cache is None else (RANK_ONLY if against else BITS)
    if asked is not None and cache is None:
        raise ValueError(
            f"cache_dtype={asked!r} without cache: it says how a share of the cache is reached; give cache (--cache), "
            "or leave it out."
        )
    if settings.max_rank is not None and (chosen != BITS or settings.max_rank < 1):
        raise ValueError(
            f"max_rank={settings.max_rank} with cache={cache} and cache_dtype={chosen!r}: it must be at least 1, and "
            "limits the channels of a cache with bits; for a rank alone use kv_lora_rank."
        )
    return chosen


def command_line(
    label: str, settings: CheckedSettings, calibration: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None
) -> str:
    """Return the command that repeats a conversion, with names in place of paths.

    Args:
        label (`str`): the source as the user named it.
        settings (`CheckedSettings`): what was asked for.
        calibration, evaluation (`Mapping`, *optional*): what the report says of the texts.
    """
    words = ["egmla", "convert", public_name(label), "TARGET"]
    widths = ("exact", "kv_lora_rank", "qk_rope_head_dim", "cache", "cache_dtype", "max_rank")
    given = {name: getattr(settings, name) for name in widths}
    if calibration is not None:
        own = [path.name for path in settings.calibration if path != sample_path("calibration")]
        given |= {"calibration": own, "no_shipped_text": not settings.shipped_text}
        given |= {"calibration_tokens": calibration["tokens_asked"], "refine_steps": settings.refinement.steps}
    if evaluation is not None:
        given |= {"evaluate": evaluation["file"], "evaluation_windows": evaluation["windows"]}
    given |= {"layout": None if settings.layout == "egmla" else settings.layout, "dtype": settings.dtype}
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if name == "calibration":
            words += [word for path in value for word in (option, path)]
        elif value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    if calibration is not None and settings.refinement.steps:
        words += refinement_options(settings.refinement)
    return shlex.join(words + ([] if settings.exact else recipe_options(settings.recipe)))
