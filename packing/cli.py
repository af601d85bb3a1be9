"""The command pack-dataset: finds the subcommand, runs it, and prints an error in one line.

pack-dataset pack SOURCE TARGET     also without a subcommand: pack-dataset SOURCE TARGET
pack-dataset plan SOURCE                                       pack-dataset SOURCE --plan-only
pack-dataset compare SOURCE                                    pack-dataset SOURCE --compare, or --report FILE
pack-dataset verify PACKED
pack-dataset unpack PACKED TARGET
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from packing.command import compare, pack, plan, unpack, verify
from packing.command.parser import Parser, with_hyphens
from packing.files.collector import few_collections
from packing.files.errors import notes, said_in_command, suggestion

MODULES = {"pack": pack, "plan": plan, "compare": compare, "verify": verify, "unpack": unpack}
COMMANDS = {name: module.COMMAND for name, module in MODULES.items()}

OVERVIEW = """\
Pack tokenized sequences into rows of one length, without padding. Subcommands, each with its own --help:
  pack SOURCE TARGET      write packs; the word may be left out, as in `pack-dataset SOURCE TARGET`
  plan SOURCE             how well would it pack? (or SOURCE --plan-only)
  compare SOURCE          which packer, how deep? one table (or SOURCE --compare, or SOURCE --report FILE)
  verify PACKED           is all of it there, unchanged?
  unpack PACKED TARGET    write the rows again
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns 0: done; 1: verify found problems; 2: the input was refused, with the reason in one line on stderr;
    130: interrupted."""
    if argv is None:
        with few_collections():
            return main(sys.argv[1:])
    first = argv[0] if argv else ""
    meant = suggestion(first, COMMANDS) if first.isalpha() and not Path(first).exists() else ""
    if meant and first not in COMMANDS:
        print(f"pack-dataset: there is no command {first!r}{meant}", file=sys.stderr)
        return 2
    name, prog, rest = find_subcommand(argv)
    is_also_source = first in COMMANDS and Path(first).exists()
    hint = f"; to pack the SOURCE that is called {first}, write ./{first}" if is_also_source else ""
    parser = make_parser(name, prog, hint)
    try:
        _refuse_unknown(parser, rest)
        return COMMANDS[name].run(parser.parse(rest))
    except (FileNotFoundError, FileExistsError) as error:
        return _refused(prog, error, hint)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _refused(prog, error)
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted; {'; '.join(notes(error)) or 'nothing was written'}", file=sys.stderr)
        return 130


def find_subcommand(argv: Sequence[str]) -> tuple[str, str, list[str]]:
    """The subcommand, its name in errors, and its arguments.

    ["plan", "rows"] -> "plan", "pack-dataset plan", ["rows"]
    ["rows", "--plan-only"] -> "plan", "pack-dataset", ["rows"]
    """
    if argv and argv[0] in COMMANDS:
        return argv[0], f"pack-dataset {argv[0]}", list(argv[1:])
    options = [argument.partition("=")[0] for argument in with_hyphens(argv)]
    rest = [argument for argument, option in zip(argv, options, strict=True) if option not in SHORT]
    if "--compare" in options or "--report" in options:
        return "compare", "pack-dataset", rest
    return "plan" if "--plan-only" in options else "pack", "pack-dataset", rest


SHORT = ("--plan-only", "--compare")  # stand for a subcommand


def make_parser(name: str = "pack", prog: str = "pack-dataset", hint: str = "") -> Parser:
    """The parser of a subcommand; by default that of `pack-dataset` without one."""
    command = COMMANDS[name]
    description = OVERVIEW if (name, prog) == ("pack", "pack-dataset") else command.description
    parser = Parser(prog, hint, command.lacks, description=description, epilog=command.examples)
    command.add_options(parser)
    positionals = [str(action.metavar) for action in parser._get_positional_actions()]
    parser.usage = f"%(prog)s {' '.join(positionals)} [options]"
    return parser


def _refuse_unknown(parser: Parser, arguments: list[str]) -> None:
    """Raise ValueError for an option of other subcommands; exit for one that no subcommand has."""
    unknown = parser.first_unknown(arguments)
    if unknown is None:
        return
    option, value = unknown
    options = {other: make_parser(other).options for other in COMMANDS}
    have = {other: found[option] for other, found in options.items() if option in found}
    if not have:
        parser.error(f"unknown option {option}{suggestion(option, parser.options)}")
    takes_none = any(action.nargs == 0 for action in have.values())
    given = option if takes_none or value is None else f"{option} {value}"
    why = f"it is for pack-dataset {' and '.join(have)}" + (f", and {parser.lacks}" if parser.lacks else "")
    raise ValueError(f"{given} would be ignored: {why}; leave it out{parser.hint}")


def _refused(prog: str, error: Exception, hint: str = "") -> int:
    print(f"{prog}: {said_in_command(error)}{hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
