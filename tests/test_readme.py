"""The documents: their code runs, their commands parse, their links lead somewhere, and they keep their lengths.

Commands are parsed, not run: what they do is tested by room.
"""

import importlib.util
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
from cases import needs_compiler
from command_line import SHAPE, run, save_tokenizer

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.commands import app
from egmla.configuration import load_preset


# Of the click that this typer is built on, its own copy in new versions.
USAGE_ERROR = typer.BadParameter.__base__
ROOT = Path(__file__).parents[1]
FIGURES = ROOT / ".github" / "figures"
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        ".github/*.md",
        "configuration/*.md",
        "conversion/*.md",
        "model_cards/README.md",
        "modeling_egmla/**/*.md",
        "tests/benchmarks/*.md",
    )
    for path in ROOT.glob(pattern)
)
# Logs record what was run at their date, and options may be gone since.
CURRENT = [name for name in DOCUMENTS if not name.endswith(("LOG.md", "CHANGELOG.md"))]
MOST_LINES = {
    "README.md": 170,
    "conversion/README.md": 120,
    "modeling_egmla/README.md": 150,
    "tests/benchmarks/README.md": 150,
}
README_WORDS, UNRELEASED_LINES = 1_200, 25


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    """Return the contents of all code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def command_lines(text: str) -> list[list[str]]:
    """Return each command of a document's bash blocks and indented blocks as words, without comments."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    indented = "\n".join(line[4:] for line in prose.splitlines() if line.startswith("    "))
    # Indented blocks may hold trees and formulas too.
    programs = re.compile(r"(?:\w+=\S+ +)?(?:egmla|python3?|pip|accelerate|torchrun|lm_eval) ")
    lines = [line for block in fenced(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += filter(programs.match, indented.replace("\\\n", " ").splitlines())
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for command in commands if command]


def egmla_arguments(command: list[str]) -> list[str] | None:
    """Return what follows `egmla` in a command, run as a program or as a module, or None for another program."""
    for position, word in enumerate(command):
        if word in ("egmla", ".venv/bin/egmla"):
            before = command[:position]
            if not before or before[-1] == "-m" or all("=" in other for other in before):
                return command[position + 1 :]
    return None


def check_egmla(arguments: list[str]) -> None:
    """Parse the arguments of `egmla` as the command line does, without running the command."""
    group = typer.main.get_command(app)
    while arguments and arguments[0].startswith("--"):
        assert any(arguments[0] in option.opts for option in group.params), f"egmla {arguments[0]}"
        arguments = arguments[1:]
    if not arguments or not arguments[0].islower():
        return  # `egmla --version`, `egmla COMMAND`
    command = group.get_command(typer.Context(group), arguments[0])
    assert command is not None, f"egmla {arguments[0]}"
    if "..." in arguments:
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= options, arguments
        return
    command.make_context(arguments[0], arguments[1:])


def check_command(command: list[str]) -> None:
    """Check one command of a document: its options, its extras, its script or its module."""
    arguments = egmla_arguments(command)
    if arguments is not None:
        check_egmla(arguments)
    for word in command:
        if extras := re.fullmatch(r"\.\[([\w,]+)\]", word):
            known = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
            assert set(extras[1].split(",")) <= set(known), command
        if word.startswith(("tests/", ".github/")) and word.endswith(".py"):
            assert (ROOT / word).is_file(), command
    if command[0].startswith("python") and command[1:2] == ["-m"] and command[2].startswith("egmla"):
        assert importlib.util.find_spec(command[2]), command


@pytest.mark.parametrize("name", CURRENT)
def test_commands_parse(name):
    for command in command_lines(read(name)):
        try:
            check_command(command)
        except USAGE_ERROR as error:
            pytest.fail(f"{name}: {shlex.join(command)}: {error.format_message()}")


@pytest.mark.parametrize("name", CURRENT)
def test_commands_in_running_text_exist(name):
    known = {*typer.main.get_command(app).list_commands(None)}
    named = set(re.findall(r"`egmla ([a-z_]+)\b", read(name)))
    assert named <= known


@pytest.mark.parametrize(
    "command",
    [
        "egmla convert SOURCE TARGET --no-such-option",
        "egmla heal CONVERTED",
        "egmla no_such_command",
        "pip install -e '.[no_such_extra]'",
        "python tests/benchmarks/no_such_script.py",
        "EGMLA_CPU_KERNEL=1 egmla convert --no-such-option",
    ],
)
def test_wrong_commands_are_found(command):
    [words] = command_lines(f"```bash\n{command}\n```\n")
    with pytest.raises((USAGE_ERROR, AssertionError)):
        check_command(words)


def headings(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name):
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file.read_text(encoding="utf-8")), f"{name} links to {target}"


