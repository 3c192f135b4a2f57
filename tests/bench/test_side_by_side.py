"""The table of `egmla demo` and its plot."""

import importlib.util
import math

import pytest
from cases import make_tokenizer
from shapes import build
from transformers.cache_utils import DynamicCache

from egmla import EGMLACache
from egmla.bench.side_by_side import ComparisonRow, Contestant, Sizes, compare, measurement_notes, plot_comparison
from egmla.samples import sample_text
from egmla.utils.plotting import check_matplotlib


def test_compare_and_plot(tmp_path):
    # As many ids as the tokenizer's characters.
    stock, latent = (build(kind) for kind in ("llama", "egmla"))
    for model in (stock, latent):
        model.resize_token_embeddings(128, mean_resizing=False)
    contestants = {
        "stock": Contestant(stock, lambda: DynamicCache(config=stock.config), 1.0),
        "imitated": Contestant(stock, lambda: DynamicCache(config=stock.config), 0.5, timed=False),
        "latent": Contestant(latent, lambda: EGMLACache(latent.config), 0.375),
    }
    sizes = Sizes(window=32, windows=2, passage=400, passages=1, questions=2, context=40, steps=1, rounds=1)
    rows = compare(contestants, make_tokenizer(), sample_text("evaluation"), sizes)
    assert [(row.name, row.cache_share, row.questions) for row in rows] == [
        ("stock", 1.0, 2),
        ("imitated", 0.5, 2),
        ("latent", 0.375, 2),
    ]
    assert rows[0].perplexity == rows[1].perplexity != rows[2].perplexity
    assert all(math.isfinite(row.perplexity) for row in rows)
    assert [row.decode_tokens_per_second is not None for row in rows] == [True, False, True]
    assert measurement_notes(contestants, sizes)["dtype"] == "float32"

    pytest.importorskip("matplotlib")
    plot_comparison(rows, tmp_path / "table.png", "A title", "a note")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_plot_wants_rows(tmp_path):
    with pytest.raises(ValueError, match="0 models"):
        plot_comparison([], tmp_path / "table.png", "A title")
    row = ComparisonRow("m", 1.0, 1.0, 1, 2, [0.1, 0.9])
    with pytest.raises(ValueError, match="7 models"):
        plot_comparison([row] * 7, tmp_path / "table.png", "A title")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'egmla\[plot\]'"):
        check_matplotlib()
