"""Which packs meet in an optimizer step, so that every step holds the same number of sequences.

Packs hold different numbers of sequences, their depths. If packs were drawn blindly, the sequences of a step would vary
by some per cent, and with them the weight of a sequence. Here a step has exactly N, in as many packs as it takes:

    depths of all packs     3 2 1 1 2 3 1 1 2     N = 5
    steps                   (3 2) (1 1 3) (1 1 2) + the 1 that is left, a step of its own at the end of the epoch

1. plan_steps: which depths meet. Every step gets its share of each depth, then exchanges depths until the sum fits.
   Only the number of packs of each depth decides this, so every epoch has the same plan, and needs the same slots.
2. lay_out_steps: which packs these are, and the order of steps: uniformly random under (seed, epoch).
3. deal_packs: the packs of a step to its micro-batches, equal numbers (give or take one) of nearly equal cost.

A step has accumulation x ranks x packs-per-pass slots, whatever it holds; empty packs fill those that are left over.
They cost what the model spends on padding: nothing where it drops it (PackedBertForPreTraining), a row each in stock
models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, Sampler

from packing import EpochPacks
from packing.files.errors import Option, OptionError, whole_number
from packing.numba_tools import njit

NO_DEPTH = -1
GOLDEN = 0.6180339887498949

EMPTY_PACK: dict[str, list] = {"input_ids": [], "sequence_lengths": []}
"""A row without any sequence: no loss, no denominator, no gradient."""


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Which depths meet in each step.

    depths: (packs,) step after step; step_offsets: (steps + 1,) where each begins. The first step is incomplete;
    lay_out_steps puts it at the end of the epoch.
    """

    depths: np.ndarray
    step_offsets: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1

    @property
    def packs(self) -> np.ndarray:
        """(steps,) packs in each."""
        return np.diff(self.step_offsets)

    @property
    def most_packs(self) -> int:
        """The slots that a step needs."""
        return int(self.packs.max())

    @property
    def sequences(self) -> np.ndarray:
        """(steps,) sequences in each."""
        return np.add.reduceat(self.depths.astype(np.int64), self.step_offsets[:-1])


