"""pack_stream: tokenized stream -> packed stream, buffer by buffer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.features.features import encode_nested_example

from packing.files.errors import SourceError, whole_number
from packing.options import PackOptions
from packing.source.exact import REFUSALS, NotHeldError, exact_array
from packing.source.rows import INPUT_IDS, closing_token, last_tokens
from packing.source.sequences import DONE
from packing.source.token_column import AS_BYTES
from packing.source.token_ids import read_checked
from packing.store.contents import gather_all, plan_packing
from packing.store.info import INDICES, packed_facts

logger = logging.getLogger(__name__)

PACKER = "lpfhp"  # best fit, longest sequences first
FIRST_ROWS = 1_000  # columns and types follow from them
TOO_FEW = 100  # rows that may look padded by chance


def pack_stream(
    dataset: datasets.IterableDataset,
    max_sequence_length: int = 512,
    max_sequences_per_pack: int | None = None,
    buffer_size: int = 10_000,
    overlong: str = "error",
    seed: int = 0,
    *,
    token_columns: Sequence[str] | None = None,
    pad_token_id: int | None = None,
) -> datasets.IterableDataset:
    """Pack a stream of tokenized rows, endless or not: the next buffer_size rows at a time, every sequence once.

    [7 8] [5 6 4] | [9 9] [3] …   buffer_size=2, max_sequence_length=5   ->   [7 8 5 6 4] [9 9 3] …

    buffer_size: rows packed at a time. Each buffer ends in some packs that are not full; larger ones lose less and take
        more memory.
    seed: decides which of equally long sequences lie together, and the order of a buffer's packs.
    The others are as for pack_dataset. "truncate" keeps the last token of a row if all of the first rows end in it.

    Returns a map over `dataset` with packs as pack_dataset makes them, but without sequence_indices: no number is
    unique over the shards of a stream. What datasets does for streams it does for packs: resume, shards for workers and
    nodes, set_epoch, formats. packed_info tells what can be known; counts are None. docs/packing.md says what does not
    resume exactly.

    The first thousand rows decide the columns and their types. Raises ValueError for these at once, and while the
    stream is read for a later row that differs. What is cut, dropped or trimmed is logged when first met, and then at
    every tenfold count, by each process for itself.
    """
    _check_stream(dataset)
    buffer_size = whole_number("buffer_size", buffer_size)
    given = locals() | {"packer": PACKER}  # all arguments, by name
    options = PackOptions(**{option.name: given[option.name] for option in fields(PackOptions) if option.name in given})
    dataset = dataset.with_format(None)
    # Each table may have its own types without features, and a cast would turn numbers into text.
    is_arrow = dataset.features is not None and getattr(dataset._ex_iterable, "iter_arrow", None) is not None
    first, features = _first_rows(dataset, is_arrow)
    with _hint(first):
        rows = _as_dataset(first, features)
        packing = plan_packing(rows, read_checked(rows, token_columns, pad_token_id), options)
    names = packing.facts.token_columns
    packed_features = datasets.Features({name: f for name, f in packing.features.items() if name != INDICES})
    of_buffers = replace(options, token_columns=[name for name in names if name != INPUT_IDS])
    closing = closing_token(packing.source) if overlong == "truncate" else None
    stream = _has_shuffle_buffer(dataset._ex_iterable), dataset.features is not None
    pack = _PackBuffer(features, packed_features, of_buffers, closing, *stream)
    form = {"batched": True, "batch_size": buffer_size, "with_indices": True, "features": packed_features}
    if is_arrow:
        packed = dataset.with_format("arrow").map(pack, **form).with_format(None)
    else:
        gone = [name for name in features if name not in packed_features]  # attention_mask; all others are replaced
        packed = _uncast(dataset).map(pack, remove_columns=gone, **form)
    counts = dict.fromkeys(("source_rows", "num_sequences", "num_packs", "num_tokens"))  # nobody knows
    of_stream = {"max_depth": options.max_sequences_per_pack, "buffer_size": buffer_size}
    facts = packed_facts(options, token_columns=names, **of_stream, **counts)
    packed.info.description = facts.to_description()
    return packed


@dataclass(eq=False)
class _PackBuffer:
    """One buffer of rows -> its packs; what is kept from one to the next are counts alone.

    features: of the rows; packed_features: of the packs. options: of each buffer.
    closing: the token that all rows end in; None: they do not.
    is_shuffled: whether rows come through a buffer of datasets, which a resumed stream has lost.
    is_declared: whether the stream itself says what types its columns have.
    coming: numbers of the rows that come next, how often each. Whoever reads a stream numbers its rows from 0 on;
        datasets may read several shards in turns.
    """

    features: datasets.Features
    packed_features: datasets.Features
    options: PackOptions
    closing: int | None
    is_shuffled: bool
    is_declared: bool
    coming: Counter = field(default_factory=Counter)
    seen: Counter = field(default_factory=Counter)

    def __call__(self, rows: pa.Table | dict[str, list], numbers: list[int]) -> pa.Table | dict[str, list]:
        """Rows and packs as a table, or both as lists. numbers: of the rows."""
        if self.is_shuffled and numbers[0] and not self.coming[numbers[0]]:
            raise ValueError(
                "this stream was resumed in the middle, and comes through shuffle(buffer_size=…), a buffer that "
                "datasets does not save: rows would be lost, and others come twice; start over and skip the packs that "
                "are done, as a Trainer does, or shuffle shards alone: shuffle(buffer_size=1), and read without workers"
            )
        self.coming = self.coming - Counter(numbers[:1]) + Counter([numbers[-1] + 1])
        table = rows if isinstance(rows, pa.Table) else _as_table(rows, self.features, self.is_declared)
        with _hint(table):
            packs = self._packs(table)
        if isinstance(rows, pa.Table):
            return packs
        return {name: _as_lists(packs.column(name).combine_chunks()) for name in packs.column_names}

    def _packs(self, table: pa.Table) -> pa.Table:
        rows, options, longest = _as_dataset(table, self.features), self.options, self.options.max_sequence_length
        source = read_checked(rows, options.token_columns, options.pad_token_id, len(table) < TOO_FEW)
        if options.overlong == "drop" and source.kept.min() > longest:
            self._say_overlong(source.num_rows, int(source.kept.sum(dtype=np.int64)))
            return self.packed_features.arrow_schema.empty_table()
        if options.overlong == "truncate":  # the first rows decide, not the rest of the buffer
            closed = False if self.closing is None else np.concatenate([t == self.closing for t in last_tokens(source)])
            source = replace(source, ends_alike=closed)
        seed = _seed_of(table, options.seed)
        packing = plan_packing(rows, source, replace(options, seed=seed))
        facts = packing.facts
        self._say("have padding trimmed", "tokens of it", facts.trimmed_rows, facts.trimmed_tokens)
        self._say_overlong(len(facts.overlong_rows), facts.overlong_tokens)
        return pa.Table.from_batches(gather_all(packing)).select(list(self.packed_features))

    def _say_overlong(self, rows: int, tokens: int) -> None:
        if not rows:
            return
        what = f"have more than {self.options.max_sequence_length} tokens: {DONE[self.options.overlong]}"
        self._say(what, "tokens lost", rows, tokens)

    def _say(self, what: str, tokens_are: str, rows: int, tokens: int) -> None:
        """Count; say so for the first rows and whenever there are ten times as many."""
        before = self.seen[what, "rows"]
        self.seen[what, "rows"] += int(rows)
        self.seen[what, "tokens"] += int(tokens)
        after = self.seen[what, "rows"]
        if after and len(str(after)) > (len(str(before)) if before else 0):
            logger.warning(
                "%d rows so far %s, %d %s; said again at %d rows",
                *(after, what, self.seen[what, "tokens"], tokens_are, 10 ** len(str(after))),
            )


def _check_stream(dataset: object) -> None:
    if isinstance(dataset, datasets.IterableDatasetDict | datasets.DatasetDict):
        what = f"{type(dataset).__name__} with splits {', '.join(map(str, dataset))} was given"
        raise TypeError(f"{what}; pack split by split: pack_stream(dataset['train'])")
    if not isinstance(dataset, datasets.IterableDataset):
        is_whole = isinstance(dataset, datasets.Dataset)
        whole = "use pack_dataset, which packs it as a whole, or dataset.to_iterable_dataset(num_shards=…)"
        cure = whole if is_whole else "make one with IterableDataset.from_generator"
        raise TypeError(f"pack_stream needs a datasets.IterableDataset, got {type(dataset).__name__}; {cure}")


def _has_shuffle_buffer(rows: Any) -> bool:
    """Whether datasets keeps rows back to shuffle them, anywhere on their way."""
    if type(rows).__name__ == "BufferShuffledExamplesIterable" and rows.buffer_size > 1:
        return True
    inner = [getattr(rows, "ex_iterable", None), *getattr(rows, "ex_iterables", ())]
    return any(_has_shuffle_buffer(each) for each in inner if each is not None)


def _first_rows(dataset: datasets.IterableDataset, is_arrow: bool) -> tuple[pa.Table, datasets.Features]:
    """The first thousand rows, and what types all rows have."""
    plain = dataset.with_format("arrow") if is_arrow else _uncast(dataset)
    rows = next(iter(plain.iter(FIRST_ROWS)), None)
    if rows is None:
        raise ValueError("the stream is empty: it has no rows to pack")
    if is_arrow:
        return rows, dataset.features
    features = dataset.features
    if features is None:
        schema = pa.table({name: _as_array(name, rows[name]) for name in rows}).schema
        features = datasets.Features.from_arrow_schema(schema)
    return _as_table(rows, features, dataset.features is not None), features


def _uncast(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    """The stream with its values as they come: datasets would cut 4.75 to a declared integer."""
    plain = dataset.with_format(None)  # a copy
    plain._info = dataset._info.copy()
    plain._info.features = None
    return plain


def _as_table(rows: dict[str, list], features: datasets.Features, is_declared: bool) -> pa.Table:
    other = [name for name in rows if name not in features]
    if other:
        row = next((i for i, value in enumerate(rows[other[0]]) if value is not None), 0)
        raise ValueError(
            f"column {other[0]!r} is in row {row} of a buffer, but not among {', '.join(features)}, the columns of the "
            "stream so far; give all rows the same columns, or remove it"
        )
    missing = [None] * len(next(iter(rows.values())))
    columns = [_as_array(name, rows.get(name, missing), feature, is_declared) for name, feature in features.items()]
    return pa.table(columns, features.arrow_schema)


def _as_array(name: str, values: list, feature: Any = None, is_declared: bool = False) -> pa.Array:
    type_ = None if feature is None else datasets.Features({name: feature}).arrow_schema.field(name).type
    try:
        if is_declared and not _is_of_values(feature):
            values = [_encoded(feature, value) for value in values]
        return exact_array(values, type_, rounds=is_declared)
    except REFUSALS as error:
        if is_declared and _is_of_values(feature):  # numbers may be declared as text
            with suppress(*REFUSALS):
                return exact_array([_encoded(feature, value) for value in values], type_, rounds=True)
        known = "be of one type in all rows" if type_ is None else f"hold {type_}, by the features or the first rows"
        where = f" in row {error.row} of a buffer" if isinstance(error, NotHeldError) else ""
        cure = "give the stream features that all rows have (from_generator(features=…), cast), or remove the column"
        raise ValueError(f"column {name!r} must {known}, which it does not{where}: {error}; {cure}") from None


def _encoded(feature: Any, value: Any) -> Any:
    """As datasets encodes it for a declared feature: names of classes, images. Only numbers stay as they are: datasets
    would cut them."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: _encoded(feature[name], inner) if name in feature else inner for name, inner in value.items()}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list | tuple):
        return [_encoded(inner, each) for each in value]
    is_number = isinstance(feature, datasets.Value) and feature.pa_type not in AS_BYTES
    return value if value is None or is_number else encode_nested_example(feature, value)


