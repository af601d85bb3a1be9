"""Text -> sequences to pretrain on, split in training and test, and the tokenizer, in one folder.

    OUTPUT/
        train/ test/ dataset_dict.json     `datasets.load_from_disk(OUTPUT)` reads them as one DatasetDict
        tokenizer/                         `AutoTokenizer.from_pretrained(OUTPUT/tokenizer)`
        prepare.json                       the configuration, and the numbers of each split

The text is read three times (to count documents, to train the vocabulary, to tokenize); what stays in memory is 4 bytes
a token, not the text. Sequences lie in the order of the documents: packing or training shuffles them.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from bert_pretrain.documents import DOCUMENTS, SENTENCES, Document, TokenDocuments, offsets_of, read_documents
from bert_pretrain.examples import IS_RANDOM, OBJECTIVES, BuiltSequence
from bert_pretrain.tokenizer import load_tokenizer, tokenize_documents, train_tokenizer
from packing.folder import new_folder

if TYPE_CHECKING:
    import datasets

# Sequences gathered before they become Arrow buffers.
SEQUENCES_PER_BATCH = 10_000


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which text becomes which sequences."""

    text: list[str] = field(
        metadata={
            "help": ".txt files, folders of them, or folders written by datasets' save_to_disk with a `text` column."
        }
    )
    output: str = field(metadata={"help": "The folder to write; it must not exist yet."})
    documents: Literal["paragraph", "file"] = field(
        default="paragraph",
        metadata={
            "help": "What next-sentence prediction may not cross: `paragraph` (a blank line parts documents, BERT's "
            "own format) or `file`. Longer documents give longer sequences and so less to gain by packing."
        },
    )
    sentences: Literal["split", "lines"] = field(
        default="split",
        metadata={
            "help": "`split` joins the lines of a paragraph and finds its sentences; `lines` takes each line for one."
        },
    )
    language: str = field(
        default="en", metadata={"help": "ISO 639 code of the text, for the abbreviations that end no sentence."}
    )
    objective: Literal["nsp", "none"] = field(
        default="nsp",
        metadata={
            "help": "`nsp` builds BERT's sentence pairs with a label, `none` runs of full sentences, without loss."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or hub name of a fast tokenizer; without one, a WordPiece is trained."}
    )
    vocab_size: int = field(
        default=8192,
        metadata={
            "help": "Tokens of a trained tokenizer. 8192 suits up to some 100 MB of text, where the rarer pieces of a "
            "larger vocabulary would hardly be seen; BERT had 30522 for 16 GB."
        },
    )
    lowercase: bool = field(default=True, metadata={"help": "Lowercase and strip accents in a trained tokenizer."})
    max_sequence_length: int = field(
        default=512, metadata={"help": "Tokens in the longest sequence, special tokens included."}
    )
    short_sequence_probability: float = field(
        default=0.1, metadata={"help": "Share of the documents whose sequences aim at a shorter, random length."}
    )
    test_fraction: float = field(
        default=0.05, metadata={"help": "Share of the documents that become the test split; 0 makes none."}
    )
    seed: int = field(default=0, metadata={"help": "Draws the test documents and the sequences."})

    def __post_init__(self) -> None:
        if isinstance(self.text, str):
            raise TypeError(f"text={self.text!r} must be a list of files and folders: [{self.text!r}]")
        # Checked again where they are used; here, so that a wrong one does not cost the minutes until then.
        for name, choices in (("documents", DOCUMENTS), ("sentences", SENTENCES), ("objective", tuple(OBJECTIVES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {list(choices)}")
        if self.max_sequence_length < 8:
            raise ValueError(f"max_sequence_length={self.max_sequence_length} must be at least 8")
        if not 0 <= self.short_sequence_probability <= 1:
            raise ValueError(f"short_sequence_probability={self.short_sequence_probability} must lie in 0..1")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction={self.test_fraction} must be at least 0 (no test split) and less than 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


@dataclass(frozen=True)
class SplitSummary:
    """The numbers of one split."""

    documents: int
    sentences: int
    sequences: int
    tokens: int
    """Tokens of all sequences, special tokens included."""
    tokens_dropped: int
    """Tokens of the text that are in no sequence, because a pair was too long."""
    unknown_tokens: int
    """Tokens of the documents that are [UNK]: words or characters that the vocabulary does not have."""
    random_pairs: int | None
    """Pairs labelled 1, the next sentence is random; None where sequences aren't pairs."""
    max_sequence_length: int
    """Token slots that a padded row would have."""

    @property
    def random_share(self) -> float | None:
        """Share of the pairs that are labelled random, in 0..1."""
        return None if self.random_pairs is None else self.random_pairs / self.sequences

    @property
    def nsp_baseline(self) -> float | None:
        """Accuracy of always giving the commoner label: what a next-sentence accuracy must beat, in 0..1."""
        return None if self.random_share is None else max(self.random_share, 1 - self.random_share)

    @property
    def padding_share(self) -> float:
        """Share of the token slots that are padding when every sequence has a row of its own, in 0..1."""
        return 1 - self.tokens / (self.sequences * self.max_sequence_length)

    @property
    def packing_factor_bound(self) -> float:
        """Sequences per pack if packs had no empty slot: packing cannot shorten an epoch by more."""
        return self.sequences * self.max_sequence_length / self.tokens


class Prepared(NamedTuple):
    """What `prepare` made: the splits, and the numbers of each."""

    dataset: "datasets.DatasetDict"
    summary: dict[str, SplitSummary]


def prepare(config: PrepareConfig) -> Prepared:
    """Build the sequences and write them, with tokenizer and numbers, to `config.output`.

    The folder appears when it is complete: whatever fails on the way leaves nothing behind. An existing one is refused.
    """
    from datasets import DatasetDict, load_from_disk

    with new_folder(config.output) as folder:
        text = _Text(config)
        num_documents = sum(1 for _ in tqdm(text.documents(), desc="reading", unit=" documents"))
        splits = split_documents(num_documents, config.test_fraction, config.seed)
        _check_splits(splits, config)

        if config.tokenizer is None:
            tokenizer = train_tokenizer(_Sentences(text, splits["train"]), config.vocab_size, config.lowercase)
        else:
            tokenizer = load_tokenizer(config.tokenizer)

        dataset, summary = {}, {}
        for split, members in splits.items():
            chosen = tqdm(text.documents(members), desc=f"tokenizing {split}", unit=" documents", total=members.sum())
            tokenized = tokenize_documents(chosen, tokenizer)
            dataset[split], summary[split] = build_split(tokenized, tokenizer, config, split)

        DatasetDict(dataset).save_to_disk(folder)
        tokenizer.save_pretrained(folder / "tokenizer")
        record = {"config": asdict(config), "splits": {split: _as_json(numbers) for split, numbers in summary.items()}}
        (folder / "prepare.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Prepared(load_from_disk(config.output), summary)


def split_documents(num_documents: int, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Which documents are in which split: {"train": (num_documents,) bool, "test": ...}; no test split for 0.

    By document, so that no test sequence has its neighbours in the training split. The same count and seed give the
    same split.
    """
    num_test = math.ceil(test_fraction * num_documents)
    if num_test >= num_documents:
        raise ValueError(
            f"test_fraction={test_fraction} of {num_documents} documents leaves none to train on; give more text, or "
            "test_fraction=0 for no test split"
        )
    test = np.zeros(num_documents, bool)
    test[np.random.default_rng(seed).permutation(num_documents)[:num_test]] = True
    return {"train": ~test, "test": test} if num_test else {"train": ~test}


def _check_splits(splits: dict[str, np.ndarray], config: PrepareConfig) -> None:
    """Before a vocabulary is trained: a random next sentence comes from another document of the same split."""
    for split, members in splits.items():
        if config.objective == "nsp" and members.sum() < 2:
            raise ValueError(
                f"objective='nsp' needs two documents in each split, {split} has {members.sum()} of {len(members)}; "
                f"give more text, test_fraction=0 for no test split (now {config.test_fraction}), or objective='none'"
            )


def build_split(documents: TokenDocuments, tokenizer, config: PrepareConfig, split: str):
    """The sequences of one split as a `datasets.Dataset`, and their SplitSummary."""
    try:
        sequences = OBJECTIVES[config.objective](
            documents,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            max_sequence_length=config.max_sequence_length,
            short_sequence_probability=config.short_sequence_probability,
            seed=config.seed,
        )
    except ValueError as error:
        hint = "; test_fraction=0 makes no test split" if split == "test" else ""
        raise ValueError(f"{split} split: {error}{hint}") from None
    # One iterator for all batches: each iter() of a tqdm is a loop of its own, and closing one loses sequences.
    sequences = iter(tqdm(sequences, desc=f"building {split}", unit=" sequences"))

    batches, dropped, random_pairs = [], 0, 0
    while chunk := list(islice(sequences, SEQUENCES_PER_BATCH)):
        batches.append(_record_batch(chunk))
        dropped += sum(sequence.tokens_dropped for sequence in chunk)
        random_pairs += sum(sequence.next_sentence_label == IS_RANDOM for sequence in chunk)
    if not batches:
        raise ValueError(f"{split} split: the tokenizer left no token of {len(documents)} documents")
    dataset = _dataset(pa.Table.from_batches(batches))
    return dataset, SplitSummary(
        documents=len(documents),
        sentences=documents.num_sentences,
        sequences=len(dataset),
        tokens=sum(len(batch["input_ids"].flatten()) for batch in batches),
        tokens_dropped=dropped,
        unknown_tokens=int(np.count_nonzero(documents.tokens == tokenizer.unk_token_id)),
        random_pairs=random_pairs if "next_sentence_label" in dataset.column_names else None,
        max_sequence_length=config.max_sequence_length,
    )


def summary_table(summary: dict[str, SplitSummary]) -> str:
    """The numbers of each split, a column each, as text.

                                   train          test
    documents                     24,213         1,275
    sequences                     36,239         1,895
    random next                    70.2%         71.0%
    packing factor at most          2.36          2.33
    ...
    """
    rows = [
        ("documents", "{:,}", lambda split: split.documents),
        ("sentences", "{:,}", lambda split: split.sentences),
        ("sequences", "{:,}", lambda split: split.sequences),
        ("tokens", "{:,}", lambda split: split.tokens),
        ("tokens dropped", "{:,}", lambda split: split.tokens_dropped),
        ("unknown tokens", "{:.2%}", lambda split: split.unknown_tokens / split.tokens),
        ("random next", "{:.1%}", lambda split: split.random_share),
        ("mean length", "{:.1f}", lambda split: split.tokens / split.sequences),
        ("padding, unpacked", "{:.1%}", lambda split: split.padding_share),
        ("packing factor at most", "{:.2f}", lambda split: split.packing_factor_bound),
    ]
    lines = [" " * 22 + "".join(f"{name:>14}" for name in summary)]
    for name, form, number in rows:
        numbers = ["-" if number(split) is None else form.format(number(split)) for split in summary.values()]
        lines.append(f"{name:<22}" + "".join(f"{text:>14}" for text in numbers))
    return "\n".join(lines)


def _as_json(summary: SplitSummary) -> dict[str, int | float | None]:
    derived = ("random_share", "nsp_baseline", "padding_share", "packing_factor_bound")
    return asdict(summary) | {name: getattr(summary, name) for name in derived}


def _record_batch(sequences: list[BuiltSequence]) -> pa.RecordBatch:
    """One list array per token column, made of whole buffers: no Python object per token."""
    offsets = pa.array(offsets_of([len(sequence.input_ids) for sequence in sequences]).astype(np.int32))

    def lists(column: Callable[[BuiltSequence], np.ndarray]) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([column(sequence) for sequence in sequences])))

    columns = {
        "input_ids": lists(lambda sequence: sequence.input_ids),
        "token_type_ids": lists(lambda sequence: sequence.token_type_ids),
    }
    if sequences[0].next_sentence_label is not None:
        columns["next_sentence_label"] = pa.array([sequence.next_sentence_label for sequence in sequences], pa.int64())
    return pa.RecordBatch.from_pydict(columns)


def _dataset(table: pa.Table) -> "datasets.Dataset":
    from datasets import Dataset, Features
    from datasets.table import InMemoryTable

    features = Features.from_arrow_schema(table.schema)
    return Dataset(InMemoryTable(table.replace_schema_metadata(features.arrow_schema.metadata)))


class _Text:
    """The documents of a configuration, as often as they are asked for."""

    def __init__(self, config: PrepareConfig):
        self.config = config

    def documents(self, members: np.ndarray | None = None) -> Iterator[Document]:
        """All of them, or those of which `members` is True."""
        config = self.config
        found = read_documents(config.text, config.documents, config.sentences, config.language)
        if members is None:
            return found
        # strict: text that grew or shrank since it was counted must not move documents between splits.
        return (document for document, member in zip(found, members, strict=True) if member)


@dataclass(frozen=True, eq=False)
class _Sentences:
    """The sentences of some documents; can be iterated twice, as a tokenizer's training needs."""

    text: _Text
    members: np.ndarray

    def __iter__(self) -> Iterator[str]:
        documents = self.text.documents(self.members)
        for document in tqdm(documents, desc="training the tokenizer", unit=" documents", total=self.members.sum()):
            yield from document
