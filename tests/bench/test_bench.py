"""The benchmark: results by hand, the parity check before them, resuming after an interruption, and bad input."""

import functools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import BASE, tiny_config, tiny_model
from command_line import run
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from typer.testing import CliRunner

import egmla.bench.run as module
from egmla import EGMLAForCausalLM
from egmla.bench import contestants as registry
from egmla.bench.contestants import Contestant, Models, compiled_graphs, compiling, pair_subject, shape_subject
from egmla.bench.decode import DecodeTiming, pair_ratios, rewind, synthetic_cache, time_decode, time_prefill
from egmla.bench.limits import Limits
from egmla.bench.memory import measure_apart
from egmla.bench.packing import pack
from egmla.bench.parity import check_parity, gates_at_identity
from egmla.bench.plan import plan_bench
from egmla.bench.report import REPORT, share_of_ceiling, slopes
from egmla.bench.run import run_bench
from egmla.bench.settings import BenchSettings
from egmla.commands import app
from egmla.modeling_egmla import EGMLAAttention
from egmla.utils.accounting import decode_flops, swept_weight_bytes
from egmla.utils.timing import Timer


pytestmark = pytest.mark.long  # in front, see conftest.py


CPU = torch.device("cpu")
# Elements per token and layer of each role's cache: R + P, R + P, 2 x heads x 12 (twice: 4 heads are 4 groups).
ELEMENTS = {"egmla": 24 + 8, "deepseek": 24 + 8, "llama-mha": 96, "llama-gqa4": 96}
NAMES = ("egmla", "egmla-fixed", "deepseek", "llama-mha", "llama-gqa4-static")
SMALL = BenchSettings(
    contexts=(64, 128),
    batch_sizes=(1, 2),
    dtypes=("float32",),
    contestants=NAMES,
    rounds=2,
    steps=2,
    prefill_tokens=16,
    sweep_bytes=2**16,
)
ONE = {"contexts": (64,), "batch_sizes": (1,), "prefill_tokens": 0}


def settings(**changes) -> BenchSettings:
    return BenchSettings(**{**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}, **changes})


def subject(**fields):
    return shape_subject("tiny", tiny_config(**fields), 256)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("bench") / "out"
    stages = []
    report = run_bench([subject()], SMALL, folder, progress=lambda *state: stages.append(state))
    return folder, report, stages


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Llama of 96 elements per token and layer, and an EG-MLA model of 32."""
    source, converted = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("converted")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: BASE[name] for name in names}
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=256)).save_pretrained(source)
    tiny_model().save_pretrained(converted)
    return source, converted


@pytest.fixture
def small_sweeps(monkeypatch):
    """The command's settings, bandwidth measured on little."""
    monkeypatch.setattr(module, "BenchSettings", functools.partial(BenchSettings, sweep_bytes=2**16))


# what a report holds


def test_every_case_has_its_figures(measured):
    _, report, stages = measured
    cases = [(context, batch) for batch in (1, 2) for context in (64, 128)]
    found = {(row["context"], row["batch"], row["contestant"]): row for row in report["decode"]}
    assert set(found) == {(*case, name) for case in cases for name in NAMES}
    for (context, batch, name), row in found.items():
        role = registry.CONTESTANTS[name].role
        assert row["cache_used_bytes"] == row["cache_formula_bytes"] == batch * context * 2 * ELEMENTS[role] * 4
        assert row["cache_used_bytes"] <= row["cache_allocated_bytes"]
        assert row["steps"] == 4 and [len(steps) for steps in row["turns"]] == [2, 2]
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * batch / row["ms_median"])
        assert row["bytes_per_token"] == (row["weight_bytes_swept"] + row["cache_used_bytes"]) / batch
        assert row["share_of_ceiling"] == pytest.approx(row["ceiling_ms"] / row["ms_median"])
        gemv, read = row["gemv_bytes_per_second"], row["read_bytes_per_second"]
        assert row["share_of_gemv"] == pytest.approx(row["share_of_ceiling"] * max(gemv, read) / gemv)
    assert {(row["context"], row["batch"], row["contestant"]) for row in report["prefill"]} == {
        (16, batch, name) for batch in (1, 2) for name in NAMES
    }
    assert all(row["tokens_per_second"] == row["batch"] * 16 / row["seconds"] for row in report["prefill"])
    names = ("gemv_bytes_per_second", "read_bytes_per_second", "product_flops_per_second")
    assert all(row[name] > 0 for row in report["decode"] for name in names)
    assert not report["skipped"]
    assert ("Parity check", 1, 1) in stages and ("tiny, float32, batch 2, 128 tokens", 10, 10) in stages


