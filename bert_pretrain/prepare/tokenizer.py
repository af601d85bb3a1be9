"""A tokenizer that BERT can use, trained or loaded; and the token ids that it makes of documents."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_pretrain.places import find_pretrained
from bert_pretrain.prepare.documents import Document
from bert_pretrain.prepare.tokens import TokenDocuments
from packing.files.errors import Option, OptionError
from packing.histogram import offsets_of
from packing.text.pretrained import load_pretrained

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
        raise OptionError(
            f"{Option('vocab_size', size)} has no room for {len(SPECIAL_TOKENS)} special tokens and {ends[sure - 1]} "
            f"pieces of the {sure} most frequent characters; give {least} or more"
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
    from transformers import PreTrainedTokenizerFast

    place = find_pretrained("tokenizer", str(name_or_path))
    try:
        tokenizer = load_pretrained(place)
    except (OSError, ValueError) as error:
        inside = Path(place) / "tokenizer"
        cure = f"did you mean {str(inside)!r}?" if inside.is_dir() else "give a folder with tokenizer.json"
        raise OptionError(f"{Option('tokenizer', str(name_or_path))} holds no tokenizer; {cure}") from error
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
    is_long = lengths > most
    starts = np.zeros(len(rows.ids), np.bool_)  # of sentences, and of the words of long ones
    starts[rows.offsets[:-1][lengths > 0]] = True
    if is_long.any():
        in_long = np.repeat(is_long, lengths)
        starts[in_long] |= _word_starts(encoder.tokenizer, sentences, np.flatnonzero(is_long), rows.ids[in_long])
        starts[in_long] = _cut_words(starts[in_long], most)
    counts = np.diff(offsets_of(starts)[rows.offsets])
    depths = np.array([len(document) for document in documents], np.int64)
    kept = np.add.reduceat(counts, offsets_of(depths)[:-1], dtype=np.int64) if len(depths) else depths
    return TokenDocuments(
        tokens=rows.ids,
        sentence_offsets=np.append(np.flatnonzero(starts), len(starts)),
        document_offsets=offsets_of(kept[kept > 0]),
        long_sentences=int(is_long.sum()),
        words=int(counts[is_long].sum()),
        unread_characters=_unread_characters(texts, encoder.tokenizer),
    )


def _word_starts(tokenizer: Tokenizer, sentences: list[str], numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(ids,) bool: which tokens of these sentences begin a word. The tokenizer reads them again only where ids do not
    tell, since that takes longer than all the rest."""
    is_start = _starting_ids(tokenizer)
    if is_start is not None:
        return is_start[ids]
    found = (_word_ids(tokenizer, sentences[number]) for number in numbers.tolist())
    return np.concatenate([_changes(words) for words in found])


@lru_cache(maxsize=1)
def _starting_ids(tokenizer: Tokenizer) -> np.ndarray | None:
    """(ids,) bool: which of them begin a word; None: a word may begin with any.

    BERT takes "#" for a word, so that no word begins with "##", and all tokens but the first of a word do.
    """
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer

    model, prefix = tokenizer.model, "##"
    if not isinstance(model, WordPiece) or model.continuing_subword_prefix != prefix:
        return None
    if not isinstance(tokenizer.pre_tokenizer, BertPreTokenizer):
        return None
    vocabulary = tokenizer.get_vocab()
    continuing = {id_ for token, id_ in vocabulary.items() if token.startswith(prefix)}
    others = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {model.unk_token}
    if any(token.startswith(prefix) for token in others):
        return None
    is_start = np.ones(max(vocabulary.values()) + 1, np.bool_)
    is_start[[*continuing]] = False
    return is_start


def _word_ids(tokenizer: Tokenizer, sentence: str) -> list[int | None]:
    return tokenizer.encode(sentence, add_special_tokens=False).word_ids


def _changes(words: list[int | None]) -> np.ndarray:
    """[0, 0, 1, 2, 2] -> [True, False, True, True, False]; None is a word of its own."""
    return np.array([word is None or word != before for word, before in zip(words, [None, *words], strict=False)])


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


def _cut_words(starts: np.ndarray, longest: int) -> np.ndarray:
    """Where words begin. Each token of a word that is too long is one, such as those of a clause of Chinese, which is
    one word to SentencePiece."""
    lengths = np.diff(np.flatnonzero(starts), append=len(starts))
    is_long = lengths > min(longest, max(WORD_TOKENS, longest // 8))
    return starts | np.repeat(is_long, lengths)
