"""Errors name what the user may have meant."""

import pytest

from packing.files.errors import path_suggestion, suggestion


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("--sed", ["--seed", "--packer"], "; did you mean --seed?"),
        ("inputs_ids", ["input_ids", "label"], "; did you mean 'input_ids'?"),
        ("Optimal", ["optimal", "spfhp"], "; did you mean 'optimal'?"),
        ("zzz", ["input_ids"], "; see there"),
    ],
)
def test_a_near_name_is_suggested(name, known, said):
    assert suggestion(name, known, "; see there") == said


def test_a_near_path_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenized" / "train").mkdir(parents=True)
    (tmp_path / "rows.parquet").write_bytes(b"")
    assert path_suggestion("tokenizd/train") == "; did you mean 'tokenized/train'?"
    assert path_suggestion("row.parquet") == "; did you mean 'rows.parquet'?"
    assert path_suggestion("row.parquet", only_folders=True) == path_suggestion("elsewhere") == ""
    assert path_suggestion("rows.parquet/train") == path_suggestion("tokenized") == ""