def test_files_and_names_in_contributing_exist():
    words = re.findall(r"`([^`\s]+)`", read(".github/CONTRIBUTING.md"))
    paths = {word for word in words if "/" in word}
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]
    classes = {word for word in words if re.fullmatch(r"[A-Z][a-z]\w+[A-Z]\w+|[A-Z_]{6,}", word)}
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py") if ".venv" not in path.parts)
    assert len(classes) >= 6
    assert not [name for name in classes if not re.search(rf"^(class )?{name}\b", source, flags=re.M)]


@pytest.mark.parametrize("name", MOST_LINES)
def test_documents_are_short(name):
    assert len(read(name).splitlines()) <= MOST_LINES[name]


def test_readme_has_few_words():
    assert len(read("README.md").split()) <= README_WORDS


def test_changelog_has_one_short_unreleased_section():
    _, *sections = re.split(r"^## ", read("CHANGELOG.md"), flags=re.M)
    unreleased = [section for section in sections if "unreleased" in section.splitlines()[0].lower()]
    assert len(unreleased) == 1
    assert len(unreleased[0].strip().splitlines()) <= UNRELEASED_LINES


def test_cache_figure_is_what_its_script_draws():
    drawn = runpy.run_path(str(FIGURES / "draw_cache.py"))["picture"]()
    assert (FIGURES / "cache.svg").read_text(encoding="utf-8") == drawn


def test_cache_figures_of_presets():
    rows = re.findall(r"^\| `([\w.-]+)`.*\| ([\d,]+) \| ([\d,]+) \|", read("modeling_egmla/README.md"), flags=re.M)
    assert len(rows) == 7
    for name, elements, size in rows:
        config = load_preset(name)
        assert f"{config.cache_elements_per_token:,}" == elements, name
        assert f"{config.cache_bytes_per_token():,}" == size, name


def test_package_table_shows_what_presets_prints():
    printed = run("presets").output
    table = read("modeling_egmla/README.md").split("| preset |")[1]
    for line in table.splitlines()[2:9]:
        cells = [re.sub(r"`| \(.*\)", "", cell).strip() for cell in line.strip("| ").split("|")]
        assert re.search(r"\s*│\s*".join(map(re.escape, cells)), printed), line


@pytest.fixture(scope="module")
def half_cache(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, in place of the demo's."""
    folder = tmp_path_factory.mktemp("readme") / "half-cache"
    EGMLAForCausalLM(EGMLAConfig(**SHAPE)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def quickstart(folder: Path) -> str:
    [code] = fenced(read("README.md"), "python")
    assert code.count('"egmla-demo/quarter-cache"') == 1
    return code.replace('"egmla-demo/quarter-cache"', repr(str(folder)))


@needs_compiler
def test_python_code_runs(half_cache, kernel_extensions, loaded_python, monkeypatch, tmp_path):
    """README's quickstart, then the blocks of the package's README and the table's lines, in one process."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(kernel_extensions))
    blocks = fenced(read("modeling_egmla/README.md"), "python")
    assert len(blocks) == 3
    # The compiler's work is tested in test_attention_backends.py; here the options are.
    compiled = [block.replace("fullgraph=True", 'fullgraph=True, backend="eager"') for block in blocks]
    assert compiled != blocks
    blocks = [block.replace("num_blocks=64", "num_blocks=4") for block in compiled]
    # Offloading needs an accelerator.
    cells = [
        cell.strip(" `")
        for name in ("README.md", "modeling_egmla/README.md")
        for row in re.findall(r"^\|.*\|$", read(name), flags=re.M)
        for cell in row.split("|")
        if "offload" not in cell
    ]
    lines = [cell for cell in cells if cell.startswith(("EGMLACache(", "model.", "egmla.")) and cell.endswith(")")]
    calls = [f"model.generate(**inputs, {cell})" for cell in cells if cell.startswith("cache_implementation=")]
    assert len(lines) == 10 and len(calls) == 3
    code = "\n".join([quickstart(half_cache), *blocks, "import egmla", *lines, *calls])
    printed = loaded_python.run(code, cwd=tmp_path, check=True).stdout
    config = EGMLAConfig(**SHAPE)
    used, allocated = map(int, re.findall(r"(\d+) (\d+)\n", printed)[-1])
    assert used % (config.cache_elements_per_token * 4) == 0
    assert used <= allocated
