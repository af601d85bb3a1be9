"""A column of texts becomes tokens: in tasks, of which none is done twice, whatever ends a run."""

import random

import datasets
import numpy as np
import pyarrow as pa
import pytest
from killed_commands import killed_once
from killed_steps import contents, identities, killed_at, steps
from tokenizer_families import FOREIGN, english, family, hostile_texts
from tokenizers import Tokenizer

from packing import cli
from packing.source import text as source_text
from packing.source.text import tokenize
from packing.text import rules
from packing.text.tokenizer import describe, text_tokenizer

datasets.disable_progress_bars()
TEXTS = [text[:400] for text in english()[:40]] + FOREIGN + hostile_texts(40) + ["", "one"]


def tokenizer_of(name="BERT"):
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"mask_token": "[MASK]", "model_input_names": ["input_ids", "token_type_ids"]}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(family(name)), **special)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch, tmp_path):
    monkeypatch.setattr(source_text, "TASK_BYTES", 4000)
    monkeypatch.setattr(source_text, "BATCH_BYTES", 1000)
    monkeypatch.setattr(source_text, "BATCH_ROWS", 7)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def source(tmp_path):
    rows = {"text": TEXTS, "reply": TEXTS[::-1], "label": list(range(len(TEXTS)))}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    return datasets.load_from_disk(tmp_path / "saved")


def expected_rows(dataset, columns, keep_text=False):
    tokenizer = text_tokenizer(describe(tokenizer_of()))
    rows = dataset.to_list()
    texts = [row["text"] if len(columns) == 1 else (row["text"], row["reply"]) for row in rows]
    for row, found in zip(rows, tokenizer.encode_batch(texts), strict=True):
        row.update(input_ids=found.ids, token_type_ids=found.type_ids)
        for name in () if keep_text else columns:
            del row[name]
    return rows


def shuffled(dataset):
    return dataset.shuffle(seed=3).select(range(5, 70))


def large(dataset):
    return dataset.cast_column("text", datasets.Value("large_string"))


def beside_nulls(dataset):
    """A row without a text, which is not chosen."""
    null = datasets.Dataset.from_dict({"text": [None], "reply": [""], "label": [0]}, features=dataset.features)
    return datasets.concatenate_datasets([dataset, null]).select(range(len(dataset)))


@pytest.mark.parametrize("change", [None, shuffled, large, beside_nulls])
@pytest.mark.parametrize("columns", [("text",), ("text", "reply")], ids=["texts", "pairs"])
def test_the_tokens_of_the_tokenizer(source, tmp_path, change, columns):
    dataset = source if change is None else change(source)
    for mode in ("exact", "fast", "auto"):
        found = tokenize(dataset, tokenizer_of(), columns, keep_text=mode == "fast", cache=tmp_path / mode, mode=mode)
        assert found.to_list() == expected_rows(dataset, columns, keep_text=mode == "fast")
        (key,) = (tmp_path / mode).iterdir()
        assert sum(path.suffix == ".arrow" for path in key.iterdir()) > 2
        lengths = [len(batch) for batch in found.data.to_batches()]
        assert max(lengths) <= 7 and np.mean(lengths) > 1.5
    assert found.features["input_ids"] == datasets.List(datasets.Value("int32"))


def test_other_columns_are_in_memory_for_some_rows_only(source, tmp_path, monkeypatch):
    """Texts of a byte beside columns of megabytes."""
    monkeypatch.setattr(source_text, "TASK_BYTES", 1 << 25)
    monkeypatch.setattr(source_text, "BATCH_BYTES", 1 << 22)
    rows = datasets.Dataset.from_dict({"text": ["a"] * 100, "image": list(range(100))}).shuffle(seed=0)
    asked, real = [], datasets.Dataset.__getitem__

    def note(dataset, rows):
        if isinstance(rows, slice) and "image" in dataset.column_names:
            asked.append(rows.stop - rows.start)
        return real(dataset, rows)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", note)
    tokenize(rows, tokenizer_of(), ["text"], cache=tmp_path)
    assert max(asked) == 7 and sum(asked) == 100


