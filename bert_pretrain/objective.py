"""What a run learns about sentence pairs: the dataset's columns and the configuration must agree on it."""

import logging

import pyarrow as pa
from datasets import Dataset

from bert_pretrain.prepare.sequences import NO_PAIR, PAIR_LABELS
from bert_pretrain.train.config import PretrainConfig

logger = logging.getLogger(__name__)

READ_PACKS = 10_000  # at a time


def check_objective(config: PretrainConfig, dataset: Dataset) -> str:
    """ "nsp", "sop" or "none": what was asked for, or else, for "auto", what the columns of the dataset say.

    next_sentence_label -> nsp,  sentence_order_label -> sop,  neither -> none

    Raises ValueError for an objective whose column is not there, and for a dataset with the columns of two.
    """
    found = {objective: column for objective, column in PAIR_LABELS.items() if column in dataset.column_names}
    if config.objective == "none":
        for column in found.values():
            logger.info("objective=none: %s is in the dataset, and is not learned", column)
        return "none"
    if len(found) > 1:
        raise ValueError(
            f"{config.dataset} has the columns {' and '.join(found.values())}, and one head cannot learn both; "
            "remove_columns() the one that is not meant, or choose objective='none'"
        )
    if config.objective == "auto":
        return next(iter(found), "none")
    if config.objective not in found:
        raise ValueError(
            f"objective={config.objective!r} needs the column {PAIR_LABELS[config.objective]!r}, and {config.dataset} "
            f"has {dataset.column_names}; prepare the text with --objective {config.objective}, or set the objective "
            f"to {next(iter(found), 'none')!r}, which this dataset is made for"
        )
    return config.objective


def for_objective(config: PretrainConfig, *splits: Dataset | None) -> list[Dataset | None]:
    """The splits of one dataset with no label but the objective's; all must be made for the same one."""
    objectives = {check_objective(config, split) for split in splits if split is not None}
    if len(objectives) > 1:
        raise ValueError(
            f"the splits of {config.dataset} are made for different objectives, {sorted(objectives)}; prepare them "
            "together, or choose objective='none'"
        )
    for column in (PAIR_LABELS[objective] for objective in objectives - {"none"}):
        for split in splits:
            if split is not None:
                _check_labels(config.dataset, split, column)
    logger.info("objective: masked language modelling%s", "".join(f" and {o}" for o in objectives - {"none"}))
    return [None if split is None else _without_others(split, objectives) for split in splits]


def _check_labels(dataset: str, split: Dataset, column: str) -> None:
    """All of them: one that is wrong would end the run when its turn comes, after days perhaps."""
    cure = f"a label is 0 or 1, or {NO_PAIR} where there is no pair; correct the source, and pack it again"
    for table in split.select_columns([column]).with_format("arrow").iter(READ_PACKS):
        labels = table[column].combine_chunks().flatten()
        if not (pa.types.is_integer(labels.type) or pa.types.is_boolean(labels.type)):
            raise ValueError(f"{dataset}: the column {column!r} holds {labels.type}; {cure}")
        wrong = set(labels.unique().to_pylist()) - {0, 1, NO_PAIR}
        if wrong:
            raise ValueError(f"{dataset}: the column {column!r} holds {sorted(wrong, key=str)[0]}; {cure}")


def _without_others(split: Dataset, objectives: set[str]) -> Dataset:
    others = [column for objective, column in PAIR_LABELS.items() if objective not in objectives]
    others = [column for column in others if column in split.column_names]
    return split.remove_columns(others) if others else split
