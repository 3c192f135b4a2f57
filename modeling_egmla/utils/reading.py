"""Read ids into a cache, and write greedily from it: a model as it is used, whatever the cache."""

import torch


@torch.no_grad()
def read_in_chunks(model, ids: torch.Tensor, cache, chunk: int) -> None:
    """Read ids `[B, T]` into a cache, `chunk` tokens at a time."""
    for part in ids.split(chunk, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def write_greedily(model, ids: torch.Tensor, cache, steps: int) -> list[int]:
    """Return the `steps` ids that follow ids `[1, T]` behind what a cache holds, which takes them in."""
    found = []
    for _ in range(steps):
        ids = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found