@pytest.mark.long
def test_any_number_of_processes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(source_text, "BATCH_BYTES", 1 << 22)  # as in the processes that are started
    monkeypatch.setattr(source_text, "BATCH_ROWS", 1000)
    for num_proc in (1, 2):
        tokenize(source, tokenizer_of(), ["text"], num_proc=num_proc, cache=tmp_path / str(num_proc))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_the_summary_and_the_bar(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: False)
    said = []
    tokenize(source, tokenizer_of(), ["text"], cache=tmp_path / "a", say=said.append)
    size = sum(len(text.encode()) for text in TEXTS)
    (line,) = said
    assert line.startswith(f"tokenized {size / 1e6:.1f} MB of texts, ") and line.endswith(
        "% of it by units known before"
    )
    assert f"tokenizing: 100% {size / 1e3:.1f}k/{size / 1e3:.1f}k [" in capsys.readouterr().err
    tokenize(source, tokenizer_of(), ["text"], cache=tmp_path / "b", mode="exact", say=said.append)
    assert said[1].endswith("MB of texts one by one: as --tokenize exact asks")
    tokenize(source, tokenizer_of(), ["text"], cache=tmp_path / "b", mode="exact", say=said.append)
    assert len(said) == 2  # kept


# Killed


def pack_command(tmp_path, target, *options):
    tokenizer_of().save_pretrained(tmp_path / "tokenizer")
    given = ["--text-column", "text", "--tokenizer", str(tmp_path / "tokenizer"), "--max-sequence-length", "512"]
    return [str(tmp_path / "saved"), str(tmp_path / target), *given, *options]


