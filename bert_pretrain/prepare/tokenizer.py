"""A tokenizer that BERT can use, trained or loaded; and the token ids that it makes of documents."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_pretrain.places import find_pretrained
from bert_pretrain.prepare.documents import Document
from bert_pretrain.prepare.tokens import TokenDocuments
from packing.histogram import offsets_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    from packing.text.encode import Encoder, Texts

logger = logging.getLogger(__name__)

# Their ids are their places: [PAD] is 0, as in BERT's own vocabularies.
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# Characters that get a token of their own, the most frequent first. Writing systems of many characters (Chinese) may
# fill half of the vocabulary with them, and more where words leave places free. Rarer ones become [UNK].
MAX_ALPHABET = 1000

# The most tokens of a word; or an eighth of the longest sentence, if that is more.
WORD_TOKENS = 16


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, lowercase: bool = True, characters: Counter[str] | None = None
) -> BertTokenizer:
    """Train a WordPiece vocabulary; the same texts give the same vocabulary, on any machine and thread count.

    texts: read twice, so a list or an object that can be iterated again, not a generator.
    vocab_size: at most this many tokens, special tokens included; less text gives fewer, which is logged.
    characters: how often each occurs in the texts, where that is known: then they are read once.

    WordPiece: Wu et al. 2016, https://arxiv.org/abs/1609.08144, as BERT uses it.
    """
    if characters is None and iter(texts) is texts:
        raise TypeError("texts is read twice and an iterator can be read once; pass a list, or an object with __iter__")
    from tokenizers import Tokenizer
    from tokenizers.trainers import WordPieceTrainer
    from transformers import BertTokenizer

    untrained = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    if characters is None:
        characters = Counter(chain.from_iterable(texts))
    pieces = _pieces(characters, untrained)
    places = vocab_size - len(SPECIAL_TOKENS)
    alphabet = _fitting(pieces, places, max(MAX_ALPHABET, vocab_size // 2))
    # The trainer numbers "##x" pieces in the order of a randomly seeded hash map, and breaks ties between merges by
    # number: each run gives another vocabulary (huggingface/tokenizers#1794). Pieces that it gets beforehand keep
    # their numbers.
    fixed = SPECIAL_TOKENS + [piece for character in sorted(alphabet) for piece in pieces[character][1:]]
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=fixed,
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
    )
    # A copy, because training makes "##x" special in the tokenizer that is trained; only its vocabulary is used.
    trained = Tokenizer.from_str(untrained.to_str())
    trained.train_from_iterator(texts, trainer)
    vocabulary = _filled(trained.get_vocab(), pieces, vocab_size)
    if len(vocabulary) < vocab_size:
        logger.warning("vocab_size=%d was asked for, and the text has %d tokens", vocab_size, len(vocabulary))
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase)


def _pieces(characters: Counter[str], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """{"e": ["e", "##e"], "的": ["的"], …}: what each character takes, the most frequent first.

    Punctuation and CJK characters are always words of their own, so nothing continues with them.
    """
    split, normalize = tokenizer.pre_tokenizer.pre_tokenize_str, tokenizer.normalizer.normalize_str
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        for normalized in normalize(character):
            if not normalized.isspace():
                counts[normalized] += count
    if not counts:
        raise ValueError("no text to train a tokenizer on")
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return {
        character: [character, f"##{character}"] if len(split(normalize(f"a{character}"))) == 1 else [character]
        for character in ranked
    }


def _fitting(pieces: dict[str, list[str]], places: int, most: int) -> list[str]:
    """The first `most` characters; behind MAX_ALPHABET only those that there are places for."""
    ends = list(accumulate(len(of_character) for of_character in pieces.values()))
    sure = min(len(ends), MAX_ALPHABET)
    if ends[sure - 1] > places:
        size, least = (count + len(SPECIAL_TOKENS) for count in (places, ends[sure - 1]))
        raise ValueError(
            f"vocab_size={size} has no room for {len(SPECIAL_TOKENS)} special tokens and {ends[sure - 1]} pieces of "
            f"the {sure} most frequent characters; give {least} or more"
        )
    return list(pieces)[: min(most, bisect_right(ends, places))]


def _filled(vocabulary: dict[str, int], pieces: dict[str, list[str]], size: int) -> dict[str, int]:
    """The vocabulary, with the next characters in the places that are left."""
    for of_character in pieces.values():
        if of_character[0] not in vocabulary and len(vocabulary) + len(of_character) <= size:
            for piece in of_character:
                vocabulary.setdefault(piece, len(vocabulary))
    return vocabulary


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the hub, without the truncation and padding that its file may ask for.

    Raises ValueError if there is none, if it is slow, or if it lacks a special token of BERT's sequences or masks.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = find_pretrained("tokenizer", str(name_or_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        inside = Path(place) / "tokenizer"
        cure = f"did you mean {str(inside)!r}?" if inside.is_dir() else "give a folder with tokenizer.json"
        raise ValueError(f"tokenizer={str(name_or_path)!r} holds no tokenizer; {cure}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{name_or_path!r} is a slow tokenizer; a fast one (with tokenizer.json) is needed")
    roles = ("cls_token", "sep_token", "mask_token", "pad_token")
    missing = [role for role in roles if getattr(tokenizer, role) is None]
    if missing:
        raise ValueError(f"tokenizer {name_or_path!r} has no {', '.join(missing)}; add_special_tokens() and save it")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """ "vocabulary:9f2c…", the same for tokenizers with the same tokens and ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return f"vocabulary:{hashlib.sha256(vocabulary.encode()).hexdigest()[:16]}"


