"""The `egmla` command line: what it prints, where, and its exit codes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SHAPE, run, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MixtralConfig

import egmla.commands.demo
import egmla.conversion
from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.commands.common import in_bytes
from egmla.samples import sample_text


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A small Llama whose keys and values take 32 elements per token and layer."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=8)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Path:
    """A small EG-MLA model of 8 + 4 elements per token and layer."""
    folder = tmp_path_factory.mktemp("latent")
    config = EGMLAConfig(**SHAPE, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    EGMLAForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "calibration.txt"
    file.write_text(sample_text("calibration")[:60_000])
    return file


# presets and inspect


def test_presets_lists_the_published_figures():
    result = run("presets")
    assert result.exit_code == 0
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert all(figure in rows["egmla-kv64-120m"] for figure in ("1,536", "3,072", "-91.7%", "-60.0%", "+154.5M"))
    assert all(figure in rows["mla-kv256-120m"] for figure in ("3,840", "7,680", "-79.2%", "none"))
    assert all(figure in rows["egmla-kv16-120m"] for figure in ("960", "1,920", "-94.8%"))


def test_inspect_a_preset():
    result = run("inspect", "egmla-kv64-120m")
    assert result.exit_code == 0
    for expected in (
        "table of 50,304 x 256",
        "154,533,888",
        "1,536",
        "24.0 MiB",
        "96.0 MiB",
        "384.0 MiB",
        "rope_theta",
    ):
        assert expected in result.stdout


def test_inspect_folders(llama, latent):
    stock = run("inspect", llama)
    assert stock.exit_code == 0
    assert "LlamaForCausalLM" in stock.stdout
    assert re.search(r"cache elements per token\s+│ 64 ", stock.stdout)
    ours = run("inspect", latent)
    assert "fed by the input embedding" in ours.stdout
    assert re.search(r"cache elements per token\s+│ 24 ", ours.stdout)


def test_inspect_allocated_bits(tmp_path):
    """Bytes of the stored allocation and of each budget, beside those of entries as they are."""
    layer = {"latent": [[8, 16], [4, 32]], "rope": [[3, 16]]}
    small = {"latent": [[2, 16]], "rope": []}
    bits = {"group_tokens": 64, "first_tokens": 4, "layers": 2 * [layer], "budgets": {"0.05": 2 * [small]}}
    config = EGMLAConfig(num_hidden_layers=2, kv_cache_bits=bits)
    config.save_pretrained(tmp_path)
    shown = run("inspect", tmp_path).stdout
    assert re.search(r"cache elements per token\s*│\s*256\b", shown)
    assert re.search(r"allocated bits: stored channels\s*│\s*160 of 256\b", shown)
    # 32,764 tokens after the first: 511 groups and 60 tokens. The channels have 8, 4 and 3 bits.
    group = 64 * (16 * 8 + 32 * 4 + 32 * 3) // 8 + 2 * 80
    stored = 2 * (511 * group + 2 * (4 * 128 + 60 * 80))
    budget = 2 * (511 * (64 * 16 * 2 // 8 + 2 * 16) + 2 * (4 * 128 + 60 * 16))
    whole = 2 * 32_768 * 128 * 2
    rows = re.findall(r"at 32K tokens\s*│\s*([\d.]+ \w+)", shown)
    assert rows == [in_bytes(nbytes) for nbytes in (whole, stored, budget)]


def test_inspect_a_sliding_window(tmp_path):
    MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=1025).save_pretrained(tmp_path)
    shown = run("inspect", tmp_path).stdout
    assert re.search(r"tokens these cache at most\s+│ 1,024 ", shown)
    # 1,024 tokens of 2 layers, 32 elements, 2 bytes.
    assert re.search(r"at 8K tokens\s+│ 128\.0 KiB ", shown)


def test_inspect_experts(tmp_path):
    MixtralConfig(**SHAPE, num_key_value_heads=2, head_dim=8, num_local_experts=4).save_pretrained(tmp_path)
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"parameters: MLP\s+│ \S+ \(37,120\)", result.stdout)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config: config | {"kv_gate": "sideways"}, "kv_gate"),
        (lambda config: config | {"num_hidden_layers": "two"}, "num_hidden_layers"),
    ],
)
def test_a_spoilt_config_is_an_error_in_words(latent, tmp_path, spoil, message):
    config = json.loads((latent / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(spoil(config)))
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert "Traceback" not in result.output


def test_truncated_weights_are_an_error_in_words(latent, tmp_path):
    folder = Path(shutil.copytree(latent, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run("generate", folder, "--prompt", "Alice", "--no-chat")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("egmla-kv64", "'egmla-kv64' is no preset: did you mean egmla-kv64-120m"),
        ("./nowhere", "There is no folder ./nowhere"),
        ("owner/nowhere", "'owner/nowhere' is no preset (egmla-kv16-120m"),
    ],
)
def test_inspect_says_what_it_cannot_find(name, message):
    result = run("inspect", name)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_inspect_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for name, value in (("block_count", 3), ("context_length", 64), ("embedding_length", 32)):
        getattr(writer, f"add_{name}")(value)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(97)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    result = run("inspect", path)
    assert result.exit_code == 0, result.output
    # Keys and values of 2 heads 8 wide, in 3 layers.
    assert "LlamaForCausalLM" in result.stdout and "96" in result.stdout
    missing = run("inspect", tmp_path / "missing.gguf")
    assert missing.exit_code == 1 and "There is no file" in missing.stderr
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    broken = run("inspect", tmp_path / "broken.gguf")
    assert broken.exit_code == 1 and "broken.gguf" in broken.stderr and "Traceback" not in broken.output


def test_inspect_a_folder_that_is_no_model(tmp_path):
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "is a folder without a config.json" in result.stderr


def test_inspect_an_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "nonesuch" in result.stderr


# generate


def test_generate_counts_tokens_and_cache(latent):
    result = run("generate", latent, "--prompt", "Alice was", "--max-new-tokens", 5, "--no-chat", "--threads", 1)
    assert result.exit_code == 0, result.output
    # The last token is written but never read, so it is not in the cache.
    cached = int(re.search(r"cache: (\d+) tokens x 24 elements", result.stdout)[1])
    new = int(re.search(r"(\d+) tokens in", result.stdout)[1])
    assert cached == 2 + new - 1
    used, allocated = re.search(r"([\d,]+) bytes used, ([\d,]+) allocated", result.stdout).groups()
    assert int(used.replace(",", "")) == cached * 24 * 4 <= int(allocated.replace(",", ""))


def test_generate_with_a_stock_model_counts_its_storages(llama):
    result = run("generate", llama, "--prompt", "Alice was", "--max-new-tokens", 3, "--no-chat")
    assert result.exit_code == 0, result.output
    assert "tokens x 64 elements" in result.stdout


def test_generate_uses_the_chat_template(latent):
    plain = run("generate", latent, "--prompt", "Alice was", "--max-new-tokens", 1, "--no-chat")
    chat = run("generate", latent, "--prompt", "Alice was", "--max-new-tokens", 1)
    system = run("generate", latent, "--prompt", "Alice was", "--max-new-tokens", 1, "--system", "Alice")
    assert "prompt of 2 tokens" in plain.stdout
    assert "prompt of 3 tokens" in chat.stdout
    assert "prompt of 4 tokens" in system.stdout


def test_generate_draws_the_same_with_the_same_seed(latent):
    arguments = ("generate", latent, "--prompt", "Alice", "--temperature", 2.0, "--top-p", 0.9, "--max-new-tokens", 8)
    first, again, other = (run(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first.exit_code == 0
    assert first.stdout.splitlines()[0] == again.stdout.splitlines()[0] != other.stdout.splitlines()[0]


def test_generate_in_another_format(latent):
    result = run("generate", latent, "--prompt", "Alice", "--max-new-tokens", 2, "--dtype", "bfloat16", "--no-chat")
    assert result.exit_code == 0
    assert "2 tokens x 24 elements, 96 bytes used" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "The prompt is empty"),
        (("--prompt", "a", "--no-chat", "--system", "b"), "the chat template is turned off"),
        (("--prompt", "a", "--temperature", "1", "--top-p", "0"), "top_p above 0"),
    ],
)
def test_generate_refuses(latent, options, message):
    result = run("generate", latent, *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_generate_wants_a_model():
    assert "is a preset, a shape without weights" in run("generate", "egmla-kv64-120m", "--prompt", "a").stderr
    assert run("generate", "./nowhere", "--prompt", "a").exit_code == 1
    assert run("generate").exit_code == 2


# convert


def test_convert_exact_and_generate(llama, tmp_path):
    result = run("convert", llama, tmp_path / "exact", "--exact")
    assert result.exit_code == 0, result.output
    assert "64 -> 64" in result.stdout
    assert run("generate", tmp_path / "exact", "--prompt", "Alice", "--max-new-tokens", 2).exit_code == 0


def test_convert_to_half_the_cache(llama, text, tmp_path):
    options = "--kv-lora-rank", "8,12", "--qk-rope-head-dim", 6, "--calibration", text, "--calibration-tokens", 4096
    options += "--refine-steps", 2, "--refine-gate", "--set", "refine.learning_rate=3e-4", "--set", "balance=2"
    result = run("convert", llama, tmp_path / "half", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "half" / "conversion_report.json").read_text())
    assert report["refinement"]["steps"] == 2 and report["refinement"]["gate"]
    assert report["refinement"]["learning_rate"] == 3e-4 and report["recipe"]["balance"] == 2
    assert "--refine-steps 2" in report["command"]
    assert report["command"].endswith(" --refine-gate --set refine.learning_rate=0.0003 --set balance=2")
    assert "64 -> 32" in result.stdout
    assert "8 to 12, one per layer" in result.stdout
    assert EGMLAConfig.from_pretrained(tmp_path / "half").kv_lora_rank == [8, 12]


def test_convert_dry_run_writes_nothing(llama, text, tmp_path):
    result = run("convert", llama, tmp_path / "half", "--cache", 0.5, "--calibration", text, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "nothing was written" in result.stdout
    assert "50.0%" in result.stdout
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-lora-rank", "0", "--qk-rope-head-dim", "4"), "kv_lora_rank=0: must be from 1"),
        (("--kv-lora-rank", "999", "--qk-rope-head-dim", "4"), "kv_lora_rank=999: must be from 1"),
        (("--kv-lora-rank", "8", "--qk-rope-head-dim", "5"), "qk_rope_head_dim=5: must be even"),
        (("--kv-lora-rank", "many"), "--kv-lora-rank many: must be a number"),
        (("--kv-lora-rank", "8", "--qk-rope-head-dim", "4"), "needs calibration text"),
        (("--kv-lora-rank", "8", "--qk-rope-head-dim", "4", "--calibration", "nix.txt"), "nix.txt does not exist"),
        (("--cache", "0.5", "--refine-steps", "0", "--refine-gate"), "--refine-gate with --refine-steps 0"),
        (("--cache", "0.5", "--set", "refine.rate=1"), "The refinement has no choice 'rate'; it has learning_rate"),
        (("--exact", "--refine-gate"), "exact mode keeps the source's function and has no use for refinement"),
        (("--exact", "--refine-steps", "9", "--calibration", "nix.txt"), "(--calibration, --calibration-tokens) and "),
        (("--exact", "--set", "balance=2"), "has no use for choices of a recipe (--recipe, --set)"),
    ],
)
def test_convert_refuses(llama, tmp_path, options, message):
    result = run("convert", llama, tmp_path / "target", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "target").exists()


def test_convert_leaves_a_full_folder_alone(llama, latent):
    result = run("convert", llama, latent, "--exact")
    assert result.exit_code == 1
    assert "exists and is not empty" in result.stderr


# errors in general


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_interruption_exits_with_130(monkeypatch, tmp_path):
    monkeypatch.setattr(egmla.conversion, "convert_checkpoint", fail_with(KeyboardInterrupt()))
    result = run("convert", "source", tmp_path / "target", "--exact")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted."


def test_interruption_says_what_is_kept(llama, text, tmp_path, monkeypatch):
    """Finished layers of a conversion, its model while it is measured, the models of a sweep."""
    monkeypatch.chdir(tmp_path)
    options = "--kv-lora-rank", 8, "--qk-rope-head-dim", 4, "--calibration", text, "--calibration-tokens", 4096
    options += "--refine-steps", 0
    with monkeypatch.context() as patch:
        patch.setattr("egmla.conversion.convert.ShardWriter.finish", fail_with(KeyboardInterrupt()))
        result = run("convert", llama, "half", *options)
    assert result.exit_code == 130
    expected = "Interrupted. The layers that are finished are kept, and the same command resumes from there."
    assert result.stderr.strip().endswith(expected)
    other = tmp_path / "other.txt"
    other.write_text(sample_text("evaluation")[:60_000])
    options += "--evaluate", other, "--evaluation-windows", 1
    with monkeypatch.context() as patch:
        patch.setattr("egmla.conversion.convert.source_perplexity", fail_with(KeyboardInterrupt()))
        result = run("convert", llama, "half", *options)
    assert result.stderr.strip().endswith("Interrupted. The model is written, and the same command measures it.")
    result = run("convert", llama, "half", *options)
    assert result.exit_code == 0 and "perplexity, 1 windows of other.txt" in result.stdout
    with monkeypatch.context() as patch:
        patch.setattr("egmla.conversion.sweep.converted_perplexity", fail_with(KeyboardInterrupt()))
        result = run("sweep", llama, "models", "--cache", "0.5", *options[4:])
    assert "Interrupted. The models and layers that are finished are kept" in result.stderr


def test_the_current_folder_has_a_name(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(llama)
    assert run("convert", ".", tmp_path / "t", "--exact").exit_code == 0
    report = json.loads((tmp_path / "t" / "conversion_report.json").read_text())
    assert report["source"]["label"] == llama.name
    assert report["command"] == f"egmla convert {llama.name} TARGET --exact"


@pytest.mark.parametrize("flag", [("--debug",), ()])
def test_debug_shows_the_traceback(monkeypatch, tmp_path, flag):
    monkeypatch.setattr(egmla.conversion, "convert_checkpoint", fail_with(ValueError("too\n  small")))
    result = run(*flag, "convert", "source", tmp_path / "target", "--exact")
    assert result.exit_code == 1
    if flag:
        assert isinstance(result.exception, ValueError)
    else:
        assert result.stderr.strip() == "Error: too small"


def test_bugs_are_not_dressed_up(monkeypatch, tmp_path):
    monkeypatch.setattr(egmla.conversion, "convert_checkpoint", fail_with(AssertionError("bug")))
    result = run("convert", "source", tmp_path / "target", "--exact")
    assert result.exit_code == 1
    assert isinstance(result.exception, AssertionError)


def test_as_a_process():
    """What a shell sees: the module form, streams, exit codes."""

    def shell(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "egmla", *arguments], capture_output=True, text=True, timeout=120)

    version = shell("--version")  # two processes only: each imports torch and Transformers anew
    assert (version.returncode, version.stdout.strip()) == (0, f"egmla {egmla.__version__}")
    wrong = shell("inspect", "./nowhere")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("Error: There is no folder ./nowhere")


def test_unknown_command():
    assert run("no-such-command").exit_code == 2


# demo


def test_demo(llama, tmp_path, monkeypatch):
    """The whole demo on a small model: table, answer, files; the second run converts nothing."""
    pytest.importorskip("matplotlib")
    demo = sys.modules["egmla.commands.demo"]
    monkeypatch.setattr(egmla.conversion, "smollm2_source", lambda cache_dir: str(llama))
    tiny = {"window": 64, "windows": 2, "passage": 200, "passages": 1, "questions": 2, "context": 64}
    monkeypatch.setattr(demo, "SIZES", tiny)
    monkeypatch.setattr(demo, "SHARE", 0.5)
    monkeypatch.setattr(demo, "SMALLER_SHARE", 0.25)
    output = tmp_path / "demo"
    result = run("demo", "--output", output, "--question", "Alice was")
    assert result.exit_code == 0, result.output
    assert "its cache at 50% of the source's bytes" in result.stdout
    table = json.loads((output / "table.json").read_text())
    names = ["source", "source, KIVI-style 4 bits", "EG-MLA, 50 %", "source, KIVI-style 2 bits", "EG-MLA, 25 %"]
    assert [row["name"] for row in table["rows"]] == names
    shares = [row["cache_share"] for row in table["rows"]]
    assert (shares[0], shares[2], shares[4]) == (1, 0.5, 0.25)
    assert [row["decode_ms_median"] is not None for row in table["rows"]] == [True, False, True, False, True]
    assert table["sizes"]["context"] == 64
    assert (output / "table.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(egmla.conversion, "convert_checkpoint", fail_with(AssertionError("converted again")))
    again = run("demo", "--output", output, "--question", "Alice was")
    assert again.exit_code == 0, again.output
    shutil.rmtree(output / "quarter-cache")
    assert isinstance(run("demo", "--output", output).exception, AssertionError)


def test_demo_without_a_source(monkeypatch, tmp_path):
    monkeypatch.setattr(egmla.conversion, "smollm2_source", fail_with(OSError("neither hub nor wheel")))
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 1
    assert "neither hub nor wheel" in result.stderr
