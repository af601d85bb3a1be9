"""Documents -> sequences to pretrain on: sentence pairs (BERT's own), or runs of full sentences.

What a document gives depends on (seed, pass_number, its number) and on the document set, never on the order of work:
documents may be built in parallel, in any order, and give the same sequences.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from bert_pretrain.documents import TokenDocuments

# The labels that transformers' BertForPreTraining defines.
IS_NEXT = 0
IS_RANDOM = 1

# Which column holds the labels of an objective's sentence pairs, and what transformers calls it.
PAIR_LABELS = {"nsp": "next_sentence_label", "sop": "sentence_order_label"}

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
    next_sentence_label: IS_NEXT, IS_RANDOM, or None where sequences aren't pairs.
    tokens_dropped: tokens of the sequence's own document that truncation cut off and that no other sequence has.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    next_sentence_label: int | None
    tokens_dropped: int


def nsp_pairs(
    documents: TokenDocuments,
    *,
    cls_token_id: int,
    sep_token_id: int,
    max_sequence_length: int,
    short_sequence_probability: float = 0.1,
    seed: int = 0,
    pass_number: int = 0,
) -> Iterator[BuiltSequence]:
    """Sentence pairs for next-sentence prediction, as the original BERT builds them.

    1. The target is max_sequence_length - 3 tokens; for one document in ten, any length from 2 to that.
    2. A chunk is the fewest next sentences of the document that reach the target, or all that are left.
    3. A is a random number of the chunk's first sentences, at least one, and not all if there are several.
    4. B is the rest of the chunk; or, half of the time, and always if the chunk has one sentence, sentences from a
       random place in a random other document, again the fewest that reach the target.
    5. With a random B, the rest of the chunk wasn't used: the next chunk begins with it.
    6. A pair that is too long loses tokens of its longer side, each from the front or the back at random.

        document: s1 s2 s3 s4 s5   chunk s1 s2 s3, A = s1, random B = t7 t8  ->  [CLS] s1 [SEP] t7 t8 [SEP]   label 1
                                   chunk s2 s3 s4, A = s2 s3, B = s4         ->  [CLS] s2 s3 [SEP] s4 [SEP]   label 0
                                   chunk s5,       A = s5, random B = u1     ->  [CLS] s5 [SEP] u1 [SEP]      label 1

    Because of 4 and 5, well over half of the labels are IS_RANDOM where documents are short.

    pass_number: another number gives other pairs of the same documents (BERT made ten passes, its "dupe_factor").

    Devlin et al. 2019, https://arxiv.org/abs/1810.04805, appendix A.2, and google-research/bert's
    create_pretraining_data.py, of which this is an independent implementation. Two differences in form, none in
    distribution: the cut of 6 is drawn at once, as a binomial, and the other document without rejection.
    """
    _check(max_sequence_length, PAIR_SPECIALS, short_sequence_probability, seed, pass_number)
    if len(documents) < 2:
        raise ValueError(
            f"next-sentence pairs take random sentences from another document and there are {len(documents)} "
            f"documents; add text, let blank lines part documents (documents='paragraph'), or choose objective='none'"
        )
    room = max_sequence_length - PAIR_SPECIALS

    def sequences() -> Iterator[BuiltSequence]:
        for document in range(len(documents)):
            draw = document_draws(seed, pass_number, document)
            target = draw_target(room, short_sequence_probability, draw)
            yield from pairs_of_document(documents, document, target, room, cls_token_id, sep_token_id, draw)

    return sequences()


def pairs_of_document(
    documents: TokenDocuments,
    document: int,
    target: int,
    room: int,
    cls_token_id: int,
    sep_token_id: int,
    draw: np.random.Generator,
) -> Iterator[BuiltSequence]:
    """The pairs of one document; steps 2 to 6 of `nsp_pairs`. `draw` needs random(), integers() and binomial()."""
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
        b_length = int(offsets[b_end] - offsets[b_start])

        a_kept = min(a_length, max(room - b_length, (room + 1) // 2))
        b_kept = min(b_length, room - a_kept)
        a = _cut(documents.tokens[offsets[start] : offsets[a_end]], a_kept, draw)
        b = _cut(documents.tokens[offsets[b_start] : offsets[b_end]], b_kept, draw)
        yield BuiltSequence(
            input_ids=np.concatenate([[cls_token_id], a, [sep_token_id], b, [sep_token_id]]).astype(np.int32),
            token_type_ids=np.repeat(np.array([0, 1], np.int8), [a_kept + 2, b_kept + 1]),
            next_sentence_label=IS_RANDOM if is_random else IS_NEXT,
            # A random B is no loss: its document shows all of its tokens itself.
            tokens_dropped=a_length - a_kept + (0 if is_random else b_length - b_kept),
        )
        start = a_end if is_random else end


def _random_place(documents: TokenDocuments, document: int, draw: np.random.Generator) -> tuple[int, int]:
    """A random sentence of a random other document, and the end of that document."""
    other = int(draw.integers(0, len(documents) - 1))
    other += other >= document
    first, last = (int(sentence) for sentence in documents.document_offsets[other : other + 2])
    return int(draw.integers(first, last)), last


def _reach(sentence_offsets: np.ndarray, start: int, last: int, target: int) -> int:
    """The end of the fewest sentences from `start`, at least one, that hold `target` tokens; or `last`."""
    end = int(np.searchsorted(sentence_offsets, sentence_offsets[start] + target))
    return min(max(end, start + 1), last)


def _cut(tokens: np.ndarray, kept: int, draw: np.random.Generator) -> np.ndarray:
    """`kept` of the tokens: each one lost came off the front or the back with equal probability."""
    lost = len(tokens) - kept
    front = int(draw.binomial(lost, 0.5)) if lost else 0
    return tokens[front : front + kept]


def single_sequences(
    documents: TokenDocuments,
    *,
    cls_token_id: int,
    sep_token_id: int,
    max_sequence_length: int,
    short_sequence_probability: float = 0.1,
    seed: int = 0,
    pass_number: int = 0,
) -> Iterator[BuiltSequence]:
    """Runs of full sentences of one document, with no pairs and no labels; no token is lost.

    A sequence takes the next sentences until it has reached the target of its document (drawn as for `nsp_pairs`) or
    until one more would not fit. A sentence longer than a whole sequence is cut into consecutive pieces.

        room for 5 tokens: [a a a] [b b] [c c c c c c c]  ->  [CLS] a a a b b [SEP]
                                                              [CLS] c c c c c [SEP]
                                                              [CLS] c c [SEP]

    RoBERTa's DOC-SENTENCES, Liu et al. 2019, https://arxiv.org/abs/1907.11692, section 4.2.
    """
    _check(max_sequence_length, SINGLE_SPECIALS, short_sequence_probability, seed, pass_number)
    room = max_sequence_length - SINGLE_SPECIALS

    def sequences() -> Iterator[BuiltSequence]:
        for document in range(len(documents)):
            target = draw_target(room, short_sequence_probability, document_draws(seed, pass_number, document))
            for start, end in _runs(documents, document, target, room):
                input_ids = np.concatenate([[cls_token_id], documents.tokens[start:end], [sep_token_id]])
                yield BuiltSequence(input_ids.astype(np.int32), np.zeros(len(input_ids), np.int8), None, 0)

    return sequences()


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


# A name or any callable with the same arguments.
SequenceBuilder = Callable[..., Iterator[BuiltSequence]]

OBJECTIVES: dict[str, SequenceBuilder] = {"nsp": nsp_pairs, "none": single_sequences}


def document_draws(seed: int, pass_number: int, document: int) -> np.random.Generator:
    """The random draws of one document: a stream of its own."""
    return np.random.default_rng([seed, pass_number, document])


def draw_target(room: int, short_sequence_probability: float, draw: np.random.Generator) -> int:
    """Tokens that a document's sequences aim at: `room`, or now and then any length from 2 to `room`.

    Short ones are there so that the model also meets sequences as short as those it will be used on.
    """
    if draw.random() < short_sequence_probability:
        return int(draw.integers(SHORTEST_TARGET, room + 1))
    return room


def _check(
    max_sequence_length: int, specials: int, short_sequence_probability: float, seed: int, pass_number: int
) -> None:
    if max_sequence_length < specials + SHORTEST_TARGET:
        raise ValueError(
            f"max_sequence_length={max_sequence_length} must be at least {specials + SHORTEST_TARGET}: "
            f"{specials} special tokens and {SHORTEST_TARGET} of text"
        )
    if not 0 <= short_sequence_probability <= 1:
        raise ValueError(f"short_sequence_probability={short_sequence_probability} must lie in 0..1")
    if seed < 0 or pass_number < 0:
        raise ValueError(f"seed={seed} and pass_number={pass_number} must not be negative")
