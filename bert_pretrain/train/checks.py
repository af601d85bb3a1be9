"""What a run is given, checked before it builds a model: dataset, objective, tokenizer, arguments."""

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from bert_pretrain.objective import NO_PAIR, pair_columns
from bert_pretrain.prepare.tokenizer import vocabulary_fingerprint
from bert_pretrain.train.config import AUTO, PretrainConfig
from bert_pretrain.train.run_record import CHECKPOINTING
from collate.losses import mlm_loss_of, pretraining_loss
from collate.vocabulary import token_ids, vocabulary_size
from packing import load_packed, packed_info
from packing.files.errors import Option, OptionError, marked, path_suggestion, suggestion
from packing.files.saved import load_saved

logger = logging.getLogger(__name__)

READ_PACKS = 10_000  # read at a time
SAMPLED_PACKS = 2000
"""Packs whose tokens are compared with the tokenizer: spread over a split, read in a fraction of a second."""


def load_splits(folder: str) -> tuple[Dataset, Dataset | None]:
    """The packed training split and, where there is one, the test (or validation) split."""
    given = Option("dataset", folder)
    try:
        try:
            loaded = load_packed(folder)  # Arrow or Parquet, here or at a URL
        except FileNotFoundError:
            loaded = load_saved(folder)  # a packed dataset that save_to_disk wrote
    except FileNotFoundError as error:
        problem = "is no folder of save_to_disk" if os.path.exists(folder) else "does not exist"
        cure = f"give the folder that pack-dataset wrote{path_suggestion(folder, only_folders=True)}"
        raise OptionError(f"{given} {problem}; {cure}") from error
    except IndexError as error:  # datasets cannot read what it wrote without rows
        raise OptionError(f"{given} has a split without packs; pack a source with sequences") from error
    splits = {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    if "train" not in splits:
        raise OptionError(
            f"{given} has no split named train, only {sorted(splits)}; rename one of them in the "
            "source, and pack it again"
        )
    train, test = splits["train"], splits.get("test", splits.get("validation"))
    try:
        lengths = {packed_info(split).max_sequence_length for split in (train, test) if split is not None}
    except ValueError as error:
        raise OptionError(f"{given}: {marked(error)}; or in a shell: pack-dataset {folder} PACKED") from None
    if "labels" in train.column_names:
        raise OptionError(
            f"{given} has a column 'labels', which is what masking makes; remove_columns('labels') "
            "in the source, and pack it again"
        )
    if len(lengths) > 1:
        raise OptionError(
            f"{given}: training and held-out split are packed for max_sequence_length "
            f"{' and '.join(map(str, sorted(lengths)))}; pack both for the same"
        )
    return train, test


def check_objective(config: PretrainConfig, dataset: Dataset) -> str:
    """ "nsp", "sop" or "none": what was asked for, or else, for "auto", what the columns of the dataset say.

    next_sentence_label -> nsp,  sentence_order_label -> sop,  neither -> none

    Raises ValueError for an objective whose column is not there, and for a dataset with the columns of two.
    """
    found = {objective: column for objective, column in pair_columns().items() if column in dataset.column_names}
    if config.objective == "none":
        return "none"
    if len(found) > 1:
        raise OptionError(
            f"{config.dataset} has the columns {' and '.join(found.values())}, and one head cannot learn both; "
            f"remove_columns() the one that is not meant, or choose {Option('objective', 'none')}"
        )
    if config.objective == AUTO:
        return next(iter(found), "none")
    if config.objective not in found:
        raise OptionError(
            f"{Option('objective', config.objective)} needs the column {pair_columns()[config.objective]!r}, and "
            f"{config.dataset} has {dataset.column_names}; prepare the text with --objective {config.objective}, or "
            f"set the objective to {next(iter(found), 'none')!r}, which this dataset is made for"
        )
    return config.objective


def for_objective(config: PretrainConfig, *splits: Dataset | None) -> list[Dataset | None]:
    """The splits of one dataset with no label but the objective's; all must be made for the same one."""
    objectives = {check_objective(config, split) for split in splits if split is not None}
    if len(objectives) > 1:
        raise OptionError(
            f"the splits of {config.dataset} are made for different objectives, {sorted(objectives)}; prepare them "
            f"together, or choose {Option('objective', 'none')}"
        )
    learned = objectives & pair_columns().keys()
    for split in filter(None, splits):
        for objective in learned:
            _check_labels(config.dataset, split, pair_columns()[objective])
    if config.objective == "none":
        for column in pair_columns().values():
            if any(split is not None and column in split.column_names for split in splits):
                logger.info("objective=none: %s is in the dataset, and is not learned", column)
    logger.info("objective: masked language modelling%s", "".join(f" and {objective}" for objective in learned))
    return [None if split is None else _without_others(split, objectives) for split in splits]


def _check_labels(dataset: str, split: Dataset, column: str) -> None:
    """Check all labels: a wrong one would end the run when its turn comes, perhaps after days."""
    cure = f"a label is 0 or 1, or {NO_PAIR} where there is no pair; correct the source, and pack it again"
    for table in split.select_columns([column]).with_format("arrow").iter(READ_PACKS):
        labels = table[column].combine_chunks().flatten()
        if not (pa.types.is_integer(labels.type) or pa.types.is_boolean(labels.type)):
            raise ValueError(f"{dataset}: the column {column!r} holds {labels.type}; {cure}")
        wrong = set(labels.unique().to_pylist()) - {0, 1, NO_PAIR}
        if wrong:
            raise ValueError(f"{dataset}: the column {column!r} holds {sorted(wrong, key=str)[0]}; {cure}")


def _without_others(split: Dataset, objectives: set[str]) -> Dataset:
    others = [column for objective, column in pair_columns().items() if objective not in objectives]
    others = [column for column in others if column in split.column_names]
    return split.remove_columns(others) if others else split


def check_tokenizer(folder: str, split: Dataset, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ValueError if the packs were made with another tokenizer.

    A dataset of `bert-pretrain prepare` keeps its vocabulary's fingerprint, which decides. In others a sample does: ids
    that the tokenizer does not have, or sequences none of which begins with its [CLS] or ends with its [SEP].
    """
    cure = (
        "give the tokenizer that the dataset was prepared with (PREPARED/tokenizer), or prepare the text with this one"
    )
    made_with, given = split.info.config_name or "", vocabulary_fingerprint(tokenizer)
    if made_with.startswith(given.partition(":")[0] + ":") and made_with != given:
        raise OptionError(
            f"{Option('dataset', folder)} was made with another vocabulary ({made_with}) than that of "
            f"{Option('tokenizer', name)} ({given}); {cure}"
        )
    tokens, lengths = (_sample(split, name) for name in ("input_ids", "sequence_lengths"))
    foreign = np.setdiff1d(tokens, token_ids(tokenizer))
    if len(foreign):
        raise OptionError(
            f"{Option('dataset', folder)} holds token {foreign[-1]}, but {Option('tokenizer', name)} has "
            f"{len(tokenizer)} tokens, up to {vocabulary_size(tokenizer) - 1}, and none with that id; {cure}"
        )
    ends = np.cumsum(lengths)
    for token, its_id, found in (
        ("cls_token", tokenizer.cls_token_id, tokens[ends - lengths]),
        ("sep_token", tokenizer.sep_token_id, tokens[ends - 1]),
    ):
        if not (found == its_id).any():
            where = "begins" if token == "cls_token" else "ends"
            raise OptionError(
                f"{Option('dataset', folder)}: none of {len(lengths):,} sequences {where} with {its_id}, the {token} "
                f"of {Option('tokenizer', name)}; most often it is {np.bincount(found).argmax()}; {cure}"
            )


def check_token_types(folder: str, split: Dataset, known: int) -> None:
    """Raise ValueError if a sample of the packs has token_type_ids beyond those that the model knows."""
    if "token_type_ids" not in split.column_names:
        return  # all are 0
    types = _sample(split, "token_type_ids")
    for wrong in types[(types < 0) | (types >= known)][:1]:
        raise OptionError(
            f"{Option('dataset', folder)} has token_type_ids of {wrong}, but the model knows 0 to {known - 1}; correct "
            "or remove_columns() them in the source, and pack it again"
        )


def _sample(split: Dataset, column: str) -> np.ndarray:
    """The values of some packs, one after the other."""
    chosen = np.unique(np.linspace(0, len(split) - 1, SAMPLED_PACKS).astype(int))
    table = split.select_columns([column]).with_format("arrow")[chosen]
    return table[column].combine_chunks().flatten().to_numpy()


def check_arguments(training: TrainingArguments, test: Dataset | None, dataset: str) -> None:
    """Raise ValueError for TrainingArguments that would fail late: after the model is built, or at the first save."""
    output, given = Path(str(training.output_dir)), Option("output_dir", training.output_dir)
    for folder in (output, *output.parents):
        if folder.exists():
            if not folder.is_dir():
                raise OptionError(f"{given}: {folder} is a file; give a folder")
            if not os.access(folder, os.W_OK):
                raise OptionError(f"{given}: {folder} may not be written to; give another")
            break
    if training.fp16 and training.device.type == "cpu":
        what = f"{Option('fp16', True)} needs a GPU, and would be ignored on a CPU"
        raise OptionError(f"{what}; choose bf16, or leave it out")
    _check_schedule(training)
    for name in training.report_to or ():
        given = Option("report_to", name)
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise OptionError(f"{given} is unknown to transformers; choose from {known}, or none")
        if name not in (*get_available_reporting_integrations(), "flyte"):
            raise OptionError(f"{given} needs a package that is not installed: pip install {name}; or choose none")
    for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
        value = getattr(training, name)
        value = getattr(value, "value", value)
        if test is None and value not in ("no", False):
            raise OptionError(
                f"{Option(name, value)} needs held-out sequences, but {Option('dataset', dataset)} has no split named "
                f"test or validation; prepare with a {Option('test_fraction')}, or leave the option out"
            )
    if test is not None:
        _check_best_metric(training.metric_for_best_model, test)


def check_stream(model: PreTrainedModel, training: TrainingArguments) -> None:
    """Raise ValueError for checkpointing on top of a reversible stream, which keeps less already, and for FSDP."""
    options = getattr(model.base_model.encoder, "options", None)
    if options is None or options.stream != "reversible":
        return
    if training.fsdp:
        raise OptionError(
            f"{Option('fsdp', training.fsdp)} gathers the weights of a layer when it is called, and the stream "
            f"'reversible' of {Option('block')} calls its branches; leave either out"
        )
    for name in CHECKPOINTING:
        if getattr(training, name, False):
            raise OptionError(
                f"{Option(name, True)} keeps what enters each layer, and {Option('block')} has the stream "
                "'reversible', which keeps nothing of them; leave the former out"
            )


def _check_schedule(training: TrainingArguments) -> None:
    """Raise ValueError for options that the schedule does not take: transformers raises late, or ignores them."""
    kind, given = SchedulerType(training.lr_scheduler_type), training.lr_scheduler_kwargs or {}
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    parameters = dict(inspect.signature(schedule).parameters)
    if "num_warmup_steps" not in parameters and training.warmup_steps:
        raise OptionError(
            f"{Option('lr_scheduler_type', kind.value)} has no warm-up, {Option('warmup_steps', training.warmup_steps)}"
            " would be ignored; choose another, such as 'constant_with_warmup' or 'linear', or leave the latter out"
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # it hands them on to a class of torch's
    known = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    }
    options = f"its options are {list(known)}" if known else "it has no options"
    for name in given:
        if name not in known:
            raise OptionError(
                f"{Option('lr_scheduler_kwargs')} has {name!r}, which {Option('lr_scheduler_type', kind.value)} does "
                f"not know{suggestion(name, known)}; {options}"
            )
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in given:
            cure = f"{Option('lr_scheduler_kwargs')} '{{\"{name}\": …}}'"
            raise OptionError(f"{Option('lr_scheduler_type', kind.value)} needs {name!r}: {cure}; {options}")


def _check_best_metric(name: str | None, test: Dataset) -> None:
    losses = [pretraining_loss("token", pair) for pair, column in pair_columns().items() if column in test.column_names]
    loss = losses[0] if losses else mlm_loss_of("token")
    known = {"loss", *(row.name for row in loss.logged)}
    if name is not None and name.removeprefix("eval_") not in known:
        raise OptionError(
            f"{Option('metric_for_best_model', name)} is no metric of evaluation; choose from {sorted(known)}"
        )
