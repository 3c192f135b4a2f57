"""What a model writes after a long context, read through a cache: text to look at beside every figure.

Short prompts show nothing of a cache that rounds: it holds the first and the last tokens exact.
"""

from collections.abc import Callable
from typing import Any

import torch

from .reading import read_in_chunks, write_greedily


CONTEXTS = 5
CONTEXT_TOKENS, NEW_TOKENS = 384, 32
CHUNK = 64  # tokens of a context that are read at a time
SHOWN_TOKENS = 24  # of a context


def take_contexts(windows: torch.Tensor, count: int = CONTEXTS, length: int = CONTEXT_TOKENS) -> torch.Tensor:
    """Take contexts from token windows `[windows, T]`, evenly spaced and apart: `[count or fewer, length or T]`."""
    ids = windows.flatten()
    length = min(length, windows.shape[1])
    whole = ids[: len(ids) // length * length].view(-1, length)
    chosen = torch.linspace(0, len(whole) - 1, min(count, len(whole))).round().long()
    return whole[chosen.unique()]


@torch.no_grad()
def continue_contexts(
    model, tokenizer, contexts: torch.Tensor, make_cache: Callable[[], Any], new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Continue each context greedily.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its tokenizer.
        contexts (`torch.Tensor`): ids `[contexts, T]`.
        make_cache (`Callable`): makes the empty cache to read a context through, 64 tokens at a time.
        new_tokens (`int`): tokens to write, also after the end of a text.

    Returns:
        `list[str]`: the continuations.
    """
    found = []
    for context in contexts[:, None].to(model.device):
        cache = make_cache()
        read_in_chunks(model, context[:, :-1], cache, CHUNK)
        written = write_greedily(model, context[:, -1:], cache, new_tokens)
        found.append(tokenizer.decode(written, skip_special_tokens=True))
    return found


def shown_ends(tokenizer, contexts: torch.Tensor) -> list[str]:
    """Return the last words of each context `[contexts, T]`, enough to judge what follows."""
    return [tokenizer.decode(context[-SHOWN_TOKENS:], skip_special_tokens=True) for context in contexts]