def test_ratios_are_of_pairs_of_one_round(measured):
    _, report, _ = measured
    rows = {row["contestant"]: row for row in report["decode"] if (row["context"], row["batch"]) == (128, 2)}
    ratios = [row for row in report["ratios"] if (row["context"], row["batch"]) == (128, 2)]
    assert {(row["contestant"], row["against"]) for row in ratios} == {
        (ours, name) for ours in ("egmla", "egmla-fixed") for name in NAMES if name != ours
    }
    for ratio in ratios:
        timings = [DecodeTiming(128, 2, rows[ratio[key]]["turns"]) for key in ("contestant", "against")]
        assert ratio["times"] == pytest.approx(sum(pair_ratios(*timings)) / 2)
        assert ratio["least"] <= ratio["times"] <= ratio["most"]
    assert pair_ratios(DecodeTiming(1, 1, [[1.0, 2.0, 9.0], [1.0]]), DecodeTiming(1, 1, [[4.0], [5.0, 7.0]])) == [2, 6]


def test_the_parity_check_is_in_the_report(measured):
    _, report, _ = measured
    compared = {(row["contestant"], row["against"]) for row in report["parity"]}
    assert ("egmla", "its expanded path") in compared and ("deepseek", "EG-MLA, gates at identity") in compared
    assert {name for name, _ in compared} == set(NAMES)
    assert all(row["difference"] <= row["allowed"] for row in report["parity"])


