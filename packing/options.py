"""The options of one packing, each written once: a field of PackOptions.

    PackOptions ->  pack_dataset's keywords        the same names and defaults, in the same order
                    the command's options          --max-sequence-length, made of the field's name, type, default
                    manifest.json                  `parameters`: the fields that decide a byte
                    PackedInfo                     its fields of the same names

field.metadata holds, by these names:

    help      what it does, for the command line
    metavar   what stands for its value there; None: the choices
    choices   the values that it may have; None: any of its type
    decides   whether another value can make another packed dataset: then it stands in the manifest
    added     after 0.1.0: the manifest leaves out its default, so packings of earlier versions resume

To add an option: a field here (with its check, in __post_init__), a keyword of pack_dataset, and the code that it
changes. Importing this is cheap; what checks the values is imported when there are some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from packing.files.errors import Option, OptionError, check_known, whole_number

if TYPE_CHECKING:
    from packing.packers.table import Packer

OVERLONG = ("error", "truncate", "split", "drop")
ENGINES = ("processes", "ray")  # this machine's, or a cluster's
OUTPUT_FORMATS = ("arrow", "parquet")


def option(
    default: Any,
    help: str,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    decides: bool = True,
    added: bool = False,
) -> Any:
    """A field with this default. The others are its metadata; see the top of the file."""
    about = {"help": help, "metavar": metavar, "choices": choices, "decides": decides, "added": added}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How to pack a dataset. Raises ValueError for a value that no packing can have.

    Whole numbers of any integer type become int, token_columns a tuple.
    """

    max_sequence_length: int = option(512, "token slots in a pack", "N")
    max_sequences_per_pack: int | None = option(None, "sequences in a pack at most; left out: no limit", "N")
    packer: str | Packer = option("optimal", "algorithm that makes the plan", "NAME")  # noqa: RUF009 makes a field
    overlong: str = option("error", "what to do with rows longer than a pack", choices=OVERLONG)
    seed: int = option(0, "decides which equally long sequences lie together", "N")
    token_columns: Sequence[str] | None = option(
        None, "columns with one value per token; left out: those that are as long as input_ids in every row", "NAME"
    )
    pad_token_id: int | None = option(None, "token to trim at row ends, if there is no attention_mask", "ID")
    balance: int | None = option(None, "order packs so that every N of them cost attention nearly the same", "N")
    cohort: int | None = option(
        None,
        "keep pieces of documents in order, N documents at a time, for memory along a document (--overlong split)",
        "N",
        added=True,
    )
    cohort_lanes: int = option(8, "lanes of a cohort; ranks that train on it must divide them", "N", added=True)
    num_proc: int = option(
        1,
        "processes that tokenize and write, the same bytes for any number; left out with --engine ray",
        "N",
        decides=False,
    )
    engine: str = option(
        "processes",
        "who does it, the same bytes: processes of this machine, or a Ray cluster that sees SOURCE and TARGET",
        choices=ENGINES,
        decides=False,
    )
    format: str = option(
        "arrow",
        "files of TARGET: arrow is mapped into memory, by load_from_disk; parquet is compressed, for load_dataset",
        choices=OUTPUT_FORMATS,
    )

    def __post_init__(self) -> None:
        from packing.assignment import checked_seed  # not at the top: Numba takes a second to import
        from packing.packers.table import checked_depth, checked_length, find_packer

        for each in fields(self):
            if each.metadata["choices"]:
                check_known(each.name, getattr(self, each.name), each.metadata["choices"])
        find_packer(self.packer)
        self._set("max_sequence_length", checked_length(self.max_sequence_length))
        self._set("max_sequences_per_pack", checked_depth(self.max_sequences_per_pack))
        self._set("seed", int(checked_seed(self.seed)))
        self._set("num_proc", whole_number("num_proc", self.num_proc, cure=": the processes that write"))
        if self.engine != ENGINES[0] and self.num_proc != 1:
            why = f"{Option('engine', self.engine)} takes all CPUs it has"
            raise OptionError(f"{Option('num_proc', self.num_proc)} would be ignored: {why}; leave it out")
        if self.balance is not None:
            self._set("balance", whole_number("balance", self.balance))
        self._check_cohort()
        if self.pad_token_id is not None:
            self._set("pad_token_id", checked_pad_token_id(self.pad_token_id))
        if isinstance(self.token_columns, str):
            names = self.token_columns
            raise ValueError(f"token_columns={names!r} must be a list of column names: [{names!r}]")
        if self.token_columns is not None:
            self._set("token_columns", tuple(self.token_columns))

    def _check_cohort(self) -> None:
        """Raise for cohorts of rows that are not split, or whose order something else would choose."""
        lanes = whole_number("cohort_lanes", self.cohort_lanes, cure=": the parts of a cohort that ranks share out")
        self._set("cohort_lanes", lanes)
        if self.cohort is None:
            default = next(each.default for each in fields(self) if each.name == "cohort_lanes")
            if lanes != default:
                given = Option("cohort_lanes", lanes)
                raise OptionError(f"{given} would be ignored: there is no {Option('cohort')}; give it, too")
            return
        self._set("cohort", whole_number("cohort", self.cohort, cure=": the documents that are packed side by side"))
        given = Option("cohort", self.cohort)
        if self.overlong != "split":
            what = f"{given} keeps pieces of documents in order, which only {Option('overlong', 'split')} makes"
            raise OptionError(f"{what}; give it in place of {Option('overlong', self.overlong)}")
        if self.balance is not None:
            what = f"{Option('balance', self.balance)} would choose an order of packs beside that of {given}"
            raise OptionError(f"{what}; leave out either")
        if lanes > self.cohort:
            what = f"{Option('cohort_lanes', lanes)} is more than the {self.cohort} documents of a cohort"
            raise OptionError(f"{what}, so lanes would be empty; give at most {self.cohort}, or a larger cohort")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen from here on

    @property
    def one_process(self) -> bool:
        """Whether this process alone writes."""
        return self.num_proc == 1 and self.engine == ENGINES[0]

    def parameters(self) -> dict[str, Any]:
        """The options that decide a byte, as the manifest has them. packer and token_columns are as they were given."""
        values = {each: getattr(self, each.name) for each in fields(self) if each.metadata["decides"]}
        return {own.name: value for own, value in values.items() if not own.metadata["added"] or value != own.default}


def checked_pad_token_id(value: int) -> int:
    """The id as an int, which may be negative. Raises ValueError for what no column of tokens can hold."""
    return whole_number("pad_token_id", value, -(2**63), 2**63 - 1, ": the id that the tokenizer pads with")
