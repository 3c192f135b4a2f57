"""The table of `egmla demo` and its plot."""

import importlib.util
import math

import pytest
from shapes import CharacterTokenizer, build

from egmla.bench.side_by_side import ComparisonRow, compare, measurement_notes, plot_comparison
from egmla.samples import sample_text
from egmla.utils.plotting import check_matplotlib


def test_compare_and_plot(tmp_path):
    models = {"stock": build("llama"), "latent": build("egmla")}
    rows = compare(
        models,
        CharacterTokenizer(),
        sample_text("evaluation"),
        window=32,
        max_windows=2,
        context=40,
        steps=1,
        rounds=1,
    )
    assert [row.model for row in rows] == ["stock", "latent"]
    assert [row.cache_elements_per_token for row in rows] == [64, 24]
    assert [row.cache_bytes_per_token for row in rows] == [256, 96]
    assert all(math.isfinite(row.perplexity) and row.decode_tokens_per_second > 0 for row in rows)
    assert measurement_notes(models, 32, 2, 40)["dtype"] == "float32"

    pytest.importorskip("matplotlib")
    plot_comparison(rows, tmp_path / "table.png", "A title", "a note")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_plot_wants_rows(tmp_path):
    with pytest.raises(ValueError, match="0 models"):
        plot_comparison([], tmp_path / "table.png", "A title")
    row = ComparisonRow("m", 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1)
    with pytest.raises(ValueError, match="7 models"):
        plot_comparison([row] * 7, tmp_path / "table.png", "A title")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'egmla\[plot\]'"):
        check_matplotlib()
