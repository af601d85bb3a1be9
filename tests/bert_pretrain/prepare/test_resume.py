"""`prepare` that is killed resumes, makes the same folder, and uses nothing that was made of something else."""

import json
import logging
import os
import random

import pytest
from killed_commands import killed_once
from killed_steps import contents, identities, killed_at, steps
from tokenizer_families import english, family
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bert_pretrain.prepare import build
from bert_pretrain.prepare import text as prepare_text
from bert_pretrain.prepare.prepare import PrepareConfig, prepare
from bert_pretrain.prepare.summary import summary_table
from packing.source import text_files
from packing.text import rules


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(prepare_text, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(build, "TOKENS_PER_TASK", 2000)


def save_tokenizer(folder, name="BERT"):
    special = {role: f"[{role[:-6].upper()}]" for role in ("pad_token", "unk_token", "cls_token", "sep_token")}
    tokenizer = Tokenizer.from_str(family(name))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special).save_pretrained(folder)


@pytest.fixture
def given(tmp_path):
    """The options of a run: a text of some pages, and a tokenizer."""
    (tmp_path / "text.txt").write_text("\n\n".join(english()[:60]), encoding="utf-8")
    save_tokenizer(tmp_path / "tokenizer")
    return {"text": [str(tmp_path / "text.txt")], "tokenizer": str(tmp_path / "tokenizer"), "max_sequence_length": 64}


def run(given, output, **options):
    return prepare(PrepareConfig(**given | options, output=str(output)))


def same(folder, other):
    """The same bytes but for the name of the folder itself."""
    left, right = contents(folder), contents(other)
    records = [json.loads(each.pop("prepare.json")) for each in (left, right)]
    for record in records:
        del record["config"]["output"]
    return left == right and records[0] == records[1]


def kill_and_resume(given, tmp_path, seed, kills):
    with steps() as taken:
        run(given, tmp_path / "whole")
    output, draw, made = tmp_path / "prepared", random.Random(seed), {}
    for _ in range(kills):
        killed_at(draw.randint(1, taken()), lambda: run(given, output))
        if output.exists():
            break
        found = identities(tmp_path, "0*.npy")
        assert made.items() <= found.items() or not list(tmp_path.glob(".prepared.unfinished/.parts/*"))
        made = found
    if not output.exists():
        run(given, output)
    assert same(output, tmp_path / "whole")
    assert [path.name for path in tmp_path.glob(".*") if path.suffix != ".lock"] == []


def test_killed_at_random_steps(given, tmp_path):
    kill_and_resume(given, tmp_path, 0, kills=2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 9))
def test_killed_at_many_random_steps(given, tmp_path, seed):
    """Every other one trains its tokenizer."""
    options = {} if seed % 2 else {"tokenizer": None, "vocab_size": 300}
    kill_and_resume(given | options, tmp_path, seed, kills=6)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_two_processes_that_are_killed(given, tmp_path, seed):
    """The run dies once it has some parts, of tokens or of sequences; then its processes end, and the same goes on."""
    output, draw = tmp_path / "prepared", random.Random(seed)

    def parts():
        return len([*tmp_path.glob(".prepared.unfinished/.parts/*/0*")])

    for _ in range(2):
        least = draw.randint(parts(), max(parts(), 20))
        killed = killed_once(lambda: parts() >= least, lambda: run(given, output, num_proc=2))  # noqa: B023
        if not killed:
            break
        assert not output.exists() and parts() >= least
    if not output.exists():
        run(given, output, num_proc=2)
    run(given, tmp_path / "whole")
    assert same(output, tmp_path / "whole")
    assert [path.name for path in tmp_path.glob(".*") if path.suffix != ".lock"] == []


@pytest.mark.long
def test_any_number_of_processes(given, tmp_path):
    run(given, tmp_path / "one")
    run(given, tmp_path / "two", num_proc=2)
    assert same(tmp_path / "one", tmp_path / "two")


def interrupted(given, output, monkeypatch, error=KeyboardInterrupt, **options):
    """Ends while the second file of tokens is saved; -> the first."""
    real, saved = prepare_text.save_part, []

    def save(file, part):
        if saved:
            raise error
        saved.append(file)
        real(file, part)

    with monkeypatch.context() as patch, pytest.raises(error) as raised:
        patch.setattr(prepare_text, "save_part", save)
        run(given, output, **options)
    if issubclass(error, (KeyboardInterrupt, OSError)):
        assert any("run the same again to continue from there" in note for note in raised.value.__notes__)
    return saved[0]