def kill_and_resume(tmp_path, monkeypatch, seed, kills):
    """Runs that die at a random step each, until one ends: packs as if nothing had happened, no file made twice."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "whole cache")
    with steps() as taken:
        assert cli.main(pack_command(tmp_path, "whole")) == 0
    draw, cache = random.Random(seed), tmp_path / f"cache {seed}"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    command, made = pack_command(tmp_path, f"packed {seed}"), {}
    for _ in range(kills):
        killed = killed_at(draw.randint(1, taken()), lambda: cli.main(command))
        found = identities(cache, "0*.arrow")
        assert made.items() <= found.items()  # finished files stay
        made = found
        if not killed:
            break
    if not (tmp_path / f"packed {seed}").exists():
        assert cli.main(command) == 0
    assert made.items() <= identities(cache, "0*.arrow").items()
    assert contents(tmp_path / f"packed {seed}") == contents(tmp_path / "whole")
    assert contents(cache) == contents(tmp_path / "whole cache")  # and nothing beside
    return len(made)


def test_killed_at_random_steps(source, tmp_path, monkeypatch):
    assert kill_and_resume(tmp_path, monkeypatch, 0, kills=2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 9))
def test_killed_at_many_random_steps(source, tmp_path, monkeypatch, seed):
    kill_and_resume(tmp_path, monkeypatch, seed, kills=6)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_two_processes_that_are_killed(source, tmp_path, monkeypatch, seed):
    """The command dies once it has some of the files; then its processes end, and the same command goes on."""
    monkeypatch.setattr(source_text, "BATCH_BYTES", 1 << 22)  # as in the processes that it starts
    monkeypatch.setattr(source_text, "BATCH_ROWS", 1000)
    monkeypatch.setattr(source_text, "TASK_BYTES", 1000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "whole cache")
    assert cli.main(pack_command(tmp_path, "whole")) == 0
    count = len(identities(tmp_path / "whole cache", "0*.arrow"))
    assert count > 5
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache := tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    draw, command, made = random.Random(seed), pack_command(tmp_path, "packed", "--num-proc", "2"), {}
    for _ in range(2):
        least = draw.randint(min(len(made), count - 1), count - 1)
        killed = killed_once(lambda: len(identities(cache, "0*.arrow")) >= least, lambda: cli.main(command))  # noqa: B023
        found = identities(cache, "0*.arrow")
        assert made.items() <= found.items() and len(found) >= least
        made = found
        if not killed:
            break
    if not (tmp_path / "packed").exists():
        assert cli.main(command) == 0
    assert made.items() <= identities(cache, "0*.arrow").items()
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
    assert contents(cache) == contents(tmp_path / "whole cache")


def unfinished(cache):
    (folder,) = cache.glob(".*.unfinished")
    return folder


def test_what_another_source_or_tokenizer_has_left_is_not_used(source, tmp_path):
    """A run dies in its third task; runs of other texts, and with another tokenizer, begin anew."""
    cache = tmp_path / "kept"
    calls = 0

    def die(work, tasks):
        nonlocal calls
        for calls, task in enumerate(tasks):
            if calls == 2:
                raise KeyboardInterrupt
            yield work.write(task)

    with pytest.raises(KeyboardInterrupt):
        tokenize(source, tokenizer_of(), ["text"], cache=cache, run=die)
    before = contents(unfinished(cache))
    assert sorted(before) == ["000000.arrow", "000001.arrow"]
    changed = source.map(lambda row: {"text": row["text"] + "!"}, load_from_cache_file=False)
    assert tokenize(changed, tokenizer_of(), ["text"], cache=cache).to_list() == expected_rows(changed, ["text"])
    cased = tokenizer_of("BERT cased")
    found = tokenize(source, cased, ["text"], cache=cache)["input_ids"][:]
    assert found == [each.ids for each in text_tokenizer(describe(cased)).encode_batch(TEXTS)]
    assert tokenize(source, tokenizer_of(), ["text"], cache=cache, mode="exact").to_list()
    assert contents(unfinished(cache)) == before
    assert tokenize(source, tokenizer_of(), ["text"], cache=cache).to_list() == expected_rows(source, ["text"])
    assert len(list(cache.iterdir())) == 4 and not list(cache.glob(".*"))


# A rule that is wrong


@pytest.fixture
def wrong_rule(monkeypatch):
    """Texts are cut between all letters."""
    right = rules.cut_table
    monkeypatch.setattr(rules, "cut_table", lambda is_cut: right(lambda *classes: True))


@pytest.fixture
def late(tmp_path):
    """Texts of which the last ones show that the rule is wrong: numbers are cut rightly, in the first tasks."""
    texts = [". , ; " * 40] * 60 + ["we must hold"] * 20
    datasets.Dataset.from_dict({"text": texts, "label": list(range(80))}).save_to_disk(tmp_path / "saved")
    return datasets.load_from_disk(tmp_path / "saved")


def test_a_wrong_rule_begins_again_text_by_text(late, wrong_rule, tmp_path):
    said = []
    found = tokenize(late, tokenizer_of(), ["text"], cache=tmp_path / "kept", say=said.append)
    assert found.to_list() == expected_rows(late, ["text"])
    why = "the tokenizer gives other tokens than its units for the text 'we must hold'"
    assert said == [f"all texts are tokenized one by one, since {why}"]
    (folder,) = (tmp_path / "kept").iterdir()
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {"different", "exact", "seal.json"}
    with pytest.raises(ValueError, match=f"{why}; take auto or exact"):
        tokenize(late, tokenizer_of(), ["text"], cache=tmp_path / "fast", mode="fast")
    assert "exact-" not in str(contents(tmp_path / "fast").keys())
    assert tokenize(late, tokenizer_of(), ["text"], cache=tmp_path / "fast").to_list() == found.to_list()


def test_a_run_that_was_killed_while_it_began_again(late, wrong_rule, tmp_path):
    tokenize(late, tokenizer_of(), ["text"], cache=tmp_path / "whole")
    with steps() as taken:
        tokenize(late, tokenizer_of(), ["text"], cache=tmp_path / "counted")
    for number in np.linspace(2, taken() - 1, 6).astype(int).tolist():
        cache = tmp_path / str(number)
        assert killed_at(number, lambda cache=cache: tokenize(late, tokenizer_of(), ["text"], cache=cache))
        tokenize(late, tokenizer_of(), ["text"], cache=cache)
        assert contents(cache) == contents(tmp_path / "whole")


def test_tokenize_fast_of_the_command_names_the_cure(late, wrong_rule, tmp_path, capsys):
    assert cli.main(pack_command(tmp_path, "packed", "--tokenize", "fast")) == 2
    assert "for the text 'we must hold'; take auto or exact" in capsys.readouterr().err
    assert cli.main(pack_command(tmp_path, "packed")) == 0
    assert "one by one, since the tokenizer gives other tokens" in capsys.readouterr().err


def test_the_command_has_one_pack_for_all_modes(source, tmp_path):
    for mode in ("exact", "fast", "auto"):
        assert cli.main(pack_command(tmp_path, mode, "--tokenize", mode)) == 0
    assert contents(tmp_path / "exact") == contents(tmp_path / "fast") == contents(tmp_path / "auto")


def test_texts_in_several_chunks(tmp_path):
    chunks = pa.chunked_array([["we", "must"], [], ["hold"], ["the line"]], pa.string())
    dataset = datasets.Dataset(pa.table({"text": chunks, "label": [1, 2, 3, 4]}))
    assert tokenize(dataset, tokenizer_of(), ["text"], cache=tmp_path).to_list() == expected_rows(dataset, ["text"])
