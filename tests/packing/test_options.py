"""PackOptions: the one place where the options of a packing stand."""

import inspect
import re
import typing
from dataclasses import fields

import numpy as np
import pytest

from packing import PackedInfo, pack_dataset
from packing.dataset import _Keywords
from packing.files.errors import whole_number
from packing.options import ENGINES, OUTPUT_FORMATS, OVERLONG, PackOptions
from packing.source.sequences import CUTS
from packing.store.dataset_files import ENDINGS
from packing.store.info import packed_facts

ABOUT_THE_CALL = ("dataset", "output", "storage_options", "progress")


def test_pack_dataset_has_a_keyword_for_each_option():
    """With the same name and default, in the same order."""
    keywords = inspect.signature(pack_dataset).parameters.values()
    found = [(each.name, each.default) for each in keywords if each.name not in ABOUT_THE_CALL]
    assert found == [(each.name, each.default) for each in fields(PackOptions)]
    for overload in typing.get_overloads(pack_dataset):
        *named, more = inspect.signature(overload).parameters
        assert more == "more" and [*named, *_Keywords.__annotations__] == [each.name for each in keywords]


def test_each_choice_is_in_its_table():
    assert tuple(CUTS) == OVERLONG
    assert tuple(ENDINGS) == OUTPUT_FORMATS
    assert PackOptions().engine == ENGINES[0]


def test_options_are_plain_values_whatever_they_were_given_as():
    options = PackOptions(max_sequence_length=np.int32(8), seed=np.uint64(3), token_columns=["tags"])
    assert type(options.max_sequence_length) is int
    assert options == PackOptions(max_sequence_length=8, seed=3, token_columns=("tags",))


def test_the_manifest_has_the_options_that_decide_a_byte():
    """In an order that older manifests have, too."""
    assert list(PackOptions(num_proc=2).parameters()) == [
        *("max_sequence_length", "max_sequences_per_pack", "packer", "overlong", "seed"),
        *("token_columns", "pad_token_id", "balance", "format"),
    ]


def test_packed_info_takes_its_options_from_there():
    known = dict.fromkeys(("max_depth", "source_rows", "num_sequences", "num_packs", "num_tokens"))
    facts = packed_facts(PackOptions(overlong="drop", balance=2), token_columns=("input_ids",), **known)
    assert (facts.overlong, facts.balance, facts.token_columns) == ("drop", 2, ("input_ids",))
    assert isinstance(facts, PackedInfo)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 0}, "max_sequence_length=0 must be a whole number, at least 1"),
        ({"max_sequences_per_pack": 2.0}, "max_sequences_per_pack=2.0 must be a whole number, at least 1"),
        ({"packer": "nope"}, "unknown packer 'nope'; choose from"),
        ({"overlong": "cut"}, "unknown overlong 'cut'; choose from error, truncate, split, drop"),
        ({"seed": -1}, "seed=-1 must be a whole number, 0 to 2**64 - 1"),
        ({"token_columns": "tags"}, "token_columns='tags' must be a list of column names: ['tags']"),
        ({"pad_token_id": True}, "pad_token_id=True must be a whole number, -(2**63) to 2**63 - 1: the id that"),
        ({"balance": 0}, "must be a whole number, at least 1"),
        ({"num_proc": "2"}, "num_proc='2' must be a whole number, at least 1: the processes that write"),
        ({"engine": "spark"}, "unknown engine 'spark'; choose from processes, ray"),
        ({"format": "csv"}, "unknown format 'csv'; choose from arrow, parquet"),
    ],
)
def test_a_value_that_no_packing_can_have_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackOptions(**options)


def test_whole_number():
    assert whole_number("n", np.int8(3)) == 3
    with pytest.raises(ValueError, match=r"^n=70000 must be a whole number, 1 to 65,536$"):
        whole_number("n", 70_000, 1, 2**16)
