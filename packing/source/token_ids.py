"""Ids of tokens that no model has, refused: all tokens are read once, as fast as memory gives them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numba import config

from packing.files.errors import Option, SourceError
from packing.numba_tools import njit
from packing.source.rows import Source, read_source

if TYPE_CHECKING:
    import datasets

ROWS_PER_THREAD = 1 << 14  # a thread is not worth its start for fewer


def read_checked(
    dataset: datasets.Dataset,
    token_columns: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    may_look_padded: bool = False,
) -> Source:
    """read_source, and all ids are looked at. Raises SourceError for an id that no model has, too."""
    source = read_source(dataset, token_columns, pad_token_id, may_look_padded)
    refuse_foreign_ids(source)
    return source


def refuse_foreign_ids(source: Source) -> None:
    """Raise ValueError for a token id that is no int32 from 0 on; padding is not looked at."""
    input_ids = source.input_ids
    type_ = input_ids.value_type
    least = 1 << (31 if type_.bit_width >= 32 else type_.bit_width - 1)  # the lowest id to refuse, without its sign
    if pa.types.is_unsigned_integer(type_) and type_.bit_width < 32:
        return
    for block in input_ids.blocks():
        source.columns.files.check()
        begins = block.starts if source.skipped is None else block.starts + source.skipped[block.rows]
        row = _first_foreign_of_all(input_ids.tokens, begins, source.kept[block.rows], least)
        if row >= 0:
            tokens = input_ids.numbers()[begins[row] : begins[row] + source.kept[block.rows][row]]
            place = int(np.argmax((tokens < 0) | (tokens >= least)))
            what = f"has the token id {tokens[place]} (its token {place}); ids are from 0 to 2**31 - 1"
            cure = f"tokenize again, or leave the row out (if it marks padding, give it as {Option('pad_token_id')})"
            raise SourceError(what, row=block.first + row, cure=cure)


def _first_foreign_of_all(tokens: np.ndarray, begins: np.ndarray, counts: np.ndarray, least: int) -> int:
    """_first_foreign, by several threads: one alone does not read as fast as memory gives."""
    threads = max(1, min(config.NUMBA_NUM_THREADS, len(begins) // ROWS_PER_THREAD))
    bounds = [len(begins) * i // threads for i in range(threads + 1)]

    def first(part: tuple[int, int]) -> int:
        row = _first_foreign(tokens, begins[slice(*part)], counts[slice(*part)], least)
        return -1 if row < 0 else part[0] + row

    if threads == 1:
        return first((0, len(begins)))
    with ThreadPoolExecutor(threads) as pool:
        return next((row for row in pool.map(first, pairwise(bounds)) if row >= 0), -1)


@njit(cache=True, nogil=True)
def _first_foreign(tokens, begins, counts, least):
    """The first row with a token that is `least` or more without its sign, or -1."""
    for row in range(len(begins)):
        first, bits = np.uint64(begins[row]), np.uint64(0)
        for i in range(np.uint64(counts[row])):
            bits |= np.uint64(tokens[first + i])
        if bits >= np.uint64(least):
            return row
    return -1
