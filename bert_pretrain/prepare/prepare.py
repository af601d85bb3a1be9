"""Text -> sequences to pretrain on, split in training and test, and the tokenizer, in one folder.

    OUTPUT/
        train/ test/ dataset_dict.json     `datasets.load_from_disk(OUTPUT)` reads them as one DatasetDict
        tokenizer/                         `AutoTokenizer.from_pretrained(OUTPUT/tokenizer)`
        prepare.json                       the configuration, and the numbers of each split

The text is read up to four times: to count documents, to count characters, to train the vocabulary, to tokenize. Each
process holds some megabytes of it in memory. Sequences have the order of the documents; packing and training shuffle.
"""

import json
import logging
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bert_pretrain.objective import OBJECTIVES
from bert_pretrain.prepare.build import BuildOptions, build_sequences
from bert_pretrain.prepare.documents import SENTENCES, DocumentOptions
from bert_pretrain.prepare.sequences import check_draws, longest_sentence
from bert_pretrain.prepare.summary import SplitSummary
from bert_pretrain.prepare.text import Text
from bert_pretrain.prepare.tokenizer import load_tokenizer, train_tokenizer, vocabulary_fingerprint
from packing.files.cache import key_of
from packing.files.errors import Option, OptionError, check_known, marked, suggestion, whole_number
from packing.files.folder import check_target, resumed_folder
from packing.files.hashed import sync
from packing.files.processes import Workers
from packing.source.formats import endings
from packing.source.text_files import DOCUMENTS
from packing.text.tokenizer import MODES, describe

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PARTS = ".parts"  # what an unfinished folder has beside what it will hold


