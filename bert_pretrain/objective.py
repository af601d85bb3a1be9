"""What a run learns about sentence pairs: the dataset's columns and the configuration must agree on it."""

import logging

from datasets import Dataset

from bert_pretrain.config import PretrainConfig
from bert_pretrain.examples import PAIR_LABELS

logger = logging.getLogger(__name__)


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
    logger.info("objective: masked language modelling%s", "".join(f" and {o}" for o in objectives - {"none"}))
    return [None if split is None else _without_others(split, objectives) for split in splits]


def _without_others(split: Dataset, objectives: set[str]) -> Dataset:
    others = [column for objective, column in PAIR_LABELS.items() if objective not in objectives]
    others = [column for column in others if column in split.column_names]
    return split.remove_columns(others) if others else split
