"""SourceError: where a source is wrong, what is wrong, and the cure, in one sentence."""

import ast
import pickle
from pathlib import Path

import pytest

from packing.files.errors import Option, OptionError, SourceError, in_split, marked, said_in_command


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


def test_an_option_is_spelled_for_its_reader():
    """In an f-string, in a larger error, in a part of a SourceError, and from another process."""
    option = Option("pad_token_id", 0)
    inner = OptionError(f"{option} is no {{name}}, nor is {Option('seed')}")
    outer = OptionError(f"train split: {marked(inner)}; or {marked(ValueError('seed=1'))}")
    parts = SourceError(f"holds {option}", row=3, cure=f"no {option}")
    for error, plain, command in (
        (inner, "pad_token_id=0 is no {name}, nor is seed", "--pad-token-id 0 is no {name}, nor is --seed"),
        (
            outer,
            "train split: pad_token_id=0 is no {name}, nor is seed; or seed=1",
            "train split: --pad-token-id 0 is no {name}, nor is --seed; or seed=1",
        ),
        (
            parts,
            "row 3 holds pad_token_id=0; no pad_token_id=0",
            "row 3 holds --pad-token-id 0; no --pad-token-id 0",
        ),
    ):
        for each in (error, pickle.loads(pickle.dumps(error))):
            assert (str(each), each.in_command()) == (plain, command)
    outer.add_note("resume it")
    assert said_in_command(outer) == f"{outer.in_command()}; resume it"
    assert said_in_command(KeyError("seed")) == "'seed'"


def test_a_hint_says_how_to_find_the_row_also_where_there_is_no_cure():
    for cure, printed in (
        ("", "row 3 is empty (it is [])"),
        ("fill it", "row 3 is empty; fill it (it is [])"),
    ):
        error = SourceError("is empty", row=3, cure=cure)
        error.hint = "it is []"
        assert str(error) == str(pickle.loads(pickle.dumps(error))) == printed


def marks_without_reader(source):
    """Lines of calls, other than of errors that spell options, that get an Option in an f-string."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        if name.endswith("Error") and not name.endswith(("OptionError", "SourceError", "OverlongError")):
            words = [part for given in call.args for part in ast.walk(given) if isinstance(part, ast.FormattedValue)]
            lines += [call.lineno for word in words if ast.unparse(word.value).startswith("Option(")]
    return lines


def test_an_option_is_only_in_errors_that_spell_it():
    """Any other error would print both spellings, and the marks between them."""
    assert marks_without_reader("raise ValueError(f'{Option(name)} is odd')") == [1]
    assert not marks_without_reader("raise OptionError(f'{Option(name)} is odd')")
    root = Path(__file__).parents[3]
    for package in ("packing", "collate", "bert_pretrain"):
        for file in (root / package).rglob("*.py"):
            assert not marks_without_reader(file.read_text(encoding="utf-8")), file
