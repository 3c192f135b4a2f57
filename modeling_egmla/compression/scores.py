# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Scores of tokens that need no training: by place, by keys, by the attention of the prompt's own queries.

Scores of heads are averaged, since one entry serves all heads.
"""

import torch
from torch.nn.functional import avg_pool1d, cosine_similarity

from .press import Press, Reading


QUERY_BLOCK = 256  # queries whose weights are in memory at a time


class RecentPress(Press):
    """Keeps the newest tokens. Source: StreamingLLM (arXiv 2309.17453); here tokens keep their positions."""

    def score(self, reading: Reading) -> torch.Tensor:
        B, _, S, _ = reading.entries.shape
        return torch.arange(S, dtype=torch.float32, device=reading.entries.device).expand(B, -1)


class RandomPress(Press):
    """Keeps random tokens, the control that any other press has to beat."""

    def score(self, reading: Reading) -> torch.Tensor:
        new = torch.rand(reading.hidden_states.shape[:2], device=reading.entries.device)
        return torch.cat((reading.older, new), dim=1)


class KnormPress(Press):
    """Keeps tokens with short keys. Source: arXiv 2406.11430, `KnormPress` of kvpress, of expanded keys."""

    def score(self, reading: Reading) -> torch.Tensor:
        new = -reading.new_keys().float().norm(dim=-1).mean(dim=1)
        return torch.cat((reading.older, new), dim=1)


class KeyDiffPress(Press):
    """Keeps tokens whose keys are unlike the mean key. Source: arXiv 2504.15364, `KeyDiffPress` of kvpress."""

    def score(self, reading: Reading) -> torch.Tensor:
        keys = torch.nn.functional.normalize(reading.keys().float(), dim=-1)
        return -cosine_similarity(keys, keys.mean(dim=2, keepdim=True), dim=-1).mean(dim=1)


class ObservedAttentionPress(Press):
    """Keeps tokens that the prompt attends to most, per query that sees them. Source: H2O (arXiv 2306.14048).

    Of a prompt in parts, each part's queries add to the scores of the tokens held. Memory is that of one block of
    queries.
    """

    def score(self, reading: Reading) -> torch.Tensor:
        S, T = reading.entries.shape[2], reading.new_tokens
        received = torch.zeros(reading.entries.shape[0], S, device=reading.entries.device)
        keys = reading.keys().transpose(2, 3)
        nope, rope, _, _ = reading.attention.project(
            reading.hidden_states, reading.gate_input, reading.position_embeddings
        )
        queries = torch.cat((nope, rope), dim=-1)
        for start in range(0, T, QUERY_BLOCK):
            block = queries[:, :, start : start + QUERY_BLOCK]
            last = S - T + start + block.shape[2]
            scores = torch.matmul(block, keys[..., :last]).float() * reading.attention.scaling
            ahead = torch.ones(block.shape[2], last, dtype=torch.bool, device=scores.device)
            ahead = ahead.triu(last - block.shape[2] + 1)
            received[:, :last] += scores.masked_fill(ahead, -torch.inf).softmax(dim=-1).mean(dim=1).sum(dim=1)
        # By the number of queries that see a token: the first ones would always win.
        queries_after = torch.arange(S, 0, -1, device=received.device).clamp(max=T)
        return received / queries_after + torch.nn.functional.pad(reading.older, (0, T))


class SnapKVPress(Press):
    """Keeps tokens, and their neighbours, that the newest queries attend to.

    Source: SnapKV (arXiv 2404.14469), with the window and kernel of kvpress.
    """

    queries, kernel = 64, 5

    def score(self, reading: Reading) -> torch.Tensor:
        received = reading.weights(self.queries).mean(dim=(1, 2))
        return avg_pool1d(received[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]


class TOVAPress(Press):
    """Keeps tokens that the last query attends to. Source: TOVA (arXiv 2401.06104)."""

    def score(self, reading: Reading) -> torch.Tensor:
        return reading.weights(1).mean(dim=(1, 2))
