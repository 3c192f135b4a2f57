"""Perplexity of a causal language model on a text, in windows that do not overlap."""

import math
from collections.abc import Callable

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
