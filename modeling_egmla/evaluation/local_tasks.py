"""lm-eval tasks with this package's groups, and official tasks on local files. Needs `egmla[eval]`.

A task on local files keeps its official configuration and so its prompts. Only the source of its rows changes.
"""

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory


TASKS_FOLDER = Path(__file__).parent / "tasks"
GROUPS = {
    "egmla_paper": ("piqa", "arc_challenge", "arc_easy", "hellaswag", "winogrande", "social_iqa", "mmlu"),
    "egmla_quick": ("piqa", "arc_easy", "hellaswag", "lambada_openai"),
}
# Official data set (last part of its Hub id) and configuration ("*" for any): how each split's file name begins.
LOCAL_FILES: dict[tuple[str, str | None], dict[str, str]] = {
    ("piqa", None): {"validation": "piqa_valid", "train": "piqa_train"},
    ("ai2_arc", "ARC-Easy"): {"test": "arc_easy_test", "train": "arc_easy_train"},
    ("ai2_arc", "ARC-Challenge"): {"test": "arc_challenge_test", "train": "arc_challenge_train"},
    ("hellaswag", None): {"validation": "hellaswag_val", "train": "hellaswag_train"},
    ("winogrande", "winogrande_xl"): {"validation": "winogrande_dev", "train": "winogrande_train"},
    ("siqa", None): {"validation": "social_iqa_valid", "train": "social_iqa_train"},
    ("super_glue", "boolq"): {"validation": "boolq_val", "train": "boolq_train"},
    ("lambada_openai", "default"): {"test": "lambada_openai_test"},
    ("wikitext_document_level", "wikitext-2-raw-v1"): {"test": "wikitext2_test_pages"},
    ("mmlu", "*"): {"test": "mmlu_test", "dev": "mmlu_dev"},
    ("blimp", "*"): {"train": "blimp"},
}
# Data sets with all configurations in one file: the column that names the configuration.
CONFIGURATION_COLUMNS = {"mmlu": "subject", "blimp": "UID"}
SPLIT_KEYS = ("training_split", "validation_split", "test_split")


