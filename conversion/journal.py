"""The journal of a conversion, from which the same command resumes an interrupted one.

It lies in the staging folder (`egmla.utils.folders`) beside the parts that are written and the hidden states after the
last finished layer.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from egmla.utils.folders import JOURNAL, read_journal, remove_content, staging_path
from egmla.utils.provenance import peak_bytes

from .shards import PARTS, save_tensors


STATES = "states-*.safetensors"


class Journal:
    """What of a conversion is done: its settings, what is known of each finished layer, the hidden states behind it.

    A layer counts as finished once the journal says so: its part and the states are written before. So does the whole
    model, whose report the journal then holds: only moving it to its place is left.

    Args:
        folder (`Path`): the staging folder.
        settings (`dict`): everything the result depends on, in types that JSON keeps.
        resume (`bool`): take up what is there; otherwise start over.
        started (`float`, *optional*): when this run began, seconds as of `time.time`; now by default.

    Attributes:
        layers: what is known of each finished layer.
        ranks: ranks allocated before the first layer, where that is asked for.
        report: the report of the whole model once it is written, else `None`.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True, started: float | None = None):
        self.folder, self.settings = folder, settings
        self.started = time.time() if started is None else started
        self.earlier = {"runs": 0, "seconds": 0.0, "peak_bytes": 0}
        self.layers: list[dict[str, Any]] = []
        self.ranks: list[int] | None = None
        self.report: dict[str, Any] | None = None
        found = read_journal(folder) if resume else None
        if found is None:
            remove_content(folder)
        else:
            self.layers, self.ranks, self.report = found["layers"], found.get("ranks"), found.get("report")
            self.earlier = found.get("spent", self.earlier)
            self._remove_stale()

    def states(self) -> dict[str, torch.Tensor]:
        """The hidden states behind the last finished layer; empty before the first and where none were needed."""
        file = self._states(len(self.layers))
        return load_file(file) if file.is_file() else {}

    def note_ranks(self, ranks: list[int]) -> None:
        """Notes the ranks of all layers."""
        self.ranks = ranks
        self._write()

    def finish_layer(self, layer: dict[str, Any], states: dict[str, torch.Tensor]) -> None:
        """Notes that the tensors of one more layer are written, and what `states` it leaves to the next."""
        count = len(self.layers) + 1
        if states:
            save_tensors(states, self._states(count))
        self.layers.append(layer)
        self._write()
        self._remove_stale()

    def finish(self, report: dict[str, Any]) -> None:
        """Notes that the whole model is written beside the journal, and what its report says."""
        self.report = report
        self._write()
        self._remove_stale()

    def spent(self) -> dict[str, Any]:
        """Of all runs: how many, their seconds (earlier ones up to the journal's last note), the most bytes held."""
        return {
            "runs": self.earlier["runs"] + 1,
            "seconds": round(self.earlier["seconds"] + time.time() - self.started, 1),
            "peak_bytes": max(self.earlier["peak_bytes"], peak_bytes()),
        }

    def _write(self) -> None:
        content: dict[str, Any] = {
            "settings": self.settings,
            "layers": self.layers,
            "ranks": self.ranks,
            "report": self.report,
            "spent": self.spent(),
        }
        if self.report is not None:
            content["files"] = [path.name for path in self.folder.iterdir()]
        waiting = self.folder / f"{JOURNAL}.waiting"
        waiting.write_text(json.dumps(content))
        waiting.replace(self.folder / JOURNAL)

    def _remove_stale(self) -> None:
        """Removes states that no layer starts from any more, and all that is not part of a model once it is whole."""
        stale = set(self.folder.glob(STATES)) - {self._states(len(self.layers))}
        if self.report is not None:
            stale = {path for pattern in (PARTS, STATES) for path in self.folder.glob(pattern)}
        for path in stale:
            path.unlink()

    def _states(self, count: int) -> Path:
        return self.folder / f"states-{count:05d}.safetensors"


def check_unfinished(target: Path, settings: dict[str, Any]) -> None:
    """Raises `ValueError` where an unfinished conversion into `target` was begun under other settings."""
    folder = staging_path(target)
    journal = read_journal(folder)
    if journal is None:
        return
    found = journal["settings"]
    if different := [name for name in settings if settings[name] != found.get(name)]:
        raise ValueError(
            f"{folder} holds an unfinished conversion with other settings: "
            + "; ".join(f"{name} was {found.get(name)} and is {settings[name]}" for name in different)
            + ". Give the same ones to finish it"
            + (" (OMP_NUM_THREADS sets the threads)" if "machine" in different else "")
            + ", or remove it to start over (as convert does with --no-resume, resume=False)."
        )
