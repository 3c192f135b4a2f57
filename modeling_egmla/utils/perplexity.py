"""Perplexity of a causal language model on a text, in windows that do not overlap."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .head import states_for_head


def token_windows(tokenizer, text: str, window: int, max_windows: int | None = None) -> torch.Tensor:
    """Tokens of a text in whole windows, without special tokens.

    Args:
        tokenizer: a Transformers tokenizer.
        text (`str`): the text.
        window (`int`): tokens in a window.
        max_windows (`int`, *optional*): windows to keep; all by default.

    Returns:
        `torch.Tensor`: ids `[windows, window]`.

    Raises:
        ValueError: when the text does not fill one window.
    """
    # Tokenised as one piece: cutting the text first would change tokens at the seams.
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    count = ids.numel() // window
    if count == 0:
        raise ValueError(
            f"The text has {ids.numel()} tokens and one window needs {window}; give a longer text or a smaller window."
        )
    count = min(count, max_windows or count)
    return ids[: count * window].view(count, window)


@torch.no_grad()
def perplexity(
    model, windows: torch.Tensor, progress: Callable[[int, int], None] | None = None, chunk: int = 512
) -> float:
    """Compute perplexity over windows of token ids. The first token of each window is context only.

    Args:
        model: a causal language model of Transformers.
        windows (`torch.Tensor`): ids `[windows, window]`.
        progress (*optional*): called with (windows done, windows in total).
        chunk (`int`): positions whose logits exist at the same time; limits memory with a large vocabulary.

    Returns:
        `float`: exp of the mean negative log-likelihood per scored token.
    """
    total, scored = 0.0, 0
    for done, ids in enumerate(windows, start=1):
        ids = ids[None].to(model.device)
        hidden = states_for_head(model, ids)
        for start in range(0, ids.shape[1] - 1, chunk):
            stop = min(start + chunk, ids.shape[1] - 1)
            logits = model.get_output_embeddings()(hidden[:, start:stop]).float()
            total += torch.nn.functional.cross_entropy(logits[0], ids[0, start + 1 : stop + 1], reduction="sum").item()
            scored += stop - start
        if progress is not None:
            progress(done, len(windows))
    return math.exp(total / scored)


@torch.no_grad()
def cached_losses(
    model,
    windows: torch.Tensor,
    make_cache: Callable[[], Any],
    chunk: int = 64,
    batch_size: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Mean negative log-likelihood of each window, read `chunk` tokens at a time through a cache, as in decoding.

    What a cache has rounded is seen by all later chunks. Read at once, a window would see its own entries exact.

    Args:
        model: a causal language model of Transformers.
        windows (`torch.Tensor`): ids `[windows, window]`; the first token of each is context only.
        make_cache (`Callable`): makes an empty cache.
        chunk (`int`): tokens read at a time.
        batch_size (`int`): windows read side by side.
        progress (*optional*): called with (windows done, windows in total).

    Returns:
        `torch.Tensor`: nats per scored token `[windows]`; perplexity is exp of their mean.
    """
    found = []
    for rows in windows.split(batch_size):
        ids, cache = rows.to(model.device), make_cache()
        total = torch.zeros(len(rows), dtype=torch.float64)
        for start in range(0, ids.shape[1] - 1, chunk):
            stop = min(start + chunk, ids.shape[1] - 1)
            logits = model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits.float()
            labels = ids[:, start + 1 : stop + 1]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            total += losses.double().sum(dim=1).cpu()
        found.append(total / (ids.shape[1] - 1))
        if progress is not None:
            progress(sum(map(len, found)), len(windows))
    return torch.cat(found)


def recovered_share(source: float | None, before: float | None, after: float | None) -> float | None:
    """Fraction of a conversion's loss in log-perplexity that training won back; negative if training lost more.

    Args:
        source (`float`, *optional*): perplexity of the source.
        before, after (`float`, *optional*): perplexities of the conversion before and after training.

    Returns:
        `float` or `None`: log(before / after) / log(before / source); `None` if a perplexity is missing or nothing
        was lost.
    """
    if source is None or before is None or after is None or before <= source:
        return None
    return math.log(before / after) / math.log(before / source)
