"""What every command does the same way: its help, its options from a YAML file, and how errors are shown."""

import difflib
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from .help_texts import EXAMPLES, GROUP_OF, GROUPS


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors that the library raises for bad input. Any other is a bug, and its traceback is shown."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (ValueError, TypeError, OSError, ImportError, StrictDataclassError, SafetensorError)


def group_of(command: str | None, param) -> str:
    """Return the group of a command's option in help; "Other" for one without."""
    names = [*(f"{command}{name}" for name in param.opts), *param.opts]
    return next((GROUP_OF[name] for name in names if name in GROUP_OF), "Other")


class Command(typer.core.TyperCommand):
    """A command with options in groups, examples, and `--config FILE`."""

    def invoke(self, ctx):
        # Here, not when help is shown: this takes seconds.
        importlib.import_module("egmla.auto_classes")
        return super().invoke(ctx)

    def format_options(self, ctx, formatter):
        """Write arguments, then the options of each group."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *GROUPS)}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                section = "Arguments" if param.param_type_name == "argument" else group_of(self.name, param)
                sections[section].append((_plain_types(record[0]), record[1]))
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records, col_max=34)

    def format_epilog(self, ctx, formatter):
        """Write examples as they are typed."""
        with formatter.section("Examples"):
            for line in textwrap.dedent(EXAMPLES[self.name or ""]).strip().splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _plain_types(text: str) -> str:
    """Names of types as a manual writes them: `--steps N` instead of `--steps <int range>`."""
    for typed, plain in (("int", "N"), ("float", "X"), ("str", "TEXT"), ("[Pp]ath", "PATH")):
        text = re.sub(rf"<(?:list\[)?{typed}(?: range)?\]?>", plain, text)
    return text


def with_config(function: Callable) -> Callable:
    """Give a command the option `--config FILE`. One with a `config` of its own gives that the callback below."""
    signature = inspect.signature(function)
    if "config" in signature.parameters:
        return function

    @functools.wraps(function)
    def command(*args, config=None, **kwargs):
        return function(*args, **kwargs)

    option = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile)
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    command.__annotations__ = {**function.__annotations__, "config": ConfigFile}
    return command


def read_config(ctx: typer.Context, value: Any) -> Any:
    """Take the options of YAML files as defaults of this command; return what else was given.

    `egmla train --config KEY=VALUE` changes the model's configuration: texts with an equals sign are returned.

    Raises:
        typer.BadParameter: for a file that cannot be read, or with a key that is no option of the command.
    """
    texts = [] if value is None else [value] if isinstance(value, str) else list(value)
    for text in texts:
        if "=" not in text:
            ctx.default_map = {**(ctx.default_map or {}), **_options(ctx, Path(text))}
    return [text for text in texts if "=" in text] or None


ConfigFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        is_eager=True,
        callback=read_config,
        help="YAML file with options of this command, such as `batch-size: 4`. The command line wins.",
    ),
]


def _options(ctx: typer.Context, file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        change = " A change of the model's configuration is written key=value." if ctx.command.name == "train" else ""
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}.{change}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{file} must hold options as `name: value`, one a line.")
    params = {}
    for param in ctx.command.params:
        for name in (param.name, *param.opts):
            params[name.lstrip("-").replace("-", "_")] = param
    found = {}
    for key, setting in content.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in params or name == "config":
            near = difflib.get_close_matches(name, params, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else "."
            raise typer.BadParameter(f"{file}: {key!r} is no option of `egmla {ctx.info_name}`{hint}")
        found[params[name].name] = _value(params[name], setting)
    return found


def _value(param, setting: Any) -> Any:
    """A setting of YAML as the option takes it: lists repeat an option or are joined by commas, so are mappings."""
    if isinstance(setting, dict):
        setting = [f"{key}={value}" for key, value in setting.items()]
    if getattr(param, "multiple", False) or param.nargs == -1:
        return [str(item) for item in setting] if isinstance(setting, list) else [str(setting)]
    return ",".join(map(str, setting)) if isinstance(setting, list) else setting


class CommandGroup(typer.core.TyperGroup):
    """Show expected errors as one red paragraph and exit with 1, or with 130 after Ctrl-C."""

    def format_commands(self, ctx, formatter):
        """Write each command with the whole first line of its docstring."""
        names = self.list_commands(ctx)
        commands = [(name, command) for name in names if (command := self.get_command(ctx, name))]
        with formatter.section("Commands"):
            formatter.write_dl([(name, (command.help or "").splitlines()[0]) for name, command in commands])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, BrokenPipeError):
            raise  # the end of help, or a reader that went away (`egmla presets | head`)
        except Exception as error:
            if not isinstance(error, expected_errors()) or ctx.params.get("debug"):
                raise
            show_error(f"Error: {' '.join(str(error).split()) or type(error).__name__}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interruption:
            if ctx.params.get("debug"):
                raise
            kept = f" {interruption}" if interruption.args else ""
            show_error(f"Interrupted.{kept}")
            raise typer.Exit(130) from None


def show_error(text: str) -> None:
    """Print a paragraph in red to stderr, without line breaks of its own."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, style="red", markup=False)
