"""Fixtures of all tests: offline, one fixed seed, and uninitialised memory that cannot be mistaken for zeros."""

import functools
import gc
import os
import pickle
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Tiny tensors gain nothing from threads, and lose much of a test run to them where cores are shared. The variable is
# for processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from cases import MODEL_CASES, make_tokenizer
from filelock import FileLock
from loaded_python import LoadedPython
from torch.utils import collect_env
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging


torch.set_num_threads(1)
VERBOSITY = logging.get_verbosity()
DRAWN_ONCE = {
    *("conversion_report.png", "training_loss.png", "architecture.png", "scores.png"),
    *("ms_per_token.png", "cache_bytes.png"),
}


def pytest_configure(config):
    config.option.loadscopereorder = False  # keeps the order below


def pytest_collection_modifyitems(items):
    """Run modules marked `long` first.

    `--dist loadscope` hands out modules with many tests first. A long module with few tests would come last, and one
    worker would wait for the other to finish it.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """Take what is there, millions of objects of imported modules, out of the garbage collector's rounds.

    Accelerate collects after each training run, which took a quarter of a tiny run's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def figures_drawn_once():
    """Draw each kind of report figure once. Its axes and layout take half the time of a tiny conversion.

    Later figures with the same file name and number of panels are a copy of the first. Conversions with the same
    panels and lines do not even make the axes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:  # an extra
        yield
        return
    from egmla.conversion import convert

    save, drawn = Figure.savefig, {}
    draw, reports = convert.draw_report, {}

    def savefig(figure, path, **options):
        kind = Path(str(path)).name, len(figure.axes)
        if kind[0] not in DRAWN_ONCE:
            return save(figure, path, **options)
        if kind not in drawn:
            save(figure, path, **options)
            drawn[kind] = Path(path).read_bytes()
        Path(path).write_bytes(drawn[kind])

    def draw_report(folder, report):
        kind = report["refinement"] is None, bool(report["slots_per_frequency"])
        path = folder / "conversion_report.png"
        if kind not in reports:
            draw(folder, report)
            reports[kind] = path.read_bytes()
        path.write_bytes(reports[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        patch.setattr(convert, "draw_report", draw_report)
        yield


@pytest.fixture(autouse=True)
def same_verbosity():
    """Trainer sets the verbosity of the whole process; what Transformers logs is part of some tests.

    Set before each test: a module's fixtures may have run a Trainer by then.
    """
    logging.set_verbosity(VERBOSITY)


@pytest.fixture(params=list(MODEL_CASES))
def case(request) -> str:
    """Each named configuration, one a test."""
    return request.param


@pytest.fixture(params=["int8", "int4"])
def quantization(request) -> str:
    """Each format of quantised caches, one a test."""
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills new uninitialised tensors with NaN, so that reading a slot never written shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory) -> Path:
    """A Python whose environment has every installed distribution but this one."""
    root = tmp_path_factory.mktemp("clean")
    packages = root / "packages"
    packages.mkdir()
    # The path of this Python too: a .pth file may have added another environment's packages.
    added = [path for path in sys.path if path.endswith("site-packages")]
    standard = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in dict.fromkeys([*standard, *added]):
        for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
            # Links, not a path entry: an installed package, or an editable one's finder, would come along.
            if "egmla" not in entry.name.lower() and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    venv.EnvBuilder(with_pip=False, symlinks=True).create(root / "env")
    python = root / "env" / "bin" / "python"
    command = [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    Path(purelib, "packages.pth").write_text(f"{packages}\n")
    return python


@pytest.fixture(scope="session")
def loaded_python():
    """Processes of their own that need not import Transformers (`helpers/loaded_python.py`)."""
    server = LoadedPython()
    yield server
    server.close()


@pytest.fixture(scope="session")
def loaded_clean_python(clean_python):
    """The same of `clean_python`."""
    server = LoadedPython(clean_python)
    yield server
    server.close()


def folder_of_all_workers(tmp_path_factory) -> Path:
    """Return a temporary folder that the workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def kernel_extensions(tmp_path_factory) -> Path:
    """Compile the CPU kernel once for all workers of pytest-xdist. Return PyTorch's folder of extensions."""
    from egmla.cpu_kernel.build import compiled_library

    folder = folder_of_all_workers(tmp_path_factory) / "extensions"
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{folder}.lock"):
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        compiled_library()
    return folder


@pytest.fixture(scope="session")
def calibration(tmp_path_factory):
    """Random text of 20 thousand characters, words repeating so that attention has something to find."""
    generator = torch.Generator().manual_seed(1)
    words = ["".join(chr(97 + int(c)) for c in torch.randint(26, (5,), generator=generator)) for _ in range(60)]
    text = " ".join(words[int(i)] for i in torch.randint(60, (3500,), generator=generator))
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A random Llama with biases, a token per ASCII character: 3 key heads of 8 frequencies, 96 elements a layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=60,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.15,
        attention_bias=True,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a small source, its conversion `half` with dropout, and texts (`runs.py`)."""
    from runs import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def healed(models, tmp_path_factory) -> tuple[Path, dict]:
    """An uninterrupted run of `runs.heal` with its default settings: the folder it wrote, and the report."""
    from runs import heal

    folder = tmp_path_factory.mktemp("healed") / "healed"
    torch.manual_seed(0)
    return folder, heal(models, folder)


@pytest.fixture(scope="session")
def lm_eval_reads_once(tmp_path_factory):
    """Read lm-eval's ten thousand task files, a quarter of a minute, once for all workers and managers.

    And list installed packages once, which lm-eval does for each task scored, a second a time.
    """
    index = pytest.importorskip("lm_eval.tasks._index").TaskIndex
    tasks_of_lm_eval = Path(sys.modules["lm_eval.tasks"].__file__).parent
    build, made = index.build, {}
    shared = folder_of_all_workers(tmp_path_factory) / "tasks.pickle"

    def of_lm_eval(path, options):
        with FileLock(f"{shared}.lock"):
            if not shared.exists():
                shared.write_bytes(pickle.dumps(build([path], **options)))
            return pickle.loads(shared.read_bytes())

    def cached(paths, **options):
        found = {}
        for path in paths:  # later ones win, as in lm-eval
            if path not in made:
                own = Path(path) == tasks_of_lm_eval
                made[path] = of_lm_eval(path, options) if own else build([path], **options)
            found |= made[path]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "build", staticmethod(cached))
        patch.setattr(collect_env, "get_pip_packages", functools.cache(collect_env.get_pip_packages))
        yield
