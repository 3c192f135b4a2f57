"""The choices of the closed form, and named sets of them: ours and those of the projects we compare with.

The peers' recipes run on our statistics and in our model's form; what else is not as in their code is said below.
Papers: TransMLA, arXiv 2502.07864; MHA2MLA, arXiv 2502.14837.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_type_hints

from .families.base import AttentionShape
from .refinement import Refinement


REFINE = "refine."  # what the refinement's choices begin with beside those of a recipe
CHOICES: dict[str, tuple[str, ...]] = {
    "rope_metric": ("query", "key", "heads"),
    "slots": ("lost", "uniform", "heads"),
    "mean_rotation": ("head", "layer", "none"),
    "metric": ("input", "output", "weights"),
    "weighting": ("attention", "uniform"),
    "balance_by": ("energy", "norm", "none"),
    "ranks": ("uniform", "energy"),
}


@dataclass(frozen=True)
class Recipe:
    """Choices of the closed form; the defaults are the best of those in tests/benchmarks/LOG.md.

    Attributes:
        rope_metric: `"query"` mixes and ranks rotary components by the logit energy lost, `"key"` by key energy alone.
            `"heads"` mixes nothing. It ranks each head's own pairs by the norms of queries times that of keys.
        freqfold: neighbouring frequencies that are mixed as if they were one; more than 1 needs uniform slots.
        slots: what rotary slots go to: what loses most at any frequency (`"lost"`), all groups of `freqfold`
            frequencies in equal numbers (`"uniform"`), or all key heads in equal numbers (`"heads"`).
        mean_rotation: stand-in for lost rotation: `"head"` one per head, `"layer"` one for all, `"none"` uses 1.
        metric: measures the low-rank error on keys and values (`"input"`), on logits and output (`"output"`), or on
            weights alone, whatever the text (`"weights"`).
        weighting: `"attention"` weighs calibration tokens by the attention they receive, `"uniform"` equally.
        sequence_length: calibration tokens in a row, at most the source's context.
        centred: fold the means of keys and values away before the low rank.
        balance: weight of the keys' error against the values' (1 is equal).
        balance_by: what is made equal: `"energy"` all of it, `"norm"` the mean norm of a dimension, `"none"` nothing.
        damping: share of the mean eigenvalue added to the output metric, against directions it saw too little of.
        ranks: `"uniform"` gives all layers the rank asked for, `"energy"` as many in all. The latter allocates by what
            each layer has left, after a look at all layers on the first calibration text.
        latent_norm: give the latent an RMSNorm, as DeepSeek's has; one of its numbers becomes a constant.

    Raises:
        ValueError, TypeError: for unknown choices, or ones that contradict one another.
    """

    rope_metric: str = "query"
    freqfold: int = 1
    slots: str = "lost"
    mean_rotation: str = "head"
    metric: str = "input"
    weighting: str = "attention"
    sequence_length: int = 1024
    centred: bool = True
    balance: float = 1.0
    balance_by: str = "energy"
    damping: float = 0.01
    ranks: str = "uniform"
    latent_norm: bool = False

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(known)}.")
        if self.freqfold < 1 or (self.freqfold > 1 and self.slots != "uniform"):
            raise ValueError(
                f"freqfold={self.freqfold} with slots={self.slots!r}: must be 1, or with slots='uniform' at least 1."
            )
        if self.slots == "heads" and self.rope_metric != "heads":
            raise ValueError(
                f"slots='heads' with rope_metric={self.rope_metric!r}: slots of a head need components that are one "
                "head's; use rope_metric='heads'."
            )
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length}: at least 2 tokens must follow one another.")
        if self.balance <= 0 or self.damping < 0:
            raise ValueError(
                f"balance={self.balance}, damping={self.damping}: balance must be above 0 and damping not below it."
            )

    def rope_widths(self, shape: AttentionShape) -> list[int]:
        """Rotary widths `P` that these slots allow for a source, in rising order.

        Raises:
            ValueError: when its frequencies cannot be folded like this.
        """
        F, g = shape.frequencies, shape.kv_heads
        if self.slots == "lost":
            return list(range(0, shape.rope_width + 1, 2))
        if self.slots == "heads":
            return list(range(0, shape.rope_width + 1, 2 * g))
        if F % self.freqfold:
            raise ValueError(
                f"freqfold={self.freqfold}: must divide the {F} rotary frequencies of this source; 1 always does."
            )
        return sorted(2 * F // stride for stride in range(1, self.freqfold + 1) if self.freqfold % stride == 0)


# TransMLA: keys alone decide the rotation; each fold of neighbouring frequencies keeps as many slots, at the stock
# frequencies of a rotary key of that width; principal components of uncentred activations, keys scaled to the values'
# mean norm. Different here: one pass of statistics (its second one is behind the rotary step).
TRANSMLA_LIKE = Recipe(
    rope_metric="key",
    freqfold=4,
    slots="uniform",
    mean_rotation="none",
    weighting="uniform",
    centred=False,
    balance_by="norm",
)

# MHA2MLA: each key head keeps the pairs with the largest product of query and key norms; one singular value
# decomposition of the weights of the other keys and all values. Different here: root mean squares for mean norms.
MHA2MLA_LIKE = Recipe(
    rope_metric="heads",
    slots="heads",
    mean_rotation="none",
    metric="weights",
    weighting="uniform",
    centred=False,
    balance_by="none",
)

RECIPES: dict[str, Recipe] = {"default": Recipe(), "transmla-like": TRANSMLA_LIKE, "mha2mla-like": MHA2MLA_LIKE}


def find_recipe(recipe: str | Recipe | None, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, the default for `None`, with some choices changed.

    Raises:
        ValueError, TypeError: for an unknown name or choice, or a value of another kind.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            near = difflib.get_close_matches(recipe, RECIPES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"Recipe {recipe!r} is not known: must be one of {', '.join(RECIPES)}{hint}")
        recipe = RECIPES[recipe]
    recipe = recipe or Recipe()
    _check_kinds("A recipe", get_type_hints(Recipe), changes or {})
    return replace(recipe, **(changes or {}))


def find_refinement(
    steps: int | None = None, gate: bool = False, changes: Mapping[str, Any] | None = None
) -> Refinement | None:
    """The refinement asked for on a command line, `None` for that of the recipe.

    Args:
        steps (`int`, *optional*): training steps of each layer.
        gate (`bool`): train the gate too.
        changes (`Mapping`, *optional*): its other choices.

    Raises:
        ValueError, TypeError: for an unknown choice, a value of another kind, or choices without steps.
    """
    kinds = {name: kind for name, kind in get_type_hints(Refinement).items() if name not in ("steps", "gate")}
    _check_kinds("The refinement", kinds, changes or {})
    if steps == 0 and (gate or changes):
        given = "--refine-gate" if gate else f"--set {REFINE}{next(iter(changes or ()))}"
        raise ValueError(f"{given} with --refine-steps 0: without refinement nothing is trained; leave one out.")
    if steps is None and not gate and not changes:
        return None
    settings: dict[str, Any] = {**(changes or {}), **({} if steps is None else {"steps": steps})}
    return Refinement(gate=gate, **settings)


def split_choices(choices: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choices of a recipe, and those of the refinement: the ones that are named `refine.` and more."""
    recipe = {name: value for name, value in choices.items() if not name.startswith(REFINE)}
    return recipe, {name.removeprefix(REFINE): choices[name] for name in choices if name not in recipe}


