"""A config file and flags -> the dataclasses that configure a command; flags win over the file.

    bert-pretrain train config.yaml --max-steps 1000

    config.yaml   learning_rate: 1e-4           --learning-rate=1e-4
                  eval_strategy: no        ->   --eval-strategy=no
                  save_steps: 500               --save-steps=500        --max-steps 1000

The file becomes flags before the real ones: both mean the same, one parser checks both, and the last one wins.
(HfArgumentParser.parse_yaml_file takes no flags beside the file, and checks no types.)
"""

import json
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from packing.command.parser import HelpFormatter, Version, one_of, with_hyphens
from packing.files.errors import path_suggestion, suggestion

if TYPE_CHECKING:
    from transformers import HfArgumentParser

CONFIG_ENDINGS = (".yaml", ".yml", ".json")
SEE_HELP = "; --help lists the options"
TRUE_OR_NONE = {"true": True, "false": None}


def read_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any], list[str]]:
    """The config file, its values, and the flags: ["run.yaml", "--seed", "1"] -> "run.yaml", {…}, ["--seed", "1"]"""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], read_config_file(arguments[0]), list(arguments[1:])
    return None, {}, list(arguments)


def named(given: tuple[str | None, dict[str, Any], Sequence[str]]) -> frozenset[str]:
    """The options that have a value, from `read_arguments`: {"seed": 1, "model": null} and --bf16 -> seed, bf16"""
    _, values, flags = given
    options = {flag.partition("=")[0] for flag in with_hyphens(flags) if flag.startswith("--")}
    return frozenset(option[2:].replace("-", "_").removeprefix("no_") for option in options) | {
        name.replace("-", "_") for name, value in values.items() if value is not None
    }


def read_config_file(file: str) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file."""
    path = Path(file)
    if path.suffix not in CONFIG_ENDINGS:
        raise ValueError(f"{file!r} is no config file: its name must end in {', '.join(CONFIG_ENDINGS)}")
    if not path.is_file():
        raise ValueError(f"there is no config file {file!r}{path_suggestion(file)}")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text, object_pairs_hook=_without_twins) if path.suffix == ".json" else _load_yaml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config file {file!r}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"config file {file!r} must hold options and their values, as in `seed: 1`")
    return values


def _load_yaml(text: str) -> Any:
    """YAML 1.2: 1e-4 is a number and `no` a word. In PyYAML's own YAML 1.1 they are a word and False."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own name for it; add_implicit_resolver fills it)

        def construct_mapping(self, node, deep=False):
            return _without_twins(self.construct_pairs(node, deep=True))

    for tag, pattern in (
        ("null", r"null|~|"),
        ("bool", r"true|True|false|False"),
        ("int", r"[-+]?(0|[1-9][0-9]*)"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), None)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _without_twins(pairs: Iterable[tuple[Any, Any]]) -> dict:
    values: dict = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} is given twice")
        values[key] = value
    return values


def refuse_unknown(known: Iterable[str], config_file: str | None, keys: Iterable[str], flags: Sequence[str]) -> None:
    """Raise ValueError for a key of the file or a flag that no option has, naming the nearest one.

    known: the names of all options, with underscores. flags: with hyphens.
    """
    known = set(known)
    for key in keys:
        if key not in known:
            meant = suggestion(key, known, SEE_HELP)
            raise ValueError(f"config file {config_file!r} has an unknown key {key!r}{meant}")
    options = {f"--{name.replace('_', '-')}" for name in known}
    for flag in flags:
        option = flag.partition("=")[0]
        if not flag.startswith("--") or option in ("--help", "--version"):
            continue
        if option not in options and f"--{option.removeprefix('--no-')}" not in options:
            raise ValueError(f"unknown option {option}{suggestion(option, options, SEE_HELP)}")