def plan_steps(depths: np.ndarray, sequences_per_step: int) -> StepPlan:
    """Share out packs, given by their depths, to ceil(sequences / sequences_per_step) steps.

    Each step in turn takes packs of the depth that is furthest behind its share, until it has enough. If it has too
    many sequences, it exchanges a pack, or two, for shallower ones that are still to be dealt. Where no exchange fits
    (packs of 3 do not make 256), the step has the nearest number that one exchange gives, and the next makes up for it.
    The number of steps stays, none is empty, and each pack has its place once.

    Raises ValueError if a pack holds more than sequences_per_step.
    """
    depths = np.asarray(depths, np.int64)
    whole_number("sequences_per_step", sequences_per_step)
    if not len(depths):
        raise ValueError("the training dataset has no packs")
    deepest = int(depths.max())
    if deepest > sequences_per_step:
        given, pack = (Option(name, sequences_per_step) for name in ("sequences_per_step", "max_sequences_per_pack"))
        what = f"{given} is less than the {deepest} sequences of the deepest pack"
        raise OptionError(f"{what}; set it to {deepest} or more, or pack with {pack}")
    found, counts = np.unique(depths, return_counts=True)
    num_steps = -(-int(depths.sum()) // sequences_per_step)
    planned, offsets = np.empty(len(depths), np.int32), np.empty(num_steps + 1, np.int64)
    _share_out(found, counts.astype(np.int64), sequences_per_step, planned, offsets)
    return StepPlan(planned, offsets)


def pack_costs(lengths: np.ndarray, pack_offsets: np.ndarray, width: int) -> np.ndarray:
    """(packs,) the cost of each to an encoder, in units of attention's: Σ n² + 6 · width · tokens over its sequences.

    A layer's matrices take 24 · width² FLOPs a token, its attention 4 · width · n² a sequence.
    """
    lengths = lengths.astype(np.int64)
    return np.add.reduceat(lengths * lengths + 6 * width * lengths, pack_offsets[:-1])


def lay_out_steps(plan: StepPlan, depths: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """(steps, plan.most_packs) packs of each step in the order of the epoch; empty slots have number len(depths).

    Each pack is equally likely in every place that the plan has for its depth. The order of steps is random, except
    that an incomplete one is the last.
    """
    draw = np.random.default_rng([seed, epoch])
    packs = draw.permutation(len(depths))
    chosen = np.empty_like(packs)
    chosen[np.argsort(plan.depths, kind="stable")] = packs[np.argsort(depths[packs], kind="stable")]
    order = np.append(1 + draw.permutation(plan.num_steps - 1), 0)
    table = np.full((plan.num_steps, plan.most_packs), len(depths))
    counts = plan.packs[order]
    first = np.repeat(plan.step_offsets[order] - (np.cumsum(counts) - counts), counts)
    table[np.arange(plan.most_packs) < counts[:, None]] = chosen[first + np.arange(len(chosen))]
    return table


def deal_packs(steps: np.ndarray, costs: np.ndarray, num_parts: int, packs_per_part: int) -> np.ndarray:
    """(steps, num_parts, packs_per_part) the packs of each step, dealt to parts; empty slots have number len(costs).

    Each round deals the costliest packs left, one to each part, the costliest of them to the cheapest part so far
    (Graham's longest-first rule for equal numbers). steps: as lay_out_steps returns them.
    """
    num_steps, most_packs = steps.shape
    rounds = -(-most_packs // num_parts)
    if rounds > packs_per_part:
        raise ValueError(f"{most_packs} packs do not fit into {num_parts} x {packs_per_part} slots")
    costs = np.append(costs, 0)
    table = np.full((num_steps, rounds * num_parts), len(costs) - 1)
    table[:, :most_packs] = steps
    table = np.take_along_axis(table, np.argsort(-costs[table], axis=1, kind="stable"), 1)
    dealt = np.full((num_steps, num_parts, packs_per_part), len(costs) - 1)
    so_far = np.zeros((num_steps, num_parts), costs.dtype)
    for turn in range(rounds):
        packs = table[:, turn * num_parts : (turn + 1) * num_parts]
        cheapest_first = np.argsort(so_far, axis=1, kind="stable")
        np.put_along_axis(dealt[:, :, turn], cheapest_first, packs, 1)
        so_far += np.take_along_axis(costs[packs], np.argsort(cheapest_first, axis=1), 1)
    return dealt


class SequencesPerStep(Sampler):
    """Packs in the order of training, `sequences_per_step` sequences to an optimizer step.

    Empty packs have number len(dataset), see EvenedPacks. accelerate deals batches of packs_per_pass to the ranks in
    turns: 2 passes on 2 ranks are rank 0, rank 1, rank 0, rank 1 | the next step

    dataset: one of pack_dataset, or EpochPacks, which it tells each new epoch. width: the model's, see pack_costs.
    """

    def __init__(
        self, dataset: Any, sequences_per_step: int, packs_per_pass: int, passes: int, ranks: int, seed: int, width: int
    ):
        self.dataset, self.seed, self.width, self.epoch = dataset, seed, width, 0
        self.packs_per_pass, self.parts = packs_per_pass, passes * ranks
        self.plan = plan_steps(pack_depths(dataset), sequences_per_step)
        slots = self.parts * packs_per_pass
        if self.plan.most_packs > slots:
            raise ValueError(
                f"{sequences_per_step} sequences take up to {self.plan.most_packs} packs, a step has {slots} slots: "
                f"per_device_train_batch_size={packs_per_pass}, {passes} passes (gradient_accumulation_steps), {ranks} "
                f"ranks; set gradient_accumulation_steps={-(-self.plan.most_packs // (packs_per_pass * ranks))}"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.dataset, EpochPacks):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self.plan.num_steps * self.parts * self.packs_per_pass

    def __iter__(self) -> Iterator[int]:
        lengths, offsets = pack_lengths(self.dataset)
        steps = lay_out_steps(self.plan, np.diff(offsets), self.seed, self.epoch)
        dealt = deal_packs(steps, pack_costs(lengths, offsets, self.width), self.parts, self.packs_per_pass)
        for step in dealt:
            yield from step.ravel().tolist()


def pack_lengths(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of all sequences, pack after pack, and (packs + 1,) where each pack begins among them."""
    return (dataset if isinstance(dataset, EpochPacks) else EpochPacks(dataset)).pack_lengths()


def pack_depths(dataset: Any) -> np.ndarray:
    """(packs,) sequences in each."""
    return np.diff(pack_lengths(dataset)[1])


class StepSampler(Sampler):
    """Packs in random order by whole steps of packs_per_step; an incomplete step stays at the end.

    packs 0 1 | 2 3 | 4 5 | 6, packs_per_step 2  ->  4 5 0 1 2 3 6, say

    A balanced dataset stays balanced: the packs of a step are those that were put together.

    length: if more than num_packs, empty packs follow, see EvenedPacks. They too stay at the end, so that the order
        depends on (seed, epoch) and not on the number of ranks.
    """

    def __init__(self, num_packs: int, packs_per_step: int, seed: int, length: int | None = None):
        self.num_packs, self.packs_per_step, self.seed, self.epoch = num_packs, packs_per_step, seed, 0
        self.length = num_packs if length is None else length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        complete = self.num_packs // self.packs_per_step
        draw = np.random.default_rng([self.seed, self.epoch])
        for step in draw.permutation(complete).tolist():
            yield from range(step * self.packs_per_step, (step + 1) * self.packs_per_step)
        yield from range(complete * self.packs_per_step, self.length)


class ArrowRows(Dataset):
    """A `datasets.Dataset` that gives a batch as one Arrow table, for a collator that reads those."""

    def __init__(self, dataset: Any):
        self.dataset = dataset.with_format("arrow")

    @staticmethod
    def can_hold(dataset: Any) -> bool:
        """Whether Arrow has all that the rows have: not where the dataset has a transform of its own."""
        form = getattr(dataset, "format", None)
        return isinstance(form, dict) and form.get("type") in (None, "numpy", "torch", "arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> pa.Table:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> pa.Table:
        return self.dataset[list(indices)]


class EvenedPacks(Dataset):
    """A packed dataset followed by empty packs, up to a multiple of what all ranks take at once.

    7 packs, multiple 4  ->  7 packs and 1 that holds no sequence: no loss, no denominator, no gradient.

    Every pack with a higher number, which a sampler may ask for, is empty, too. A batch of empty packs alone has the
    columns of others: accelerate's dispatch joins it to them.
    """

    def __init__(self, packs: Any, multiple: int):
        self.packs = packs
        self.num_packs = len(packs)
        self.padded_length = -(-len(packs) // multiple) * multiple

    def __len__(self) -> int:
        return self.padded_length

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        real = [index for index in indices if index < self.num_packs]
        num_empty = len(indices) - len(real)
        if not real:
            return [self._nothing] * num_empty
        rows = self.packs.__getitems__(real) if hasattr(self.packs, "__getitems__") else [self.packs[i] for i in real]
        if not num_empty:
            return rows
        if isinstance(rows, pa.Table) and all(pa.types.is_list(type_) for type_ in rows.schema.types):
            empty = {field.name: pa.array([[]] * num_empty, field.type) for field in rows.schema}
            return pa.concat_tables([rows, pa.table(empty)])
        if not isinstance(rows, list):
            rows = rows.to_pylist()
        return rows + [EMPTY_PACK] * num_empty

    @cached_property
    def _nothing(self) -> dict:
        """An empty pack with the types of the first one, and the values of no sequence in their shapes."""
        rows = self.packs[0] if self.num_packs else {}
        first = rows.to_pylist()[0] if isinstance(rows, pa.Table) else rows
        is_packed = "sequence_lengths" in first
        arrays = {name: _as_array(value if is_packed else [value]) for name, value in first.items()}
        return {name: array[:0] for name, array in arrays.items() if array is not None} | EMPTY_PACK


def _as_array(value: Any) -> np.ndarray | None:
    """A list of numbers, or of lists of as many numbers; None: it is something else."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lists
        return None
    return array if array.ndim and array.dtype.kind in "biuf" else None


@njit(cache=True)
def _share_out(depths, counts, sequences_per_step, planned, offsets):
    """plan_steps. depths: different ones, ascending; counts: packs of each. Fills planned and offsets."""
    kinds, last = len(depths), len(offsets) - 2
    dealt, taken = np.zeros(kinds, np.int64), np.zeros(kinds, np.int64)
    kind_of = np.full(depths[-1] + 1, NO_DEPTH)
    for kind in range(kinds):
        kind_of[depths[kind]] = kind
    total = (depths * counts).sum()
    end = total - last * sequences_per_step  # sequences dealt when a step is full
    placed, filled = 0, 0
    offsets[0] = 0
    for step in range(last + 1):
        taken[:] = 0
        while placed < end or (step == last and placed < total):
            kind = _most_overdue(dealt, counts)
            dealt[kind] += 1
            taken[kind] += 1
            placed += depths[kind]
        if step < last and placed > end:
            placed -= _take_off(placed - end, depths, counts, kind_of, dealt, taken)
        for kind in range(kinds):
            for _ in range(taken[kind]):
                planned[filled] = depths[kind]
                filled += 1
        offsets[step + 1] = filled
        end += sequences_per_step


@njit(cache=True)
def _most_overdue(dealt, counts):
    """The kind whose next pack is due first; at least one kind has packs left."""
    best, least = NO_DEPTH, 2.0
    for kind in range(len(counts)):
        if dealt[kind] < counts[kind] and _turn(kind, dealt[kind], counts) < least:
            best, least = kind, _turn(kind, dealt[kind], counts)
    return best


@njit(cache=True)
def _turn(kind, number, counts):
    """When in the epoch, 0 to 1, pack `number` of a kind is due.

    Kinds begin at different times, multiples of the golden ratio, so that rare kinds are not all due at once.
    """
    return (number + (kind + 1) * GOLDEN % 1.0) / counts[kind]


@njit(cache=True)
def _take_off(excess, depths, counts, kind_of, dealt, taken):
    """Exchange packs of a step until it has `excess` sequences less, or nearly so. In place; returns how many less."""
    if _exchange(excess, depths, counts, kind_of, dealt, taken):
        return excess
    for out in range(len(depths)):  # two exchanges, the first of any amount
        for into in range(len(depths)):
            if out == into or taken[out] == 0 or dealt[into] == counts[into]:
                continue
            _move(out, into, dealt, taken)
            if _exchange(excess - depths[out] + depths[into], depths, counts, kind_of, dealt, taken):
                return excess
            _move(into, out, dealt, taken)
    for error in range(1, excess):
        for wanted in (excess - error, excess + error):
            if _exchange(wanted, depths, counts, kind_of, dealt, taken):
                return wanted
    return 0


@njit(cache=True)
def _exchange(excess, depths, counts, kind_of, dealt, taken):
    """Give back a pack of the step for one that has `excess` sequences less, or for none. Returns whether one fits.

    Among those that fit it takes the most overdue for the least overdue. In place."""
    best_out, best_into, least = NO_DEPTH, NO_DEPTH, 3.0
    packs = taken.sum()
    for out in range(len(depths)):
        wanted = depths[out] - excess
        if taken[out] == 0 or wanted < 0 or wanted >= len(kind_of) or (wanted == 0 and packs == 1):
            continue
        into = kind_of[wanted] if wanted > 0 else NO_DEPTH
        if wanted > 0 and (into == NO_DEPTH or dealt[into] == counts[into]):
            continue
        before = _turn(out, dealt[out] - 1, counts)
        after = _turn(into, dealt[into], counts) if wanted > 0 else 1.0
        if after - before < least:
            best_out, best_into, least = out, into, after - before
    if best_out == NO_DEPTH:
        return False
    _move(best_out, best_into, dealt, taken)
    return True


@njit(cache=True)
def _move(out, into, dealt, taken):
    """One pack of kind `out` back to the pool, one of kind `into` (none: NO_DEPTH) to the step. In place."""
    dealt[out] -= 1
    taken[out] -= 1
    if into != NO_DEPTH:
        dealt[into] += 1
        taken[into] += 1
