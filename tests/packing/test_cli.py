"""The command pack-dataset, and what importing costs."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import slow_rows

import packing
from packing import cli, packed_info
from packing.command import plan
from packing.command.parser import reading
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
        (["source", "packed", "--packer", "nope"], "pack-dataset: unknown packer 'nope'; choose from "),
        (
            ["source", "packed", "--max-sequence-length", "0"],
            "pack-dataset: --max-sequence-length 0 must be",
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
        (
            ["--compare", "--packer", "lpfhp"],
            "--packer lpfhp would be ignored: it is for pack-dataset pack and plan, and compare",
        ),
        (["--compare", "--balance", "4"], "--balance 4 would be ignored"),
        (["--report", "x.html", "--seed", "3"], "--seed 3 would be ignored"),
        (["packed", "--compare"], "'packed' would be ignored"),
        (["packed", "--plan-only"], "'packed' would be ignored"),
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
    monkeypatch.setattr(plan, "_plan_lengths", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main([str(file), "--plan-only"]) == 130
    assert capsys.readouterr().err == "pack-dataset: interrupted; nothing was written\n"


def test_a_source_that_is_called_verify(tmp_path, source, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, "verify")
    assert cli.main(["verify", "packed"]) == 2
    assert "to pack the SOURCE that is called verify, write ./verify" in capsys.readouterr().err
    assert cli.main(["verify", "packed", "--seed", "1"]) == 2
    assert "write ./verify" in capsys.readouterr().err
    assert cli.main(["./verify", "packed"]) == 0
    assert cli.main(["verify", "packed", "--source", "verify"]) == 0


def test_an_empty_source_is_not_this_folder(tmp_path, source, capsys, monkeypatch):
    """An empty value, as from an unset variable of a script."""
    monkeypatch.chdir(source)
    assert cli.main(["", str(tmp_path / "packed")]) == 2
    assert "SOURCE is empty" in capsys.readouterr().err


# Subcommands


def test_subcommands_and_the_short_form_are_the_same(tmp_path, source, capsys):
    single, packed = str(tmp_path / "single"), str(tmp_path / "packed")
    said = []
    for arguments in (["plan", single], [single, "--plan-only"], ["compare", single], [single, "--compare"]):
        assert cli.main([*arguments, "--max_sequence_length", "40"]) == 0
        said.append(re.sub(r"[\d,.]+ m?s\b|\s+", " ", capsys.readouterr().out).split())
    assert said[0] == said[1] and said[2] == said[3] != said[0]
    assert cli.main(["pack", single, packed, "--max-sequence-length=40"]) == 0
    assert cli.main([single, f"{packed}-too", "--max_sequence_length=40"]) == 0
    assert datasets.load_from_disk(packed).to_list() == datasets.load_from_disk(f"{packed}-too").to_list()


def test_unpack_writes_the_rows_again(tmp_path, source, capsys):
    for name in ("single", "source"):
        assert cli.main([str(tmp_path / name), str(tmp_path / f"{name}-packed")]) == 0
    rows = datasets.load_from_disk(tmp_path / "single").to_list()
    packed = str(tmp_path / "single-packed")
    for target in ("rows", "rows.parquet", "rows.jsonl"):
        assert cli.main(["unpack", packed, str(tmp_path / target)]) == 0
    assert datasets.load_from_disk(tmp_path / "rows").to_list() == rows
    assert datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet")).to_list() == rows
    assert datasets.Dataset.from_json(str(tmp_path / "rows.jsonl")).to_list() == rows
    assert cli.main(["unpack", str(tmp_path / "source-packed"), str(tmp_path / "all")]) == 0
    assert datasets.load_from_disk(tmp_path / "all")["a"].to_list() == rows


def test_a_log_has_whole_lines_alone(tmp_path, source, capsys, monkeypatch):
    """No bar, no carriage return and no empty line."""
    monkeypatch.chdir(tmp_path)
    datasets.enable_progress_bars()
    for arguments in (
        ["plan", "source", "--balance", "2"],
        ["compare", "source", "--max-sequences-per-pack", "2"],
        ["pack", "single", "packed"],
        ["pack", "source", "splits", "--max_sequence_length", "40", "--num_proc", "2", "--balance", "2"],
        ["verify", "splits", "--source", "source"],
        ["unpack", "packed", "deep/rows.parquet"],
    ):
        assert cli.main(arguments) == 0
        for shown in capsys.readouterr():
            assert "\r" not in shown and not re.search(r"(\A|\n)\n|\S\|", shown) and shown[-1:] in ("", "\n"), shown
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["packed", "rows"], "pack-dataset unpack: output 'rows' exists already"),
        (["packed", "back.csv"], "pack-dataset unpack: TARGET 'back.csv' must end in .parquet or .jsonl, or as a"),
        (["packed", "other.jsonl"], "pack-dataset unpack: PACKED has the splits a, b, and .jsonl is one file; give"),
        (
            ["source", "other"],
            "pack-dataset unpack: 'source/a' holds no manifest.json; give a folder that pack_d",
        ),
        (["packed", "other", "--seed", "1"], "pack-dataset unpack: --seed 1 would be ignored: it is for pack-dataset"),
    ],
)
def test_unpack_refuses_in_one_line(tmp_path, source, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["source", "packed"]) == 0
    (tmp_path / "rows").mkdir()
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert cli.main(["unpack", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source", "packed", "--sed", "1"], "pack-dataset: unknown option --sed; did you mean --seed?; pack-dataset"),
        (["plan", "source", "--overlong", "trim"], "'trim' is unknown; choose from error, truncate, split, drop"),
        (["plan", "source", "--overlong", "splt"], "'splt' is unknown; did you mean 'split'?; choose from"),
        (["plan", "source", "--seed", "x"], "pack-dataset plan: argument --seed: invalid int value: 'x'"),
        ([], "pack-dataset: SOURCE and TARGET are missing; pack-dataset --help lists the options"),
    ],
)
def test_mistakes_in_options_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["sourse", "packed"], "'source'"),
        (["verfy", "packed"], "'verify'"),
        (["plann", "source"], "'plan'"),
        (["unpak", "missing"], "'unpack'"),
        (["pak", "source", "packed"], "'pack'"),
        (["plann", "source/dataset_dict.json"], "'plan'"),
        (["verfy", "packed", "--source", "source"], "'verify'"),
        (["verify", "sourse"], "'source'"),
        (["unpack", "sourse", "rows"], "'source'"),
        (["source", "packed", "--packer", "optimel"], "'optimal'"),
    ],
)
def test_what_is_mistyped_is_guessed(tmp_path, source, capsys, monkeypatch, arguments, meant):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert f"; did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("name", [[], *([name] for name in cli.COMMANDS)])
def test_every_subcommand_has_help_with_examples_and_a_version(capsys, name):
    for option, said in (("--help", "examples:\n  pack-dataset "), ("--version", f" {packing.__version__}\n")):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*name, option])
        assert said in capsys.readouterr().out


def test_ray_takes_no_number_of_processes(tmp_path, source, capsys):
    assert cli.main([str(source), str(tmp_path / "packed"), "--engine", "ray", "--num-proc", "4"]) == 2
    said = "pack-dataset: --num-proc 4 would be ignored: --engine ray takes all CPUs it has; leave it out\n"
    assert capsys.readouterr().err == said
    with pytest.raises(SystemExit, match="0"):
        cli.main(["pack", "--help"])
    assert "left out with --engine ray" in " ".join(capsys.readouterr().out.split())


def test_an_option_is_read_by_its_type():
    assert reading("share", float | None) == {"type": float}
    assert reading("columns", Sequence[str] | None) == {"type": str, "nargs": "+"}
    with pytest.raises(TypeError, match=r"option table has the type .*dict.*, which the command cannot read"):
        reading("table", dict[str, int])
