"""Scores by lm-eval: official prompts on local files, the same figures by every route, runs that go on, bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BASE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM
from egmla.commands import app
from egmla.evaluation import compare as score_comparison
from egmla.evaluation import harness


pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.tasks import TaskManager

from egmla.evaluation import lm_eval as registered
from egmla.evaluation.local_tasks import GROUPS, EGMLATaskManager, find_file, read_rows
from egmla.evaluation.paired import paired_stderr


pytestmark = [pytest.mark.long, pytest.mark.usefixtures("lm_eval_reads_once")]
DATA = Path(__file__).parents[1] / "fixtures" / "lm_eval"
# Whole data files in place of the fixtures' few rows, for the comparison of requests.
WHOLE = Path(os.environ.get("EGMLA_LM_EVAL_DATA", DATA))


def values_of(file: str, column: str) -> list[str]:
    """What occurs in a column of a data file."""
    lines = (WHOLE / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)[column] for line in lines})


# Task, the file with its questions, and the column and value that pick them.
LOCAL_TASKS = {
    "piqa": ("piqa_valid", None),
    "arc_easy": ("arc_easy_test", None),
    "arc_challenge": ("arc_challenge_test", None),
    "hellaswag": ("hellaswag_val_1000", None),
    "winogrande": ("winogrande_dev", None),
    "social_iqa": ("social_iqa_valid", None),
    "boolq": ("boolq_val_1000", None),
    "lambada_openai": ("lambada_openai_test", None),
    "wikitext": ("wikitext2_test_pages", None),
    **{
        f"mmlu_{subject}{form}": ("mmlu_test_57x18", ("subject", subject))
        for subject in values_of("mmlu_test_57x18", "subject")
        for form in ("", "_continuation")
    },
    **{f"blimp_{paradigm}": ("blimp_12x200", ("UID", paradigm)) for paradigm in values_of("blimp_12x200", "UID")},
}
# Four rows of every kind of request, for lm-eval's own command line, which knows no data folder.
COMMON = "dataset_path: json\nvalidation_split: validation\nmetadata:\n  version: 1.0\n"
ROUTE_TASKS = {
    "route_choice": (
        "piqa_valid",
        'output_type: multiple_choice\ndoc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_target: label\n'
        'doc_to_choice: "{{[sol1, sol2]}}"\n',
    ),
    "route_rolling": (
        "wikitext2_test_pages",
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page[:150]}}"\nmetric_list:\n'
        "  - metric: bits_per_byte\n",
    ),
    "route_generate": (
        "arc_easy_test",
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answerKey}}"\n'
        'generation_kwargs:\n  until: ["?"]\n  max_gen_toks: 12\n  do_sample: false\nmetric_list:\n'
        "  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n",
    ),
}


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {chr(32 + number): number for number in range(95)} | {"\n": 95, "<unk>": 96, "<end>": 97}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_model(folder: Path, **settings) -> Path:
    shape = {**BASE, "vocab_size": 98, "max_position_embeddings": 1024, "pad_token_id": 97, "eos_token_id": 97}
    EGMLAForCausalLM(EGMLAConfig(**{**shape, **settings})).save_pretrained(folder)
    make_tokenizer(unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return save_model(tmp_path_factory.mktemp("models") / "narrow", kv_lora_rank=12)


@pytest.fixture(scope="module")
def route_tasks(tmp_path_factory) -> Path:
    """A folder of task files, as a user of lm-eval would write them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (file, text) in ROUTE_TASKS.items():
        data = json.dumps({"data_files": {"validation": str(DATA / f"{file}.jsonl")}, "cache_dir": str(folder / "c")})
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_kwargs: {data}\n{COMMON}{text}")
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when weights are loaded: bad input has to show before."""

    def load(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


def requests_of(task, num_fewshot: int) -> list:
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    return [(instance.request_type, instance.args) for instance in task.instances]


def rows_of(file: str, choice: tuple[str, str] | None) -> datasets.Dataset:
    rows = [json.loads(line) for line in (WHOLE / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
    return datasets.Dataset.from_list([row for row in rows if choice is None or row[choice[0]] == choice[1]])


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_local_tasks_ask_the_official_requests(name, monkeypatch):
    file, choice = LOCAL_TASKS[name]
    if not (WHOLE / f"{file}.jsonl").is_file():
        pytest.skip(f"{WHOLE} has no {file}.jsonl")
    shots = 2 if name.startswith("mmlu") else 0
    local = requests_of(EGMLATaskManager(WHOLE).load([name])["tasks"][name], shots)

    # The official task, believing that it reads the hub.
    splits = {split: rows_of(file, choice) for split in ("train", "validation", "test")}
    if shots:
        splits["dev"] = rows_of("mmlu_dev", choice)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict(splits))
    official = requests_of(TaskManager().load([name])["tasks"][name], shots)

    assert local == official
    assert len(local) >= 2


def test_a_request_by_hand():
    task = EGMLATaskManager(WHOLE).load(["piqa"])["tasks"]["piqa"]
    row = rows_of("piqa_valid", None)[0]
    assert requests_of(task, 0)[0] == ("loglikelihood", (f"Question: {row['goal']}\nAnswer:", f" {row['sol1']}"))


def test_groups_are_those_of_the_task_files():
    manager = EGMLATaskManager()
    for group, members in GROUPS.items():
        text = Path(manager.task_index[group].yaml_path).read_text()
        assert [line[4:] for line in text.splitlines() if line.startswith("  - ")] == list(members)
        assert set(members) <= set(manager.all_tasks)


def test_file_names(tmp_path):
    assert find_file(tmp_path, "piqa_valid") is None
    (tmp_path / "piqa_valid_10.jsonl").write_text('{"a": 1}\n\n{"a"\n')
    assert find_file(tmp_path, "piqa_valid").name == "piqa_valid_10.jsonl"
    with pytest.raises(ValueError, match="line 3: no JSON object"):
        read_rows(tmp_path / "piqa_valid_10.jsonl")
    (tmp_path / "piqa_valid_20.jsonl").touch()
    with pytest.raises(ValueError, match=r"2 files .* piqa_valid_20.jsonl\); keep one"):
        find_file(tmp_path, "piqa_valid")
    (tmp_path / "piqa_valid.jsonl").touch()
    assert find_file(tmp_path, "piqa_valid").name == "piqa_valid.jsonl"


def figures(results) -> dict:
    return {
        task: {key: value for key, value in values.items() if "," in key}
        for task, values in results["results"].items()
    }


# lm-eval's command line, which would read its ten thousand task files first.
LM_EVAL = """
import functools
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_every_route_gives_the_same_scores(model, route_tasks, loaded_python, tmp_path, monkeypatch):
    names = list(ROUTE_TASKS)
    ours = figures(harness.evaluate(str(model), names, include_path=route_tasks, batch_size=2))
    assert set(ours) == set(names)

    library = lm_eval.simple_evaluate(
        model="egmla",
        model_args=f"pretrained={model}",
        tasks=names,
        batch_size=2,
        task_manager=TaskManager(include_path=str(route_tasks)),
    )
    assert figures(library) == ours

    def arguments(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        given = ["--model", name, "--model_args", f"pretrained={model}", "--tasks", ",".join(names)]
        given += ["--include_path", route_tasks, "--batch_size", 2, "--device", "cpu"]
        return [*map(str, given), "--output_path", str(tmp_path / name / "results.json")]

    def written(name: str) -> dict:
        (file,) = (tmp_path / name).glob("results*.json")
        return figures(json.loads(file.read_text()))

    monkeypatch.setattr(sys, "argv", ["egmla.evaluation.lm_eval", *arguments("egmla")])
    registered.main()
    assert written("egmla") == ours
    # A process that knows only the code of the checkpoint.
    loaded_python.run(LM_EVAL, *arguments("hf"), "--trust_remote_code", cwd=tmp_path, check=True)
    assert written("hf") == ours


def test_generation_goes_through_the_latent_cache(model, route_tasks, monkeypatch):
    caches = []
    initialise = EGMLACache.__init__

    def recorded(self, *arguments, **settings):
        caches.append(self)
        initialise(self, *arguments, **settings)

    monkeypatch.setattr(EGMLACache, "__init__", recorded)
    answers = {}
    for batch_size in (1, 3):
        results = harness.evaluate(
            str(model), ["route_generate"], include_path=route_tasks, batch_size=batch_size, log_samples=True
        )
        answers[batch_size] = [sample["filtered_resps"] for sample in results["samples"]["route_generate"]]
    # Left padding changes nothing, and every batch had a cache of ours with its tokens in it.
    assert answers[1] == answers[3]
    assert len(caches) == 4 + 2
    assert all(cache.get_seq_length() > 12 for cache in caches)


def test_automatic_batch_size_keeps_to_a_budget(model, route_tasks, monkeypatch):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    small = registered.rows_in_budget(loaded, 100, 64, 10**6)
    assert 1 < small < 64
    assert registered.rows_in_budget(loaded, 200, 64, 10**6) == small // 2
    assert registered.rows_in_budget(loaded, 100, 64, 0) == 1
    assert registered.rows_in_budget(loaded, 100, 64, 10**12) == 64
    assert registered.available_bytes() > 0

    sizes = []
    call = registered.EGMLAHarnessModel._model_call
    monkeypatch.setattr(registered, "CPU_BATCH_BYTES", 5 * 10**6)
    monkeypatch.setattr(
        registered.EGMLAHarnessModel,
        "_model_call",
        lambda self, ids, *rest, **more: sizes.append(ids.shape[0]) or call(self, ids, *rest, **more),
    )
    automatic = harness.evaluate(str(model), ["route_choice"], include_path=route_tasks, batch_size="auto")
    # No trial runs: 8 requests in batches of what fits.
    assert sum(sizes) == 8
    assert 1 < max(sizes) < 8
    single = harness.evaluate(str(model), ["route_choice"], include_path=route_tasks)
    assert figures(automatic)["route_choice"] == pytest.approx(figures(single)["route_choice"])


def test_comparison_goes_on_after_an_interruption(model, narrow, tmp_path, monkeypatch):
    run, calls = score_comparison._run, []
    settings = {"limit": 3, "data_dir": DATA, "bootstrap_iters": 10}

    def counted(loaded, path, arguments, task, *rest):
        if stop_at is not None and len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append((path, task))
        return run(loaded, path, arguments, task, *rest)

    def compare(output, **more):
        calls.clear()
        tasks = ["piqa", "wikitext"]
        return score_comparison.compare_scores([str(model), str(narrow)], tasks, output, **{**settings, **more})

    monkeypatch.setattr(score_comparison, "_run", counted)
    stop_at = None
    whole = compare(tmp_path / "whole")
    assert len(calls) == 4
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "cut")
    said: list[str] = []
    resumed = compare(tmp_path / "cut", say=said.append)
    assert calls == [(str(narrow), "wikitext")]
    assert sum("from an earlier run" in line for line in said) == 3
    assert resumed.scores == whole.scores
    stop_at = None
    # What the scores depend on asks for new ones.
    compare(tmp_path / "cut", limit=2)
    assert len(calls) == 4
    compare(tmp_path / "cut", limit=2)
    assert not calls
    compare(tmp_path / "cut", limit=2, resume=False)
    assert len(calls) == 4

    saved = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    assert [entry["cache_bytes_per_token"] for entry in saved["models"]] == [2 * 32 * 4, 2 * 20 * 4]
    own = json.loads((tmp_path / "whole" / "narrow.json").read_text())
    assert set(own["results"]) == {"piqa", "wikitext"}
    assert own["config"]["model_args"]["pretrained"] == str(narrow)


