"""Documents -> sequences to pretrain on: sentence pairs (BERT's own, or ALBERT's), or runs of full sentences.

What a document gives depends on (seed, its number) and on the document set, never on the order of work: documents may
be built in parallel, in any order, and give the same sequences.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bert_pretrain.objective import NO_PAIR, OBJECTIVES
from bert_pretrain.prepare.tokens import TokenDocuments
from packing.files.errors import Option, OptionError, whole_number

# The labels that transformers' BertForPreTraining and AlbertForPreTraining define.
IS_NEXT, IS_RANDOM = 0, 1
IN_ORDER, SWITCHED = 0, 1

# Special tokens around a pair ([CLS] A [SEP] B [SEP]) and around a single sequence ([CLS] A [SEP]).
PAIR_SPECIALS = 3
SINGLE_SPECIALS = 2

# A target that is drawn short is at least this long.
SHORTEST_TARGET = 2


class BuiltSequence(NamedTuple):
    """One tokenized example.

        input_ids        [CLS] a a a [SEP] b b [SEP]
        token_type_ids     0   0 0 0   0   1 1   1

    input_ids: int32; token_type_ids: int8, both (length,).
    label: 0 or 1, see `nsp_pairs` and `sop_pairs`; NO_PAIR; or None where sequences aren't pairs.
    tokens_dropped: tokens of the sequence's own document that truncation cut off and that no other sequence has.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    label: int | None
    tokens_dropped: int


def sequences_of(
    objective: str,
    documents: TokenDocuments,
    *,
    cls_token_id: int,
    sep_token_id: int,
    max_sequence_length: int,
    short_sequence_probability: float = 0.1,
    seed: int = 0,
    numbers: Iterable[int] | None = None,
) -> Iterator[BuiltSequence]:
    """The sequences of documents, by the builder that the objective's row names.

    The target of a document's sequences is all the room that special tokens leave. In one document of ten
    (short_sequence_probability) it is any length from 2 to that.

    numbers: the documents to build, in this order; None: all of them. Random sentences come from all in any case.

    Raises ValueError, before the first sequence, for options or documents that the builder cannot use.
    """
    specials = special_tokens(objective)
    if max_sequence_length < specials + SHORTEST_TARGET:
        raise OptionError(
            f"{Option('max_sequence_length', max_sequence_length)} must be at least {specials + SHORTEST_TARGET}: "
            f"{specials} special tokens and {SHORTEST_TARGET} of text"
        )
    check_draws(short_sequence_probability, seed)
    least = OBJECTIVES[objective].documents
    if least > 1 and len(documents) < least:
        first, *more = [name for name, row in OBJECTIVES.items() if row.documents < least]
        others = " or ".join([f"{Option('objective', first)}", *map(repr, more)])
        raise OptionError(
            f"{Option('objective', objective)} needs {least} documents, and there are {len(documents)} documents; add "
            f"text, let blank lines part documents ({Option('documents', 'paragraph')}), or choose "
            f"{others}"
        )
    build, room = builder_of(objective), max_sequence_length - specials

    def sequences() -> Iterator[BuiltSequence]:
        for document in range(len(documents)) if numbers is None else numbers:
            draw = document_draws(seed, document)
            target = draw_target(room, short_sequence_probability, draw)
            yield from build(documents, document, target, room, cls_token_id, sep_token_id, draw)

    return sequences()


def check_draws(short_sequence_probability: float, seed: int) -> None:
    """Raise ValueError for what no sequences can be drawn with."""
    if not 0 <= short_sequence_probability <= 1:
        raise OptionError(f"{Option('short_sequence_probability', short_sequence_probability)} must lie in 0..1")
    whole_number("seed", seed, 0)


