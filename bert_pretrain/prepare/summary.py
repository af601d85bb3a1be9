"""The numbers of a prepared split."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from bert_pretrain.objective import OBJECTIVES
from packing.text.outcome import Amount

UNKNOWN_SHARE, DROPPED_SHARE = 0.001, 0.05
"""Shares of a split's tokens above which a warning is due."""


@dataclass(frozen=True)
class SplitSummary:
    """The numbers of one split."""

    objective: str
    documents: int
    sentences: int
    sequences: int
    tokens: int
    """Tokens of all sequences, special tokens included."""
    tokens_dropped: int
    """Tokens of the text that are in no sequence, because a pair was too long."""
    unknown_tokens: int
    """Tokens of the documents that are [UNK]: words or characters that the vocabulary does not have."""
    pairs: int
    """Sequences with a label: all of them for nsp, those of two segments for sop, 0 for none."""
    ones: int
    """Pairs labelled 1: B is random (nsp), A and B are switched (sop)."""
    max_sequence_length: int
    """Token slots that a padded row would have."""
    long_sentences: int = 0
    """Sentences of more tokens than a sequence has room for: sequences may begin and end between their words."""
    source_tokens: int = 0
    """Tokens of the text itself."""
    unread_characters: int = 0
    """Characters of words that are too long for the tokenizer, each of which is one unknown token."""
    tokenized: Amount = field(default=Amount(), compare=False)
    """How much text was tokenized, and how much of it the tokenizer read. A fact of this run, which is not recorded."""

    @property
    def ones_share(self) -> float | None:
        """Share of the pairs that are labelled 1, in 0..1; None where there are no pairs."""
        return self.ones / self.pairs if self.pairs else None

    @property
    def majority(self) -> float | None:
        """The accuracy of always giving the commoner label, in 0..1: any accuracy on pairs must beat it."""
        return None if self.ones_share is None else max(self.ones_share, 1 - self.ones_share)

    @property
    def padding_share(self) -> float:
        """The share of padding among token slots where every sequence has a row of its own, in 0..1."""
        return 1 - self.tokens / (self.sequences * self.max_sequence_length)

    @property
    def packing_factor_bound(self) -> float:
        """Sequences per pack if packs had no empty slot: packing cannot shorten an epoch by more."""
        return self.sequences * self.max_sequence_length / self.tokens

    def warnings(self, vocabulary_cure: str) -> Iterator[str]:
        """What a user must know: which tokens are lost. vocabulary_cure: what helps against unknown tokens, too."""
        if self.unread_characters > UNKNOWN_SHARE * self.source_tokens:
            yield (
                f"{self.unread_characters:,} characters are in words of more than 100, each of which is one unknown "
                "token; put spaces between words, or give a tokenizer that needs none (SentencePiece)"
            )
        unknown_cure = f"give a tokenizer of this language{vocabulary_cure}"
        dropped = "in no sequence, because a pair was too long"
        dropped_cure = "give a larger max_sequence_length, or objective='none', which drops none"
        for count, share, what, cure in (
            (self.unknown_tokens, UNKNOWN_SHARE, "unknown to the vocabulary", unknown_cure),
            (self.tokens_dropped, DROPPED_SHARE, dropped, dropped_cure),
        ):
            if count > share * self.source_tokens:
                of_all = f"{count:,} of {self.source_tokens:,} tokens ({count / self.source_tokens:.2%})"
                yield f"{of_all} are {what}; {cure}"

    def as_json(self) -> dict[str, int | float | str | None]:
        derived = ("ones_share", "majority", "padding_share", "packing_factor_bound")
        recorded = asdict(self) | {name: getattr(self, name) for name in derived}
        del recorded["tokenized"]
        return recorded


def summary_table(summary: dict[str, SplitSummary]) -> str:
    """The numbers of each split, a column each, as text.

                                   train          test
    documents                     24,213         1,275
    sequences                     36,239         1,895
    random next                    70.2%         71.0%
    packing factor at most          2.36          2.33
    ...
    """
    label_1 = OBJECTIVES[next(iter(summary.values())).objective].label_1
    rows = [
        ("documents", "{:,}", lambda split: split.documents),
        ("sentences", "{:,}", lambda split: split.sentences),
        ("cut at words", "{:,}", lambda split: split.long_sentences),
        ("sequences", "{:,}", lambda split: split.sequences),
        ("tokens", "{:,}", lambda split: split.tokens),
        ("tokens dropped", "{:,}", lambda split: split.tokens_dropped),
        ("unknown tokens", "{:.2%}", lambda split: split.unknown_tokens / split.tokens),
        ("without a pair", "{:,}", lambda split: split.sequences - split.pairs if split.pairs else 0),
        (label_1, "{:.1%}", lambda split: split.ones_share),
        ("mean length", "{:.1f}", lambda split: split.tokens / split.sequences),
        ("padding, unpacked", "{:.1%}", lambda split: split.padding_share),
        ("packing factor at most", "{:.2f}", lambda split: split.packing_factor_bound),
        ("text of known units", "{:.2%}", lambda split: split.tokenized.known_share),
    ]
    lines = [" " * 22 + "".join(f"{name:>14}" for name in summary)]
    for name, form, number in rows:
        is_shown_if_any = name in ("cut at words", "without a pair", "text of known units")
        if not name or (is_shown_if_any and not any(map(number, summary.values()))):
            continue
        lines.append(f"{name:<22}" + "".join(f"{form.format(number(split)):>14}" for split in summary.values()))
    return "\n".join(lines)
