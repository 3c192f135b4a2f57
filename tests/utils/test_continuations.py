"""Contexts taken from windows, and their greedy continuations through a cache."""

import torch
from cases import make_tokenizer, tiny_model, token_ids

from egmla import EGMLACache
from egmla.utils.continuations import CHUNK, continue_contexts, shown_ends, take_contexts


def test_contexts_are_apart_and_evenly_spaced():
    windows = torch.arange(4000).view(2, 2000)
    contexts = take_contexts(windows, count=5, length=100)
    assert contexts[:, 0].tolist() == [0, 1000, 2000, 2900, 3900]
    assert (contexts.diff(dim=1) == 1).all()
    assert take_contexts(windows, count=5, length=3000).shape == (2, 2000)  # no longer than a window
    assert take_contexts(torch.arange(7)[None], count=5, length=4).tolist() == [[0, 1, 2, 3]]


def test_continuations_are_what_the_model_generates():
    model, tokenizer = tiny_model(vocab_size=128), make_tokenizer()
    contexts = token_ids(2, CHUNK + 9)
    texts = continue_contexts(model, tokenizer, contexts, lambda: EGMLACache(model.config), new_tokens=6)
    ids = model.generate(
        contexts, max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=contexts * 0 + 1
    )
    assert texts == [tokenizer.decode(row[contexts.shape[1] :], skip_special_tokens=True) for row in ids]
    assert [len(end) > 0 for end in shown_ends(tokenizer, contexts)] == [True, True]