def parse(
    dataclasses: Sequence[Any],
    prog: str,
    config_file: str | None,
    values: dict[str, Any],
    flags: Sequence[str],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> tuple:
    """The dataclasses, filled from the file's values and the flags.

    groups: {title: options} in the order in which --help shows them.
    Raises ValueError for what the parser does not understand; prints the help and exits for --help.
    """
    flags = with_hyphens(flags)
    refuse_unknown((field.name for options in dataclasses for field in fields(options)), config_file, values, flags)
    parser = _make_parser(dataclasses, prog)
    actions = _options(parser)
    _arrange(parser, groups or {})
    given = []
    for key, value in values.items():
        try:
            given += _as_flags(actions[key], value)
        except ValueError as error:
            raise ValueError(f"config file {config_file!r}: {key} {error}") from None
    try:
        return parser.parse_args_into_dataclasses([*given, *flags], look_for_args_file=False)
    except json.JSONDecodeError as error:  # an option that takes a dictionary
        raise ValueError(f"{error.doc!r} is no JSON: {error}") from None
    except TypeError as error:  # a key that such a dictionary may not have
        raise ValueError(str(error)) from error


def _make_parser(dataclasses: Sequence[Any], prog: str) -> "HfArgumentParser":
    from transformers import HfArgumentParser

    class OptionsParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)  # one line, as for any other bad input, instead of two hundred lines of usage

    parser = OptionsParser(
        dataclasses,
        prog=prog,
        usage=f"{prog} [CONFIG.yaml] [--option value …]",
        description="Options come from a YAML or JSON file, from flags, or from both: flags win over the file.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, default=SUPPRESS)
    for action in parser._actions:
        _mend(action)
    return parser


def _mend(action: Action) -> None:
    """Give an option one spelling and choices that name the nearest one, and correct what HfArgumentParser misreads."""
    from transformers.hf_argparser import string_to_bool

    action.option_strings = [option for option in action.option_strings if "_" not in option]
    if action.choices and callable(action.type):
        action.type = one_of(tuple(action.choices), action.type)
    if action.type is string_to_bool:  # `--bf16` alone means yes for optional booleans, too
        action.nargs, action.const = "?", True
    if action.dest == "report_to":  # TrainingArguments takes a list, HfArgumentParser would take one name
        action.nargs = "+"
    if action.dest == "fsdp":  # True, or the words of older versions, without fsdp_config
        action.type, action.nargs, action.const = lambda text: TRUE_OR_NONE.get(text.lower(), text), "?", True
    if action.dest == "include_num_input_tokens_seen":  # a word or a boolean; HfArgumentParser takes the latter
        words = {"true": "all", "false": "no"}
        counted = one_of(("all", "non_padding", "no"), lambda text: words.get(text.lower(), text.lower()))
        action.type, action.nargs, action.const = counted, "?", "all"


def _options(parser: ArgumentParser) -> dict[str, Action]:
    """{name: argparse's action}, without the --no_name that HfArgumentParser adds where the default is True."""
    options: dict[str, Action] = {}
    for action in parser._actions:
        options.setdefault(action.dest, action)
    return options


def _as_flags(action: Action, value: Any) -> list[str]:
    """A value of the file as a flag: 0.1 -> ["--x=0.1"], ["a", "b"] -> ["--x", "a", "b"]"""
    flag = action.option_strings[0]
    if value is None:
        if action.default is not None or action.required:
            raise ValueError("has no value; give one, or leave the key out")
        return []
    if isinstance(value, list):
        if action.nargs != "+":
            raise ValueError(f"is {value!r}, but takes one value")
        return [flag, *map(_as_text, value)] if value else []
    return [f"{flag}={_as_text(value)}"] if action.nargs != "+" else [flag, _as_text(value)]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _HelpFormatter(HelpFormatter):
    """One spelling of each option."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action):
        option = action.option_strings[0]
        if action.choices:
            return f"{option} {{{','.join(map(str, action.choices))}}}" if len(action.choices) < 6 else f"{option} NAME"
        if action.const is True:
            return f"{option}, --no-{option.removeprefix('--')}" if action.default is True else option
        if action.nargs == 0:
            return option
        kind = {int: "N", float: "X"}.get(action.type, "VALUE")
        return f"{option} {kind}{' …' if action.nargs == '+' else ''}"


def _arrange(parser: ArgumentParser, groups: Mapping[str, Sequence[str]]) -> None:
    """Sort the options into groups for --help. Parsing does not change: argparse keeps groups as lists of their own."""
    left = _options(parser)
    for group in parser._action_groups:
        group._group_actions = []
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        group._group_actions = [left.pop(name) for name in (names or list(left)) if name in left]
