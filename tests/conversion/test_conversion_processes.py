"""Conversions as processes: killed or interrupted, out of disk, two at a time, and the memory they take."""

import contextlib
import json
import signal
import subprocess
import time

import conversions
import pytest
from cases import make_tokenizer
from conversions import CLOSED_FORM, SHRUNK, SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from egmla.conversion import convert_checkpoint


pytestmark = pytest.mark.long  # in front, see conftest.py


make_source = conversions.make_source  # the fixture


def test_full_disk_leaves_nothing(make_source, loaded_python, tmp_path):
    """A file-size limit in a child process stands for a disk that fills up half way."""
    _, folder = make_source("llama-mha")
    script = (
        "import resource, signal, sys\n"
        "from egmla.conversion import convert_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], exact=True)\n"
    )
    done = loaded_python.run(script, folder, tmp_path / "t")
    assert done.returncode != 0
    assert "nothing was left there" in done.stderr
    assert list(tmp_path.iterdir()) == []


RESUMED = (
    "import sys, time\n"
    "from egmla.conversion import Refinement, convert_checkpoint\n"
    "def progress(stage, done, total):\n"
    "    if done / total > float(sys.argv[4]):\n"
    "        print('there', flush=True)\n"
    "        time.sleep(60)\n"
    "convert_checkpoint(sys.argv[1], sys.argv[2], kv_lora_rank=12, qk_rope_head_dim=6, calibration=sys.argv[3],"
    " calibration_tokens=4096, refinement=Refinement(steps=3), progress=progress)\n"
)


@pytest.mark.parametrize("share", [0.6, 0.85])
def test_killed_conversion_resumes_to_the_same_bytes(make_source, calibration, loaded_python, tmp_path, share):
    """Killed in the second layer: in its calibration, and in its refinement."""
    _, folder = make_source("llama-gqa-tied")
    target = tmp_path / "t"
    child = loaded_python.start(RESUMED, folder, target, calibration, share)
    assert child.stdout is not None and child.stdout.readline() == "there\n"
    child.kill()
    child.wait()
    assert not target.exists()
    assert not list(tmp_path.rglob("config.json")) and not list(tmp_path.rglob("model*.safetensors"))

    with pytest.raises(ValueError, match=r"unfinished conversion with other settings: .*Refinement|refinement was"):
        convert_checkpoint(folder, target, **{**SHRUNK, "refinement": CLOSED_FORM}, calibration=calibration)
    layers = []
    report = convert_checkpoint(
        folder, target, **SHRUNK, calibration=calibration, progress=lambda _, done, total: layers.append(done / total)
    )
    assert min(layers) >= 0.5, "the first layer was done again"
    convert_checkpoint(folder, tmp_path / "whole", **SHRUNK, calibration=calibration)
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    whole = json.loads((tmp_path / "whole/conversion_report.json").read_text())
    assert report["layers"] == whole["layers"] and report["weights_sha256"] == whole["weights_sha256"]
    assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "whole"]


def test_two_processes_do_not_write_one_target(make_source, tmp_path):
    from egmla.utils.folders import staged_folder

    _, folder = make_source("llama-mha")
    with staged_folder(tmp_path / "t") as staging:
        with pytest.raises(BlockingIOError, match="Another process is writing"):
            convert_checkpoint(folder, tmp_path / "t", exact=True)
        assert staging.is_dir()


def test_peak_memory_does_not_grow_with_depth(calibration, loaded_python, tmp_path):
    """Four times the layers, in processes of their own."""
    script = (
        "import ctypes, sys\n"
        # Small blocks are kept back by the C library, more of them the longer a process runs: give them back sooner.
        "M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3\n"
        "for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):\n"
        "    assert ctypes.CDLL(None).mallopt(parameter, 65536)\n"
        "from egmla.conversion import Refinement, convert_checkpoint\n"
        "report = convert_checkpoint(sys.argv[1], sys.argv[2], kv_lora_rank=64, qk_rope_head_dim=16,"
        " calibration=sys.argv[3], calibration_tokens=1024, refinement=Refinement(steps=1))\n"
        "print(report['peak_bytes'])\n"
    )
    shape = {**SMALL, "hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 8}
    peaks = []
    for layers in (2, 8):  # 46 and 185 MB of weights
        source = tmp_path / f"source-{layers}"
        config = LlamaConfig(**{**shape, "num_hidden_layers": layers}, num_key_value_heads=4)
        LlamaForCausalLM(config).save_pretrained(source, max_shard_size="50MB")
        make_tokenizer().save_pretrained(source)
        done = loaded_python.run(script, source, tmp_path / f"t-{layers}", calibration, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_nothing_like_a_model(make_source, calibration, loaded_python, tmp_path, how):
    _, folder = make_source("llama-mha")
    script = (
        "import signal, sys, time\n"
        # Shells start background jobs, tests among them, with interrupts ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from egmla.conversion import convert_checkpoint\n"
        "def progress(*args):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(0.2)\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], kv_lora_rank=8, qk_rope_head_dim=4, calibration=sys.argv[3],"
        " progress=progress)\n"
    )
    child = loaded_python.start(script, folder, tmp_path / "t", calibration)
    assert child.stdout is not None and child.stdout.readline() == "working\n"
    time.sleep(0.3)
    child.send_signal(how)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=30)
    if child.returncode is None:  # Python drops an interrupt that meets it in a finaliser; a user presses again
        child.send_signal(how)
    assert child.wait(timeout=60) != 0
    assert not (tmp_path / "t").exists()
    leftovers = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(path.name in ("config.json", "model.safetensors") for path in leftovers)
    if how == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    convert_checkpoint(folder, tmp_path / "t", exact=True)  # what was left does not stand in the way
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t").config.model_type == "egmla"