def tokenize_sentences(documents: list[Document], encoder: Encoder, longest: int | None = None) -> TokenDocuments:
    """Token ids of every sentence, without special tokens. Raises DifferentTokens as `encoder` does.

    Sentences of which the tokenizer leaves nothing (control characters) are left out, and documents of nothing else.

    longest: a sentence of more tokens is stored word by word: sequences may begin and end between its words, and
        truncation cuts nothing off. Text without sentence ends, such as a transcript, is such a sentence.
    """
    from packing.text.encode import Texts  # compiled code, which help must not wait for

    sentences = list(chain.from_iterable(documents))
    texts = Texts.of_strings(sentences)
    rows = encoder.encode([texts], special_tokens=False)
    lengths = np.diff(rows.offsets)
    most = len(rows.ids) if longest is None else longest
    long = np.flatnonzero(lengths > most)
    words = [_word_lengths(_word_ids(encoder.tokenizer, sentences[i]), most) for i in long.tolist()]
    counts = (lengths > 0).astype(np.int64)  # pieces of each sentence
    counts[long] = [len(of_sentence) for of_sentence in words]
    pieces = np.repeat(lengths, counts)
    pieces[np.repeat(np.isin(np.arange(len(lengths)), long), counts)] = list(chain.from_iterable(words))
    depths = np.array([len(document) for document in documents], np.int64)
    kept = np.add.reduceat(counts, offsets_of(depths)[:-1], dtype=np.int64) if len(depths) else depths
    return TokenDocuments(
        tokens=rows.ids,
        sentence_offsets=offsets_of(pieces),
        document_offsets=offsets_of(kept[kept > 0]),
        long_sentences=len(long),
        words=int(counts[long].sum()),
        unread_characters=_unread_characters(texts, encoder.tokenizer),
    )


def _word_ids(tokenizer: Tokenizer, sentence: str) -> list[int | None]:
    return tokenizer.encode(sentence, add_special_tokens=False).word_ids


def _unread_characters(sentences: Texts, bare: Tokenizer) -> int:
    """Characters in words that are too long for WordPiece, so that each is one [UNK]: text without spaces, as in Thai.

    0 for tokenizers of another kind.
    """
    most = getattr(bare.model, "max_input_chars_per_word", None)
    spaces = np.flatnonzero(sentences.data == ord(" "))
    if most is None or np.diff(spaces, prepend=-1, append=len(sentences.data)).max() <= most:  # nearly always
        return 0
    found = re.findall(rf"\S{{{most + 1},}}", "\n".join(sentences.strings()))
    normalized = (run if bare.normalizer is None else bare.normalizer.normalize_str(run) for run in found)
    split = None if bare.pre_tokenizer is None else bare.pre_tokenizer.pre_tokenize_str
    words = (word for run in normalized for word, _ in ([(run, None)] if split is None else split(run)))
    return sum(len(word) for word in words if len(word) > most)


def _word_lengths(words: list[int | None], longest: int) -> list[int]:
    """Tokens of each word: [0, 0, 1, 2, 2] -> [2, 1, 2].

    A word that is too long counts token by token, such as a clause of Chinese, which is one word to SentencePiece.
    """
    lengths, limit = [], min(longest, max(WORD_TOKENS, longest // 8))
    for word, run in groupby(words):
        length = len(list(run))
        lengths += [length] if word is not None and length <= limit else [1] * length
    return lengths
