"""SourceError: where a source is wrong, what is wrong, and the cure, in one sentence."""

import pickle

import pytest

from packing.files.errors import SourceError, in_split


@pytest.mark.parametrize(
    ("place", "printed"),
    [
        ({}, "is empty; fill it"),
        ({"row": 3}, "row 3 is empty; fill it"),
        ({"column": "tags"}, "column 'tags' is empty; fill it"),
        ({"column": "tags", "row": 3}, "column 'tags' in row 3 is empty; fill it"),
        ({"file": "a.jsonl", "row": 3, "unit": "line"}, "'a.jsonl' line 3 is empty; fill it"),
        ({"split": "train", "row": 3}, "split 'train': row 3 is empty; fill it"),
    ],
)
def test_it_prints_itself(place, printed):
    error = SourceError("is empty", cure="fill it", **place)
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == printed


def test_a_split_is_added_where_it_is_known():
    with pytest.raises(SourceError, match=r"^split 'test': row 3 is empty$"), in_split("test"):
        raise SourceError("is empty", row=3)
    with pytest.raises(SourceError, match=r"^row 3 is empty$"), in_split(""):
        raise SourceError("is empty", row=3)
    with pytest.raises(ValueError, match=r"^balance=9 is too many") as error, in_split("test"):
        raise ValueError("balance=9 is too many")
    assert error.value.__notes__ == ["this was split 'test'"]
