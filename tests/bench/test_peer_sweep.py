"""Sweeps beside peers: rows, bytes as storages have them, what is skipped, and resumption."""

import json
import math
import shutil

import pytest
import torch
from command_line import run
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from egmla import EGMLACache
from egmla.bench import peer_plots
from egmla.bench import peer_sweep as module
from egmla.bench import peers as peer_module
from egmla.bench.peer_sweep import PeerSettings, sweep_peers
from egmla.bench.peers import list_peers
from egmla.conversion import load_source
from egmla.samples import sample_text
from egmla.utils.accounting import cache_nbytes
from egmla.utils.perplexity import perplexity, token_windows
from egmla.utils.retrieval import wilson_interval
from egmla.utils.sink_window import SinkWindowCache
from egmla.utils.stock_quantized import missing_package


pytest.importorskip("matplotlib")

CACHES = (0.5, 0.25)
NAMES = [
    "source",
    *("KIVI-style, 4 bits", "KIVI-style, 3 bits", "KIVI-style, 2 bits"),
    *("QuantizedCache, hqq, 4 bits", "QuantizedCache, hqq, 2 bits"),
    *("QuantizedCache, quanto, 4 bits", "QuantizedCache, quanto, 2 bits"),
    *("EG-MLA, 50 %", "EG-MLA, 25 %"),
    *("window with sinks, 50 %", "window with sinks, 25 %"),
    *("rank only, 50 %", "rank only, 25 %"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts to measure on."""
    folder, text = tmp_path_factory.mktemp("evaluation"), sample_text("evaluation").encode("ascii", "ignore").decode()
    (folder / "book.txt").write_text(text[:3000])
    (folder / "other.txt").write_text(text[-3000:])
    return folder / "book.txt", folder / "other.txt"


@pytest.fixture(scope="module")
def settings(calibration, texts):
    def make(**changes):
        usual = {"caches": CACHES, "evaluate": texts, "calibration": (calibration,), "calibration_tokens": 2048}
        usual |= {"evaluation_windows": 2, "retrieval": (180,), "passages": 2, "questions": 2, "context": 40}
        return PeerSettings(**{**usual, **changes})

    return make


@pytest.fixture(scope="module")
def without_libraries():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_module, "missing_package", lambda backend: f"{backend}-package")
        yield


@pytest.fixture(scope="module")
def swept(llama_folder, settings, without_libraries, tmp_path_factory):
    """A sweep that was killed in the middle and run again, with what each run measured."""
    target = tmp_path_factory.mktemp("peers") / "models"
    measured: list[list[tuple]] = [[], []]
    said: list[str] = []
    of_text, of_passages = module._perplexity, module._retrieval
    with pytest.MonkeyPatch.context() as patch:
        for attempt in (0, 1):

            def counted(run, peer, key, model, attempt=attempt):
                if attempt == 0 and peer.name == "EG-MLA, 25 %" and key == "other.txt":
                    raise KeyboardInterrupt
                measured[attempt].append((peer.name, key))
                return (of_text if isinstance(key, str) else of_passages)(run, peer, key, model)

            patch.setattr(module, "_perplexity", counted)
            patch.setattr(module, "_retrieval", counted)
            if attempt == 0:
                with pytest.raises(KeyboardInterrupt):
                    sweep_peers(llama_folder, target, settings())
            else:
                report = sweep_peers(llama_folder, target, settings(), say=said.append)
    return target, report, measured, said


def test_rows(swept):
    target, report, _, _ = swept
    assert sorted(row["name"] for row in report["rows"]) == sorted(NAMES)
    assert json.loads((target / "sweep.json").read_text()) == json.loads(json.dumps(report))
    for figure in ("perplexity.png", "retrieval.png"):
        assert (target / figure).read_bytes().startswith(b"\x89PNG")
    for row in report["rows"]:
        if "skipped" in row:
            continue
        for found in row["perplexity"].values():
            assert found["perplexity"] == pytest.approx(math.exp(sum(found["losses"]) / 2))
            assert math.isfinite(found["ratio_error"])
        assert row["retrieval"]["180"]["questions"] == 4
        timed = row["series"] in ("source", "EG-MLA", "rank only")
        assert ("decode" in row) == timed
    assert (target / "bits-0.5").is_dir() and not (target / "bits-0.25").exists()  # one conversion serves both


def test_figures_are_those_of_the_models(swept, llama_folder, texts):
    """Perplexity of what changes nothing before its length, by the function that reads windows whole."""
    target, report, _, _ = swept
    rows = {row["name"]: row for row in report["rows"]}
    source, tokenizer = load_source(llama_folder)
    by_rank = AutoModelForCausalLM.from_pretrained(target / "rank-0.25", dtype=torch.float32).eval()
    for text in texts:
        windows = token_windows(tokenizer, text.read_text(), 256, 2)
        whole = {"source": perplexity(source, windows), "rank only, 25 %": perplexity(by_rank, windows)}
        for name, expected in whole.items():
            found = rows[name]["perplexity"][text.name]
            assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
            assert found["ratio"] == pytest.approx(expected / whole["source"], rel=1e-4)
        assert rows["source"]["perplexity"][text.name]["ratio_error"] == 0


def test_bytes_are_those_of_storages(swept, llama_folder):
    """Caches filled with 2,048 tokens in bf16, as much of the source's as the rows say."""
    target, report, _, _ = swept
    rows = {row["name"]: row for row in report["rows"]}
    config = load_source(llama_folder)[0].config
    generator = torch.Generator().manual_seed(0)

    def held(cache, heads: int, *widths: int) -> int:
        for layer_idx in range(2):
            entries = [torch.randn((1, heads, 2048, width), generator=generator).bfloat16() for width in widths]
            cache.update(*entries, layer_idx)
        if isinstance(cache, SinkWindowCache):
            return sum(2 * entries.numel() for layer in cache.layers for entries in (layer.keys, layer.values))
        return cache_nbytes(cache)[0]

    whole = held(DynamicCache(config=config), 3, 16, 16)
    assert rows["source"]["bytes"]["2048"] == whole
    for size in CACHES:
        own = AutoModelForCausalLM.from_pretrained(target / "bits-0.5").config
        ranked = AutoModelForCausalLM.from_pretrained(target / f"rank-{size:g}").config
        ours = held(EGMLACache(own, bits=size), 1, own.kv_lora_rank, own.qk_rope_head_dim)
        by_rank = held(EGMLACache(ranked), 1, ranked.kv_lora_rank, ranked.qk_rope_head_dim)
        peers = {peer.name: peer for peer in list_peers(target, CACHES, 192)}
        name = f"window with sinks, {100 * size:g} %"
        window = held(SinkWindowCache(config, peers[name].newest(config, 2048)), 3, 16, 16)
        assert rows[f"EG-MLA, {100 * size:g} %"]["bytes"]["2048"] == ours
        assert rows[f"rank only, {100 * size:g} %"]["bytes"]["2048"] == by_rank == size * whole
        assert rows[name]["bytes"]["2048"] == window
        assert ours - whole / 2048 < window <= ours  # less than a token fewer
        assert rows[f"EG-MLA, {100 * size:g} %"]["shares"]["32768"] <= size


def test_a_killed_sweep_measures_nothing_twice(swept):
    _, report, measured, said = swept
    assert measured[0] and measured[1] and not set(measured[0]) & set(measured[1])
    there = [row["name"] for row in report["rows"] if "skipped" not in row]
    keys = ("book.txt", "other.txt", 180)
    assert sorted(map(str, measured[0] + measured[1])) == sorted(str((name, key)) for name in there for key in keys)
    assert measured[1][0] == ("EG-MLA, 25 %", "other.txt")
    assert "2 conversions to make: about " in said[0]
    assert f"{len(measured[1])} measurements are left" in said[1]


def test_the_rest_is_nothing_after_the_end(swept, llama_folder, settings, monkeypatch):
    """All is there: no model is loaded."""
    target, report, _, _ = swept
    monkeypatch.setattr(module, "load_source", lambda source: pytest.fail("the source was loaded"))
    assert sweep_peers(llama_folder, target, settings()) == report


def test_sizes_texts_and_lengths_can_be_added(swept, llama_folder, settings, texts, tmp_path):
    target = shutil.copytree(swept[0], tmp_path / "models")
    more = settings(caches=(0.5, 0.125), evaluate=texts[:1], retrieval=(150,))
    report = sweep_peers(llama_folder, target, more)
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {*NAMES, "EG-MLA, 12.5 %", "window with sinks, 12.5 %", "rank only, 12.5 %"}
    before = {row["name"]: row for row in swept[1]["rows"]}
    assert rows["EG-MLA, 25 %"] == before["EG-MLA, 25 %"]  # not asked for, and kept
    assert rows["EG-MLA, 50 %"]["perplexity"] == before["EG-MLA, 50 %"]["perplexity"]
    assert set(rows["EG-MLA, 50 %"]["retrieval"]) == {"180", "150"}


def test_a_missing_library_is_said(swept):
    _, report, _, said = swept
    rows = {row["name"]: row for row in report["rows"]}
    for name in NAMES[4:8]:
        backend = name.split(", ")[1]
        assert rows[name]["skipped"] == f"{backend}-package is not installed; pip install {backend}-package"
        assert "perplexity" not in rows[name]
        assert f"{name} is left out: {backend}-package is not installed" in said[0]


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_a_library_that_comes_later_is_measured(backend, swept, llama_folder, settings, tmp_path, monkeypatch):
    if (package := missing_package(backend)) is not None:
        pytest.skip(f"{package} is not installed")
    target = shutil.copytree(swept[0], tmp_path / "models")
    monkeypatch.setattr(peer_module, "missing_package", lambda name: None if name == backend else "another")
    rows = {row["name"]: row for row in sweep_peers(llama_folder, target, settings())["rows"]}
    four, two = (rows[f"QuantizedCache, {backend}, {bits} bits"] for bits in (4, 2))
    of_source = rows["source"]["perplexity"]["book.txt"]["losses"]
    errors = [
        max(abs(one - other) for one, other in zip(row["perplexity"]["book.txt"]["losses"], of_source, strict=True))
        for row in (four, two)
    ]
    assert "skipped" not in four and 0 < errors[0] < errors[1]
    # Codes, and scale and zero point of 16 bits for the 16 numbers of a head, of 16 bits each.
    assert four["shares"]["32768"] == pytest.approx((4 + 2) / 16, abs=0.002)
    assert two["shares"]["32768"] < two["shares"]["2048"] < four["shares"]["2048"]


def test_other_settings_are_not_mixed_in(swept, llama_folder, settings, texts, tmp_path):
    target = swept[0]

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            sweep_peers(llama_folder, target, settings(**changes))

    refused(r"other settings \(largest_cache.*\)", caches=(0.25,))
    refused(r"other settings \(calibration\)", calibration_tokens=4096)
    refused(r"other settings \(retrieval\)", questions=1)
    refused(r"figures on another book.txt", evaluation_windows=1, passages=2)
    changed = tmp_path / "other.txt"
    changed.write_text(texts[1].read_text()[300:])
    refused(r"figures on another other.txt", evaluate=(texts[0], changed))


def test_a_sweep_starts_over(swept, llama_folder, settings, texts, tmp_path):
    target = shutil.copytree(swept[0], tmp_path / "models")
    before = (target / "bits-0.5" / "config.json").stat().st_mtime_ns
    short = settings(caches=(0.5,), evaluate=texts[:1], retrieval=(), context=0, evaluation_windows=1)
    report = sweep_peers(llama_folder, target, short, resume=False)
    assert len(report["rows"]) == len(NAMES) - 3 and "decode" not in report["rows"][0]
    assert report["rows"][0]["perplexity"]["book.txt"]["ratio_error"] is None  # of one window
    assert (target / "bits-0.5" / "config.json").stat().st_mtime_ns > before


def test_bad_input_shows_before_anything_is_made(llama_folder, settings, texts, calibration, tmp_path):
    def refused(message, error=ValueError, source=llama_folder, **changes):
        with pytest.raises(error, match=message):
            sweep_peers(source, tmp_path / "t", settings(**changes))
        assert not (tmp_path / "t").exists()

    refused(r"at least one size and one text", caches=())
    refused(r"at least one size and one text", evaluate=())
    refused(r"cache=1.5: the share", caches=(1.5,))
    refused(r"cache=0.2 beside cache=0.5: .* 0.5, 0.25, 0.1875, .* choose from these", caches=(0.5, 0.2))
    refused(r"cache=0.05 beside", caches=(0.5, 0.05))
    refused(r"cache=0.01: with bits a cache has at least 0.05", caches=(0.01,))
    refused(r"retrieval=\[0, 180\]", retrieval=(0, 180))
    refused(r"retrieval=500: .* room for passages of 192 tokens", retrieval=(500,))
    refused(r"length=20: 2 facts alone take", retrieval=(20,))
    refused(r"context=-1", context=-1)
    refused(r"have text in common", evaluate=(texts[0], calibration))
    refused(r"does not exist", FileNotFoundError, evaluate=(texts[0], tmp_path / "nothing.txt"))
    twin = tmp_path / "twin" / "book.txt"
    twin.parent.mkdir()
    twin.write_text("twin")
    refused(r"rows are by file name", evaluate=(texts[0], twin))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists and holds no sweep"):
        sweep_peers(llama_folder, tmp_path, settings())


def test_a_source_with_a_latent_has_no_peers(swept, settings, tmp_path):
    with pytest.raises(ValueError, match=r"caches a latent, and the peers .* without --peers"):
        sweep_peers(swept[0] / "rank-0.5", tmp_path / "t", settings())


def test_on_the_command_line(swept, llama_folder, texts, settings, tmp_path, monkeypatch):
    """The tables of a finished sweep, and the options as the library gets them."""
    passed = []

    def given(source, target, asked, **options):
        passed.append(asked)
        return swept[1]

    monkeypatch.setattr(module, "sweep_peers", given)
    words = ["sweep", llama_folder, swept[0], "--peers", "--cache", "0.5,0.25", "--evaluate", texts[0]]
    result = run(*words, "--evaluate", texts[1], "--retrieval", "180,150", "--context", 40, "--evaluation-windows", 2)
    assert result.exit_code == 0, result.output
    for row in swept[1]["rows"]:
        assert row["name"] in result.stdout
        for found in row.get("perplexity", {}).values():
            assert f"{found['perplexity']:.2f} ({found['ratio']:.3f} ± " in result.stdout
    assert "hqq-package is not installed" in result.stdout and "of 4 (" in result.stdout
    run(*words, "--retrieval", "0", "--refine-steps", 3, "--calibration", texts[1])
    first, second = passed
    assert [len(first.evaluate), first.retrieval, first.context, first.refinement.steps] == [2, [180, 150], 40, 0]
    assert [second.retrieval, second.context, second.refinement.steps] == [[], 8192, 3]
    assert [path.name for path in first.calibration] == ["calibration.txt"]
    assert second.calibration[1:] == [texts[1]]


def test_what_the_command_line_refuses(llama_folder, texts, tmp_path):
    words = ["sweep", llama_folder, tmp_path / "t", "--cache", "0.5", "--evaluate", texts[0]]
    assert "needs calibration text" in run(*words).stderr
    plain = [*words, "--calibration", texts[1]]
    assert "a second --evaluate without --peers" in run(*plain, "--evaluate", texts[1]).stderr
    assert "--retrieval without --peers" in run(*plain, "--retrieval", "512").stderr
    assert "--layout with --peers" in run(*words, "--peers", "--layout", "deepseek_v3").stderr
    assert "--retrieval long: must be whole numbers" in run(*words, "--peers", "--retrieval", "long").stderr
    assert not (tmp_path / "t").exists()


def test_bars_have_no_negative_length():
    """Rounding puts the lower end of some intervals above their value."""
    for questions in (4, 48):
        for hits in range(questions + 1):
            found = {"share": hits / questions, "interval": wilson_interval(hits, questions)}
            value, down, up = peer_plots._point("retrieval", found)
            assert value == pytest.approx(100 * hits / questions) and min(down, up) >= 0
