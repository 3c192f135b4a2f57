# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Left padding in caches that keep the first tokens exact: each row's own first tokens take the first places.

Much attention goes to the first tokens of a text. In a batch padded on the left, the first places of a row are
padding, and its first tokens would be rounded with a group. So a prompt's entries are stored in this order:

    columns   p p p p a b c d e f      (p padding, a b c d the first tokens)
    stored    a b c d . . . . e f      (. hidden by the mask, and filled so as to spoil no group's range)

Columns and stored places are the same again behind a row's first tokens, so nothing changes for later tokens.
"""

from dataclasses import dataclass

import torch


@dataclass
class LeftPadding:
    """Where the first tokens of each row of a batch are.

    Attributes:
        pads: padding in front of each row, `[B]`.
        moved: first tokens of each row that take the first places, `[B]`.
    """

    pads: torch.Tensor
    moved: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, first_tokens: int) -> "LeftPadding | None":
        """Find the padding of a prompt by its mask `[B, T]`; `None` where no row begins with padding."""
        pads = (attention_mask.cumsum(dim=1) == 0).sum(dim=1)
        if not pads.any():
            return None
        return cls(pads, (attention_mask.shape[1] - pads).clamp(max=first_tokens))

    @property
    def columns(self) -> int:
        """Columns that are stored in another order, of the row with the most."""
        return int((self.pads + self.moved).max())

    def order_entries(self, entries: torch.Tensor) -> torch.Tensor:
        """Return the entries of a prompt `[B, 1, T, W]` in the order in which they are stored."""
        columns, padding = self._columns(entries.shape[2], entries.device)
        # A group's range covers what it holds. So padding repeats the token behind it.
        behind = (self.pads + self.moved).clamp(max=entries.shape[2] - 1).to(entries.device)
        columns = torch.where(padding, behind[:, None], columns)
        return entries.gather(2, columns[:, None, :, None].expand(-1, 1, -1, entries.shape[3]))

    def order_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a mask over columns `[B, 1, T, S]` as a mask over stored entries."""
        columns, _ = self._columns(mask.shape[3], mask.device)
        return mask.gather(3, columns[:, None, None, :].expand(-1, *mask.shape[1:3], -1))

    def select(self, rows: torch.Tensor) -> "LeftPadding":
        """Return the padding of these rows."""
        rows = rows.to(self.pads.device)
        return LeftPadding(self.pads[rows], self.moved[rows])

    def repeat(self, repeats: int) -> "LeftPadding":
        """Return the padding of rows each of which is repeated."""
        return LeftPadding(self.pads.repeat_interleave(repeats), self.moved.repeat_interleave(repeats))

    def _columns(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the column of each stored entry, and whether it is padding, `[B, length]` each."""
        place = torch.arange(length, device=device)
        pads, moved = self.pads[:, None].to(device), self.moved[:, None].to(device)
        padding = (place >= moved) & (place < moved + pads)
        return torch.where(place < moved, place + pads, torch.where(padding, place - moved, place)), padding