def nsp_pairs(
    documents: TokenDocuments, document: int, target: int, room: int, cls: int, sep: int, draw: np.random.Generator
) -> Iterator[BuiltSequence]:
    """Sentence pairs of one document for next-sentence prediction, as the original BERT builds them.

    1. A chunk is the fewest next sentences of the document that reach the target, or all that are left.
    2. A is a random number of the chunk's first sentences, at least one, and not all if there are several.
    3. B is the rest of the chunk. But half of the time, and always if the chunk has one sentence, B comes from a random
       place in a random other document: again the fewest sentences that reach the target.
    4. With a random B, the rest of the chunk is not used yet: the next chunk starts with it.
    5. A pair that is too long loses tokens of its longer side, each from the front or the back at random.

        document: s1 s2 s3 s4 s5   chunk s1 s2 s3, A = s1, random B = t7 t8  ->  [CLS] s1 [SEP] t7 t8 [SEP]   label 1
                                   chunk s2 s3 s4, A = s2 s3, B = s4         ->  [CLS] s2 s3 [SEP] s4 [SEP]   label 0
                                   chunk s5,       A = s5, random B = u1     ->  [CLS] s5 [SEP] u1 [SEP]      label 1

    Because of 3 and 4, well over half of the labels are IS_RANDOM where documents are short.

    Devlin et al. 2019, https://arxiv.org/abs/1810.04805, appendix A.2, and google-research/bert's
    create_pretraining_data.py, of which this is an independent implementation. The cut of 5 is drawn at once, as a
    binomial, and the other document without rejection: the distributions are the same. BERT passes over the text ten
    times ("dupe_factor") to get other masks; here each epoch draws them.
    """
    offsets = documents.sentence_offsets
    start, last = (int(sentence) for sentence in documents.document_offsets[document : document + 2])
    while start < last:
        end = _reach(offsets, start, last, target)
        a_end = start + 1 if end - start == 1 else int(draw.integers(start + 1, end))
        a_length = int(offsets[a_end] - offsets[start])
        is_random = end - start == 1 or draw.random() < 0.5
        if is_random:
            b_start, b_last = _random_place(documents, document, draw)
            b_end = _reach(offsets, b_start, b_last, target - a_length)
        else:
            b_start, b_end = a_end, end
        whole_a = documents.tokens[offsets[start] : offsets[a_end]]
        whole_b = documents.tokens[offsets[b_start] : offsets[b_end]]
        a, b = _fit(whole_a, whole_b, room, draw)
        # A random B is no loss: its document shows all of its tokens itself.
        dropped = len(whole_a) - len(a) + (0 if is_random else len(whole_b) - len(b))
        yield _pair(a, b, cls, sep, IS_RANDOM if is_random else IS_NEXT, dropped)
        start = a_end if is_random else end


def _random_place(documents: TokenDocuments, document: int, draw: np.random.Generator) -> tuple[int, int]:
    """A random sentence of a random other document, and the end of that document."""
    other = int(draw.integers(0, len(documents) - 1))
    other += other >= document
    first, last = (int(sentence) for sentence in documents.document_offsets[other : other + 2])
    return int(draw.integers(first, last)), last


def sop_pairs(
    documents: TokenDocuments, document: int, target: int, room: int, cls: int, sep: int, draw: np.random.Generator
) -> Iterator[BuiltSequence]:
    """Pairs of consecutive segments of one document, half of them switched, for sentence-order prediction.

    1. A chunk is the fewest next sentences, two at least, that reach the target, or all that are left.
    2. It is parted in two segments between two of its sentences, each place being as likely.
    3. Half of the time the second segment is A and the first B: label 1, SWITCHED.
    4. A pair that is too long loses tokens of its longer side, as in `nsp_pairs`.

        document: s1 s2 s3 s4 s5   chunk s1 s2 s3, parted s1 | s2 s3, switched  ->  [CLS] s2 s3 [SEP] s1 [SEP]  label 1
                                   chunk s4 s5,    parted s4 | s5               ->  [CLS] s4 [SEP] s5 [SEP]     label 0

    A last sentence that is left alone makes a sequence without B: [CLS] s [SEP], label -100. It counts for MLM and not
    for SOP. (ALBERT's own code gives it a random B, and labels that as switched.)

    ALBERT, Lan et al. 2020, https://arxiv.org/abs/1909.11942, section 3.1.
    """
    offsets = documents.sentence_offsets
    start, last = (int(sentence) for sentence in documents.document_offsets[document : document + 2])
    while last - start > 1:
        end = max(_reach(offsets, start, last, target), start + 2)
        middle = int(draw.integers(start + 1, end))
        is_switched = draw.random() < 0.5
        a = documents.tokens[offsets[start] : offsets[middle]]
        b = documents.tokens[offsets[middle] : offsets[end]]
        # First switch, then cut: the cut treats A and B a little differently, which must not tell the order.
        a, b = _fit(b, a, room, draw) if is_switched else _fit(a, b, room, draw)
        dropped = int(offsets[end] - offsets[start]) - len(a) - len(b)
        yield _pair(a, b, cls, sep, SWITCHED if is_switched else IN_ORDER, dropped)
        start = end
    if start < last:
        whole = documents.tokens[offsets[start] : offsets[last]]
        kept = _cut(whole, min(len(whole), room + PAIR_SPECIALS - SINGLE_SPECIALS), draw)
        yield _single(kept, cls, sep, NO_PAIR, len(whole) - len(kept))


