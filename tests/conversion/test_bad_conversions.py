"""Bad input of a conversion: each case is named in words, before any long work, and leaves nothing behind."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

from egmla import EGMLAConfig
from egmla.conversion import Refinement, convert_checkpoint, layer_loop
from egmla.evaluation.harness import check_model_args
from egmla.samples import sample_text


def change_config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def change_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def lose_a_shard(folder):
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def two_shards(spoil):
    """A checkpoint in two shards, the second of which has the layers; `spoil` is called with its path."""

    def split(folder):
        tensors, names = load_file(folder / "model.safetensors"), {}
        for number, inside in ((1, False), (2, True)):
            shard = f"model-{number:05d}-of-00002.safetensors"
            part = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers") is inside}
            save_file(part, folder / shard, metadata={"format": "pt"})
            names |= dict.fromkeys(part, shard)
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))
        spoil(folder / shard)

    return split


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def more_tokens(folder):
    """Another model's tokenizer: every other token is beyond the embedding."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for text, number in tokenizer["model"]["vocab"].items():
        tokenizer["model"]["vocab"][text] = number + (1000 if text.isalpha() else 0)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def tokenizer_of_its_own(folder):
    (folder / "tokenizer.json").unlink()
    own = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["tokenization.MyTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))


INDEX = "model.safetensors.index.json"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXACT = {"exact": True, "kv_lora_rank": None, "qk_rope_head_dim": None, "calibration": None}
BIAS = "model.layers.1.self_attn.k_proj.bias"
LAST = "model.layers.1.mlp.down_proj.weight"

# What is done to the source; arguments other than those of a good conversion, names of files in place of paths; what
# the message must contain: what was given, what is required, what to do.
CASES = {
    "ranks of too few layers": (None, {"kv_lora_rank": [8]}, ["1 entries and the source 2 layers", "give one number"]),
    "rank zero": (None, {"kv_lora_rank": 0}, ["kv_lora_rank=0", "from 1 to 88"]),
    "rank too large": (None, {"kv_lora_rank": 89}, ["kv_lora_rank=89", "from 1 to 88", "use exact"]),
    "one rank too large": (None, {"kv_lora_rank": [8, 200]}, ["kv_lora_rank=200", "from 1 to 88"]),
    "odd rotary width": (None, {"qk_rope_head_dim": 7}, ["qk_rope_head_dim=7", "must be even and from 0 to 48"]),
    "rotary width too large": (None, {"qk_rope_head_dim": 50}, ["qk_rope_head_dim=50", "3 key heads of 16"]),
    "cache of nothing": (None, {"kv_lora_rank": None, "cache": 0.0}, ["cache=0.0", "above 0 and at most 1"]),
    "cache in percent": (None, {"kv_lora_rank": None, "cache": 50}, ["cache=50", "above 0 and at most 1"]),
    "cache and rank": (None, {"cache": 0.5}, ["either cache or kv_lora_rank", "max_rank"]),
    "no size": (None, {"kv_lora_rank": None}, ["Say how small the cache shall be"]),
    "unknown recipe": (None, {"recipe": "mha2mla"}, ["Recipe 'mha2mla' is not known", "did you mean mha2mla-like"]),
    "unknown dtype": (None, {"dtype": "float99"}, ["dtype='float99'", "must be one of float32, bfloat16, float16"]),
    "no calibration": (None, {"calibration": None}, ["needs calibration text", "--calibration FILE"]),
    "calibration missing": (None, {"calibration": "none.txt"}, ["none.txt does not exist", "give a plain text file"]),
    "calibration empty": (None, {"calibration": "empty.txt"}, ["empty.txt is empty"]),
    "calibration binary": (None, {"calibration": "binary.txt"}, ["binary.txt is a binary file"]),
    "calibration not UTF-8": (None, {"calibration": "latin.txt"}, ["latin.txt is no UTF-8 text", "convert it"]),
    "calibration too short": (
        None,
        {"calibration": "short.txt"},
        ["short.txt gives 500 calibration tokens", "at least 1024", "longer text"],
    ),
    "calibration is evaluation": (
        None,
        {"calibration": "book.txt", "evaluate": "copy.txt"},
        ["book.txt and evaluation text copy.txt have text in common", "on other text"],
    ),
    "evaluation too short": (None, {"evaluate": "tiny.txt"}, ["has 4 tokens and one window needs 256"]),
    "target is there": (None, {"target": "full"}, ["full exists and is not empty", "Choose another target"]),
    "target below a file": (
        None,
        {"target": "short.txt/model"},
        ["short.txt/model cannot be written", "another target"],
    ),
    "source missing": (
        None,
        {"source": "./nothing"},
        ["There is no folder ./nothing", "give the folder of a checkpoint"],
    ),
    "source without config": (lambda folder: (folder / "config.json").unlink(), {}, ["has no config.json"]),
    "shard missing": (lose_a_shard, {}, ["lacks model-00002-of-00002.safetensors", "download the checkpoint again"]),
    "one shard of two truncated": (
        two_shards(lambda shard: shard.write_bytes(shard.read_bytes()[:-10])),
        {},
        ["model-00002-of-00002.safetensors is truncated or no safetensors file", "download it again"],
    ),
    "index broken": (
        two_shards(lambda shard: (shard.parent / INDEX).write_text('{"weight_map": {')),
        {},
        [f"{INDEX} is no valid JSON", "download it again"],
    ),
    "index without its key": (
        two_shards(lambda shard: (shard.parent / INDEX).write_text('{"metadata": {}}')),
        {},
        [f"{INDEX} has no weight_map", "download the checkpoint again"],
    ),
    "index of something else": (
        two_shards(lambda shard: (shard.parent / INDEX).write_text('{"weight_map": {"model.norm.weight": 1}}')),
        {},
        [f"{INDEX} has no weight_map that gives each tensor's file"],
    ),
    "config broken": (truncate("config.json"), {}, ["config.json is no valid JSON", "download it again"]),
    "config without architecture": (
        change_config(model_type=None),
        {},
        ["config.json has model_type=None", "must name an architecture"],
    ),
    "architecture unknown to Transformers": (
        change_config(model_type="mymodel", auto_map={"AutoConfig": "configuration_mymodel.MyConfig"}),
        {},
        ["Architecture 'mymodel' is not supported. Supported: llama, ", "Nearest: ", "missing: "],
    ),
    "rotation without a factor": (
        change_config(rope_parameters={key: value for key, value in LLAMA3.items() if key != "factor"}),
        {},
        ["config.json has a value that does not work (", "rope_parameters", "'factor'", "correct it"],
    ),
    "unknown rotation": (
        change_config(rope_parameters={"rope_type": "ntk", "rope_theta": 1e4}),
        {},
        ["rope_type='ntk' in the rope_parameters of config.json", "must be one of default, linear, "],
    ),
    "tokenizer broken": (truncate("tokenizer.json"), {}, ["tokenizer.json is no valid JSON", "download it again"]),
    "tokenizer of something else": (
        write("tokenizer.json", '{"model": {"type": "none"}}'),
        EXACT,
        ["tokenizer.json holds no tokenizer that can be read", "download it again"],
    ),
    "tokenizer settings broken": (
        truncate("tokenizer_config.json"),
        EXACT,
        ["tokenizer_config.json is no valid JSON"],
    ),
    "tokenizer of its own code": (
        tokenizer_of_its_own,
        {},
        ["has no tokenizer that can be read, which calibration needs", "code that comes with it", "tokenizer.json"],
    ),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("*token*")],
        {},
        ["has no tokenizer that can be read, which calibration needs (it has no tokenizer files)", "add its"],
    ),
    "no tokenizer to evaluate with": (
        tokenizer_of_its_own,
        {**EXACT, "evaluate": "book.txt"},
        ["has no tokenizer that can be read, which evaluation needs", "code that comes with it"],
    ),
    "tokenizer of another model": (
        more_tokens,
        {},
        ["gives token id 1122 and the source has embeddings of 128 tokens (vocab_size)", "source's own tokenizer"],
    ),
    "tokenizer of another model to evaluate with": (
        more_tokens,
        {**EXACT, "evaluate": "book.txt"},
        ["gives token id 1122 and the source has embeddings of 128 tokens (vocab_size)"],
    ),
    "exact with calibration": (
        None,
        {"exact": True, "kv_lora_rank": None, "qk_rope_head_dim": None},
        [
            "exact mode",
            "no use for calibration text (--calibration, --calibration-tokens)",
            "leave that out, or --exact",
        ],
    ),
    "exact with refinement": (
        None,
        {**EXACT, "refinement": Refinement(gate=True)},
        ["exact mode", "no use for refinement (--refine-steps, --refine-gate)"],
    ),
    "exact with choices": (None, {**EXACT, "recipe": "mha2mla-like"}, ["no use for choices of a recipe"]),
    "cache smaller than any": (
        None,
        {"kv_lora_rank": None, "qk_rope_head_dim": None, "cache": 0.004, "cache_dtype": "bf16"},
        ["cache=0.004: of 96 elements", "keeps 0", "the share must be at least 0.011"],
    ),
    "cache smaller than slots allow": (
        None,
        {"kv_lora_rank": None, "qk_rope_head_dim": None, "cache": 0.04, "recipe": "transmla-like"},
        [
            "cache=0.04: of 96 elements",
            "keeps 4, and the rotary key takes 4",
            "slots='uniform' and freqfold=4",
            "0.053",
        ],
    ),
    "cache smaller than the rotary key": (
        None,
        {"kv_lora_rank": None, "cache": 0.05, "cache_dtype": "bf16"},
        ["keeps 5, and the rotary key takes 8, as asked for", "must be at least 0.094"],
    ),
    "NaN in the last layer": (
        change_tensors(lambda tensors: tensors[LAST][0, :2].fill_(float("nan"))),
        {},
        [f"Tensor {LAST} in", "has 2 values that are NaN", "Use an intact copy"],
    ),
    "infinite": (
        change_tensors(lambda tensors: tensors[LAST][0, :1].fill_(float("inf"))),
        {},
        ["has 1 values that are NaN or infinite"],
    ),
    "quantised": (
        change_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        {},
        ["has quantised weights (gptq)", "Use the unquantised checkpoint"],
    ),
    "quantised as DeepSeek's": (
        change_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        {},
        ["has quantised weights (fp8)", "bfloat16 copy", "inference/fp8_cast_bf16.py of github.com/deepseek-ai"],
    ),
    "biases on some": (
        change_tensors(lambda tensors: tensors.pop(BIAS)),
        {},
        ["has model.layers.1.self_attn.q_proj.bias and no", BIAS, "the missing ones as zeros"],
    ),
    "attention sinks": (
        change_tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.zeros(6)})),
        {},
        ["has attention sinks (model.layers.0.self_attn.sinks)", "use a checkpoint without"],
    ),
    "soft-capped logits": (
        change_config(attn_logit_softcapping=50.0),
        {},
        ["caps its attention logits (attn_logit_softcapping=50.0)", "remove the field"],
    ),
    "config of unknown dtype": (
        change_config(dtype="float99"),
        {},
        ["config.json has a value that does not work", "float99", "correct it"],
    ),
    "odd head width": (
        change_config(head_dim=15),
        {},
        ["config.json has a value", "even rotary dimension", "head_dim`=15"],
    ),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    book = sample_text("evaluation")[:5000].encode("ascii", "ignore")
    contents = {
        "empty": b"",
        "binary": b"\x00\x01",
        "latin": "Größe ".encode("latin-1") * 2000,
        "short": b"abcd " * 100,
    }
    contents |= {"book": book, "copy": b" ".join(book.upper().split()), "tiny": b"tiny"}
    for name, content in contents.items():
        (folder / f"{name}.txt").write_bytes(content)
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("mine")
    return folder


