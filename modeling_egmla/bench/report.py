"""The report of a benchmark, `bench.json`, and results derived from its rows."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from egmla.utils.files import check_writable, read_json
from egmla.utils.machine import describe_machine
from egmla.utils.provenance import source_commit

from .contestants import Subject
from .limits import bandwidth


REPORT = "bench.json"
# Raise it when rows hold something new that is read back.
FORMAT = 2
# Kinds of rows. A row is about one contestant in one case.
KINDS = ("parity", "decode", "ratios", "prefill", "memory", "skipped", "slopes")
# Slopes start at this context: below it, weights and small operations dominate.
SLOPE_CONTEXT = 2048


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a report without the seconds of each step."""
    decode = [{name: value for name, value in row.items() if name != "turns"} for row in report["decode"]]
    return {**report, "decode": decode}


def slopes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fit how time, bytes and operations grow with the context, for contestants with at least two long contexts.

    Slopes are in milliseconds per 1,024 tokens of each sequence, by least squares. Bytes become milliseconds by the
    higher of the measured bandwidths, operations by the measured matmul speed; both are medians.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in report["decode"]:
        groups.setdefault(tuple(row[name] for name in ("subject", "dtype", "batch", "contestant")), []).append(row)
    found = []
    for (subject, dtype, batch, contestant), rows in groups.items():
        chosen = [row for row in rows if row["context"] >= SLOPE_CONTEXT]
        if len(chosen) < 2:
            continue
        contexts = [row["context"] for row in chosen]
        milliseconds = 1024 * _slope(contexts, [row["ms_median"] for row in chosen])
        reading = statistics.median(bandwidth(row) for row in chosen)
        read = 1024 * _slope(contexts, [1e3 * row["cache_bytes_read"] / reading for row in chosen])
        product = statistics.median(row["product_flops_per_second"] for row in chosen)
        compute = 1024 * batch * _slope(contexts, [1e3 * row["flops_per_token"] / product for row in chosen])
        found.append(
            {
                "subject": subject,
                "dtype": dtype,
                "batch": batch,
                "contestant": contestant,
                "contexts": sorted(contexts),
                "ms_per_1024_tokens": milliseconds,
                "read_ms_per_1024_tokens": read,
                "times_read": milliseconds / read,
                "product_ms_per_1024_tokens": compute,
                "times_limit": milliseconds / max(read, compute),
            }
        )
    return found


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope


def share_of_ceiling(bytes_read: float, bandwidth: float, seconds: float) -> float:
    """Time of reading `bytes_read` at `bandwidth` bytes per second, as a fraction of a step's time: 1 is the limit."""
    return bytes_read / bandwidth / seconds


def open_report(
    output: Path, subjects: Sequence[Subject], settings: Mapping[str, Any], device: str, resume: bool = True
) -> dict[str, Any]:
    """Open the report of an earlier run in a folder, or make a new one.

    Args:
        output (`Path`): the folder.
        subjects (`Sequence[Subject]`): what will be measured.
        settings (`Mapping`): settings that results depend on.
        device (`str`): the device of the run.
        resume (`bool`): open it; otherwise a new report will replace it.

    Raises:
        FileExistsError: when the folder is a file.
        ValueError: when the earlier run had other settings, models, versions or another commit.
    """
    if output.is_file():
        raise FileExistsError(f"{output} is a file; give a folder for {REPORT} and the plots.")
    check_writable(output)
    described = json.loads(json.dumps(settings))
    commit = source_commit()
    shapes = {
        subject.name: {role: _fields(found.config.to_dict()) for role, found in subject.roles.items()}
        for subject in subjects
    }
    path = output / REPORT
    if not (resume and path.is_file()):
        report: dict[str, Any] = {"format": FORMAT, "settings": described, "commit": commit}
        report |= {"machine": describe_machine(torch.device(device)), "subjects": shapes}
        return report | {kind: [] for kind in KINDS}
    report = read_json(path, "remove it to measure again")
    if report.get("format") != FORMAT:
        raise ValueError(f"{path} is no report of a benchmark of this version; choose another folder.")
    changed = [name for name, value in described.items() if report["settings"].get(name) != value]
    changed += ["commit"] if report["commit"] != commit else []
    changed += [name for name, roles in shapes.items() if report["subjects"].get(name, roles) != roles]
    if changed:
        raise ValueError(
            f"{output} holds figures taken otherwise ({', '.join(changed)}), not comparable with new ones; "
            "choose another folder or remove it."
        )
    report["subjects"] |= shapes
    return report


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that decide a model's shape: neither its origin nor its longest context."""
    left_out = (
        "_name_or_path",
        "transformers_version",
        "auto_map",
        "architectures",
        "max_position_embeddings",
        "dtype",
    )
    return json.loads(json.dumps({name: value for name, value in config.items() if name not in left_out}, default=str))
