"""OBJECTIVES: what a run learns about sentence pairs, besides masked tokens; one row an objective.

To add one, write its row here and its builder in prepare/sequences.py. If its pairs have labels of their own, name
their column in collate/columns.py: the loss, the log and the model card follow.
"""

from dataclasses import dataclass

from collate.columns import IGNORED, PAIR_LABELS

NO_PAIR = IGNORED
"""The label of a sequence that is no pair, among pairs."""


@dataclass(frozen=True)
class Objective:
    """One way to make sequences of documents, and what is learned from them."""

    builder: str
    """The function in prepare/sequences.py that makes the sequences."""
    made: str
    """What it makes, for `prepare --help`."""
    learned: str
    """For `train --help`."""
    name: str
    """In full, for the model card."""
    column: str | None = None
    """The dataset's column with the labels of pairs; None: there are no pairs."""
    label_1: str = ""
    """What label 1 means, for the numbers of a prepared split."""
    documents: int = 1
    """The fewest documents that a split needs."""


OBJECTIVES: dict[str, Objective] = {
    "nsp": Objective(
        builder="nsp_pairs",
        made="BERT's sentence pairs (is B the next sentence, or a random one?)",
        learned="is B the next sentence?",
        name="next-sentence prediction (NSP)",
        column=PAIR_LABELS["nsp"],
        label_1="random next",
        documents=2,  # a random next sentence comes from another document
    ),
    "sop": Objective(
        builder="sop_pairs",
        made="ALBERT's sentence pairs (are A and B in order, or switched?)",
        learned="are A and B in order?",
        name="sentence-order prediction (SOP)",
        column=PAIR_LABELS["sop"],
        label_1="switched order",
    ),
    "none": Objective(
        builder="single_sequences",
        made="runs of full sentences, from which no token is lost",
        learned="nothing; labels in the dataset are ignored",
        name="",
    ),
}


def pair_columns() -> dict[str, str]:
    """{"nsp": "next_sentence_label", …}: the objectives that learn pairs, and their columns."""
    return {name: objective.column for name, objective in OBJECTIVES.items() if objective.column is not None}