def write_gguf(path, architecture, tensors, **fields):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in fields.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()


ONES = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
SHAPE = {
    "block_count": 1,
    "embedding_length": 16,
    "feed_forward_length": 16,
    "attention__head_count": 2,
    "vocab_size": 4,
    "context_length": 32,
}


@pytest.mark.parametrize(
    ("architecture", "tensors", "fields", "fragments"),
    [
        (
            "llama",
            {"rope_freqs.weight": np.array([1, 1, 8], dtype=np.float32)},
            {},
            ["scales its rotary frequencies (rope_freqs.weight)", "Use the safetensors checkpoint"],
        ),
        ("phi3", {"rope_factors_long.weight": np.array([2], dtype=np.float32)}, {}, ["(rope_factors_long.weight)"]),
        ("qwen2", ONES, {"rope__scaling__type": "yarn"}, ["rotary frequencies (qwen2.rope.scaling.type 'yarn')"]),
        ("myarch", ONES, {"rope__scaling__type": "none"}, ["Transformers cannot read", "myarch", "safetensors"]),
        (
            "llama",
            {"token_embd.weight": np.zeros((4, 16), dtype=np.int8)},
            SHAPE,
            ["Transformers cannot read", "not", "use the safetensors checkpoint"],
        ),
        (
            "llama",
            {"token_embd.weight": np.zeros((4, 16), dtype=np.float32)},
            SHAPE,
            ["tensors of its architecture, first model.layers.0.", "download it again"],
        ),
    ],
    ids=["llama3", "longrope", "yarn", "architecture", "format of numbers", "tensors missing"],
)
def test_bad_gguf(tmp_path, architecture, tensors, fields, fragments):
    write_gguf(tmp_path / "model.gguf", architecture, tensors, **fields)
    with pytest.raises(ValueError) as error:
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "t", exact=True)
    missing = [fragment for fragment in [str(tmp_path / "model.gguf"), *fragments] if fragment not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("length", [0, 3, 20, 60, -8])
def test_truncated_and_foreign_gguf(tmp_path, length):
    write_gguf(tmp_path / "whole.gguf", "llama", ONES)
    content = (tmp_path / "whole.gguf").read_bytes()
    for spoilt in (content[:length], b"PK" + content[2:]):
        (tmp_path / "model.gguf").write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"model.gguf is truncated, no GGUF file, or .* download it again"):
            convert_checkpoint(tmp_path / "model.gguf", tmp_path / "t", exact=True)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(llama_folder, calibration, texts, tmp_path, monkeypatch, name):
    def long_work(*args, **kwargs):
        raise AssertionError("the long work began")

    monkeypatch.setattr(layer_loop, "SourceRun", long_work)
    spoil, changes, fragments = CASES[name]
    source = llama_folder
    if spoil is not None:
        source = shutil.copytree(llama_folder, tmp_path / "source")
        spoil(source)
    arguments = {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "calibration": calibration, "target": tmp_path / "t"}
    for key, value in changes.items():
        arguments[key] = texts / value if key in ("calibration", "evaluate", "target") and value else value
    before = sorted(path.name for path in texts.rglob("*"))
    with pytest.raises((ValueError, OSError)) as error:
        convert_checkpoint(arguments.pop("source", source), arguments.pop("target"), **arguments)
    missing = [fragment for fragment in fragments if fragment not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert not (tmp_path / "t").exists() and sorted(path.name for path in texts.rglob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_a_package_that_the_tokenizer_needs(llama_folder, tmp_path, monkeypatch):
    source = shutil.copytree(llama_folder, tmp_path / "source")
    for file in source.glob("*token*"):
        file.unlink()
    (source / "tokenizer.model").write_bytes(b"of SentencePiece")
    monkeypatch.setattr("egmla.conversion.companions.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"can be read \(its tokenizer.model needs .*: pip install sentencepiece\)"):
        convert_checkpoint(source, tmp_path / "t", exact=True)


def test_the_good_input_behind_them(llama_folder, calibration, tmp_path):
    """What the cases change is right as it is."""
    convert_checkpoint(
        llama_folder, tmp_path / "t", kv_lora_rank=8, qk_rope_head_dim=8, calibration=calibration, dry_run=True
    )


def test_unknown_dtypes_elsewhere(llama_folder, tmp_path):
    """Of a checkpoint, as `egmla push` and all that load it see it, and of `egmla eval`."""
    with pytest.raises(ValueError, match=r"dtype='float99' is no format of PyTorch.*use 'float32'"):
        EGMLAConfig(dtype="float99")
    convert_checkpoint(llama_folder, tmp_path / "t", exact=True)
    change_config(dtype="float99")(tmp_path / "t")
    result = run("push", tmp_path / "t", "me/model", "--dry-run")
    assert result.exit_code == 1 and "float99" in result.stderr and "Traceback" not in result.output
    with pytest.raises(ValueError, match=r"dtype=float99 among the model arguments: PyTorch has no such dtype"):
        check_model_args({"dtype": "float99"})
    for dtype in ("auto", "float16", "torch.bfloat16", torch.float32):
        check_model_args({"dtype": dtype})
