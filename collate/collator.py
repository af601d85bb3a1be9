"""DataCollatorWithPacking: packs -> the tensors of one batch."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import TrainerCallback

from collate.columns import ANSWERS, BOOKKEEPING, HEADS_OF_SEQUENCES, HEADS_OF_TOKENS, IGNORED, LABELS, MADE_HERE
from collate.device.transfer import CollatedBatch
from collate.isolation.positions import position_ids_start as start_of
from collate.layout import PADDING, PackLayout
from collate.mask_rows import count_words, mask_rows, masking_rule
from collate.masking import MaskingRule
from collate.rows import FlatRows, Levels, pack_sequences, read_packs, read_sequences
from packing import packed_info
from packing.files.errors import whole_number
from packing.histogram import offsets_of

logger = logging.getLogger(__name__)

CHOICES = {
    "emit": ("sequence_ids", "attention_mask", "attention_bias", "flash"),
    "unpacked_rows": (None, "keep", "pack"),
    "return_tensors": ("pt", "np"),
}
NO_CLS = -1
EVALUATION_EPOCH = -1
"""The epoch that evaluation's masks are drawn for: always the same ones."""

CUT_SHARE = 0.05
"""Whole words that are cut hold at most this share of the tokens of a batch, or a warning says how many."""


class DataCollatorWithPacking:
    """Collate packs; mask them for masked language modelling; keep every sequence's identity.

        row       input_ids [2, 8, 9, 3, 2, 7, 3]    sequence_lengths [4, 3]    labels [1, 0]    pad_to=8
        input_ids        [[2, 8, 9, 3, 2, 7, 3, 0]]
        sequence_ids     [[1, 1, 1, 1, 2, 2, 2, 0]]
        position_ids     [[0, 1, 2, 3, 0, 1, 2, 0]]
        cls_positions    [[0, 4]]
        labels           [[1, 0]]

    Args:
        tokenizer: gives the pad, mask and special token ids.
        mlm_probability: share of each sequence's tokens to predict. None: no masking; the rows' own `labels` pass.
        masking: "exact" (BERT's count per sequence), "independent" or "span"; see `collate.masking`.
        pad_to: L, the token slots per pack. None: the longest pack of the batch, until `for_dataset` sets it.
        emit: how a batch says which tokens belong together. `sequence_ids` (B, L) is always there; it is enough for
            PackedBertForPreTraining, and for models that `isolate_sequences` has prepared. For other models, besides:
            "attention_mask"    (B, 1, L, L) bool, True = attend; right for sdpa only
            "attention_bias"    the same as floats to add, under the key `attention_mask`; right for eager, too
            "flash"             no padding, one row (1, T), with transformers' cu_seq_lens_q/k and max_length_q/k
            Neither mask is right for sliding windows.
        position_ids_start: the first position of each sequence; None: that of `model`, or else 0.
        seed: of the masks.
        max_sequences_per_pack: S, the sequence slots per pack. None: the deepest pack of the batch, or `for_dataset`.
        model: gives its first position, and the kind of its labels. PackedTrainer gives its own model.
        unpacked_rows: for rows that hold one sequence each, as a tokenizer makes them. "keep" gives each a row of its
            own; "pack" packs each batch into rows of pad_to tokens. None: the rows are packed.
        columns: which columns to pass on. None: all that hold numbers, except BOOKKEEPING. Without masking, `label`
            and `label_ids` become `labels`, as in transformers' collators.
        token_columns: those with a value per token. None: the dataset tells, the model's task, or the number of values.
        mask_replace_prob, random_replace_prob: as in DataCollatorForLanguageModeling.
        whole_word_mask: choose whole words. The rows' `word_ids` tell them (None or negative: in no word), or else the
            vocabulary's pieces. A word longer than its sequence's budget is masked token by token; see `count_words`.
        max_predictions_per_sequence: predict at most so many tokens of a sequence; None: no limit.
        pad_to_multiple_of: rounds L up.
        return_tensors: "pt" or "np".

    Returns: input_ids, sequence_ids (int32) and position_ids (B, L); cls_positions (B, S), -1 in empty slots; with
    masking labels (B, L), -100 where nothing is predicted. Other columns of tokens are (B, L), 0 on padding (`labels`:
    -100); those of sequences (B, S), -100 in empty slots, or NaN if they are floats. Floats are float32, others int64.

    A row's `special_tokens_mask` says which tokens are never predicted, beside the tokenizer's special ones.

    Masks are a function of (seed, epoch, sequence index). The epoch lives in shared memory, where dataloader workers
    read it. PackedTrainer sets it; for a plain `Trainer` add `callbacks=[collator.callback()]`.

    Raises ValueError for a batch without rows, rows without `sequence_lengths`, lengths that do not add up, missing
    values, and packs that exceed pad_to or the sequence slots: it cuts nothing. It also refuses columns that would
    replace what it makes, and positions of answers in sequences that were split.
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm_probability: float | None = 0.15,
        masking: str = "exact",
        pad_to: int | None = None,
        emit: str = "sequence_ids",
        position_ids_start: int | None = None,
        seed: int = 0,
        max_sequences_per_pack: int | None = None,
        *,
        model: nn.Module | None = None,
        unpacked_rows: str | None = None,
        columns: Sequence[str] | None = None,
        token_columns: Sequence[str] | None = None,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        whole_word_mask: bool = False,
        max_predictions_per_sequence: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
    ):
        for name, choice in (("emit", emit), ("unpacked_rows", unpacked_rows), ("return_tensors", return_tensors)):
            _check_choice(name, choice)
        widths = {"pad_to": pad_to, "max_sequences_per_pack": max_sequences_per_pack}
        _check_widths(widths | {"pad_to_multiple_of": pad_to_multiple_of}, emit, unpacked_rows)
        for name, names in (("columns", columns), ("token_columns", token_columns)):
            if isinstance(names, str):
                raise ValueError(f"{name}={names!r} must be a list of column names: [{names!r}]")
        self.pad_token_id, self._pads_only = _pad_token(tokenizer)
        self.pad_to, self.pad_to_multiple_of = pad_to, pad_to_multiple_of
        self.emit, self.return_tensors = emit, return_tensors
        self.position_ids_start = position_ids_start
        self.seed = seed
        self.max_sequences_per_pack = max_sequences_per_pack
        self.unpacked_rows, self.columns, self.token_columns = unpacked_rows, columns, token_columns
        self.masking_rule = masking_rule(
            tokenizer,
            mlm_probability,
            masking=masking,
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
            whole_word_mask=whole_word_mask,
            max_predictions_per_sequence=max_predictions_per_sequence,
        )
        self._levels = Levels()
        self._tell: tuple[str, ...] = ()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._has_said = torch.zeros((), dtype=torch.bool).share_memory_()
        if model is not None:
            bound = self.for_model(model)
            self.position_ids_start, self._levels = bound.position_ids_start, bound._levels

    def for_dataset(self, packed: Any) -> "DataCollatorWithPacking":
        """A copy whose L and S are those of this packed dataset, so that all batches have one shape; same epoch.

        With unpacked_rows: a copy that knows from all rows of the dataset which lists have a value per token.
        """
        bound = copy.copy(self)
        if self.unpacked_rows is not None:
            bound._levels = self._levels.of(packed)
            return bound
        info = packed_info(packed)
        bound.pad_to = self._rounded(info.max_sequence_length) if self.pad_to is None else self.pad_to
        if self.max_sequences_per_pack is None:
            bound.max_sequences_per_pack = info.max_depth
        if self.token_columns is None:
            bound.token_columns = info.token_columns
        return bound

    def for_model(self, model: nn.Module) -> "DataCollatorWithPacking":
        """A copy whose positions start where this model's do, unless position_ids_start was given; same epoch.

        It also knows whether labels belong to tokens or to sequences, if the model's class says it.
        """
        bound = copy.copy(self)
        bound.learn_task(model)
        if self.position_ids_start is None and hasattr(model, "config"):
            bound.position_ids_start = start_of(cast(Any, model.config))
        return bound

    def learn_task(self, model: nn.Module | None) -> None:
        """In place: whether labels belong to tokens or to sequences, if the model's class says it."""
        names = [parent.__name__ for parent in type(model).__mro__]
        for heads in (HEADS_OF_TOKENS, HEADS_OF_SEQUENCES):
            if any(name.endswith(heads) for name in names):
                self._levels = replace(self._levels, labels=heads is HEADS_OF_TOKENS)

    def for_evaluation(self) -> "DataCollatorWithPacking":
        """A copy whose masks are the same at every evaluation."""
        fixed = copy.copy(self)
        fixed._epoch = torch.tensor(EVALUATION_EPOCH)
        return fixed

    def for_prediction(self) -> "DataCollatorWithPacking":
        """for_evaluation, and batches say which sequence is which: sequence_indices, sequence_starts (B, S)."""
        telling = self.for_evaluation()
        telling._tell = ("sequence_indices", "sequence_starts")
        if self.unpacked_rows == "pack":  # packing changes the order, which rows without indices do not survive
            telling.unpacked_rows = "keep"
        return telling

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from the next batch on, in this process and in its dataloader workers."""
        self._epoch.fill_(epoch)

    def callback(self) -> TrainerCallback:
        """For a plain `Trainer`: tells this collator each new epoch, and refuses what plain Trainer gets wrong."""
        from collate.training.plain_trainer import PlainTrainerCallback  # no batch needs it

        return PlainTrainerCallback(self)

    def __call__(
        self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Any] | pa.Table, return_tensors: str | None = None
    ) -> dict[str, Any]:
        return_tensors = self.return_tensors if return_tensors is None else return_tensors
        _check_choice("return_tensors", return_tensors)
        batch = self._arrays(self._read(rows))
        if self.emit in ("attention_mask", "attention_bias"):
            layout = PackLayout.of(torch.from_numpy(batch["sequence_ids"]))
            mask = layout.attention_mask if self.emit == "attention_mask" else layout.attention_bias()
            batch["attention_mask"] = mask.numpy()
        if return_tensors == "np":
            return batch
        return CollatedBatch(
            {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()}
        )

    def _read(self, rows: Any) -> FlatRows:
        levels = replace(self._levels, named=None if self.token_columns is None else tuple(self.token_columns))
        if self.masking_rule is not None:  # it makes the labels that the model's task is about
            levels = replace(levels, labels=None)
        flat = (read_packs if self.unpacked_rows is None else read_sequences)(rows, levels, self.columns)
        if not flat.num_rows:
            raise ValueError("the batch has no rows, so there is nothing to collate; give at least one")
        if self.unpacked_rows == "pack" and self.pad_to is not None:
            flat = pack_sequences(flat, self.pad_to, self.max_sequences_per_pack)
        return flat

    def _arrays(self, flat: FlatRows) -> dict[str, Any]:
        self._refuse_padding(flat)
        _refuse_split_answers(flat)
        input_ids, labels = self._mask(flat)
        flat, tokens, sequences = self._tables(flat)
        batch: dict[str, Any] = {
            "input_ids": tokens.place(input_ids, self.pad_token_id),
            **self._places(flat, tokens, sequences),
        }
        if labels is not None:
            batch["labels"] = tokens.place(labels, IGNORED)
        for name, values in self._passed_on(flat.token_columns):
            batch[name] = tokens.place(_as_tensor_type(values), IGNORED if name == "labels" else 0)
        for name, values in self._passed_on(flat.sequence_columns):
            values = _as_tensor_type(values)
            batch[name] = sequences.place(values, IGNORED if values.dtype == np.int64 else np.nan)
        if self.emit == "flash":
            cu_seqlens, longest = flat.offsets.astype(np.int32), int(flat.lengths.max(initial=0))
            batch |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch

    def _tables(self, flat: FlatRows) -> tuple[FlatRows, "_Table", "_Table"]:
        """The rows of the batch, and where their tokens and their sequences go; flash has one row without padding."""
        width = self._width("pad_to", flat.tokens_per_row, "tokens", "a longer pad_to")
        depth = self._width("max_sequences_per_pack", flat.sequences_per_row, "sequences", "more slots")
        if self.emit == "flash":
            flat = replace(flat, sequences_per_row=np.array([flat.num_sequences]))
            width, depth = flat.num_tokens, flat.num_sequences
        return flat, _Table(flat.tokens_per_row, width), _Table(flat.sequences_per_row, depth)

    def _places(self, flat: FlatRows, tokens: "_Table", sequences: "_Table") -> dict[str, np.ndarray]:
        """Which sequence each token belongs to, its position there, and where each sequence begins."""
        per_row = flat.sequences_per_row
        numbers = np.arange(flat.num_sequences) - np.repeat(offsets_of(per_row)[:-1], per_row)
        sequence_of_token = np.repeat(np.arange(flat.num_sequences), flat.lengths)
        positions = np.arange(flat.num_tokens) - flat.offsets[sequence_of_token]
        start = self.position_ids_start or 0
        # a pack's first [CLS] stands at 0, the next where the first sequence ends
        first_tokens = flat.offsets[:-1] - np.repeat(offsets_of(flat.tokens_per_row)[:-1], per_row)
        return {
            "sequence_ids": tokens.place((numbers + 1).astype(np.int32)[sequence_of_token], PADDING),
            "position_ids": tokens.place(positions + start, start),
            "cls_positions": sequences.place(first_tokens, NO_CLS),
        }

    def _passed_on(self, columns: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        wanted = [name for name in columns if name not in BOOKKEEPING] if self.columns is None else list(self.columns)
        names = [name for name in [*wanted, *self._tell] if name in columns and name != "input_ids"]
        for name in names:
            if name in MADE_HERE:
                raise ValueError(
                    f"column {name!r} would replace what the collator makes by that name; rename it, or leave it out "
                    "with columns=[…]"
                )
        has_labels = self.masking_rule is not None or "labels" in names
        return [("labels" if name in LABELS and not has_labels else name, columns[name]) for name in names]

    def _width(self, option: str, counts: np.ndarray, what: str, cure: str) -> int:
        """Slots of a row: by the option, or by the fullest row of the batch. Raises ValueError for a row with more."""
        limit: int | None = getattr(self, option)
        if limit is None:
            longest = int(counts.max(initial=1))
            return self._rounded(longest) if option == "pad_to" else longest
        if counts.max(initial=0) > limit:
            row = int(counts.argmax())
            raise ValueError(
                f"row {row} of the batch holds {counts[row]} {what}, more than {option}={limit}; "
                f"give the collator {cure} or pack the dataset again"
            )
        return limit

    def _rounded(self, width: int) -> int:
        """Up to a multiple of pad_to_multiple_of."""
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple

    def _refuse_padding(self, flat: FlatRows) -> None:
        if self._pads_only and (flat.token_columns["input_ids"] == self.pad_token_id).any():
            raise ValueError(
                f"a sequence contains the padding token {self.pad_token_id}: it was padded before it was packed; "
                "tokenize without padding, or keep attention_mask so that padding can be trimmed"
            )

    def _mask(self, flat: FlatRows) -> tuple[np.ndarray, np.ndarray | None]:
        """Input ids and labels of all tokens (T,)."""
        if self.masking_rule is None:
            return flat.token_columns["input_ids"].astype(np.int64), None
        masked = mask_rows(self.masking_rule, flat, self.seed, int(self._epoch))
        if self.masking_rule.whole_word_mask and not self._has_said and flat.num_tokens:
            self._say_cut_words(self.masking_rule, flat)
        return masked

    def _say_cut_words(self, rule: MaskingRule, flat: FlatRows) -> None:
        """Once only, for the first batch of all copies of the collator in all processes."""
        self._has_said.fill_(True)
        counts = count_words(rule, flat)
        if counts["cut_tokens"] > CUT_SHARE * counts["tokens"]:
            logger.warning(
                "whole_word_mask: %d of %d tokens of the first batch lie in %d words that are longer than their "
                "sequence's budget, as in scripts without spaces; these tokens are masked one by one; for other words "
                "give a column word_ids; collator.count_words(rows) counts them",
                *(counts["cut_tokens"], counts["tokens"], counts["cut_words"]),
            )

    def count_words(self, rows: Any) -> dict[str, int]:
        """What whole_word_mask=True makes of rows.

        Returns words, and cut_words: those that are longer than the budget of their sequence, so that their tokens are
        masked one by one; tokens and cut_tokens: how many tokens lie in either.
        """
        if self.masking_rule is None or not self.masking_rule.whole_word_mask:
            raise ValueError("count_words is for whole_word_mask=True, which this collator was not given")
        return count_words(self.masking_rule, self._read(rows))


class _Table:
    """Where the values of each row go in a flattened (rows, width) table: counts [2, 1], width 3 -> slots [0, 1, 3]."""

    def __init__(self, counts: np.ndarray, width: int):
        padding_before = np.arange(len(counts)) * width - offsets_of(counts)[:-1]
        self.slots = np.arange(counts.sum()) + np.repeat(padding_before, counts)
        self.shape = (len(counts), width)

    def place(self, values: np.ndarray, fill: float) -> np.ndarray:
        """(values, …) -> (rows, width, …), `fill` where there is no value."""
        table = np.full((self.shape[0] * self.shape[1], *values.shape[1:]), fill, values.dtype)
        table[self.slots] = values
        return table.reshape(*self.shape, *values.shape[1:])


def _check_choice(name: str, value: object) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"unknown {name}={value!r}; choose from {', '.join(map(repr, CHOICES[name]))}")


def _check_widths(limits: Mapping[str, int | None], emit: str, unpacked_rows: str | None) -> None:
    """Raise ValueError for widths below 1, and for widths that contradict each other or what they are for."""
    for name, limit in limits.items():
        if limit is not None:
            whole_number(name, limit, cure=", or None")
    pad_to, multiple = limits["pad_to"], limits["pad_to_multiple_of"]
    if multiple is not None and (emit == "flash" or (pad_to or 0) % multiple):
        what = "emit='flash', which has no padding" if emit == "flash" else f"pad_to={pad_to}, which is no multiple"
        raise ValueError(f"pad_to_multiple_of={multiple} contradicts {what}; leave one of them out")
    if unpacked_rows == "pack" and pad_to is None:
        raise ValueError("unpacked_rows='pack' needs pad_to, the token slots of the packs that it makes")


def _pad_token(tokenizer: Any) -> tuple[int, bool]:
    """Its id, and whether it means nothing but padding."""
    token = tokenizer.pad_token_id
    if token is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token before collating")
    others = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id)
    return token, token not in others


def _refuse_split_answers(flat: FlatRows) -> None:
    """Positions of answers count from the start of the row that was split, and each piece has a copy of them."""
    starts = flat.sequence_columns.get("sequence_starts")
    found = [name for name in ANSWERS if name in flat.sequence_columns]
    if found and starts is not None and starts.any():
        raise ValueError(
            f"{found[0]!r} counts from the start of a row, but a sequence of the batch begins at its token "
            f"{int(starts.max())}: it was split; give the tokenizer max_length and stride, so that every row has its "
            "own answer, or leave the column out"
        )


def _as_tensor_type(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
