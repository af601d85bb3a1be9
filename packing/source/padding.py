"""Padding in a source: trimmed where the source says what it is, refused where it looks like padding unsaid.

attention_mask [0 1 1 1 0 0] -> 1 token skipped at the front, 3 kept        [1 1 0 1] -> refused: a hole
pad_token_id=0 [5 6 7 0 0 0] -> 0 skipped, 3 kept
neither        [[5 6 0 0] [5 0 0 0]] -> refused: every row has one length, and 0 occurs only in runs at the end
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit
from packing.options import checked_pad_token_id
from packing.source.token_column import TokenColumn

NONE = -1


def trim_by_mask(mask: TokenColumn) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to skip at the front of each row, and tokens kept: (rows,) int32 each. Raises for a hole in the mask."""
    skipped, kept = np.zeros(mask.num_rows, np.int32), np.zeros(mask.num_rows, np.int32)
    for block in mask.blocks():
        part = slice(block.first, block.first + len(block.starts))
        culprit = _first_not_binary(mask.numbers(), block.starts, block.lengths)
        if culprit != NONE:
            raise ValueError(
                f"attention_mask has values other than 0 and 1 in row {block.first + culprit}; if they number several "
                "sequences in one row, split the row into its sequences before packing"
            )
        culprit = _trim_zeros(mask.numbers(), block.starts, block.lengths, skipped[part], kept[part])
        if culprit != NONE:
            raise ValueError(
                f"attention_mask has zeros between ones in row {block.first + culprit}; padding can only be at the "
                "ends of a row: remove the masked tokens, or the column attention_mask if they are to be attended to"
            )
    _refuse_all_padding(kept, "attention_mask is 0 everywhere")
    return skipped, kept


def trim_by_token(input_ids: TokenColumn, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """As trim_by_mask, but whatever equals pad_token_id at the ends of a row is padding."""
    pad_token_id = checked_pad_token_id(pad_token_id)
    skipped, kept = np.zeros(input_ids.num_rows, np.int32), np.zeros(input_ids.num_rows, np.int32)
    for block in input_ids.blocks():
        part = slice(block.first, block.first + len(block.starts))
        places = block.starts, block.lengths, pad_token_id
        _trim_token(input_ids.numbers(), *places, skipped[part], kept[part])
    _refuse_all_padding(kept, f"input_ids is pad_token_id={pad_token_id} everywhere")
    return skipped, kept


def refuse_padding(input_ids: TokenColumn, lengths: np.ndarray) -> None:
    """Raise ValueError if the rows look padded: packed as they are they would fill a pack each, and nobody would know.

    1. There are several rows, and all have one length.
    2. The token that most rows end in twice or more is the suspect (then the same for the rows' beginnings).
    3. It occurs nowhere else, and no row consists of it alone.
    4. Every row ends in it twice or more, or two rows end in different numbers of it.

    lengths: of the rows. Memory, where all are alike: some 40 bytes a row for the moment.
    """
    if len(lengths) < 2 or lengths[0] < 2 or lengths.min() != lengths.max():
        return
    tokens, starts, length = input_ids.numbers(), input_ids.starts, int(lengths[0])
    for side, first, step in (("end", starts + length - 1, -1), ("begin", starts, 1)):
        suspect = _most_repeated(tokens[first], tokens[first + step])
        if suspect is None:
            continue
        runs = np.zeros(len(starts), np.int64)
        if not _count_runs(tokens, first, step, length, suspect, runs):
            continue
        if runs.min() >= 2 or len(np.unique(runs[runs > 0])) > 1:
            culprit = int(np.argmax(runs))
            raise ValueError(
                f"the source looks padded: all {len(lengths)} rows have {length} tokens, and "
                f"{np.count_nonzero(runs)} of them {side} with token {suspect} "
                f"(row {culprit} with {runs[culprit]} of it), which occurs nowhere else; tokenize without padding, "
                "keep the column attention_mask, or give pad_token_id=, the token to trim "
                f"(if {suspect} is not padding, give the true id)"
            )


def _refuse_all_padding(kept: np.ndarray, reason: str) -> None:
    if not kept.all():
        raise ValueError(f"row {int(np.argmin(kept != 0))} is nothing but padding: {reason}; leave the row out")


def _most_repeated(outer: np.ndarray, inner: np.ndarray) -> int | None:
    """The token that is most often the last of a row and the one before it, too."""
    values, counts = np.unique(outer[outer == inner], return_counts=True)
    return int(values[np.argmax(counts)]) if len(values) else None


@njit(cache=True, nogil=True)
def _first_not_binary(mask, starts, lengths):
    """The first row with a value other than 0 and 1, or NONE."""
    for row in range(len(starts)):
        for i in range(starts[row], starts[row] + lengths[row]):
            if mask[i] != 0 and mask[i] != 1:
                return row
    return NONE


@njit(cache=True, nogil=True)
def _trim_zeros(mask, starts, lengths, skipped, kept):
    """Fill skipped and kept; returns the first row with a zero between ones, or NONE."""
    for row in range(len(starts)):
        first, end = starts[row], starts[row] + lengths[row]
        while first < end and mask[first] == 0:
            first += 1
        while end > first and mask[end - 1] == 0:
            end -= 1
        for i in range(first, end):
            if mask[i] == 0:
                return row
        skipped[row], kept[row] = first - starts[row], end - first
    return NONE


@njit(cache=True, nogil=True)
def _trim_token(tokens, starts, lengths, token, skipped, kept):
    """Fill skipped and kept: the token is padding at both ends of a row, and a token in between."""
    for row in range(len(starts)):
        first, end = starts[row], starts[row] + lengths[row]
        while first < end and tokens[first] == token:
            first += 1
        while end > first and tokens[end - 1] == token:
            end -= 1
        skipped[row], kept[row] = first - starts[row], end - first


@njit(cache=True, nogil=True)
def _count_runs(tokens, first, step, length, suspect, runs):
    """Fill runs: how often the suspect repeats from `first` on, going by `step`.

    False if it occurs after its run, or fills a row."""
    for row in range(len(first)):
        run = 0
        while run < length and tokens[first[row] + step * run] == suspect:
            run += 1
        if run == length:
            return False
        for i in range(run, length):
            if tokens[first[row] + step * i] == suspect:
                return False
        runs[row] = run
    return True