def test_comparison_of_a_model_with_its_copy(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    result = score_comparison.compare_scores(
        [str(model), str(tmp_path / "copy")], ["arc_easy"], tmp_path / "out", data_dir=DATA
    )
    for score in result.scores:
        reference = (0.0, 0.0) if score.model == "copy" else (None, None)
        assert (score.difference, score.difference_stderr) == reference
        assert score.questions == 4


def test_paired_standard_error_by_hand():
    def of(aggregation, *values):
        return [{"aggregation": aggregation, "values": dict(enumerate(values))}]

    # Differences 1, 0, 1, 1: mean 3/4, variance 1/4, over 4 questions.
    assert paired_stderr(of("mean", 1, 1, 1, 1), of("mean", 0, 1, 0, 0)) == pytest.approx(0.25)
    # A constant factor of perplexity: the two leave-one-out figures are 2 and 8 apart from 1.
    wide = paired_stderr(of("perplexity", -math.log(8), -math.log(2)), of("perplexity", 0, 0))
    assert wide == pytest.approx(3)
    weighted = paired_stderr(
        of("bits_per_byte", [-3 * math.log(2), 1], [-math.log(2), 1]), of("bits_per_byte", [0, 1], [0, 1])
    )
    assert weighted == pytest.approx(1)
    assert paired_stderr(of("mean", 1, 2), of("mean", 1)) is None
    assert paired_stderr(of("f1", 1, 2), of("f1", 1, 1)) is None


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def test_eval_command(model, tmp_path):
    output = tmp_path / "results.json"
    # A folder of its own settings: a share of the questions, a seed, a dtype.
    done = run(
        *("eval", model, "--tasks", "piqa, mmlu_anatomy", "--data-dir", DATA, "--limit", "0.5", "--num-fewshot", 0),
        *("--batch-size", "auto", "--output", output, "--set", "bootstrap_iters=10", "--model-args", "dtype=bfloat16"),
        *("--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    assert "acc_norm" in done.stdout
    results = json.loads(output.read_text())
    assert set(results["results"]) == {"piqa", "mmlu_anatomy"}
    assert results["n-samples"]["piqa"]["effective"] == 2
    assert results["config"]["bootstrap_iters"] == 10
    assert results["config"]["device"] == "cpu"
    assert results["config"]["model_dtype"] == "torch.bfloat16"


def test_compare_command(model, narrow, tmp_path):
    done = run(
        *("compare", model, narrow, "--tasks", "piqa,winogrande", "--data-dir", DATA, "--limit", 2),
        *("--output", tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    assert "[4/4] narrow, winogrande" in done.stderr
    assert "160 (62%)" in done.stdout
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_bad_tasks_are_named_before_weights_are_loaded(model, narrow, tmp_path, no_weights):
    for command in (("eval", model), ("compare", model, narrow, "--output", tmp_path / "out")):
        done = run(*command, "--tasks", "piqaa", "--data-dir", DATA)
        assert done.exit_code == 1
        assert "'piqaa' is no task, group or tag" in done.stderr and "did you mean" in done.stderr
        assert "piqa" in done.stderr.partition("did you mean")[2]
    for arguments, message in {
        ("--tasks", "triviaqa", "--data-dir", DATA): "for which no local file is known",
        ("--tasks", "piqa", "--data-dir", tmp_path): "has no piqa_valid*.jsonl, which task piqa needs: the validation",
        ("--tasks", "piqa", "--data-dir", tmp_path / "no"): "There is no data folder",
        ("--tasks", "egmla_paper", "--data-dir", DATA): "has no rows with subject",
        ("--tasks", "piqa", "--data-dir", DATA, "--num-fewshot", 2): "no examples apart from its questions",
        ("--tasks", ",", "--data-dir", DATA): "No tasks were given",
        ("--tasks", "piqa", "--limit", "1.5"): "must be a whole number of questions",
        ("--tasks", "piqa", "--batch-size", "many"): "must be a positive number of rows, auto",
        ("--tasks", "piqa", "--set", "bootstrap_iter=1"): "there is bootstrap_iters",
        ("--tasks", "piqa", "--set", "bootstrap_iters"): "a setting is written key=value",
        ("--tasks", "piqa", "--model-args", "float32"): "write them as key=value",
    }.items():
        done = run("eval", model, *arguments)
        assert done.exit_code == 1, done.output
        assert message in done.stderr


def test_bad_models_are_named_before_weights_are_loaded(model, tmp_path, no_weights):
    shutil.copytree(model, tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink()
    shutil.copytree(model, tmp_path / "ragged")
    make_tokenizer().save_pretrained(tmp_path / "ragged")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "mute": "holds no tokenizer",
        "ragged": "has no pad token and no unk or eos token",
        "empty": "without a config.json",
        "absent": "There is no folder",
    }.items():
        for command in (("eval", tmp_path / name), ("compare", model, tmp_path / name, "--output", tmp_path / "out")):
            done = run(*command, "--tasks", "piqa", "--data-dir", DATA)
            assert done.exit_code == 1, done.output
            assert message in done.stderr
    done = run("compare", model, "--tasks", "piqa", "--data-dir", DATA, "--output", tmp_path / "out")
    assert "a comparison needs the source and one model or more" in done.stderr
    assert not (tmp_path / "out").exists()


def test_git_says_nothing_outside_of_a_repository(model, tmp_path, monkeypatch, capfd):
    """lm-eval asks git for a commit after each task, and git's complaint went to the terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    results = harness.evaluate(str(model), ["piqa"], data_dir=DATA, limit=1, bootstrap_iters=0)
    assert results["git_hash"] is None
    options = {"data_dir": DATA, "limit": 1, "bootstrap_iters": 0}
    shutil.copytree(model, tmp_path / "copy")
    score_comparison.compare_scores([str(model), str(tmp_path / "copy")], ["piqa"], tmp_path / "out", **options)
    assert "fatal" not in capfd.readouterr().err


def test_the_commit_of_a_repository_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    results = harness.evaluate(str(model), ["piqa"], data_dir=DATA, limit=1, bootstrap_iters=0)
    assert results["git_hash"] and head.startswith(results["git_hash"])


@pytest.mark.parametrize("command", [("eval",), ("compare", "{model}")])
def test_gguf_files_are_named_with_the_command_that_converts_them(command, model, tmp_path, no_weights):
    file = tmp_path / "small.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    words = [word.format(model=model) for word in command]
    done = run(*words, file, "--tasks", "piqa", "--data-dir", DATA)
    assert done.exit_code == 1
    assert f"egmla convert {file} FOLDER --exact" in done.stderr and "There is no folder" not in done.stderr
    done = run(*words, tmp_path / "missing.gguf", "--tasks", "piqa", "--data-dir", DATA)
    assert f"There is no file {tmp_path / 'missing.gguf'}" in done.stderr


def test_without_lm_eval(model, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'egmla\[eval\]'"):
        harness.evaluate(str(model), ["piqa"])


def test_imports_stay_light():
    code = "import sys, egmla, egmla.commands, egmla.evaluation.harness, egmla.evaluation.compare; " + (
        "print(sorted({'lm_eval', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    # A process that has loaded nothing.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