def test_files_are_left(measured):
    folder, report, _ = measured
    assert json.loads((folder / REPORT).read_text()) == json.loads(json.dumps(report))
    for name in ("ms_per_token.png", "cache_bytes.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "cache_bytes.png", "ms_per_token.png"]


def test_share_of_the_ceiling():
    assert share_of_ceiling(600, 100, 12) == 0.5


def test_slopes_leave_short_contexts_out():
    rows = [
        {
            **{"subject": "s", "dtype": "float32", "batch": 1, "contestant": "egmla", "context": context},
            **{
                "ms_median": ms,
                "cache_bytes_read": 1000 * context,
                "gemv_bytes_per_second": 4e8,
                "read_bytes_per_second": 1e9,
                "flops_per_token": 5000 + 1500 * context,
                "product_flops_per_second": 1e9,
            },
        }
        for context, ms in ((512, 99.0), (2048, 10.0), (8192, 22.0), (32768, 70.0))
    ]
    (row,) = slopes({"decode": rows})
    assert row["contexts"] == [2048, 8192, 32768]
    # 60 ms over 30 times 1,024 tokens; 1,000 bytes a token at 1e9 bytes/s are 1.024 ms.
    assert row["ms_per_1024_tokens"] == pytest.approx(2.0)
    assert row["read_ms_per_1024_tokens"] == pytest.approx(1.024)
    assert row["times_read"] == pytest.approx(2.0 / 1.024)
    # 1,500 operations a token at 1e9 per second take longer.
    assert row["product_ms_per_1024_tokens"] == pytest.approx(1.536)
    assert row["times_limit"] == pytest.approx(2.0 / 1.536)
    assert slopes({"decode": rows[:1]}) == []


def test_swept_weights_by_hand():
    D, inner, vocabulary = 48, 56, 97
    norms, attention = 2 * D + 24, D * 4 * 16 + D * 32 + 24 * 4 * 20 + 4 * 12 * D
    layer = norms + attention + 3 * D * inner
    gate = 10 * 24 + 2 * 24
    # Untied: the head is swept and the embedding is not; the tables of the gates never are.
    model = EGMLAForCausalLM(tiny_config("table-gate"))
    assert swept_weight_bytes(model) == 4 * (2 * (layer + gate) + vocabulary * D + D)
    model = EGMLAForCausalLM(tiny_config("gate-off"))
    assert swept_weight_bytes(model) == 4 * (2 * layer + vocabulary * D + D)


def test_operations_by_hand():
    """Per head and cached token: 2 (2 R + P) absorbed; 2 (N + P + V) and the expansion 2 R (N + V); 4 d."""
    models = Models(subject(), torch.float32, CPU)
    for role, per_token in (("egmla", 2 * 56), ("deepseek", 2 * 28 + 2 * 24 * 20), ("llama-mha", 4 * 12)):
        model = models.get(role)
        assert decode_flops(model, 10) - decode_flops(model, 0) == 10 * 4 * 2 * per_token


# rounds


def test_static_caches_are_filled_and_rewound():
    model = Models(subject(), torch.float32, CPU).get("llama-mha")
    cache = synthetic_cache(model, 20, 2, cache=StaticCache(config=model.config, max_cache_len=24))
    scale = cache.layers[0].keys[:, :, 1:20].std()
    assert 0.5 < scale / cache.layers[0].keys[:, :, :1].std() < 2
    token = torch.zeros((2, 1), dtype=torch.long)
    with torch.no_grad():
        first = model(token, past_key_values=cache).logits
        rewind(cache, 1)
        assert cache.get_seq_length() == 20
        assert torch.equal(model(token, past_key_values=cache).logits, first)


def test_long_rounds_end_early():
    model = tiny_model()
    timings = time_decode({"m": model}, 30, steps=5, rounds=2, warmup=1, first_warmup=3, turn_seconds=1e-9)
    assert [len(steps) for steps in timings["m"].rounds] == [1, 1]


def test_prefill_takes_turns():
    model, order = tiny_model(), []
    model.register_forward_pre_hook(lambda *_: order.append("m"))
    assert len(time_prefill({"m": model}, 8, rounds=2)["m"]) == 2
    assert len(order) == 3
    with pytest.raises(ValueError, match="tokens=0"):
        time_prefill({"m": model}, 0)


def test_compiled_steps_make_one_graph(monkeypatch, tmp_path):
    """The graph is not turned into machine code here: that takes a minute and is tested with the cache."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    report = run_bench([subject()], settings(contestants=("egmla", "egmla-compiled"), **ONE), tmp_path)
    found = {row["contestant"]: row.get("recompilations") for row in report["decode"]}
    assert found == {"egmla": None, "egmla-compiled": 0}
    with compiling():
        assert compiled_graphs() == 0


class FakeCuda:
    """Events that are only complete when the device was waited for, as on a GPU; milliseconds."""

    def __init__(self):
        self.log = []

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(time=None)
        event.record = lambda: (self.log.append("record"), setattr(event, "time", len(self.log)))
        event.elapsed_time = lambda end: self.log.append("read") or 250.0 * (end.time - event.time)
        return event

    def synchronize(self, device):
        self.log.append("wait")

    def reset_peak_memory_stats(self, device):
        self.log.append("reset")

    def max_memory_allocated(self, device):
        return 77


def test_cuda_is_timed_by_events():
    cuda = FakeCuda()
    timer = Timer("cuda", cuda=cuda, clock=lambda: pytest.fail("the clock says nothing about a GPU"))
    result, seconds = timer.measure(lambda: cuda.log.append("work") or "result")
    assert cuda.log == ["wait", "record", "work", "record", "wait", "read"]
    assert (result, seconds) == ("result", 0.5)
    timer.reset_peak()
    assert timer.peak_bytes() == 77 and cuda.log[-3:] == ["wait", "reset", "wait"]


def test_cpu_is_timed_by_the_clock():
    times = iter([1.0, 3.5])
    timer = Timer("cpu", clock=lambda: next(times))
    assert timer.measure(lambda: 5) == (5, 2.5)
    assert timer.peak_bytes() is None


def test_limits_count_bytes_and_operations(monkeypatch):
    seconds = iter([2.0, 4.0, 16.0, 8.0])  # the last two of a product in each format, of which the faster counts
    monkeypatch.setattr(Timer, "measure", lambda self, work: (work(), next(seconds)))
    assert Limits(torch.bfloat16, CPU, 2**15).measure() == {  # one matrix of 128 x 128
        "gemv_bytes_per_second": 2**15 / 2,
        "read_bytes_per_second": 2**15 / 4,
        "product_flops_per_second": 2 * 128**3 / 8,
    }


def test_products_grow_until_they_take_long_enough(monkeypatch):
    sides = []

    def measure(self, work):
        sides.append(work.args[0].shape[0])
        return work(), {256: 1e-4, 512: 0.03}[sides[-1]]

    monkeypatch.setattr(Timer, "measure", measure)
    assert Limits(torch.float32, CPU, 4 * 1024**2).multiply() == 2 * 512**3 / 0.03
    assert sides == [256, 512]


# the parity check


def test_a_failed_parity_check_prints_no_result(pair, monkeypatch, tmp_path, small_sweeps):
    """Absorbed attention a hundredth too large."""
    attend = EGMLAAttention.attend_absorbed
    monkeypatch.setattr(
        EGMLAAttention, "attend_absorbed", lambda *given: (1.01 * attend(*given)[0], attend(*given)[1])
    )
    result = run("bench", *pair, "--context", 64, "--batch", 1, "--dtype", "float32", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Parity check: egmla differs from its expanded path" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_parity_check_notices_other_weights():
    """DeepSeek-V3 with weights of its own is not what its row says."""
    models = Models(subject(), torch.float32, CPU)
    models.get("deepseek").model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(torch.ones(48, 48))
    with pytest.raises(ValueError, match="Parity check: deepseek differs from EG-MLA, gates at identity"):
        check_parity(models, subject().contestants(["deepseek"]))


def test_trained_gates_are_set_aside_and_restored():
    model = tiny_model("table-gate")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norm = model.model.layers[0].self_attn.kv_gate_norm
    with gates_at_identity(model):
        assert torch.equal(norm(torch.randn(3, 24)), torch.ones(3, 24))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_passes_the_parity_check(dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rows = check_parity(Models(subject(q_lora_rank=20), dtype, CPU), subject().contestants())
    assert {row["contestant"] for row in rows} == set(subject().contestants())


def test_a_wrong_account_of_a_cache_is_an_error(monkeypatch, tmp_path):
    wrong = Contestant("EG-MLA", "egmla", cache_bytes=lambda config, itemsize, tokens: tokens * 64)
    monkeypatch.setitem(registry.CONTESTANTS, "egmla", wrong)
    with pytest.raises(ValueError, match=r"cache of egmla holds 16,384 bytes and 4,096 are expected"):
        run_bench([subject()], settings(contestants=("egmla",), **ONE), tmp_path / "out")


# interruptions and memory


def test_an_interrupted_run_resumes(monkeypatch, tmp_path):
    groups = []

    def counted(runners, context, **options):
        if len(groups) == 1 and interrupt:
            raise KeyboardInterrupt
        groups.append((context, list(runners)))
        return time_decode(runners, context, **options)

    monkeypatch.setattr(module, "time_decode", counted)
    options = {"contestants": ("egmla", "llama-mha"), "batch_sizes": (1,)}
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run_bench([subject()], settings(**options), tmp_path)
    kept = json.loads((tmp_path / REPORT).read_text())
    assert [row["context"] for row in kept["decode"]] == [64, 64]

    interrupt = False
    report = run_bench([subject()], settings(**options), tmp_path)
    assert groups == [(64, ["egmla", "llama-mha"]), (128, ["egmla", "llama-mha"])]
    assert report["decode"][:2] == kept["decode"] and report["prefill"] == kept["prefill"]

    # A contestant more is set against the same one in a round of its own; nothing is measured when all is there.
    options["contestants"] += ("deepseek",)
    report = run_bench([subject()], settings(**options), tmp_path)
    assert groups[2:] == [(64, ["egmla", "deepseek"]), (128, ["egmla", "deepseek"])]
    assert [row["against"] for row in report["ratios"]] == ["llama-mha", "llama-mha", "deepseek", "deepseek"]
    monkeypatch.setattr(module, "check_parity", lambda *_: pytest.fail("nothing is left to be checked"))
    assert run_bench([subject()], settings(**options), tmp_path) == json.loads((tmp_path / REPORT).read_text())
    assert plan_bench([subject()], settings(**options), tmp_path).decodes == 6
    assert plan_bench([subject()], settings(**options), tmp_path).done == 6
    assert plan_bench([subject()], settings(**options), tmp_path, resume=False).done == 0
    with pytest.raises(ValueError, match=r"figures taken otherwise \(steps\).*choose another folder"):
        run_bench([subject()], settings(steps=3, **options), tmp_path)
    with pytest.raises(ValueError, match=r"figures taken otherwise \(tiny\)"):
        run_bench([subject(q_lora_rank=20)], settings(**options), tmp_path)


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch, tmp_path):
    models, chosen = Models(subject(), torch.float32, CPU), subject().contestants(("egmla", "llama-mha"))
    needs = {name: models.case_bytes(contestant, 2, 128 + 5) for name, contestant in chosen.items()}
    weights = models.weight_bytes("egmla") + models.weight_bytes("llama-mha")
    free = SMALL.sweep_bytes + weights + sum(held for held, _ in needs.values())
    free += max(on_the_way for _, on_the_way in needs.values()) - 1
    monkeypatch.setattr(module, "SHARE_OF_MEMORY", 1.0)
    monkeypatch.setattr(module, "device_bytes", lambda device: free - 10**9)
    monkeypatch.setattr(Models, "loaded_bytes", lambda self: 10**9)
    said = []
    options = {"contestants": ("egmla", "llama-mha"), "prefill_tokens": 0}
    report = run_bench([subject()], settings(**options), tmp_path, say=said.append)
    # The largest case alone, where it is a byte too much.
    missing = {(row["context"], row["batch"], row["contestant"]) for row in report["skipped"]}
    assert missing == {(128, 2, "llama-mha")}
    assert len(report["decode"]) == 7
    assert said and "Skipped: tiny, float32, batch 2, 128 tokens, decode of llama-mha: needs about" in said[0]

    # It is measured as soon as it fits.
    monkeypatch.setattr(module, "device_bytes", lambda device: free)
    report = run_bench([subject()], settings(**options), tmp_path)
    assert not report["skipped"] and len(report["decode"]) == 8


def test_groups_fit_together():
    weights = {"a": {"m": 10}, "b": {"n": 10}, "c": {"n": 10}, "d": {"o": 10}, "huge": {"o": 10}}
    needs = {"a": (5, 0), "b": (15, 5), "c": (20, 5), "d": (20, 0), "huge": (60, 30)}
    # 20 of weights, 40 held, and 5 at a time on the way.
    groups, left_out = pack(needs, weights, ["a"], ["a", "b", "c", "d", "huge"], 65)
    assert groups == [["a", "b", "c"], ["a", "d"]]
    assert left_out == {"huge": 115}
    assert pack(needs, weights, ["a"], ["a"], 70) == ([["a"]], {})
    assert pack(needs, weights, ["a"], [], 70) == ([], {})
    assert pack(needs, weights, ["a"], ["a", "b"], 14) == ([], {"a": 15, "b": 30})
    # Beside both of ours there is no room for the last one, so it has a group with the first.
    ours = {"a": {"m": 10}, "a2": {"m": 10}, "b": {"n": 10}}
    needs = {"a": (5, 0), "a2": (30, 0), "b": (20, 0)}
    assert pack(needs, ours, ["a", "a2"], ["a", "a2", "b"], 50) == ([["a", "a2"], ["a", "b"]], {})


def test_memory_is_followed_in_a_process_of_its_own(monkeypatch):
    role = subject().roles["egmla"]
    options = {"dtype": "float32", "batch_size": 4, "context": 64, "warmup": 1}
    figures = measure_apart(role, "egmla", tokens=8, **options)
    assert figures["tokens"] == 8
    assert figures["cache_growth_bytes"] == 4 * 8 * 2 * 32 * 4
    assert figures["peak_bytes"] > figures["weight_bytes"] > 0
    assert figures["after_bytes"] > figures["weight_bytes"]
    assert figures["growth_bytes"] == figures["after_bytes"] - figures["before_bytes"]
    monkeypatch.setattr(sys, "executable", "false")
    assert measure_apart(role, "egmla", tokens=1, **options) == {"error": "ended with code 1"}


# the command


def test_a_pair_on_the_command_line(pair, tmp_path, small_sweeps):
    words = ["bench", *pair, "--context", "64,128", "--batch", 1, "--dtype", "float32", "--prefill", 8]
    words += ["--rounds", 2, "--steps", 1, "--contestants", "source,source-static,egmla", "--output", tmp_path / "out"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    *shown, last = result.stdout.splitlines()
    report = json.loads(last)
    assert {row["contestant"] for row in report["decode"]} == {"source", "source-static", "egmla"}
    used = {row["contestant"]: row["cache_used_bytes"] for row in report["decode"] if row["context"] == 128}
    assert used["source"] == 3 * used["egmla"]
    assert (
        "turns" not in report["decode"][0]
        and "turns" in json.loads((tmp_path / "out" / REPORT).read_text())["decode"][0]
    )
    assert any("source, static cache" in line for line in shown)
    assert str(tmp_path) not in last  # reports are published
    again = run(*words)
    assert again.exit_code == 0 and json.loads(again.stdout.splitlines()[-1]) == report


def test_the_plan_comes_first_and_a_dry_run_ends_there(pair, tmp_path, small_sweeps, monkeypatch):
    monkeypatch.setattr(module, "check_parity", lambda *_: pytest.fail("work has begun"))
    words = ["bench", *pair, "--context", "64,128", "--batch", "1,2", "--dtype", "float32", "--memory"]
    result = run(*words, "--contestants", "source,egmla", "--output", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "source, egmla" in result.stdout and "64, 128 tokens in the cache" in result.stdout
    assert "8 timings to take: about" in result.stdout and "the same command resumes" in result.stdout
    assert "memory over 256 tokens" in result.stdout
    assert not (tmp_path / "out").exists()
    result = run("bench", "--dry-run", "--output", tmp_path / "out")
    assert "egmla-kv64-120m: egmla, egmla-fixed" in result.stdout and "Shorter: " in result.stdout


def test_a_plan_counts_what_is_left(measured):
    folder, _, _ = measured
    plan = plan_bench([subject()], SMALL, folder)
    assert (plan.decodes, plan.done, plan.seconds) == (4 * len(NAMES), 4 * len(NAMES), 0)
    longer = plan_bench([subject()], settings(contexts=(64, 128, 256)), folder)
    assert (longer.decodes, longer.done) == (6 * len(NAMES), 4 * len(NAMES)) and longer.seconds > 0
    assert plan_bench([subject()], settings(rounds=2, contexts=(1024,)), folder / "new").seconds > longer.seconds


def test_a_terminal_shows_no_json(pair, tmp_path, small_sweeps, monkeypatch):
    """A line of 9 kB hid the tables; programs read the last line of a pipe, or ask for --json."""
    words = ["bench", *pair, "--context", 64, "--batch", 1, "--dtype", "float32", "--prefill", 0, "--rounds", 1]
    words += ["--steps", 1, "--contestants", "source,egmla", "--output", tmp_path / "out"]
    piped = run(*words)
    assert json.loads(piped.stdout.splitlines()[-1])["decode"]
    assert "4 timings" not in piped.stdout and "2 timings to take" in piped.stderr
    monkeypatch.setattr(sys.modules["egmla.commands.bench"], "_on_a_terminal", lambda: True)
    shown = run(*words)
    assert shown.exit_code == 0 and "{" not in shown.stdout and "bench.json" in shown.stdout
    assert json.loads(run(*words, "--json").stdout.splitlines()[-1])["decode"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["egmla-kv64-120m", "--contestants", "egmla,lama"], "'lama' is no contestant: use any of source,"),
        (["egmla-kv64-120m", "--contestants", "source"], "egmla-kv64-120m has no contestant 'source'; it has egmla,"),
        (["egmla-smollm2-135m", "--contestants", "llama-gqa4"], "9 heads do not share 4 keys evenly"),
        (["egmla-kv64-120m", "--batch", "0"], "batch 0: must be at least 1"),
        (["egmla-kv64-120m", "--batch", "one"], "--batch one: must be whole numbers separated by commas"),
        (["egmla-kv64-120m", "--context", ""], "No contexts given"),
        (["egmla-kv64-120m", "--context", "-5"], "context -5: must be at least 1"),
        (["egmla-kv64-120m", "--dtype", "int8"], "dtype 'int8': must be one of float32, bfloat16, float16"),
        (["egmla-kv64-120m", "--rounds", "0"], "rounds 0: must be at least 1"),
        (["egmla-kv64-120m", "--turn-seconds", "0"], "turn seconds 0.0: must be above 0"),
        (["egmla-kv64-12m"], "'egmla-kv64-12m' is no preset: did you mean"),
        (["./nowhere"], "There is no folder ./nowhere"),
        (["{source}"], "is a llama model; give the folder of its conversion behind it"),
        (["{source}", "{source}"], "was given twice"),
        (["{source}", "{converted}", "./third"], "give presets, the folders of one source and its conversion"),
    ],
)
def test_bad_input_shows_before_any_work(words, message, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "check_parity", lambda *_: pytest.fail("work has begun"))
    folders = dict(zip(("source", "converted"), pair, strict=True))
    words = [word.format(**folders) for word in words]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *words, "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_a_context_that_matters(pair, tmp_path):
    """Rotary tables have no end; frequencies that depend on the length have."""
    configs = [LlamaConfig(max_position_embeddings=64), tiny_config()]
    folders = tuple(map(str, pair))
    run_bench([pair_subject(("a", "b"), configs, folders)], settings(contestants=("egmla",), **ONE), tmp_path / "one")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    configs[0] = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    with pytest.raises(
        ValueError, match=r"exceeds max_position_embeddings=64, which matters with rope_type 'dynamic'"
    ):
        run_bench(
            [pair_subject(("a", "b"), configs, folders)], settings(contestants=("egmla",), **ONE), tmp_path / "two"
        )


def test_a_cuda_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="PyTorch finds no CUDA device"):
        settings(device="cuda").check()


def test_another_device():
    with pytest.raises(ValueError, match="device 'tpu': must be cpu or cuda"):
        settings(device="tpu").check()


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / REPORT).write_text("{}")
    with pytest.raises(ValueError, match="is no report of a benchmark"):
        run_bench([subject()], SMALL, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="is no folder with write permission"):
        run_bench([subject()], SMALL, tmp_path / "file" / "below")
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        run_bench([subject()], SMALL, tmp_path / "file")
