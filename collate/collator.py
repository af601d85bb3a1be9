"""DataCollatorWithPacking: packed rows -> the tensors of one batch."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from collate.layout import PADDING, PackLayout
from collate.masking import IGNORED, MaskingRule, sequence_keys, token_keys
from packing import packed_info

EMIT = ("sequence_ids", "attention_mask", "attention_bias")
NO_CLS = -1
EVALUATION_EPOCH = -1
"""The epoch that evaluation's masks are drawn for: always the same ones."""


class DataCollatorWithPacking:
    """Collate packed rows; mask them for masked language modelling; keep every sequence's identity.

        row       input_ids [2, 8, 9, 3, 2, 7, 3]    sequence_lengths [4, 3]    pad_to=8
        input_ids        [[2, 8, 9, 3, 2, 7, 3, 0]]
        sequence_ids     [[1, 1, 1, 1, 2, 2, 2, 0]]
        position_ids     [[0, 1, 2, 3, 0, 1, 2, 0]]
        cls_positions    [[0, 4]]

    Args:
        tokenizer: gives the pad, mask and special token ids.
        mlm_probability: share of each sequence's tokens to predict; None passes a `labels` column through instead.
        masking: "exact" (BERT's count per sequence) or "independent"; see `collate.masking`.
        pad_to: L, the token slots per pack. None: the longest pack of the batch, until `for_dataset` sets it.
        emit: how a batch says which tokens belong together. "sequence_ids": (B, L) int32, 65 KB at 32 x 512, always
            there. For models that take a 4-D mask also, under the key `attention_mask`: "attention_mask", (B, 1, L, L)
            bool, True = attend, right for sdpa attention only; "attention_bias", floats that are added, right for
            eager attention, too.
        position_ids_start: the first position of each sequence (padding_idx + 1 for RoBERTa's relatives).
        seed: of the masks.
        max_sequences_per_pack: S, the sequence slots per pack. None: the deepest pack of the batch, likewise.

    Returns, from a list of rows: input_ids, sequence_ids (int32), position_ids, token_type_ids (where the rows have
    them), labels (B, L), -100 where nothing is predicted; cls_positions (B, S), -1 in empty slots; and
    next_sentence_label (B, S) where the rows have it, -100 in empty slots. Other columns are left out.

    Masks are a function of (seed, epoch, sequence index). The epoch lives in shared memory, where dataloader workers
    read it; `callback()` gives the TrainerCallback that sets it (PackedTrainer adds it by itself).

    Raises ValueError for rows without `sequence_lengths`, for lengths that do not add up, and for packs that exceed
    pad_to or the sequence slots: nothing is cut here.
    """

    def __init__(
        self,
        tokenizer,
        mlm_probability: float | None = 0.15,
        masking: str = "exact",
        pad_to: int | None = None,
        emit: str = "sequence_ids",
        position_ids_start: int = 0,
        seed: int = 0,
        max_sequences_per_pack: int | None = None,
    ):
        if emit not in EMIT:
            raise ValueError(f"unknown emit {emit!r}; choose from {list(EMIT)}")
        for name, limit in (("pad_to", pad_to), ("max_sequences_per_pack", max_sequences_per_pack)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be at least 1, or None")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token before collating")
        self.pad_token_id = tokenizer.pad_token_id
        self.pad_to = pad_to
        self.emit = emit
        self.position_ids_start = position_ids_start
        self.seed = seed
        self.max_sequences_per_pack = max_sequences_per_pack
        self.masking_rule = _masking_rule(tokenizer, mlm_probability, masking)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def for_dataset(self, packed) -> "DataCollatorWithPacking":
        """A copy whose L and S are those of this packed dataset, so that all batches have one shape; same epoch."""
        info = packed_info(packed)
        bound = copy.copy(self)
        bound.pad_to = info.max_sequence_length if self.pad_to is None else self.pad_to
        if self.max_sequences_per_pack is None:
            bound.max_sequences_per_pack = info.max_depth
        return bound

    def for_evaluation(self) -> "DataCollatorWithPacking":
        """A copy whose masks are the same at every evaluation."""
        fixed = copy.copy(self)
        fixed._epoch = torch.tensor(EVALUATION_EPOCH)
        return fixed

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from the next batch on, in this process and in its dataloader workers."""
        self._epoch.fill_(epoch)

    def callback(self) -> TrainerCallback:
        """The callback by which a plain `Trainer` tells this collator of a new epoch."""
        return _SetEpoch(self)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        flat = _FlatRows(rows)
        width = self._width("pad_to", self.pad_to, flat.tokens_per_row, "tokens", "a longer pad_to")
        depth = self._width(
            "max_sequences_per_pack", self.max_sequences_per_pack, flat.sequences_per_row, "sequences", "more slots"
        )
        slots = _slots(flat.tokens_per_row, width)
        sequence_slots = _slots(flat.sequences_per_row, depth)
        numbers = np.arange(flat.num_sequences) - np.repeat(_starts(flat.sequences_per_row), flat.sequences_per_row)
        positions = np.arange(flat.num_tokens) - np.repeat(flat.offsets[:-1], flat.lengths)
        shape, sequence_shape = (len(rows), width), (len(rows), depth)

        input_ids, labels = self._mask(flat)
        batch = {
            "input_ids": _place(input_ids, slots, shape, self.pad_token_id),
            "sequence_ids": _place(np.repeat(numbers + 1, flat.lengths), slots, shape, PADDING, np.int32),
            "position_ids": _place(positions + self.position_ids_start, slots, shape, self.position_ids_start),
        }
        if flat.has("token_type_ids"):
            batch["token_type_ids"] = _place(flat.tokens("token_type_ids"), slots, shape, 0)
        if labels is not None:
            batch["labels"] = _place(labels, slots, shape, IGNORED)
        # a pack's first [CLS] stands at 0, the next where the first sequence ends
        first_tokens = flat.offsets[:-1] - np.repeat(_starts(flat.tokens_per_row), flat.sequences_per_row)
        batch["cls_positions"] = _place(first_tokens, sequence_slots, sequence_shape, NO_CLS)
        if flat.has("next_sentence_label"):
            next_sentence_label = flat.per_sequence("next_sentence_label")
            batch["next_sentence_label"] = _place(next_sentence_label, sequence_slots, sequence_shape, IGNORED)
        if self.emit != "sequence_ids":
            layout = PackLayout(batch["sequence_ids"])
            batch["attention_mask"] = (
                layout.attention_mask if self.emit == "attention_mask" else layout.attention_bias()
            )
        return batch

    def _width(self, option: str, limit: int | None, counts: np.ndarray, what: str, cure: str) -> int:
        if limit is None:
            return int(counts.max(initial=1))
        if counts.max(initial=0) > limit:
            row = int(counts.argmax())
            raise ValueError(
                f"row {row} of the batch holds {counts[row]} {what}, more than {option}={limit}; "
                f"give the collator {cure} or pack the dataset again"
            )
        return limit

    def _mask(self, flat: "_FlatRows") -> tuple[np.ndarray, np.ndarray | None]:
        """Input ids and labels of all tokens (T,)."""
        input_ids = flat.tokens("input_ids")
        if self.masking_rule is None:
            return input_ids, flat.tokens("labels") if flat.has("labels") else None
        if flat.has("labels"):
            raise ValueError("the rows have labels, which masking would replace; set mlm_probability=None to keep them")
        vocabulary = len(self.masking_rule.is_special_V)
        if len(input_ids) and not 0 <= input_ids.min() <= input_ids.max() < vocabulary:
            raise ValueError(
                f"token ids {input_ids.min()}..{input_ids.max()} exceed the tokenizer's vocabulary of {vocabulary}; "
                "use the tokenizer that the dataset was made with"
            )
        if (input_ids == self.pad_token_id).any():
            raise ValueError(
                f"a sequence contains the padding token {self.pad_token_id}: it was padded before it was packed; "
                "tokenize without padding, or keep attention_mask so that pack_dataset can trim it"
            )
        if flat.has("sequence_indices"):
            starts = flat.per_sequence("sequence_starts") if flat.has("sequence_starts") else None
            keys = sequence_keys(self.seed, int(self._epoch), flat.per_sequence("sequence_indices"), starts)
        else:
            keys = sequence_keys(self.seed, int(self._epoch), token_keys(input_ids, flat.offsets))
        return self.masking_rule(input_ids, flat.offsets, keys)


class _FlatRows:
    """The rows of a batch as flat arrays: tokens (T,), sequences (N,)."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        for number, row in enumerate(rows):
            if "input_ids" not in row or "sequence_lengths" not in row:
                missing = "input_ids" if "input_ids" not in row else "sequence_lengths"
                raise ValueError(
                    f"row {number} of the batch has no {missing!r}, only {sorted(row)}; pack the dataset with "
                    "pack_dataset, and with plain Trainer set remove_unused_columns=False (PackedTrainer keeps them)"
                )
        self.rows = rows
        row_lengths = [np.asarray(row["sequence_lengths"], dtype=np.int64) for row in rows]
        self.sequences_per_row = np.array([len(lengths) for lengths in row_lengths], dtype=np.int64)
        self.tokens_per_row = np.array([lengths.sum() for lengths in row_lengths], dtype=np.int64)
        self.lengths = np.concatenate([np.empty(0, np.int64), *row_lengths])
        self.offsets = np.concatenate([[0], self.lengths.cumsum()])
        if len(self.lengths) and self.lengths.min() < 1:
            raise ValueError("a sequence of the batch has length 0; every sequence needs at least one token")

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def has(self, column: str) -> bool:
        """Whether the rows have this column; packs without sequences need not."""
        having = [column in row for row, depth in zip(self.rows, self.sequences_per_row, strict=True) if depth]
        if any(having) and not all(having):
            raise ValueError(
                f"some rows of the batch have a column {column!r}, some have not; give it to all or to none"
            )
        return any(having)

    def tokens(self, column: str) -> np.ndarray:
        return self._concatenate(column, self.tokens_per_row, "tokens")

    def per_sequence(self, column: str) -> np.ndarray:
        return self._concatenate(column, self.sequences_per_row, "sequences")

    def _concatenate(self, column: str, counts: np.ndarray, what: str) -> np.ndarray:
        values = [np.asarray(row.get(column, np.empty(0, np.int64))) for row in self.rows]
        for number, (value, count) in enumerate(zip(values, counts, strict=True)):
            if len(value) and value.dtype.kind not in "iu":
                raise ValueError(f"row {number} of the batch: {column!r} must hold integers, not {value.dtype}")
            if len(value) != count:
                raise ValueError(
                    f"row {number} of the batch has {len(value)} values in {column!r} but {count} {what} "
                    "by its sequence_lengths"
                )
        return np.concatenate([np.empty(0, np.int64), *(value.astype(np.int64) for value in values)])