def single_sequences(
    documents: TokenDocuments, document: int, target: int, room: int, cls: int, sep: int, draw: np.random.Generator
) -> Iterator[BuiltSequence]:
    """Runs of full sentences of one document, without pairs or labels; no token is lost.

    A sequence takes the next sentences until it reaches the target, or until one more does not fit. A sentence longer
    than a whole sequence is cut into consecutive pieces.

        room for 5 tokens: [a a a] [b b] [c c c c c c c]  ->  [CLS] a a a b b [SEP]
                                                              [CLS] c c c c c [SEP]
                                                              [CLS] c c [SEP]

    RoBERTa's DOC-SENTENCES, Liu et al. 2019, https://arxiv.org/abs/1907.11692, section 4.2.
    """
    for start, end in _runs(documents, document, target, room):
        yield _single(documents.tokens[start:end], cls, sep, None, 0)


def _runs(documents: TokenDocuments, document: int, target: int, room: int) -> Iterator[tuple[int, int]]:
    """Where each sequence of a document begins and ends among the tokens."""
    first, last = documents.document_offsets[document : document + 2]
    start = end = int(documents.sentence_offsets[first])
    for sentence_end in documents.sentence_offsets[first + 1 : last + 1].tolist():
        # Either the run so far is closed here, or the sentence fits behind it.
        if end > start and (end - start >= target or sentence_end - start > room):
            yield start, end
            start = end
        while sentence_end - start > room:
            yield start, start + room
            start += room
        end = sentence_end
    yield start, end


def builder_of(objective: str) -> Callable[..., Iterator[BuiltSequence]]:
    """The function of this file that the objective's row names; all take the arguments of `nsp_pairs`."""
    return globals()[OBJECTIVES[objective].builder]


def special_tokens(objective: str) -> int:
    """How many stand in a sequence: [CLS] A [SEP] B [SEP] has three, [CLS] A [SEP] two."""
    return SINGLE_SPECIALS if OBJECTIVES[objective].column is None else PAIR_SPECIALS


def longest_sentence(objective: str, max_sequence_length: int) -> int:
    """The most tokens of a sentence from which truncation cuts nothing: half of the room if it is for pairs."""
    room = max_sequence_length - special_tokens(objective)
    return room if OBJECTIVES[objective].column is None else room // 2


def document_draws(seed: int, document: int) -> np.random.Generator:
    """The random draws of one document: a stream of its own."""
    # The 0 parts these streams from those that other code might key by two numbers; it also is what it always was.
    return np.random.default_rng([seed, 0, document])


def draw_target(room: int, short_sequence_probability: float, draw: np.random.Generator) -> int:
    """Tokens that a document's sequences aim at: `room`, or now and then any length from 2 to `room`.

    Short ones are there so that the model also meets sequences as short as those it will be used on.
    """
    if draw.random() < short_sequence_probability:
        return int(draw.integers(SHORTEST_TARGET, room + 1))
    return room


def _reach(sentence_offsets: np.ndarray, start: int, last: int, target: int) -> int:
    """The end of the fewest sentences from `start`, at least one, that hold `target` tokens; or `last`."""
    end = int(sentence_offsets.searchsorted(sentence_offsets[start] + target))
    return min(max(end, start + 1), last)


def _fit(a: np.ndarray, b: np.ndarray, room: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As many tokens of both as there is room for: the longer side loses one after the other."""
    a_kept = min(len(a), max(room - len(b), (room + 1) // 2))
    b_kept = min(len(b), room - a_kept)
    return _cut(a, a_kept, draw), _cut(b, b_kept, draw)


def _cut(tokens: np.ndarray, kept: int, draw: np.random.Generator) -> np.ndarray:
    """`kept` of the tokens: each one lost came off the front or the back with equal probability."""
    lost = len(tokens) - kept
    front = int(draw.binomial(lost, 0.5)) if lost else 0
    return tokens[front : front + kept]


def _pair(a: np.ndarray, b: np.ndarray, cls: int, sep: int, label: int, dropped: int) -> BuiltSequence:
    """[CLS] a [SEP] b [SEP]"""
    length, middle = len(a) + len(b) + PAIR_SPECIALS, len(a) + 1
    input_ids, token_type_ids = np.empty(length, np.int32), np.zeros(length, np.int8)
    input_ids[0], input_ids[middle], input_ids[-1] = cls, sep, sep
    input_ids[1:middle], input_ids[middle + 1 : -1] = a, b
    token_type_ids[middle + 1 :] = 1
    return BuiltSequence(input_ids, token_type_ids, label, dropped)


def _single(a: np.ndarray, cls: int, sep: int, label: int | None, dropped: int) -> BuiltSequence:
    """[CLS] a [SEP]"""
    input_ids = np.empty(len(a) + SINGLE_SPECIALS, np.int32)
    input_ids[0], input_ids[1:-1], input_ids[-1] = cls, a, sep
    return BuiltSequence(input_ids, np.zeros(len(input_ids), np.int8), label, dropped)
