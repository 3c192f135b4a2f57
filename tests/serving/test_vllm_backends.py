"""Decoding over pages in groups of similar lengths: what each sequence would have alone."""

from types import SimpleNamespace

import torch
from cases import plain_attention


def test_groups_of_similar_lengths():
    """Lengths of one page and many, and pages where an earlier sequence has left NaN behind."""
    from egmla.serving.vllm_backends import CPUImpl, similar_lengths

    lengths, heads, rank, width, page = [1, 33, 40, 63, 5, 64], 3, 6, 10, 8
    assert sorted(map(sorted, similar_lengths(lengths))) == [[0], [1, 2, 3], [4], [5]]
    cache = torch.randn(60, page, width)
    table = torch.randperm(59)[: 6 * 8].view(6, 8) + 1
    table[1, 5:] = 0  # not of this sequence
    cache[0] = torch.nan
    query = torch.randn(6, heads, width)
    decode = SimpleNamespace(seq_lens=torch.tensor(lengths, dtype=torch.int32), block_table=table.int())
    impl = SimpleNamespace(scale=0.3, kv_lora_rank=rank)
    found, _ = CPUImpl.forward_mqa(impl, query, cache, SimpleNamespace(decode=decode), None)
    for row, length in enumerate(lengths):
        entries = cache[table[row]].flatten(0, 1)[None, None, :length]
        right = plain_attention(query[row][None, None], entries, None, 0.3)[0, 0, :, :rank]
        assert (found[row].double() - right).abs().max() < 1e-5