class _SetEpoch(TrainerCallback):
    """Counts epochs from the one that training begins or resumes in: state.epoch itself is a fraction of max_steps
    where the dataset has no length."""

    def __init__(self, collator: DataCollatorWithPacking):
        self.collator = collator
        self.next_epoch = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.next_epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(self.next_epoch)
        self.next_epoch += 1


def _masking_rule(tokenizer, mlm_probability: float | None, masking: str) -> MaskingRule | None:
    if mlm_probability is None:
        return None
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token; set tokenizer.mask_token or mlm_probability=None")
    is_special_V = np.zeros(len(tokenizer), dtype=bool)
    is_special_V[tokenizer.all_special_ids] = True
    return MaskingRule(mlm_probability, masking, tokenizer.mask_token_id, is_special_V)


def _starts(counts: np.ndarray) -> np.ndarray:
    """[3, 2, 4] -> [0, 3, 5]"""
    return counts.cumsum() - counts


def _slots(counts: np.ndarray, width: int) -> np.ndarray:
    """Where the values of each row go in a flattened (rows, width) table: counts [2, 1], width 3 -> [0, 1, 3]."""
    padding_before = np.arange(len(counts)) * width - _starts(counts)
    return np.arange(counts.sum()) + np.repeat(padding_before, counts)


def _place(values, slots, shape: tuple[int, int], fill: int, dtype=np.int64) -> torch.Tensor:
    table = np.full(shape, fill, dtype)
    table.reshape(-1)[slots] = values
    return torch.from_numpy(table)
