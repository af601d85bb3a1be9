"""The command pack-dataset, and what importing costs."""

import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import slow_rows

import packing
from packing import cli, packed_info
from packing.options import OVERLONG

datasets.disable_progress_bars()
COMMAND = Path(sys.executable).with_name("pack-dataset")


@pytest.fixture
def source(tmp_path):
    splits = {name: datasets.Dataset.from_list(slow_rows.random_rows(seed, 50, 30)) for seed, name in enumerate("ab")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "source")
    splits["a"].save_to_disk(tmp_path / "single")
    return tmp_path / "source"


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_end_to_end(tmp_path, source):
    before = snapshot(source)
    done = subprocess.run(
        [COMMAND, source, tmp_path / "packed", "--max-sequence-length", "64", "--max-sequences-per-pack", "3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a: 50 rows\npacker " in done.stdout
    assert "packing efficiency" in done.stdout
    assert "packing: 100%" in done.stderr
    packed = datasets.load_from_disk(tmp_path / "packed")
    assert list(packed) == ["a", "b"]
    for name, rows in datasets.load_from_disk(source).items():
        assert packed_info(packed[name]).source_rows == 50
        expected = packing.pack_dataset(rows, 64, 3)
        assert packed[name].to_list() == expected.to_list()
    assert snapshot(source) == before


def test_a_dataset_without_splits(tmp_path, source, capsys):
    assert cli.main([str(tmp_path / "single"), str(tmp_path / "packed"), "--seed", "3"]) == 0
    assert packed_info(datasets.load_from_disk(tmp_path / "packed")).seed == 3
    assert f"written to {tmp_path / 'packed'}" in capsys.readouterr().out


def test_plan_only_writes_nothing(tmp_path, source, capsys):
    before = snapshot(tmp_path)
    assert cli.main([str(source), "--plan-only", "--max-sequence-length", "40"]) == 0
    assert capsys.readouterr().out.count("packing factor") == 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "packed"], "pack-dataset: there is no SOURCE 'missing'; give a folder"),
        (["folder", "packed"], "pack-dataset: SOURCE 'folder' was not written by save_to_disk"),
        (["source", "single"], "pack-dataset: output 'single' exists already"),
        (["source", "packed", "--max-sequence-length", "9"], "pack-dataset: split 'a': row "),
        (["source", "packed", "--packer", "nope"], "pack-dataset: split 'a': unknown packer 'nope'; choose from "),
        (
            ["source", "packed", "--max-sequence-length", "0"],
            "pack-dataset: split 'a': --max-sequence-length 0 must be",
        ),
    ],
)
def test_refused_in_one_line(tmp_path, source, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = snapshot(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_an_error_in_the_second_split_leaves_nothing_of_the_first(tmp_path, capsys):
    splits = {"train": [[1, 2]], "test": [[1], []]}
    rows = datasets.DatasetDict({name: datasets.Dataset.from_dict({"input_ids": ids}) for name, ids in splits.items()})
    rows.save_to_disk(tmp_path / "source")
    assert cli.main([str(tmp_path / "source"), str(tmp_path / "packed")]) == 2
    assert "split 'test': row 1 has length 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_target_or_plan_only(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["source"])
    assert "TARGET is missing" in capsys.readouterr().err


def test_every_overlong_choice_is_offered():
    (action,) = [a for a in cli.make_parser()._actions if a.dest == "overlong"]
    assert action.choices == tuple(OVERLONG)


# Importing


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'numba'} & set(sys.modules)"
    assert run(f"import sys, packing, packing.cli; print({heavy})") == "set()\n"


def test_packing_needs_neither_torch_nor_transformers():
    code = """
import sys
import datasets
from packing import *
packed = pack_dataset(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}), 8)
print(len(packed), {"torch", "transformers"} & set(sys.modules))
"""
    assert run(code) == "1 set()\n"


def test_the_table_of_names_is_complete():
    assert set(packing._MODULES) == set(packing.__all__) <= set(dir(packing))
    assert all(getattr(packing, name) is not None for name in packing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pack_everything'"):
        packing.pack_everything  # noqa: B018


def test_help():
    done = subprocess.run([sys.executable, "-m", "packing.cli", "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout
    assert "(default: 512)" in done.stdout
    assert subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True).stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "--packer", "lpfhp"], "--packer 'lpfhp' would be ignored: --compare and --report try all"),
        (["--compare", "--balance", "4"], "--balance 4 would be ignored"),
        (["--report", "x.html", "--seed", "3"], "--seed 3 would be ignored"),
        (["packed", "--compare"], "TARGET 'packed' would be ignored"),
        (["packed", "--plan-only"], "TARGET 'packed' would be ignored"),
        (["--plan-only", "--pad-token-id", "0"], "--pad-token-id 0 would be ignored: a file of lengths"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, capsys, arguments, message):
    file = tmp_path / "lengths.txt"
    file.write_text("3\n5\n")
    assert cli.main([str(file), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupt_is_one_line(tmp_path, capsys, monkeypatch):
    file = tmp_path / "lengths.txt"
    file.write_text("3\n5\n")
    monkeypatch.setattr("packing.cli.plan_file", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main([str(file), "--plan-only"]) == 130
    assert capsys.readouterr().err == "pack-dataset: interrupted; nothing was written\n"


def test_a_source_that_is_called_verify(tmp_path, source, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, "verify")
    assert cli.main(["verify", "packed"]) == 2
    assert "to pack the SOURCE that is called verify, write ./verify" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["verify", "packed", "--seed", "1"])
    assert "write ./verify" in capsys.readouterr().err
    assert cli.main(["./verify", "packed"]) == 0
    assert cli.main(["verify", "packed", "--source", "verify"]) == 0


def test_an_empty_source_is_not_this_folder(tmp_path, source, capsys, monkeypatch):
    """As an unset variable of a script gives it."""
    monkeypatch.chdir(source)
    assert cli.main(["", str(tmp_path / "packed")]) == 2
    assert "SOURCE is empty" in capsys.readouterr().err
