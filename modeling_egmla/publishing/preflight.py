"""Check a folder before it is sent: a complete EG-MLA checkpoint, safetensors only, nothing private in it."""

import ast
import contextlib
import pickletools
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from egmla.configuration_egmla import AUTO_MAP
from egmla.model_cards.metadata import card_problems
from egmla.utils.files import read_json


CHECKPOINT_REMEDY = "write the checkpoint again"
KNOWN_SUFFIXES = {".json", ".jsonl", ".md", ".txt", ".py", ".jinja", ".yaml", ".yml", ".csv", ".png", ".safetensors"}
# Weight formats other than safetensors. Most are pickles, which run code when they are read.
REFUSED_WEIGHTS = {
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz",
    ".h5", ".hdf5", ".keras", ".msgpack", ".gguf", ".onnx", ".pb", ".tflite",
}  # fmt: skip
# Names of files that hold secrets.
SECRET_FILES = re.compile(r"\.env(\..*)?|\.?netrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx)")
SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i:aws_?secret_?(?:access_?)?key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+=]{40}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password in an address": r"\bhttps?://[^\s/:@\"'<>]+:[^\s/:@\"'<>]+@[\w.-]+",
}
# An absolute path does not continue a word, an address or another path; `file://` may come before it.
_START = r"(?:(?<=file://)|(?<![\w./~:%-]))"
_ROOTS = (
    "home|Users|root|tmp|var|mnt|media|opt|srv|scratch|private|Volumes|workspace|work|data\\d*|content|gpfs|lustre|nfs|"
    "fsx|raid\\d*|storage|cluster|export|kaggle"
)
LOCAL_PATHS = (
    rf"{_START}/(?:{_ROOTS})/[\w.@-]+",
    r"(?<![A-Za-z])[A-Za-z]:(?:\\{1,2}|/)(?:Users|Documents and Settings|Windows|Temp|home)\b",
)
# In prose; in code and JSON the same may be a letter, a colon and an escaped line end.
PROSE_PATHS = (r"(?<![A-Za-z])[A-Za-z]:\\[\w.-]+\\[\w.-]+",)
# In configurations and reports a text that is a path from the root, from home or of a share is one of this machine.
JSON_PATHS = (
    r"(?<=\")(?:file://)?/(?:[\w.@+-]+/)+[\w.@+-]*(?=\")",
    r"(?<=\")~/[\w./@+-]+(?=\")",
    r"(?<=\")[A-Za-z]:(?:\\\\|/)\w[^\"]*",
    r"(?<=\")\\{4}[A-Za-z][\w.-]*\\\\[^\"]+",
)
# Vocabularies hold parts of any text, also of paths.
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
MAX_SCANNED_BYTES = 256 * 1024**2
IGNORED_FOLDERS = {".git", ".cache", "__pycache__", ".ipynb_checkpoints"}
SENT_HIDDEN = {".gitattributes", ".eval_results"}


