"""One table over several models: cache bytes, perplexity and decode speed, measured side by side."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from .accounting import cache_id_bytes
from .decode_speed import time_decode
from .perplexity import perplexity, token_windows


@dataclass
class ComparisonRow:
    """What was measured for one model.

    Attributes:
        model (`str`): its name in the table.
        cache_elements_per_token (`int`): elements in use per cached token, all layers.
        cache_bytes_per_token (`float`): bytes in use per cached token, all layers, counted in the filled cache.
        perplexity (`float`): on the windows of the text.
        decode_tokens_per_second (`float`): from the median step at the context.
        decode_ms_median, decode_ms_p10, decode_ms_p90 (`float`): milliseconds of a step.
        cache_used_bytes, cache_allocated_bytes (`int`): of the cache filled to the context.
    """

    model: str
    cache_elements_per_token: int
    cache_bytes_per_token: int
    perplexity: float
    decode_tokens_per_second: float
    decode_ms_median: float
    decode_ms_p10: float
    decode_ms_p90: float
    cache_used_bytes: int
    cache_allocated_bytes: int

    def to_dict(self) -> dict:
        return asdict(self)


def compare(
    models: Mapping[str, PreTrainedModel],
    tokenizer,
    text: str,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    context: int = 8192,
    steps: int = 4,
    rounds: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ComparisonRow]:
    """Measures models that share a tokenizer.

    Args:
        models (`Mapping[str, PreTrainedModel]`): the models by name.
        tokenizer: their tokenizer.
        text (`str`): text for the perplexity.
        window, max_windows (`int`): see `token_windows`.
        context (`int`): tokens in the cache while decoding is timed; the past is synthetic.
        steps, rounds (`int`): see `time_decode`.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `list[ComparisonRow]`: a row per model, in the order given.
    """
    windows = token_windows(tokenizer, text, window, max_windows)
    perplexities = {}
    for name, model in models.items():
        stage = f"Perplexity of {name}"
        perplexities[name] = perplexity(model, windows, _of_stage(progress, stage))
    timings = time_decode(
        models, context, steps=steps, rounds=rounds, warmup=1, progress=_of_stage(progress, "Decode speed, in turns")
    )
    rows = []
    for name, model in models.items():
        timing = timings[name]
        bytes_per_token = timing.cache_used_bytes // (timing.context * timing.batch_size)
        rows.append(
            ComparisonRow(
                model=name,
                cache_elements_per_token=(bytes_per_token - cache_id_bytes(model.config)) // model.dtype.itemsize,
                cache_bytes_per_token=bytes_per_token,
                perplexity=perplexities[name],
                decode_tokens_per_second=timing.tokens_per_second,
                decode_ms_median=1e3 * timing.median,
                decode_ms_p10=1e3 * timing.p10,
                decode_ms_p90=1e3 * timing.p90,
                cache_used_bytes=timing.cache_used_bytes,
                cache_allocated_bytes=timing.cache_allocated_bytes,
            )
        )
    return rows


def _of_stage(progress: Callable[[str, int, int], None] | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def measurement_notes(
    models: Mapping[str, PreTrainedModel], window: int, max_windows: int | None, context: int
) -> dict:
    """What a reader needs to judge the figures: versions, threads, number format, sizes."""
    import transformers

    dtypes = {str(model.dtype).removeprefix("torch.") for model in models.values()}
    return {
        "dtype": ", ".join(sorted(dtypes)),
        "device": ", ".join(sorted({model.device.type for model in models.values()})),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "perplexity_window": window,
        "perplexity_windows": max_windows,
        "decode_context": context,
        "batch_size": 1,
    }