CHANGES = {
    "seed": lambda given, folder: given | {"seed": 1},
    "text": lambda given, folder: (folder / "text.txt").write_text("\n\n".join(english()[20:60])) and given,
    "tokenizer": lambda given, folder: save_tokenizer(folder / "tokenizer", "BERT cased") or given,
    "tokenize": lambda given, folder: given | {"tokenize": "exact"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_configuration_text_or_tokenizer_begins_anew(given, tmp_path, monkeypatch, what):
    """In one process, too: nothing in memory is of the tokenizer that was there before."""
    part = interrupted(given, tmp_path / "prepared", monkeypatch)
    assert part.exists()
    given = CHANGES[what](given, tmp_path)
    run(given, tmp_path / "prepared")
    assert not part.exists()
    run(given, tmp_path / "whole")
    assert same(tmp_path / "prepared", tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_finished_is_used(given, tmp_path, monkeypatch, error):
    part = interrupted(given, tmp_path / "prepared", monkeypatch, error)
    made, real = [], prepare_text.save_part
    monkeypatch.setattr(prepare_text, "save_part", lambda file, found: (made.append(file), real(file, found)))
    run(given, tmp_path / "prepared", tokenize="fast")  # which changes no byte
    assert made and part not in made
    run(given, tmp_path / "whole")
    assert same(tmp_path / "prepared", tmp_path / "whole")


def test_an_error_in_what_was_given_leaves_nothing(given, tmp_path, monkeypatch):
    before = set(os.listdir(tmp_path))
    interrupted(given, tmp_path / "prepared", monkeypatch, ValueError)
    assert set(os.listdir(tmp_path)) == before


def test_the_modes_make_one_folder(given, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for mode in ("auto", "fast", "exact"):
        run(given, tmp_path / mode, tokenize=mode)
    assert same(tmp_path / "auto", tmp_path / "exact") and same(tmp_path / "fast", tmp_path / "exact")
    assert "train split: tokenized 0.0 MB of texts, " in caplog.text and "by units known before" in caplog.text


def test_the_summary_and_the_bars(given, tmp_path, capsys):
    _, summary = prepare(PrepareConfig(**given, output=str(tmp_path / "out")), progress=True)
    size = f"{os.path.getsize(given['text'][0]) / 1e3:.1f}k"
    bars = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("reading", "tokenizing train"))]
    assert len(bars) == 2 and f"reading: 100% {size}/{size} [" in bars[0]
    assert all(line.endswith("B/s]") and "100%" in line for line in bars)
    shares = {name: split.tokenized.known_share for name, split in summary.items()}
    (line,) = [line for line in summary_table(summary).splitlines() if line.startswith("text of known units")]
    assert line.split()[-2:] == [f"{share:.2%}" for share in shares.values()] and 0 < shares["train"] < 1
    assert "tokenized" not in (tmp_path / "out" / "prepare.json").read_text()  # a run that resumes has another share
    _, exact = run(given, tmp_path / "exact", tokenize="exact")
    assert "text of known units" not in summary_table(exact)


@pytest.fixture
def wrong_rule(monkeypatch):
    """Texts are cut between all letters."""
    right = rules.cut_table
    monkeypatch.setattr(rules, "cut_table", lambda is_cut: right(lambda *classes: True))


def test_a_wrong_rule_begins_the_split_again(given, tmp_path, wrong_rule, caplog):
    run(given, tmp_path / "exact", tokenize="exact")
    assert not caplog.records
    run(given, tmp_path / "auto")
    said = [record.getMessage() for record in caplog.records]
    for split in ("train", "test"):
        why = f"{split} split: all sentences are tokenized one by one, since the tokenizer gives other tokens than"
        assert sum(line.startswith(why) and " for the text " in line for line in said) == 1
    assert same(tmp_path / "auto", tmp_path / "exact")
    with pytest.raises(ValueError, match=r"train split: the tokenizer gives other tokens .*; take auto or exact"):
        run(given, tmp_path / "fast", tokenize="fast")
    assert not list(tmp_path.glob("*fast*"))


def test_a_run_that_was_killed_while_it_began_again(given, tmp_path, wrong_rule, monkeypatch):
    """It goes on text by text, though the next run would not meet the text again that told."""
    run(given, tmp_path / "whole")
    part = interrupted(given, tmp_path / "prepared", monkeypatch)
    assert part.parent.name == "exact"
    run(given, tmp_path / "prepared")
    assert same(tmp_path / "prepared", tmp_path / "whole")
