# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Eviction from the latent cache: entries of chosen tokens leave a layer, and their bytes are free.

One entry of a token serves all heads of a layer. So it is there or gone, and what stays is a plain, shorter buffer.
Layers may differ in length. Tokens keep their positions: `seen` stays, `stored` falls.
"""

from typing import Any

import torch


def drop_entries(layer: Any, kept: torch.Tensor) -> None:
    """Drop all entries of a layer but the chosen ones, and free their memory.

    Args:
        layer (`LatentLayer`): a growing layer with a row per token in each storage: unquantised, or int8.
        kept (`torch.Tensor`): indices `[B, K]` of what stays, among the `stored` entries, ascending.

    Raises:
        ValueError: for another layer, whose entries share codes, or for indices of another batch or order.
    """
    if not hasattr(layer, "count") or len({storage.shape[2] for storage in layer.used}) != 1:
        raise ValueError(
            f"Layer {layer.layer_idx} of this cache is a {type(layer).__name__}: entries leave growing layers that "
            "are unquantised or int8. Others get what is kept: press the prompt, which is quantised afterwards."
        )
    if kept.ndim != 2 or kept.shape[0] != layer.batch_size:
        raise ValueError(f"kept has shape {tuple(kept.shape)}: must be indices [{layer.batch_size}, K].")
    count = kept.shape[1]
    outside = (kept < 0).any() or (kept >= layer.stored).any()
    if count < 1 or outside or (kept.diff(dim=1) < 1).any():
        raise ValueError(
            f"kept must be ascending indices of the {layer.stored} entries that layer {layer.layer_idx} holds, at "
            "least one, none twice."
        )
    rows = kept.to(layer.device)[:, None, :, None]
    layer.replace_storages(lambda storage: storage.gather(2, rows.expand(-1, 1, -1, storage.shape[3])))
    # Of the newest entries, those without a gap among them can be cropped.
    whole = (kept == torch.arange(layer.stored - count, layer.stored, device=kept.device)).flip(1).cumprod(dim=1)
    layer.first_whole = count - int(whole.sum(dim=1).min())
    layer.stored = count
    layer.evicted = True


def fit_mask(mask: Any, new_tokens: int, held: int) -> Any:
    """Return the mask of a layer that holds `held` entries, `new_tokens` of them new, made from another layer's.

    Args:
        mask (`torch.Tensor`): `[B or 1, 1, T, .]`, boolean or additive, of which the last `T` columns are the new
            tokens'. All older entries are seen. Anything else comes back as it is.

    Raises:
        ValueError: for a block mask, which belongs to one length.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise ValueError(
            f"A {type(mask).__name__} cannot be fitted to layers of different lengths, and entries were evicted from "
            "this cache; load the model with attn_implementation='sdpa' or 'eager'."
        )
    own = mask[..., -new_tokens:]
    seen = own.new_full((*own.shape[:-1], held - new_tokens), own.dtype == torch.bool)
    return torch.cat((seen, own), dim=-1)