class LocalTaskFactory(TaskFactory):
    """Build official tasks on the files of a folder.

    Args:
        data_dir (`str`): folder of JSON-lines files with the official field names.
        meta (`dict`, *optional*): metadata passed to every task.
    """

    def __init__(self, data_dir: str | os.PathLike, *, meta: dict[str, Any] | None = None) -> None:
        super().__init__(meta=meta)
        self.data_dir = Path(data_dir)
        if not self.data_dir.is_dir():
            raise FileNotFoundError(f"There is no data folder {data_dir}; check the path given as data_dir.")

    def _load_full_config(self, entry, overrides=None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        return self._on_local_files(config) if config.get("dataset_path") else config

    def _on_local_files(self, config: dict[str, Any]) -> dict[str, Any]:
        task, name = config["task"], config.get("dataset_name")
        source = str(config["dataset_path"]).rpartition("/")[2]
        stems = LOCAL_FILES.get((source, name)) or LOCAL_FILES.get((source, "*"))
        if stems is None:
            raise ValueError(
                f"Task {task} reads the data set {config['dataset_path']}, for which no local file is known; with a "
                f"data folder use tasks on {', '.join(sorted({key[0] for key in LOCAL_FILES}))}, or leave it out."
            )
        splits = {key: config[key] for key in SPLIT_KEYS if config.get(key)}
        shots_split = config.get("fewshot_split")
        scored = splits.get("test_split") or splits.get("validation_split")
        wanted = {scored, shots_split} - {None}
        files: dict[str, Path] = {}
        for split in {*splits.values(), *wanted}:
            path = find_file(self.data_dir, stems[split]) if split in stems else None
            if path is not None:
                files[split] = path
            elif split in wanted:
                raise FileNotFoundError(
                    f"{self.data_dir} has no {stems.get(split, task + '_' + str(split))}*.jsonl, which task {task} "
                    f"needs: the {split} split of {config['dataset_path']} with its field names, one object a line."
                )
        for key, split in splits.items():
            if split not in files:
                config[key] = None
        column = CONFIGURATION_COLUMNS.get(source)
        config["custom_dataset"] = _reader(files, column, name, task)
        # Recorded in the results. File names only, so that results can be published.
        config["metadata"]["local_files"] = {split: path.name for split, path in sorted(files.items())}
        return config


def _reader(files: dict[str, Path], column: str | None, value: str | None, task: str):
    def local_rows(**_) -> datasets.DatasetDict:
        splits = {}
        for split, path in files.items():
            rows = read_rows(path)
            if column is not None:
                rows = [row for row in rows if row.get(column) == value]
            if not rows:
                which = f" with {column} {value!r}" if column else ""
                raise ValueError(
                    f"{path} has no rows{which}, which task {task} needs; add some or leave the task out."
                )
            splits[split] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(splits)

    return local_rows


def find_file(folder: Path, stem: str) -> Path | None:
    """Find the only file of a folder whose name begins with `stem`, such as `hellaswag_val_1000.jsonl`.

    Returns None without such a file.

    Raises:
        ValueError: when several match.
    """
    exact = folder / f"{stem}.jsonl"
    found = [exact] if exact.is_file() else sorted(folder.glob(f"{stem}*.jsonl"))
    if len(found) > 1:
        raise ValueError(
            f"{folder} has {len(found)} files that begin with {stem} ({', '.join(path.name for path in found)}); "
            "keep one."
        )
    return found[0] if found else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file.

    Raises:
        ValueError: when a line is no JSON object; the message names the line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON object ({error}); repair or remove it.") from error
    return rows


class EGMLATaskManager(TaskManager):
    """lm-eval's tasks, the groups `egmla_paper` and `egmla_quick`, and optionally local data.

    Args:
        data_dir (`str`, *optional*): folder of files that replace the official data sets.
        include_path (*optional*): more folders of task files.
        metadata (`dict`, *optional*): passed to every task.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        include_path: str | os.PathLike | Iterable[str | os.PathLike] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        more = [include_path] if isinstance(include_path, (str, os.PathLike)) else list(include_path or ())
        super().__init__(include_path=[TASKS_FOLDER, *map(Path, more)], metadata=metadata)
        if data_dir is not None:
            self._factory = LocalTaskFactory(data_dir, meta=metadata)
        self._ready: tuple[list, Any] | None = None

    def prepare(self, tasks: Sequence[str], num_fewshot: int | None = None) -> None:
        """Load tasks with their data now, so that errors show before a model is loaded.

        The next `load` of the same tasks returns them.

        Raises:
            ValueError: for unknown tasks, naming near matches; for data that cannot be read; for solved
                examples that would be questions of the test.
            FileNotFoundError: for a missing local file.
        """
        self.check_names(tasks)
        try:
            loaded = super().load(list(tasks))
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
            raise ValueError(
                f"The data of {', '.join(tasks)} cannot be read from the Hub ({type(error).__name__}: {error}); check "
                "the connection, or give a folder of local files as data_dir."
            ) from error
        if num_fewshot:
            for name, task in loaded["tasks"].items():
                config = task.config
                local = isinstance(config.metadata, dict) and "local_files" in config.metadata
                if local and config.num_fewshot != 0 and not config.training_split and not config.fewshot_split:
                    raise ValueError(
                        f"num_fewshot={num_fewshot}: the local data of task {name} has no examples apart from its "
                        "questions; add a file of its training split, or ask with num_fewshot=0."
                    )
        self._ready = (list(tasks), loaded)

    def load(self, task_list):
        """See `TaskManager.load`."""
        if self._ready is not None and self._ready[0] == task_list:
            (_, loaded), self._ready = self._ready, None
            return loaded
        return super().load(task_list)

    def check_names(self, tasks: Sequence[str]) -> None:
        """Raise `ValueError` for names that are no task, group, tag or task file. The message names near matches."""
        if not tasks:
            raise ValueError(f"No tasks were given; name some, such as {', '.join(GROUPS)} or piqa.")
        for name in tasks:
            if name in self.task_index or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
                continue
            near = difflib.get_close_matches(name, self.all_tasks, n=4, cutoff=0.7)
            hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them all."
            raise ValueError(f"{name!r} is no task, group or tag of lm-eval or of this package; {hint}")

    def match(self, tasks: Sequence[str]) -> list[str]:
        """Expand lm-eval's wildcards, each name once. A pattern without a match is kept."""
        names = [name for task in tasks for name in ((self.match_tasks([task]) if "*" in task else None) or [task])]
        return list(dict.fromkeys(names))
