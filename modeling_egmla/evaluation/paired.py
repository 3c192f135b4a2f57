"""Standard errors of differences between two models over the same questions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


# The result that lm-eval computes from the mean of its questions' values, for aggregations that need only the mean.
OF_THE_MEAN: dict[str, Callable[[float], float]] = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: math.exp(-mean),
    "weighted_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


def paired_stderr(
    first: Sequence[Mapping[str, Any] | None], second: Sequence[Mapping[str, Any] | None]
) -> float | None:
    """Standard error of the difference of two results over the same questions, by the jackknife.

    Args:
        first, second (`Sequence[Mapping]`): for each task its `aggregation` and its `values`: per question a number,
            or a pair of number and weight.

    Returns:
        `float` or None: None when the questions differ, when there are fewer than two, or when the result is no
        function of their mean.
    """
    pairs: list[tuple[Any, Any]] = []
    kinds = set()
    for one, other in zip(first, second, strict=True):
        if one is None or other is None or one["values"].keys() != other["values"].keys():
            return None
        kinds |= {one["aggregation"], other["aggregation"]}
        pairs += [(value, other["values"][question]) for question, value in one["values"].items()]
    if len(kinds) != 1 or len(pairs) < 2 or (of_the_mean := OF_THE_MEAN.get(kinds.pop())) is None:
        return None
    try:
        columns = [[_weighted(pair[index]) for pair in pairs] for index in (0, 1)]
    except (TypeError, ValueError):
        return None
    without = []
    for column in columns:
        total, weight = sum(value for value, _ in column), sum(weight for _, weight in column)
        without.append([of_the_mean((total - value) / (weight - own)) for value, own in column])
    differences = [one - other for one, other in zip(*without, strict=True)]
    mean = sum(differences) / len(differences)
    count = len(differences)
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in differences))


def _weighted(value: Any) -> tuple[float, float]:
    if isinstance(value, (list, tuple)):
        number, weight = value
        return float(number), float(weight)
    return float(value), 1.0
