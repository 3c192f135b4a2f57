"""The shape of the code base, read from its source: who may import whom, and how large anything may grow.

`ARROWS` is the one table of the allowed imports; `.github/CONTRIBUTING.md` draws it for people.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from egmla.commands import app


REPOSITORY = Path(__file__).parents[1]
# The folders of the package `egmla`, by import name.
FOLDERS = {
    "egmla.configuration": REPOSITORY / "configuration",
    "egmla.conversion": REPOSITORY / "conversion",
    "egmla.model_cards": REPOSITORY / "model_cards",
    "egmla": REPOSITORY / "modeling_egmla",
}

# Each room and the rooms it may import. Besides, every room may import itself.
# `hub` is the files that travel in a checkpoint, `*_egmla.py`; `package` is the public names, `from egmla import ...`.
GROUND = {"hub", "package", "utils"}
ARROWS = {
    "hub": set(),
    "cpu_kernel": {"hub"},
    "package": {"hub", "cpu_kernel"},
    "utils": {"hub", "package"},
    "configuration": GROUND,
    "samples": GROUND,
    "compression": GROUND,
    "conversion": GROUND | {"samples"},
    "evaluation": GROUND | {"samples"},
    "bench": GROUND | {"conversion", "configuration"},
    "training": GROUND | {"conversion", "evaluation"},
    "model_cards": GROUND | {"evaluation"},
    "publishing": GROUND | {"model_cards"},
    "serving": GROUND,
    "commands": None,  # any room
    "entry_point": {"commands"},
}
MOST_LINES_OF_A_FUNCTION = 100
MOST_LINES_OF_A_FILE = 520
MOST_PARAMETERS = 12
# What was too large before the rooms were redesigned. This list only shrinks.
TOO_LARGE: set[str] = set()
AGAINST_THE_ARROWS: set[str] = set()


@cache
def modules() -> dict[str, Path]:
    """Files of the library by the name they are imported with."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def syntax(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


def room(name: str) -> str:
    """Room of a module: the folder it lies in, or what it is in the package's own folder."""
    first, *deeper = name.split(".")[1:] or ["__init__"]
    if deeper or modules()[name].name == "__init__.py":
        return first if name != "egmla" else "package"
    return {"__main__": "commands", "auto_classes": "package"}.get(first, "hub")


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports anywhere in it, functions included, and the lines."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(syntax(name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            # `from package import name` imports the module of that name where there is one.
            full = [f"{source}.{alias.name}" for alias in node.names]
            targets = [target if target in modules() else source for target in full]
        else:
            continue
        yield from ((target, node.lineno) for target in targets if target in modules() and target != name)


def functions(name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods of a module with their full names."""

    def walk(node: ast.AST, prefix: str):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                full = f"{prefix}.{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield full, child
                yield from walk(child, full)
            else:
                yield from walk(child, prefix)

    return walk(syntax(name), name)


def against_the_arrows() -> set[str]:
    found = set()
    for name in modules():
        allowed = ARROWS[room(name)]
        for target, line in imports(name):
            if allowed is not None and room(target) not in {*allowed, room(name)}:
                found.add(f"{name}:{line} imports {target}: {room(name)} may not import {room(target)}")
    return found


def is_public(full: str) -> bool:
    return not any(part.startswith("_") and part != "__init__" for part in full.split("."))


def too_large() -> set[str]:
    # A command has one parameter per option: Typer makes the options from the signature.
    commands = {f"{command.callback.__module__}.{command.callback.__name__}" for command in app.registered_commands}
    found = set()
    for name, file in modules().items():
        lines = len(file.read_text().splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            found.add(f"{name}: {lines} lines")
        for full, function in functions(name):
            lines = function.end_lineno - function.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.add(f"{full}: {lines} lines")
            arguments = function.args
            parameters = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            count = len([a for a in parameters if a not in ("self", "cls")])
            if is_public(full) and full not in commands and count > MOST_PARAMETERS:
                found.add(f"{full}: {count} parameters")
    return found


def test_every_room_is_in_the_table():
    assert {room(name) for name in modules()} == set(ARROWS)


def test_the_arrows_themselves_have_no_circle():
    TopologicalSorter({name: allowed for name, allowed in ARROWS.items() if allowed}).prepare()


def test_imports_follow_the_arrows():
    found = {line for line in against_the_arrows() if line.split(":")[0] not in AGAINST_THE_ARROWS}
    assert not found, "\n".join(sorted(found))


def test_imports_make_no_circle():
    graph = {name: {target for target, _ in imports(name)} for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"These modules import each other: {' -> '.join(error.args[1])}")


def test_functions_and_files_stay_small():
    found = {line for line in too_large() if line.split(":")[0] not in TOO_LARGE}
    assert not found, "\n".join(sorted(found))


def test_the_lists_of_exceptions_only_shrink():
    assert {line.split(":")[0] for line in too_large()} >= TOO_LARGE
    assert {line.split(":")[0] for line in against_the_arrows()} >= AGAINST_THE_ARROWS


# The checks above find what they are for.


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that makes a library of the given files and lets the checks read it instead of this one."""

    def make(files: dict[str, str]) -> None:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.setitem(FOLDERS, "egmla", tmp_path)
        for name in ("egmla.configuration", "egmla.conversion", "egmla.model_cards"):
            monkeypatch.delitem(FOLDERS, name)
        modules.cache_clear()
        syntax.cache_clear()

    yield make
    modules.cache_clear()
    syntax.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "import egmla.bench.run",
        "from egmla.bench import run",
        "def f():\n    from ..bench.run import g",
        "from .. import bench",
    ],
)
def test_an_import_against_the_arrows_is_found(library, text):
    library({"utils/files.py": text, "bench/__init__.py": "", "bench/run.py": ""})
    (found,) = against_the_arrows()
    assert "egmla.utils.files:" in found and "utils may not import bench" in found


def test_a_circle_within_functions_is_found(library):
    library(
        {
            "utils/a.py": "def f():\n    from . import b",
            "utils/b.py": "from egmla.utils.a import f",
            "utils/__init__.py": "",
        }
    )
    with pytest.raises(pytest.fail.Exception, match=r"egmla\.utils\.a"):
        test_imports_make_no_circle()


def test_what_is_too_large_is_found(library):
    many = ", ".join(f"p{number}" for number in range(MOST_PARAMETERS + 1))
    body = "    pass\n" * MOST_LINES_OF_A_FUNCTION
    library(
        {
            "utils/a.py": f"class A:\n    def many(self, {many}): ...\n    def _many(self, {many}): ...\n",
            "utils/b.py": f"def long():\n{body}",
            "utils/c.py": "x = 1\n" * (MOST_LINES_OF_A_FILE + 1),
        }
    )
    assert too_large() == {
        f"egmla.utils.a.A.many: {MOST_PARAMETERS + 1} parameters",
        f"egmla.utils.b.long: {MOST_LINES_OF_A_FUNCTION + 1} lines",
        f"egmla.utils.c: {MOST_LINES_OF_A_FILE + 1} lines",
    }