def _is_of_values(feature: Any) -> bool:
    """Whether a feature is of plain values alone, in lists and structs, too."""
    if isinstance(feature, dict):
        return all(map(_is_of_values, feature.values()))
    if isinstance(feature, list):
        return _is_of_values(feature[0])
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _is_of_values(feature.feature)
    return isinstance(feature, datasets.Value)


def _as_lists(packs: pa.Array) -> list[list]:
    """to_pylist, which makes an object of Arrow and then one of Python for each number; this is six times as fast."""
    values = packs.flatten()
    if values.null_count or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return packs.to_pylist()
    values, ends = values.to_numpy().tolist(), np.cumsum(_lengths(packs)).tolist()
    return [values[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _as_dataset(table: pa.Table, features: datasets.Features) -> datasets.Dataset:
    types = datasets.Features({name: features[name] for name in table.column_names if name in features})
    # a fingerprint of its own would be a hash of all tokens
    return datasets.Dataset(table, datasets.DatasetInfo(features=types), fingerprint="buffer")


def _seed_of(table: pa.Table, seed: int) -> int:
    """Buffers are drawn by their content: at the same places of each buffer nothing would be the same by design."""
    lengths = _lengths(table.column(INPUT_IDS))
    return int.from_bytes(blake2b(lengths.tobytes(), digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def _lengths(lists: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(rows,) int64; a row without a list has 0."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)


@contextmanager
def _hint(table: pa.Table) -> Iterator[None]:
    """An error names a row by its number in a buffer. Its hint says how the row begins."""
    try:
        yield
    except SourceError as error:
        if error.row is not None and INPUT_IDS in table.column_names:
            tokens = (table.column(INPUT_IDS)[error.row].as_py() or [])[:8]
            error.hint = f"rows are counted in a buffer of {len(table)}: row {error.row} begins with input_ids {tokens}"
        raise