def _check_kinds(what: str, kinds: Mapping[str, type], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if name not in kinds:
            raise ValueError(f"{what} has no choice {name!r}; it has {', '.join(kinds)}.")
        allowed = (int, float) if kinds[name] is float else (kinds[name],)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kinds[name] is not bool):
            raise TypeError(f"{name}={value!r}: must be of type {kinds[name].__name__}.")


def nearest_recipe(recipe: Recipe) -> str:
    """The name of the recipe that differs in the fewest choices."""
    return min(RECIPES, key=lambda name: len(_changes(recipe, name)))


def recipe_options(recipe: Recipe) -> list[str]:
    """The command-line options that give this recipe: the nearest name, then what differs from it."""
    name = nearest_recipe(recipe)
    words = [] if name == "default" else ["--recipe", name]
    return words + [word for key, value in _changes(recipe, name).items() for word in ("--set", f"{key}={value}")]


def refinement_options(refinement: Refinement) -> list[str]:
    """The command-line options beside `--refine-steps` that give this refinement."""
    words, usual = ["--refine-gate"] if refinement.gate else [], asdict(Refinement())
    changed = {name: value for name, value in asdict(refinement).items() if value != usual[name]}
    others = (f"{REFINE}{name}={value}" for name, value in changed.items() if name not in ("steps", "gate"))
    return words + [word for choice in others for word in ("--set", choice)]


def _changes(recipe: Recipe, name: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if value != getattr(RECIPES[name], key)}