LANGUAGE = re.compile("[a-z]{2,3}(-[A-Za-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which text becomes which sequences."""

    text: list[str] = field(
        metadata={
            "help": f"Files {endings()}; folders or globs of them; folders of save_to_disk; names of the hub; URLs. Of "
            "rows, one column is the text: see text_column. Splits stay splits."
        }
    )
    output: str = field(metadata={"help": "The folder to write; it must not exist yet."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "The column of texts, where --text holds rows; each row counts as a file. Left out: `text`, or the "
            "only column of strings."
        },
    )
    documents: Literal["paragraph", "line", "file"] = field(
        default="paragraph",
        metadata={
            "help": "What next-sentence prediction may not cross: `paragraph` (a blank line parts documents, BERT's "
            "own format), `line` (each line is a document) or `file` (each file or row is). Longer documents give "
            "longer sequences, and packing gains less."
        },
    )
    sentences: Literal["split", "lines"] = field(
        default="split",
        metadata={
            "help": "`split` joins the lines of a paragraph and finds its sentences; `lines`: each line is a sentence."
        },
    )
    language: str = field(
        default="en",
        metadata={"help": "ISO 639 code of the text (en, de, zh), for the abbreviations that end no sentence."},
    )
    objective: str = field(
        default="nsp",
        metadata={"help": "What to build: " + "; ".join(f"`{name}`, {row.made}" for name, row in OBJECTIVES.items())},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or hub name of a fast tokenizer; without one, a WordPiece is trained."}
    )
    tokenize: str = field(
        default="auto",
        metadata={
            "help": "How, with the same tokens: `auto`, each distinct word once where the tokenizer allows it; `fast`, "
            "an error where it does not; `exact`, sentence by sentence."
        },
    )
    vocab_size: int = field(
        default=8192,
        metadata={
            "help": "Tokens of a trained tokenizer. 8192 suits up to some 100 MB of text, which hardly shows the rarer "
            "pieces of a larger vocabulary; BERT had 30522 for 16 GB."
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
    num_proc: int = field(
        default=1,
        metadata={"help": "Processes that read, tokenize and build; any number of them makes the same folder."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.text, str):
            raise TypeError(f"text={self.text!r} must be a list of files and folders: [{self.text!r}]")
        choices_of = {"documents": DOCUMENTS, "sentences": SENTENCES, "objective": tuple(OBJECTIVES), "tokenize": MODES}
        for name, choices in choices_of.items():
            check_known(name, getattr(self, name), choices)
        if not LANGUAGE.fullmatch(self.language):  # the splitter takes others for English
            mended = self.language.lower().replace("_", "-")
            meant = suggestion(self.language, [mended] if LANGUAGE.fullmatch(mended) else [])
            what = "must be an ISO 639 code, two or three small letters, as en, de or zh"
            raise OptionError(f"{Option('language', self.language)} {what}{meant}")
        whole_number("max_sequence_length", self.max_sequence_length, 8)
        whole_number("num_proc", self.num_proc)
        check_draws(self.short_sequence_probability, self.seed)
        if not 0 <= self.test_fraction < 1:
            raise OptionError(
                f"{Option('test_fraction', self.test_fraction)} must be at least 0 (no test split) and less than 1"
            )


class Prepared(NamedTuple):
    """What `prepare` made: the splits, and the numbers of each."""

    dataset: "datasets.DatasetDict"
    summary: dict[str, SplitSummary]


def prepare(config: PrepareConfig, progress: bool = False) -> Prepared:
    """Build the sequences and write them, with tokenizer and numbers, to `config.output`.

    progress: show bars on stderr.

    The folder appears when it is complete. An existing folder is refused. A run that is killed, is interrupted or meets
    an error of the system leaves what it has finished in .OUTPUT.unfinished, where the same configuration resumes; any
    other error leaves nothing. Any `num_proc`, and any number of interruptions, make the same bytes.
    """
    from datasets import load_from_disk

    check_target(config.output)
    given = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    with Workers(config.num_proc) as workers:
        options = DocumentOptions(config.documents, config.sentences, config.language)
        text = Text(config.text, config.text_column, options, workers, progress)
        with resumed_folder(config.output, _key(config, text, given)) as folder:
            splits = _splits(text, config)
            parts = folder / PARTS
            parts.mkdir(exist_ok=True)
            tokenizer = given or _trained(text, splits, config, folder / "tokenizer")
            summary = {
                split: _prepare_split(split, members, text, tokenizer, config, folder / split, parts)
                for split, members in splits.items()
            }
            if given is not None:
                given.save_pretrained(folder / "tokenizer")
            (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}), encoding="utf-8")
            record = {
                "config": _recorded(config),
                "splits": {split: found.as_json() for split, found in summary.items()},
            }
            (folder / "prepare.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(parts)
    return Prepared(load_from_disk(config.output), summary)


def _recorded(config: PrepareConfig) -> dict[str, Any]:
    """The configuration, but for what changes no byte."""
    recorded = asdict(config)
    del recorded["num_proc"], recorded["tokenize"]
    if config.text_column is None:
        del recorded["text_column"]
    return recorded


def _key(config: PrepareConfig, text: Text, tokenizer: "PreTrainedTokenizerFast | None") -> str:
    """What an interrupted run must share with one that resumes it: configuration, sources, tokenizer, and versions."""
    described = None if tokenizer is None else describe(tokenizer)
    versions = [version(name) for name in ("dataset-packing", "tokenizers", "transformers", "sentencex")]
    return key_of(_recorded(config), config.tokenize == "exact", text.stamps(), described, versions)


def _trained(
    text: Text, splits: dict[str, np.ndarray], config: PrepareConfig, folder: Path
) -> "PreTrainedTokenizerFast":
    """A tokenizer that is trained on the training split, or that an interrupted run has trained and saved here."""
    if not folder.exists():
        train = splits["train"]
        trained = train_tokenizer(text.sentences(train), config.vocab_size, config.lowercase, text.characters(train))
        with TemporaryDirectory(dir=folder.parent / PARTS) as temporary:
            trained.save_pretrained(Path(temporary) / "saved")
            for file in (Path(temporary) / "saved").iterdir():
                sync(file)
            (Path(temporary) / "saved").rename(folder)
    return load_tokenizer(str(folder))


def _prepare_split(
    split: str,
    members: np.ndarray,
    text: Text,
    tokenizer: "PreTrainedTokenizerFast",
    config: PrepareConfig,
    output: Path,
    parts: Path,
) -> SplitSummary:
    """Documents -> token ids, in a folder of `parts` -> sequences, in `output`."""
    description = describe(tokenizer)
    tokenizer_file, tokens = parts / f"tokenizer-{key_of(description)}.json", parts / f"{split}-tokens"
    tokenizer_file.write_text(description, encoding="utf-8")
    longest = longest_sentence(config.objective, config.max_sequence_length)
    documents, amount = text.tokenize(members, tokenizer_file, config.tokenize, tokens, split, longest)
    if not len(documents):
        raise ValueError(
            f"{split} split: the tokenizer left no token of {members.sum()} documents; give one of this language"
        )
    options = BuildOptions(
        objective=config.objective,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        max_sequence_length=config.max_sequence_length,
        short_sequence_probability=config.short_sequence_probability,
        seed=config.seed,
    )
    vocabulary = vocabulary_fingerprint(tokenizer)
    try:
        counts = build_sequences(
            tokens / "all", options, vocabulary, parts / split, output, split, text.workers, text.progress
        )
    except ValueError as error:
        hint = f"; {Option('test_fraction', 0)} makes no test split" if split == "test" else ""
        raise OptionError(f"{split} split: {marked(error)}{hint}") from None
    summary = SplitSummary(
        objective=config.objective,
        documents=len(documents),
        sentences=documents.num_sentences,
        long_sentences=documents.long_sentences,
        source_tokens=documents.num_tokens,
        unread_characters=documents.unread_characters,
        unknown_tokens=int(np.count_nonzero(documents.tokens == tokenizer.unk_token_id)),
        max_sequence_length=config.max_sequence_length,
        tokenized=amount,
        **counts._asdict(),
    )
    vocabulary_cure = ""
    if config.tokenizer is None:
        vocabulary_cure = ", or a larger vocab_size" if len(tokenizer) == config.vocab_size else ", or more text"
    for warning in summary.warnings(vocabulary_cure):
        logger.warning("%s split: %s", split, warning)
    return summary


def _splits(text: Text, config: PrepareConfig) -> dict[str, np.ndarray]:
    """Which documents are in which split: the splits that the sources have, or else drawn by test_fraction."""
    num_documents, splits = text.num_documents, text.own_splits
    if not splits:
        _check_documents(num_documents, config)
        return split_documents(num_documents, config.test_fraction, config.seed)
    least = OBJECTIVES[config.objective].documents
    for split, members in splits.items():
        if members.sum() < least:
            raise OptionError(
                f"{Option('objective', config.objective)} needs {least} documents in each split, {split} has "
                f"{members.sum()}; give text of more documents, or leave the split out"
            )
    if "train" not in splits and config.tokenizer is None:
        raise OptionError(
            f"the text has the splits {', '.join(splits)}, and no split train that a vocabulary could be trained on; "
            f"give a tokenizer: {Option('tokenizer', 'FOLDER_OR_NAME')}"
        )
    logger.warning("the text has the splits %s: test_fraction is not used", ", ".join(splits))
    return splits


def split_documents(num_documents: int, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Which documents are in which split: {"train": (num_documents,) bool, "test": ...}; no test split for 0.

    By document, so that no test sequence has neighbours in the training split. The same count and seed give the same.
    """
    num_test = math.ceil(test_fraction * num_documents)
    if num_test >= num_documents:
        raise OptionError(
            f"{Option('test_fraction', test_fraction)} of {num_documents} documents leaves none to train on; give more "
            f"text, or {Option('test_fraction', 0)} for no test split"
        )
    test = np.zeros(num_documents, bool)
    test[np.random.default_rng(seed).permutation(num_documents)[:num_test]] = True
    return {"train": ~test, "test": test} if num_test else {"train": ~test}


A_DOCUMENT_IS = {"paragraph": "what blank lines part", "line": "each line", "file": "each file"}
"""By the option `documents`."""


def _check_documents(num_documents: int, config: PrepareConfig) -> None:
    """Refuse too few documents, before a vocabulary is trained: a random next sentence comes from another document."""
    num_test = math.ceil(config.test_fraction * num_documents)
    least = OBJECTIVES[config.objective].documents
    why = f"{Option('objective', config.objective)} needs {least} documents in each split"
    why = why if least > 1 else "each split needs a document"
    for split, count in (("train", num_documents - num_test), ("test", num_test)):
        if count >= least or (split == "test" and not num_test):
            continue
        cures = ["give text of more documents"]
        if num_test and num_documents >= least:
            cures.append(f"{Option('test_fraction', 0)} for no test split (now {config.test_fraction})")
        if least > 1 and (num_documents > 1 or not num_test):
            cures.append(f"{Option('objective', 'none')}")
        others = [name for name in DOCUMENTS if name != config.documents]
        choices = " or ".join(f"{Option('documents', name)} ({A_DOCUMENT_IS[name]})" for name in others)
        raise OptionError(
            f"{why}, {split} has {count} of {num_documents}: {Option('documents', config.documents)} takes "
            f"{A_DOCUMENT_IS[config.documents]} for one; choose {choices}, or {', or '.join(cures)}"
        )
