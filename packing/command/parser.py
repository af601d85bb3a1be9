"""What all subcommands share: both spellings of an option, errors of one line, defaults and examples in help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, NoReturn, get_args, get_type_hints

from packing.files.errors import suggestion
from packing.options import PackOptions


@dataclass(frozen=True)
class Subcommand:
    """One subcommand: its help, its options, and the function that runs it.

    run: arguments -> exit status. lacks: why it lacks options of other subcommands, as the end of an error.
    """

    description: str
    examples: str
    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    lacks: str = ""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes --a-b and --a_b, and refuses in one line. It has --version.

    hint: the end of its errors. lacks: see Subcommand.
    """

    def __init__(self, prog: str, hint: str = "", lacks: str = "", **about: Any):
        super().__init__(prog=prog, formatter_class=HelpFormatter, allow_abbrev=False, **about)
        self.hint, self.lacks = hint, lacks
        self.add_argument("--version", action=Version, nargs=0, help="show the version and exit")

    def parse(self, arguments: Iterable[str]) -> argparse.Namespace:
        """The values, and `defaults`: {name: default} of all. Exits with status 2 for what it cannot parse."""
        found, others = self.parse_known_args(with_hyphens(arguments))
        if len(others) == 1 and self.lacks:
            raise ValueError(f"{others[0]!r} would be ignored: {self.lacks}; leave it out")
        if others:
            guess = "" if self.hint else " (several files? quote the glob: 'data/*.parquet')"
            self.error(f"unrecognized arguments: {' '.join(others)}{guess}")
        found.defaults = {action.dest: action.default for action in self._actions}
        return found

    def first_unknown(self, arguments: Iterable[str]) -> tuple[str, str | None] | None:
        """The first option that this parser does not have, and the argument after it."""
        given = with_hyphens(arguments)
        for argument, following in zip(given, [*given, None][1:], strict=True):
            option, _, value = argument.partition("=")
            if argument == "--":
                break
            if option.startswith("--") and option not in self._option_string_actions:
                return option, value or following
        return None

    @property
    def options(self) -> dict[str, argparse.Action]:
        """{"--seed": its action, …}"""
        return {name: action for name, action in self._option_string_actions.items() if name.startswith("--")}

    def error(self, message: str) -> NoReturn:
        required = "the following arguments are required: "
        if message.startswith(required):
            names = message.removeprefix(required).split(", ")
            message = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
        self.exit(2, f"{self.prog}: {message}{self.hint}; {self.prog} --help lists the options\n")


def with_hyphens(arguments: Iterable[str]) -> list[str]:
    """Options in one spelling: ["--num_proc=2", "a_b", "--", "--c_d"] -> ["--num-proc=2", "a_b", "--", "--c_d"]"""
    spelled, arguments = [], iter(arguments)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and name != "--"
        spelled.append(name.replace("_", "-") + equals + value if is_option else argument)
        if argument == "--":
            break
    return [*spelled, *arguments]


def add_options(parser: Parser, names: Collection[str], options: type = PackOptions) -> None:
    """Add an option for each of these fields of a dataclass, with its type, default, choices and help."""
    types = get_type_hints(options, localns={"Packer": Callable})
    for field in fields(options):
        if field.name not in names:
            continue
        about, read = field.metadata, reading(field.name, types[field.name])
        if read.get("type") is not None:
            read |= {"choices": about["choices"], "metavar": about["metavar"]}
        if about["choices"]:
            read["type"] = one_of(about["choices"])
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=about["help"], **read)


READINGS: dict[Any, dict[str, Any]] = {type_: {"type": type_} for type_ in (int, float, str)}
READINGS |= {Sequence[str]: {"type": str, "nargs": "+"}, bool: {"action": "store_true"}}


def reading(name: str, type_: Any) -> dict[str, Any]:
    """How argparse reads a value of this type; of a union, its one member in READINGS: int | None -> {"type": int}"""
    members = get_args(type_) if isinstance(type_, UnionType) else (type_,)
    known = [READINGS[member] for member in members if member in READINGS]
    if len(known) != 1:
        raise TypeError(f"option {name} has the type {type_}, which the command cannot read; add it to READINGS")
    return {**known[0]}


def one_of(choices: Sequence[Any], kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A type for add_argument; its error names the choice nearest to an unknown one. kind: text -> a value."""

    def checked(text: str) -> Any:
        if (value := kind(text)) not in choices:
            names = list(map(str, choices))
            near = suggestion(text, names)
            raise argparse.ArgumentTypeError(f"{text!r} is unknown{near}; choose from {', '.join(names)}")
        return value

    return checked


class Version(argparse.Action):
    """Print the version, which is looked up only now."""

    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> None:
        from importlib.metadata import version

        print(parser.prog, version("dataset-packing"))
        parser.exit(0)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are some, and the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, "", argparse.SUPPRESS) and action.default is not False
        return super()._get_help_string(action) if has_default else action.help
