"""The window with sinks, as a peer: what it forgets, and where tokens stand."""

import pytest
import torch
from shapes import build
from transformers.cache_utils import DynamicCache

from egmla.utils.kivi_style import FIRST_TOKENS
from egmla.utils.sink_window import SinkWindowCache


def read(model, ids: torch.Tensor, cache, chunk: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)], dim=1)


@pytest.fixture
def model():
    return build("llama").eval()


def random_ids(model, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_below_its_length_it_is_the_full_cache(model, chunk):
    ids = random_ids(model, FIRST_TOKENS + 20)
    full = read(model, ids, DynamicCache(config=model.config), chunk)
    torch.testing.assert_close(read(model, ids, SinkWindowCache(model.config, 20), chunk), full)


def test_it_holds_the_first_and_the_newest_tokens_where_they_stood(model):
    ids, newest = random_ids(model, 40), 7
    full, window = DynamicCache(config=model.config), SinkWindowCache(model.config, newest)
    read(model, ids, full, 40)
    read(model, ids, window, 40)  # at once: nothing is forgotten before the end
    assert window.get_seq_length() == 40
    for kept, whole in zip(window.layers, full.layers, strict=True):
        for name in ("keys", "values"):
            entries = getattr(whole, name)
            held = torch.cat((entries[:, :, :FIRST_TOKENS], entries[:, :, -newest:]), dim=2)
            torch.testing.assert_close(getattr(kept, name), held)


@pytest.mark.parametrize("chunk", [1, 3])
def test_it_attends_as_if_the_middle_were_masked(model, chunk):
    ids, newest, tokens = random_ids(model, 30), 6, 30
    found = read(model, ids, SinkWindowCache(model.config, newest), chunk)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    # What a query's chunk finds in the cache: the first tokens, and the newest before the chunk.
    begin = query // chunk * chunk
    seen = (key <= query) & ((key < FIRST_TOKENS) | (key >= begin - newest))
    mask = torch.zeros(tokens, tokens).masked_fill(~seen, float("-inf"))[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        masked = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-5)


def test_the_middle_is_forgotten(model):
    """One layer reads other tokens in the middle: later logits are the same, and they are not with a full cache."""
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    ids = random_ids(model, 60)
    other = ids.clone()
    other[:, 10:20] = random_ids(model, 10, seed=1)
    pairs = [
        [read(model, each, make(), 4)[:, 40:] for each in (ids, other)]
        for make in (lambda: SinkWindowCache(model.config, 16), lambda: DynamicCache(config=model.config))
    ]
    assert torch.equal(*pairs[0]) and not torch.equal(*pairs[1])


def test_what_a_window_refuses(model):
    with pytest.raises(ValueError, match="newest=0: a window holds at least 1 token"):
        SinkWindowCache(model.config, 0)
    window = SinkWindowCache(model.config, 3)
    read(model, random_ids(model, 9), window, 9)
    with pytest.raises(NotImplementedError, match="would have to come back"):
        window.crop(-1)
