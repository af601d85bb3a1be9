"""A tokenizer that BERT can use, trained or loaded, and documents put through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from bert_pretrain.documents import Document, TokenDocuments, offsets_of

if TYPE_CHECKING:
    from transformers import BertTokenizerFast, PreTrainedTokenizerFast

# Their ids are their places: [PAD] is 0, as in BERT's own vocabularies.
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# Characters that get a token of their own, the most frequent first; rarer ones become [UNK]. Writing systems of many
# characters (Chinese) may fill half of the vocabulary with them.
MAX_ALPHABET = 1000

# Documents tokenized at a time: enough to keep every core busy, few enough to hold as Python lists.
DOCUMENTS_PER_BATCH = 1000


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192, lowercase: bool = True) -> BertTokenizerFast:
    """Train a WordPiece vocabulary; the same texts give the same vocabulary, on any machine and thread count.

    texts: read twice, so a list or an object that can be iterated again, not a generator.
    vocab_size: at most this many tokens, special tokens included; less text gives fewer.

    WordPiece: Wu et al. 2016, https://arxiv.org/abs/1609.08144, as BERT uses it.
    """
    if iter(texts) is texts:
        raise TypeError("texts is read twice and an iterator can be read once; pass a list, or an object with __iter__")
    from tokenizers import Tokenizer
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertTokenizerFast

    untrained = BertTokenizerFast(do_lower_case=lowercase).backend_tokenizer
    alphabet, continuations = _alphabet(texts, untrained, max(MAX_ALPHABET, vocab_size // 2))
    # The trainer numbers "##x" pieces in the order of a randomly seeded hash map and breaks ties between merges by
    # number, so that by itself it gives another vocabulary on each run (huggingface/tokenizers#1794). Pieces that it
    # is told of beforehand keep the numbers they are given.
    fixed = SPECIAL_TOKENS + continuations
    smallest = len(fixed) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} has no room for {smallest} special tokens and single characters")
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    # A copy, because training makes "##x" special in the tokenizer that is trained; only its vocabulary is used.
    trained = Tokenizer.from_str(untrained.to_str())
    trained.train_from_iterator(texts, trainer)
    return BertTokenizerFast(vocab=trained.get_vocab(), do_lower_case=lowercase)


def _alphabet(texts: Iterable[str], tokenizer, most: int) -> tuple[list[str], list[str]]:
    """The characters that get a token, and "##x" for those that can continue a word, both sorted."""
    raw = Counter()
    for text in texts:
        raw.update(text)
    counts = Counter()
    for character, count in raw.items():
        for normalized in tokenizer.normalizer.normalize_str(character):
            if not normalized.isspace():
                counts[normalized] += count
    if not counts:
        raise ValueError("no text to train a tokenizer on")
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:most])
    # Punctuation and CJK characters are always words of their own.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    normalize = tokenizer.normalizer.normalize_str
    return alphabet, [f"##{character}" for character in alphabet if len(split(normalize(f"a{character}"))) == 1]


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the hub, without the truncation and padding that its file may have baked in.

    Raises ValueError if it is slow or lacks one of the special tokens that BERT's sequences and masks are made of.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except OSError as error:
        raise ValueError(
            f"no tokenizer at {name_or_path!r}; give a folder with tokenizer.json, or a hub name"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{name_or_path!r} is a slow tokenizer; a fast one (with tokenizer.json) is needed")
    roles = ("cls_token", "sep_token", "mask_token", "pad_token")
    missing = [role for role in roles if getattr(tokenizer, role) is None]
    if missing:
        raise ValueError(f"tokenizer {name_or_path!r} has no {', '.join(missing)}; add_special_tokens() and save it")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tokenize_documents(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> TokenDocuments:
    """Token ids of every sentence, without special tokens.

    Text that looks like a special token is text: a page about BERT that says "[MASK]" must not become a mask.
    Sentences of which the tokenizer leaves nothing (control characters) are left out, as are documents of nothing else.
    """
    from tokenizers import Tokenizer

    # A copy: the caller's tokenizer keeps its own settings.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    tokens, sentence_lengths, document_lengths = [], [], []
    for batch in _batches(documents, DOCUMENTS_PER_BATCH):
        sentences = [sentence for document in batch for sentence in document]
        ids = [encoding.ids for encoding in backend.encode_batch_fast(sentences, add_special_tokens=False)]
        tokens.append(np.fromiter((token for sentence in ids for token in sentence), np.int32))
        lengths = np.array([len(sentence) for sentence in ids], np.int64)
        sentence_lengths.append(lengths[lengths > 0])
        kept = np.add.reduceat(lengths > 0, offsets_of([len(document) for document in batch])[:-1], dtype=np.int64)
        document_lengths.append(kept[kept > 0])
    if not tokens:
        return TokenDocuments.from_lists([])
    return TokenDocuments(
        tokens=np.concatenate(tokens),
        sentence_offsets=offsets_of(np.concatenate(sentence_lengths)),
        document_offsets=offsets_of(np.concatenate(document_lengths)),
    )


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of `size` documents, the last one shorter."""
    documents = iter(documents)
    while batch := list(islice(documents, size)):
        yield batch
