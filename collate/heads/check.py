"""Labels and ids that a model has no place for, found before torch fails with a bare "index out of bounds".

The checks run on the host, where the collator has just made the batch: on a GPU they would have to wait.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from collate.columns import IGNORED
from collate.layout import PADDING, holds_sequence
from collate.losses import Batch, has_label

EMBEDDINGS = {
    "input_ids": "word_embeddings",
    "token_type_ids": "token_type_embeddings",
    "position_ids": "position_embeddings",
}
CURES = {
    "num_labels": "number the labels from 0 (label2id), or load the model with more num_labels",
    "vocab_size": "use the model's own tokenizer",
    "kinds of pairs": "a pair's label is 0 or 1",
    "input_ids": "use the model's own tokenizer, or model.resize_token_embeddings(…)",
    "token_type_ids": "remove the column, or load the model with a larger type_vocab_size",
    "position_ids": "truncate sequences when tokenizing, or take a model for longer ones",
}


def check_label_ids(batch: Batch, column: str, number: int | None, of: str = "num_labels") -> None:
    """Raise ValueError unless each label of a sequence or token is an id of 0 to number - 1, or -100.

    number: None: unknown. of: what the number counts, a key of CURES.
    """
    labels = _on_host(batch, column)
    if labels is None:
        return
    if labels.is_floating_point():
        raise ValueError(f"{column!r} holds floats, but labels are ids; cast the column to integers before packing")
    if number is None:
        return
    wrong = has_label(labels) & ((labels < 0) | (labels >= number))
    limit = f"the model has {of}={number}: ids are 0 to {number - 1}, and {IGNORED} where nothing is labelled"
    _refuse(batch, column, wrong, f"{limit}; {CURES[of]}")


def check_shares(batch: Batch, column: str) -> None:
    """Raise ValueError unless all numbers are within 0 and 1, or NaN for a label that is missing."""
    labels = _on_host(batch, column)
    if labels is not None and labels.dim() == 3 and labels.is_floating_point():
        wrong = has_label(labels) & ~((labels >= 0) & (labels <= 1))
        cure = "each of several labels is a number from 0 to 1, or NaN where it is not known"
        _refuse(batch, column, wrong, cure)


def embedding_sizes(model: nn.Module) -> dict[str, int]:
    """{column of a batch: how many ids the model has embeddings for}, where it has any."""
    base: Any = getattr(model, "base_model", model)
    embeddings = getattr(base, "embeddings", None)
    found = {column: getattr(embeddings, name, None) for column, name in EMBEDDINGS.items()}
    if hasattr(base, "get_input_embeddings"):
        found["input_ids"] = base.get_input_embeddings()
    return {column: table.num_embeddings for column, table in found.items() if isinstance(table, nn.Embedding)}


def check_inputs(batch: Batch, sizes: Mapping[str, int]) -> None:
    """Raise ValueError for an id that has no embedding. sizes: see embedding_sizes."""
    for column, size in sizes.items():
        if (values := _on_host(batch, column)) is not None:
            wrong = (values < 0) | (values >= size)
            _refuse(batch, column, wrong, f"the model has embeddings for 0 to {size - 1}; {CURES[column]}")


def refuse_text(dataset: Any, names: Sequence[str], columns: Sequence[str] | None = None) -> None:
    """Raise ValueError if the labels are text, of which no tensor can be made.

    names: columns of which one has the labels. columns: those that are passed on; None: all.
    """
    dataset = getattr(dataset, "packed", dataset)  # EpochPacks
    features = getattr(dataset, "features", None) or {}
    names = [name for name in names if name in features and (columns is None or name in columns)]
    if not names or not all(_is_text(features[name]) for name in names):
        return
    found = sorted(set(_texts(next(iter(dataset.select_columns(names[:1])))[names[0]])))
    shown = ", ".join(map(repr, found[:5])) + (", …" if len(found) > 5 else "")
    ids = ", ".join(f"{text!r}: {number}" for number, text in enumerate(found[:2]))
    raise ValueError(
        f"the labels in column {names[0]!r} are text, in the first pack {shown}; map them to ids before packing, "
        f"label2id = {{{ids}, …}}, or leave the column out"
    )


def _is_text(feature: Any) -> bool:
    while isinstance(feature, list) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _texts(values: Any) -> list[str]:
    return [values] if isinstance(values, str) else [text for value in values or () for text in _texts(value)]


class CheckedCollator:
    """A collator of packs that checks its batches; errors name the row in the source."""

    def __init__(self, collator: Any, checks: Sequence[Callable[[Batch], None]]):
        self.collator, self.checks = collator, checks

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        try:
            self._check(batch)
        except ValueError:
            self._check(self.collator.for_prediction()(rows))  # its batches have sequence_indices
            raise
        return batch

    def _check(self, batch: Batch) -> None:
        for check in self.checks:
            check(batch)


def _on_host(batch: Batch, column: str) -> Tensor | None:
    """The values of a column that lie on the host; None: they do not, or the batch has none."""
    values = batch.get(column)
    return values if isinstance(values, Tensor) and values.device.type == "cpu" else None


def _is_real(batch: Batch, values: Tensor) -> Tensor | bool:
    """Bool: the values that belong to a token or a sequence. Of other shapes none: they are refused elsewhere."""
    sequence_ids_BL = batch["sequence_ids"]
    if values.shape == sequence_ids_BL.shape:
        return sequence_ids_BL != PADDING
    slots = values.shape[1] if values.dim() > 1 else 0
    if len(values) != len(sequence_ids_BL) or not slots:
        return False
    is_sequence_BS = holds_sequence(sequence_ids_BL, slots)
    return is_sequence_BS.view(*is_sequence_BS.shape, *[1] * (values.dim() - 2)).expand_as(values)


def _refuse(batch: Batch, column: str, wrong: Tensor, cure: str) -> None:
    """Raise ValueError that says where the first wrong value stands, if a token or a sequence has one."""
    values, sequence_ids_BL = batch[column], batch["sequence_ids"]
    wrong = wrong & _is_real(batch, values)
    if not wrong.any():
        return
    pack, slot, *_ = place = tuple(wrong.nonzero()[0].tolist())
    is_token = values.shape == sequence_ids_BL.shape
    number = int(sequence_ids_BL[pack, slot]) - 1 if is_token else slot
    where = f"sequence {number} of pack {pack} of the batch"
    if "sequence_indices" in batch:
        where = f"row {int(batch['sequence_indices'][pack, number])} of the source"
    if is_token:
        begin = int((sequence_ids_BL[pack] == number + 1).nonzero()[0])
        where = f"token {slot - begin} of {where}"
    raise ValueError(f"{column!r} is {values[place].item():g} at {where}, but {cure}")
