"""What a packed dataset knows about its making, carried in its description.

load_dataset takes no description from a Parquet file, but the columns' features: there the same text is the `id` of the
values of sequence_lengths. It takes them from the first file of all that it is given.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from packing.files.metadata import build, parse_json
from packing.options import OVERLONG

if TYPE_CHECKING:
    import datasets

    from packing.balance import StepCosts
    from packing.options import PackOptions

LENGTHS, INDICES, STARTS = "sequence_lengths", "sequence_indices", "sequence_starts"
CELL = "sequence_cohorts", "sequence_rounds", "sequence_lanes"  # the same for all sequences of a pack
PREFIX = "Packed by dataset-packing, format 1: "
ADDED = {"added": True}  # after 0.1.0: left out where it is None, so that packings of earlier versions resume


@dataclass(frozen=True, kw_only=True)
class PackedInfo:
    """The making of one packed dataset. It survives save_to_disk, select and shuffle, so num_packs may be more than the
    rows that are left. A stream has not been counted: its counts are None, and only the log says what was lost.

    max_sequence_length: token slots in a pack.
    max_sequences_per_pack: the packing depth asked for; None = no limit.
    max_depth: sequences in the deepest pack: the sequence slots of a batch. For a stream: its max_sequences_per_pack.
    token_columns: columns with one value per token, concatenated per pack; input_ids first.
    packer: name of the packer that made the plan.
    seed: seed of the assignment.
    source_rows: rows of the dataset that was packed.
    num_sequences: sequences in all packs: rows less what was dropped, pieces of a split counted each.
    num_packs: packs made.
    num_tokens: real tokens in all packs.
    overlong: what was done to rows with more tokens than a pack has slots: "error", "truncate", "split" or "drop".
    overlong_rows: the source rows to which it was done.
    overlong_tokens: tokens that were cut off or dropped with their rows; 0 for a split.
    trimmed_rows: rows from which padding was trimmed.
    trimmed_tokens: padding tokens that were trimmed.
    balance: packs per global batch for which the order of packs balances attention cost; None = any order.
    step_costs_before: how the cost of the global batches would spread in any order; None without balance.
    step_costs_after: how it spreads in the order of the packs.
    cohort: documents that were packed side by side, so that their pieces are in order; None: they are in any order.
    cohort_lanes: parts of each cohort that were packed apart; None without cohorts.
    plain_packs: packs that the plan without cohorts takes; None without cohorts.
    buffer_size: rows of a stream that were packed at a time; None: all, this is no stream.
    """

    max_sequence_length: int
    max_sequences_per_pack: int | None
    max_depth: int | None
    token_columns: tuple[str, ...]
    packer: str
    seed: int
    source_rows: int | None
    num_sequences: int | None
    num_packs: int | None
    num_tokens: int | None
    overlong: str
    overlong_rows: tuple[int, ...] = ()
    overlong_tokens: int = 0
    trimmed_rows: int = 0
    trimmed_tokens: int = 0
    balance: int | None = None
    step_costs_before: StepCosts | None = None
    step_costs_after: StepCosts | None = None
    buffer_size: int | None = None
    cohort: int | None = field(default=None, metadata=ADDED)
    cohort_lanes: int | None = field(default=None, metadata=ADDED)
    plain_packs: int | None = field(default=None, metadata=ADDED)

    def to_description(self) -> str:
        new = {each.name for each in fields(self) if each.metadata == ADDED}
        return PREFIX + json.dumps({name: x for name, x in asdict(self).items() if x is not None or name not in new})


def packed_facts(options: PackOptions, **facts: Any) -> PackedInfo:
    """The options that PackedInfo has a field for, and what only the packing itself knows, which goes first."""
    names = {each.name for each in fields(PackedInfo)}
    asked = {name: value for name, value in options.parameters().items() if name in names}
    return PackedInfo(**asked | facts)


def packed_info(dataset: datasets.Dataset) -> PackedInfo:
    """Read how a packed dataset was made. Raises ValueError for a dataset that was not packed."""
    info = getattr(dataset, "info", None)
    description = getattr(info, "description", None) or ""
    by_id = _id_of_lengths(getattr(info, "features", None) or {})
    if not str(description).startswith(PREFIX):
        description = by_id or description
        if by_id is not None:
            _refuse_several(getattr(info, "splits", None) or {}, by_id)
    elif by_id is not None and by_id != description:
        what = "the packing facts of this dataset are two: its description differs from its columns"
        raise ValueError(f"{what}; pack the source again")
    if not isinstance(description, str) or not description.startswith(PREFIX):
        raise ValueError("this dataset was not packed: it carries no packing facts; make it with pack_dataset")
    return read_facts(description.removeprefix(PREFIX))


def read_facts(text: str) -> PackedInfo:
    """What to_description wrote. Raises ValueError where it is something else, or cannot be true."""
    what = "the packing facts of this dataset"
    try:
        content = parse_json(text, what)
    except ValueError as error:
        cure = "use packed datasets one by one, or concatenate the sources and pack them together"
        raise ValueError(f"{error}. Or it carries those of several packings: {cure}") from None
    costs: type = type(None)
    if isinstance(content, dict) and content.get("balance") is not None:
        from packing.balance import StepCosts  # not at the top: Numba takes a second to import

        costs = StepCosts
    facts = build(PackedInfo, content, what, StepCosts=costs)
    for name, is_true in _conditions(facts).items():
        if not is_true:
            raise ValueError(f"{what} cannot be true: {name}={getattr(facts, name)!r}; pack the source again")
    return facts


def _conditions(facts: PackedInfo) -> dict[str, bool]:
    """{fact: whether it can be so, beside the others}"""
    rows, packs, sequences, tokens = facts.source_rows, facts.num_packs, facts.num_sequences, facts.num_tokens
    cut, cohort, lanes = facts.overlong_rows, facts.cohort, facts.cohort_lanes
    conditions = {
        "max_sequence_length": 1 <= facts.max_sequence_length < 2**31,
        "max_sequences_per_pack": facts.max_sequences_per_pack is None or 1 <= facts.max_sequences_per_pack < 2**31,
        "max_depth": facts.max_depth is None or facts.max_depth < 2**31,
        "token_columns": facts.token_columns[:1] == ("input_ids",),
        "overlong": facts.overlong in OVERLONG,
        "balance": facts.balance is None or 1 <= facts.balance < 2**63,
        "cohort": cohort is None or (facts.overlong == "split" and 1 <= cohort < 2**63),
        "cohort_lanes": cohort is lanes if cohort is None or lanes is None else 1 <= lanes <= cohort,
    }
    if facts.buffer_size is not None:
        return conditions
    if rows is None or packs is None or sequences is None or tokens is None:
        return conditions | {"num_sequences": False}
    dropped = len(cut) if facts.overlong == "drop" else 0
    return conditions | {
        "num_packs": 1 <= packs <= sequences,
        "num_tokens": sequences <= tokens < 2**63,
        "overlong_rows": all(a < b for a, b in pairwise(cut)) and cut[-1:] < (rows,),
        "source_rows": 0 < rows <= sequences if facts.overlong == "split" else rows == sequences + dropped,
    }


def _id_of_lengths(features: Any) -> str | None:
    lists = features.get(LENGTHS)
    values = lists[0] if isinstance(lists, list) else getattr(lists, "feature", None)
    return getattr(values, "id", None)


def _refuse_several(splits: dict, description: str) -> None:
    """Files of several packings that load_dataset has read as one dataset, or as splits of one."""
    num_rows = sum(split.num_examples or 0 for split in splits.values())
    found = re.search(r'"num_packs": (\d+)', description)
    if len(splits) > 1 or (found and num_rows > int(found[1])):
        given = f"{num_rows:,} packs in splits {', '.join(splits)}, but read the facts of the first only"
        cure = "open the folder with load_packed, or load the files of one packing"
        raise ValueError(f"load_dataset was given files of several packings, {given}: {cure}")
