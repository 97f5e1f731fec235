"""Command line and YAML recipe to a typed config, with one-line errors.

The parser is tyro's: flags, help and types come from the config dataclass. A recipe is turned into flags that stand
before the user's own, so that both go through the same checks and the user's win.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
import yaml
from tyro import _errors
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dflash_jax.core import InputError

PROGRAM = "dflash-jax"
_CONFIG_HELP = "YAML recipe: a mapping of this command's flags to values; flags given here win over it."
_FORMAT_HELP = "How to print the result: as tables, or as Markdown in the form of the baseline report, ready to paste."
_JSON_HELP = "Write the result here too (the same document as the last line of stdout)."
_REGISTRY = ConstructorRegistry()
Config = TypeVar("Config")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean NEAREST?`, or nothing when no known word is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


@_REGISTRY.primitive_rule
def _integers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """`tuple[int, ...]` is one comma-separated value.

    tyro's own way is one token per number, which `--flag=value` cannot hold.
    """
    if info.type_origin is not tuple or set(get_args(info.type)) - {int, ...}:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,...",
        instance_from_str=lambda tokens: tuple(int(number) for number in tokens[0].split(",")),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(number, int) for number in value),
        str_from_instance=lambda value: [",".join(str(number) for number in value)],
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_line(event: _errors.ParseErrorEvent, *, flags: Sequence[str]) -> str | None:
    """A parse error as one line; None for an event of a kind that is not known here (tyro then prints its own text)."""
    match event:
        case _errors.UnrecognizedArgs(tokens=[token, *_]) | _errors.MissingArgs(unrecognized_tokens=[token, *_]):
            name = token.partition("=")[0]
            if not name.startswith("-"):
                return f"unexpected argument {token!r}: values follow a flag"
            return f"unknown flag {name}{did_you_mean(name.replace('_', '-'), flags)}"
        case _errors.MissingArgs(missing_arguments=missing):
            names = [argument.arg.lowered.name_or_flags[-1] for argument in missing]
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} needed"
        case _errors.BadValue(argument=argument):
            return f"{argument.lowered.name_or_flags[-1]} needs a value ({argument.lowered.metavar})"
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{argument.lowered.name_or_flags[-1]} is {value!r}: choose {' or '.join(choices)}"
        case _errors.InstantiationFailure(argument=argument, message=message) if argument is not None:
            # For `X | None` the message lists what was tried, a line each ("- <class 'int'>: why not"); X is the last.
            reason = re.sub(r"^- .*?: ", "", message.splitlines()[-1])
            return f"{argument.lowered.name_or_flags[-1]} needs {argument.lowered.metavar}: {reason}"
    return None


def _read_recipe(path: Path, *, known: Sequence[str]) -> dict[str, Any]:
    """A recipe's keys (with underscores) and values; keys whose value is null are left out, they mean the default."""
    if not path.is_file():
        raise InputError(f"the recipe is missing: {path} (--config)")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe is not YAML: {path}: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise InputError(
            f"the recipe is a YAML {type(recipe).__name__}, a mapping of flags to values is needed: {path}"
        )
    named = {str(key).replace("-", "_"): value for key, value in recipe.items()}
    for key in named:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known are {', '.join(known)}"
            raise InputError(f"unknown key {key} in {path}{hint}")
    return {key: value for key, value in named.items() if value is not None}


def _recipe_arguments(recipe: dict[str, Any], *, switches: set[str], path: Path | None) -> list[str]:
    """A recipe as flags: `{"steps": 5, "resume": true, "layers": [1, 2]}` is `--steps=5 --resume --layers=1,2`."""
    arguments: list[str] = []
    for key, value in recipe.items():
        flag = _flag(key)
        if key in switches:
            if not isinstance(value, bool):
                raise InputError(f"{key} is {value!r} in {path}: true or false is needed")
            arguments.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif isinstance(value, dict | bool):
            raise InputError(f"{key} is {value!r} in {path}: a {type(value).__name__} does not fit it")
        else:
            # Lists of integers are one value (see `_integers`), other lists a value per item, as tyro has it.
            whole = isinstance(value, list) and all(isinstance(item, int) for item in value)
            if isinstance(value, list) and not whole:
                arguments += [flag, *map(str, value)]
            else:
                arguments.append(f"{flag}={','.join(map(str, value)) if whole else value}")
    return arguments


def _recipe_path(arguments: Sequence[str]) -> Path | None:
    """The value of the last `--config`, which must be known before the parser can run."""
    path = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config" and (equals or index + 1 < len(arguments)):
            path = Path(value if equals else arguments[index + 1])
    return path


def _fields(config_class: type) -> tuple[Field[Any], ...]:
    return fields(config_class)


def _with_common_flags(config_class: type, *, markdown: bool) -> type:
    """A dataclass of the command's config, whose flags carry no prefix, and the flags that every command has."""

    def file(text: str) -> Any:
        return Annotated[Path | None, tyro.conf.arg(help=text, metavar="FILE", help_behavior_hint="")]

    command = Annotated[config_class, tyro.conf.arg(name="")]
    flags: list[tuple[str, Any] | tuple[str, Any, Any]] = [("command", command)]
    flags += [("config", file(_CONFIG_HELP), None), ("json", file(_JSON_HELP), None)]
    if markdown:
        format_flag = Annotated[Literal["table", "md"], tyro.conf.arg(help=_FORMAT_HELP)]
        flags.append(("format", format_flag, "table"))
    return make_dataclass("Options", flags)


def parse(
    config_class: type[Config], arguments: Sequence[str], *, command: str, markdown: bool = False
) -> tuple[Config, Path | None, bool]:
    """Return a command's config, the file that `--json` names (None without it), and whether Markdown is asked for.

    Args:
        config_class: a frozen dataclass; each field is a flag and its docstring the flag's help.
        arguments: what follows the command's name.
        command: the command's name, for usage lines.
        markdown: whether the command has `--format`.

    Raises:
        InputError: an unknown flag or recipe key (with the nearest known one), a missing or ill-typed value, or what
            the config itself refuses.
        SystemExit: `--help` was asked for and printed.
    """
    path = _recipe_path(arguments)
    names = [field.name for field in _fields(config_class)]
    recipe = _read_recipe(path, known=names) if path else {}
    switches = {field.name for field in _fields(config_class) if field.type is bool}
    by_hand = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    flags = [*map(_flag, names), "--config", "--json", "--help", *(["--format"] if markdown else [])]

    def raise_one_line(event: _errors.ParseErrorEvent) -> None:
        line = _one_line(event, flags=flags)
        if line is None:
            return
        named = [flag for flag in map(_flag, recipe) if line.startswith(flag + " ") and flag not in by_hand]
        where = f" (in {path})" if named else f" (see {PROGRAM} {command} --help)"
        raise InputError(line + where)

    # The hook is the one way to tyro's errors as values; without it tyro prints boxes of many lines. It is not public
    # yet, so pyproject.toml holds tyro below 1.1 and tests/cli pins every line.
    with _errors.on_parse_error(raise_one_line):
        parsed = tyro.cli(
            _with_common_flags(config_class, markdown=markdown),
            prog=f"{PROGRAM} {command}",
            description=config_class.__doc__,
            args=[*_recipe_arguments(recipe, switches=switches, path=path), *arguments],
            config=(tyro.conf.DisallowNone,),
            registry=_REGISTRY,
        )
    return parsed.command, parsed.json, markdown and parsed.format == "md"