@dataclass
class FolderReport:
    """Result of `check_folder`.

    Args:
        files (`dict[str, int]`): paths in the repository and their sizes in bytes.
        left_out (`list[str]`): paths in the folder that will not be sent.
        warnings (`list[str]`): messages for the user that do not prevent sending.
    """

    files: dict[str, int]
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_folder(folder: Path, secrets: Iterable[str] = (), allow: Iterable[str] = ()) -> FolderReport:
    """Check a checkpoint folder as far as possible without loading the model.

    Args:
        folder (`Path`): the checkpoint.
        secrets (`Iterable[str]`): strings that must not occur in any file, such as the token in use.
        allow (`Iterable[str]`): texts that look like a secret or a local path, but are not.

    Raises:
        FileNotFoundError: when it is no checkpoint folder.
        ValueError: lists all other problems in one message.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; give the folder of a checkpoint.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it holds no model; check the path.")
    files, left_out = _collect(folder)
    report = FolderReport({name: (folder / name).stat().st_size for name in files}, left_out)
    config = read_json(folder / "config.json", CHECKPOINT_REMEDY)
    problems = [
        *_wrong_formats(folder, files),
        *_code_problems(folder, config),
        *_weight_problems(folder, files),
        *_link_problems(folder, files),
        *_text_problems(folder, files, [secret for secret in secrets if len(secret) >= 8], set(allow)),
        *_card_problems(folder, report.warnings),
    ]
    if problems:
        raise ValueError(f"{folder} was not sent: " + " ".join(f"({n}) {text}" for n, text in enumerate(problems, 1)))
    if not {"tokenizer.json", "tokenizer_config.json"} & set(files):
        report.warnings.append(f"{folder} has no tokenizer: save one there with tokenizer.save_pretrained.")
    return report


def _collect(folder: Path) -> tuple[list[str], list[str]]:
    files: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        parts = path.relative_to(folder).parts
        if IGNORED_FOLDERS & set(parts):
            continue
        hidden = any(part.startswith(".") and part not in SENT_HIDDEN for part in parts)
        # A file with a secret is an error, not skipped: another tool might send it one day.
        keep = not hidden or SECRET_FILES.fullmatch(path.name)
        (files if keep else left_out).append("/".join(parts))
    return files, left_out


def _wrong_formats(folder: Path, files: list[str]) -> list[str]:
    wrong = [name for name in files if Path(name).suffix.lower() in REFUSED_WEIGHTS or _is_pickle(folder / name)]
    problems = []
    if wrong:
        problems.append(
            f"Weights must be safetensors, and pickles can run code on the reader's machine: remove {_some(wrong)} "
            "or save the model again with save_pretrained."
        )
    secret = [name for name in files if SECRET_FILES.fullmatch(Path(name).name)]
    if secret:
        problems.append(f"Files of this kind hold secrets: remove {_some(secret)}.")
    return problems


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
    if head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05") and path.suffix != ".safetensors":
        return True
    if head == b"\x1f\x8b":
        return True  # compressed, so it cannot be checked
    if path.suffix not in KNOWN_SUFFIXES and path.stat().st_size < MAX_SCANNED_BYTES and head[:1] in b"(cd]}l":
        # The oldest pickles are text without a magic number. Listing their operations runs nothing.
        with contextlib.suppress(Exception):
            return [operation.name for operation, _, _ in pickletools.genops(path.read_bytes())][-1] == "STOP"
    if head == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False


def _code_problems(folder: Path, config: dict) -> list[str]:
    if config.get("model_type") != "egmla":
        return [f"config.json says model_type {config.get('model_type')!r}: this command sends EG-MLA models only."]
    remedy = "load the folder with egmla.EGMLAForCausalLM.from_pretrained and save it with save_pretrained."
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        return [f"config.json has no auto_map, so it would not load without the egmla package: {remedy}"]
    problems = []
    if missing := sorted(set(AUTO_MAP) - set(auto_map)):
        problems.append(f"auto_map in config.json lacks {_some(missing)}: {remedy}")
    waiting: dict[str, set[str]] = {}
    for reference in auto_map.values():
        module, _, name = str(reference).rpartition(".")
        waiting.setdefault(module, set()).add(name)
    seen: set[str] = set()
    while waiting:
        module, names = waiting.popitem()
        try:
            tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        except FileNotFoundError:
            problems.append(f"The remote code {module}.py is not there: {remedy}")
            continue
        except (SyntaxError, ValueError) as error:
            problems.append(f"The remote code {module}.py is no valid Python ({error}): {remedy}")
            continue
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        if lost := sorted(names - defined):
            problems.append(f"auto_map names {_some(lost)}, which {module}.py does not define: {remedy}")
        seen.add(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and node.module not in seen:
                waiting.setdefault(node.module, set())
    return problems


def _weight_problems(folder: Path, files: list[str]) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if "model.safetensors" in files:
        shards = {"model.safetensors"}
    elif "model.safetensors.index.json" in files:
        shards = set(
            read_json(folder / "model.safetensors.index.json", CHECKPOINT_REMEDY).get("weight_map", {}).values()
        )
    else:
        return ["There are no weights: neither model.safetensors nor model.safetensors.index.json."]
    problems = []
    if missing := sorted(shards - set(files)):
        problems.append(f"model.safetensors.index.json names shards that are not there: {_some(missing)}.")
    for name in files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(str(folder / name), framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                problems.append(f"{name} is damaged or incomplete ({error}).")
    return problems


def _link_problems(folder: Path, files: list[str]) -> list[str]:
    root = folder.resolve()
    outside = [
        name
        for name in files
        # The Hub's cache links its files to blobs beside them.
        if not (target := (folder / name).resolve()).is_relative_to(root) and target.parent.name != "blobs"
    ]
    return [f"Links to files outside of the folder: replace {_some(outside)} by the files."] if outside else []


def _text_problems(folder: Path, files: list[str], secrets: list[str], allow: set[str]) -> list[str]:
    # The folder's absolute path may lie outside the usual roots.
    places = [str(path) for path in (Path.home(), Path.cwd(), folder.resolve()) if len(path.parts) > 2]
    paths = [re.compile(pattern) for pattern in LOCAL_PATHS]
    paths += [re.compile(rf"{_START}{re.escape(place)}(?![\w-])") for place in places]
    more = {
        ending: [re.compile(pattern) for pattern in patterns]
        for endings, patterns in (((".json", ".jsonl"), JSON_PATHS), ((".md", ".txt"), PROSE_PATHS))
        for ending in endings
    }
    kinds = {kind: re.compile(pattern) for kind, pattern in SECRETS.items()}
    if secrets:
        kinds["the token in use"] = re.compile("|".join(map(re.escape, secrets)))
    problems = []
    for name in files:
        text, binary = _read_text(folder / name)
        for kind, pattern in kinds.items():
            if found := _first(pattern, text, allow):
                problems.append(f"{name}, line {_line(text, found)}, holds {kind}: remove it, and revoke it if real.")
        if Path(name).name in VOCABULARIES:
            continue
        wanted = paths[:1] if binary else paths + more.get(Path(name).suffix, [])
        for pattern in wanted:
            if found := _first(pattern, text, allow):
                problems.append(
                    f"{name}, line {_line(text, found)}, holds a path of this machine ({found[0]}): replace it by a "
                    "name that others understand, or allow it where it is none (--allow TEXT)."
                )
                break
    return problems


def _first(pattern: re.Pattern, text: str, allow: set[str]) -> re.Match | None:
    matches = pattern.finditer(text)
    return next((found for found in matches if not any(text.startswith(fine, found.start()) for fine in allow)), None)


def _read_text(path: Path) -> tuple[str, bool]:
    """Read a file as text, weights only up to their header; also return whether it is binary."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            data = file.read(min(int.from_bytes(file.read(8), "little"), MAX_SCANNED_BYTES))
        else:
            data = file.read(MAX_SCANNED_BYTES)
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.replace(b"\0", b"").decode("ascii", "replace"), True  # finds ASCII in UTF-16 too


def _line(text: str, found: re.Match) -> int:
    return text.count("\n", 0, found.start()) + 1


def _card_problems(folder: Path, warnings: list[str]) -> list[str]:
    card = folder / "README.md"
    if not card.is_file():
        warnings.append(f"{folder} has no model card: `egmla card {folder}` writes README.md from its reports.")
        return []
    text = card.read_text(encoding="utf-8")
    if not text.lstrip().startswith("---"):
        warnings.append("README.md has no metadata (the YAML block between two lines of ---), so the Hub shows none.")
        return []
    return card_problems(text)


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
