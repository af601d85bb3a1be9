"""Config files and flags mean the same, flags win, and a typo is reported at once."""

import dataclasses
import json
import re
import subprocess
import sys
from typing import get_args

import pytest
from transformers import TrainingArguments

from bert_pretrain.cli import main as bert_pretrain
from bert_pretrain.options import _make_parser, parse, read_arguments, read_config_file
from bert_pretrain.stand_in import stand_in
from bert_pretrain.train.config import PretrainConfig

TRAIN = (PretrainConfig, TrainingArguments)


def parsed(*arguments):
    return parse(TRAIN, "bert-pretrain train", *read_arguments(arguments))


def written(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


YAML = """
# what YAML 1.1 reads otherwise: `no` as False, 1e-4 as a word
dataset: packed
tokenizer: words
output_dir: out
use_cpu: true
eval_strategy: no
learning_rate: 1e-4
max_steps: -1
attention: local
attention_options: {window: 64}
lr_scheduler_type: polynomial
lr_scheduler_kwargs:
  lr_end: 1e-6
  power: 2
report_to: [none]
model: null
"""
FLAGS = [
    *("--dataset", "packed", "--tokenizer", "words", "--output_dir", "out", "--use_cpu", "--eval_strategy", "no"),
    *("--learning_rate", "1e-4", "--attention", "local", "--attention_options", '{"window": 64}'),
    *("--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1e-6, "power": 2}'),
    *("--report_to", "none"),
]


def test_a_file_means_what_the_flags_mean(tmp_path):
    config, training = parsed(*FLAGS)
    assert training.learning_rate == 1e-4 and training.eval_strategy == "no" and config.model is None
    assert training.lr_scheduler_kwargs == {"lr_end": 1e-6, "power": 2}
    as_yaml = parsed(written(tmp_path, "run.yaml", YAML))
    values = json.dumps(read_config_file(str(tmp_path / "run.yaml")))
    as_json = parsed(written(tmp_path, "run.json", values))
    for config_too, training_too in (as_yaml, as_json):
        assert config_too == config and training_too.to_dict() == training.to_dict()


def test_flags_win_over_the_file(tmp_path):
    file = written(tmp_path, "run.yaml", YAML)
    config, training = parsed(file, "--max_steps", "7", "--attention=sdpa", "--use-cpu=true", "--attention_options={}")
    assert training.max_steps == 7 and config.attention == "sdpa" and config.attention_options == "{}"
    assert training.learning_rate == 1e-4


def test_booleans_alone_mean_yes():
    _, training = parsed(*FLAGS, "--bf16", "--torch_compile", "false", "--report_to", "none", "--ddp_static_graph")
    assert training.bf16 and not training.torch_compile and training.ddp_static_graph is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "has an unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("maxsequencesperstep: 1", "has an unknown key 'maxsequencesperstep'; did you mean 'sequences_per_step'?"),
        ("zzz: 1", "has an unknown key 'zzz'; --help lists the options"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("seed:", "seed has no value; give one, or leave the key out"),
        ("seed: [1, 2]", "seed is [1, 2], but takes one value"),
        ("seed: one", "argument --seed: invalid int value: 'one'"),
        (
            "lr_scheduler_type: linar",
            "argument --lr-scheduler-type: 'linar' is unknown; did you mean 'linear'?; choose from",
        ),
        ("- seed", "must hold options and their values"),
        ("seed: [", "while parsing a flow node"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, capsys, text, message):
    file = written(tmp_path, "run.yaml", text)
    assert bert_pretrain(["train", file]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("bert-pretrain train: ") and message in error
    assert ("argument" in message) or file in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequence_per_step", "3"], "unknown option --sequence-per-step; did you mean --sequences-per-step?"),
        (["--sequences-per-stp=3"], "unknown option --sequences-per-stp; did you mean --sequences-per-step?"),
        (["nowhere.yaml"], "there is no config file 'nowhere.yaml'"),
        (["config.toml"], "'config.toml' is no config file: its name must end in .yaml, .yml, .json"),
        (["--max_steps", "3"], "the following arguments are required: --dataset, --tokenizer"),
        (["--dataset", "a", "--tokenizer", "b", "--seed"], "argument --seed: expected one argument"),
    ],
)
def test_mistakes_in_flags_are_one_line(capsys, arguments, message):
    assert bert_pretrain(["train", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"bert-pretrain train: {message}")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr_scheduler_kwargs", '{"power": 2', "'{\"power\": 2' is no JSON: Expecting ',' delimiter"),
        ("accelerator_config", '{"spit_batches": true}', "got an unexpected keyword argument 'spit_batches'"),
    ],
)
def test_mistakes_in_options_of_options_are_one_line(capsys, option, value, message):
    assert bert_pretrain(["train", *FLAGS, f"--{option}", value]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_twins_in_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run\.json': 'seed' is given twice"):
        read_config_file(written(tmp_path, "run.json", '{"seed": 1, "seed": 2}'))


def test_a_stand_in_has_the_options_of_the_real_arguments():
    """The list answers --help and mistakes, so it must match the parser."""
    quick = stand_in("transformers.training_args", "TrainingArguments")
    actions = [{a.dest: a for a in _make_parser((kind,), "train")._actions} for kind in (quick, TrainingArguments)]
    assert list(actions[0]) == list(actions[1])
    for found, real in zip(*(each.values() for each in actions), strict=True):
        assert found.option_strings == real.option_strings and found.nargs == real.nargs, real.dest
        assert found.help == real.help and found.required == real.required, real.dest
        if real.dest != "optim":  # its default depends on the version of torch
            assert found.default == real.default, real.dest
        if "log_level" not in real.dest:  # their choices are computed
            assert found.choices == real.choices, real.dest


def test_a_stand_in_is_read_from_the_source_alone(tmp_path, monkeypatch):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "__init__.py").write_text("")
    (tmp_path / "slow" / "words.py").write_text("from enum import Enum\nclass Word(Enum):\n    YES = 'yes'\n")
    (tmp_path / "slow" / "options.py").write_text(
        "from .words import Word\nraise AssertionError('it was imported')\n"
        "class Options:\n    several = 3\n    if several:\n        other = 1\n        several = 4\n"
        "    word: Word | str = field(default='yes', metadata={'help': 'a' 'b', 'choices': unknown()})\n"
        "    number: int = several\n    names: list[str] = field(default_factory=list)\n    left: Unknown = other\n"
        "class Others(Options):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    word, number, names, left = dataclasses.fields(stand_in("slow.options", "Options"))
    assert (word.default, word.metadata) == ("yes", {"help": "ab"}) and [*get_args(word.type)[0]] == ["yes"]
    assert (number.type, number.default, names.default_factory, left.default) == (int, None, list, 1)
    assert stand_in("slow.options", "Others") is None and stand_in("not_there.options", "Options") is None


def test_a_typo_is_told_before_anything_heavy_is_imported():
    code = (
        "import sys; from bert_pretrain.cli import main; assert main(['train', '--sed', '1']) == 2; "
        "assert not {'torch', 'transformers', 'datasets', 'numba'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "bert-pretrain train: unknown option --sed; did you mean --seed?\n"


def test_prepare_takes_a_config_file(tmp_path, capsys):
    text = written(tmp_path, "text.txt", "\n\n".join(f"The cat sat. The dog ran {i} times." for i in range(20)))
    values = {"text": [text], "vocab_size": 60, "max_sequence_length": 32, "lowercase": False, "test_fraction": 0}
    file = written(tmp_path, "prepare.json", json.dumps(values))
    assert bert_pretrain(["prepare", file, "--output", str(tmp_path / "prepared"), "--vocab_size", "80"]) == 0
    record = json.loads((tmp_path / "prepared" / "prepare.json").read_text())["config"]
    assert record["text"] == [text] and record["vocab_size"] == 80 and record["lowercase"] is False
    capsys.readouterr()
    file = written(tmp_path, "typo.yaml", "max_sequnce_length: 3")
    assert bert_pretrain(["prepare", file]) == 2
    assert "did you mean 'max_sequence_length'?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["prepare", "--help"], ["train", "--help"], ["train", "--seed", "x"]])
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    code = (
        "import sys; from bert_pretrain.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'datasets', 'numba'} & set(sys.modules), sorted(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_help_shows_our_own_options_first(capsys, command):
    with pytest.raises(SystemExit) as exit_of_help:
        bert_pretrain([command, "--help"])
    assert exit_of_help.value.code == 0
    shown = capsys.readouterr().out
    if command == "train":
        order = ["data, objective and steps", "--sequences-per-step", "model:", "--hidden-size", "--learning-rate"]
        order += ["--report-to", "the other TrainingArguments", "--neftune-noise-alpha"]
        places = [shown.index(what) for what in order]
        assert places == sorted(places)
        for field in [*dataclasses.fields(PretrainConfig), *dataclasses.fields(TrainingArguments)]:
            assert len(re.findall(rf"^  --{field.name.replace('_', '-')}(?![-\w])", shown, re.MULTILINE)) == 1, (
                field.name
            )
    assert "--lowercase, --no-lowercase" in shown or command == "train"


def test_a_mistyped_config_file_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("seed: 1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"there is no config file 'runn.yaml'; did you mean 'run.yaml'\?"):
        read_config_file("runn.yaml")
