"""PackLayout: the drawing, its views against slow twins, and what it refuses."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collate import PackLayout

DRAWN = PackLayout(torch.tensor([[1, 1, 1, 2, 2, 0]]))


def test_the_drawing():
    assert DRAWN.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert DRAWN.cu_seqlens.tolist() == [0, 3, 5] and DRAWN.cu_seqlens.dtype == torch.int32
    assert DRAWN.lengths.tolist() == [3, 2]
    assert DRAWN.sequence_of_token.tolist() == [0, 0, 0, 1, 1]
    assert DRAWN.token_index.tolist() == [0, 1, 2, 3, 4]
    assert DRAWN.token_of_slot.tolist() == [0, 1, 2, 3, 4, -1]


def test_the_mask_is_block_diagonal():
    mask = PackLayout(torch.tensor([[1, 1, 2, 0]])).attention_mask
    assert mask.int().tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]]]


@st.composite
def packs(draw):
    """(B, L) sequence_ids with padding before, between and after sequences."""
    width = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row, number = [], 0
        while len(row) < width:
            piece = min(draw(st.integers(1, 8)), width - len(row))
            if draw(st.booleans()):
                row += [0] * piece
            else:
                number += 1
                row += [number] * piece
        rows.append(row)
    return torch.tensor(rows)


@given(packs())
def test_views_equal_their_slow_twins(sequence_ids):
    layout = PackLayout(sequence_ids)
    positions, lengths, rows = [], [], sequence_ids.tolist()
    for row in rows:
        seen = dict.fromkeys(row, 0)
        positions.append([])
        for number in row:
            positions[-1].append(seen[number] if number else 0)
            seen[number] += 1
        lengths += [count for number, count in seen.items() if number]
    assert layout.positions.tolist() == positions
    assert layout.lengths.tolist() == lengths
    assert layout.num_sequences == len(lengths) and layout.num_tokens == sum(lengths)
    for row, mask in zip(rows, layout.attention_mask[:, 0].tolist(), strict=True):
        assert mask == [[query == key != 0 for key in row] for query in row]
    assert ((layout.attention_bias()[:, 0] == 0) == layout.attention_mask[:, 0]).all()
    real = sequence_ids != 0
    values = torch.arange(sequence_ids.numel()).view_as(sequence_ids) + 1
    assert layout.unpad(values).tolist() == values[real].tolist()
    assert (layout.pad(layout.unpad(values)) == values * real).all()
    starts = [end - length for length, end in zip(lengths, layout.cu_seqlens[1:].tolist(), strict=True)]
    assert starts == layout.cu_seqlens[:-1].tolist()


@pytest.mark.parametrize("ids", [[[2, 2]], [[1, 3]], [[1, 2, 1]], [[1, 0, 1]], [[-1]]])
def test_ids_that_no_packing_produces_are_refused(ids):
    with pytest.raises(ValueError, match="pack 0 must count 1, 2, 3"):
        PackLayout(torch.tensor(ids))


@pytest.mark.parametrize("ids", [torch.ones(3), torch.ones(2, 3), torch.ones(3, dtype=torch.long)])
def test_only_integer_tables_are_layouts(ids):
    with pytest.raises(ValueError, match="must be \\(packs, slots\\) integers"):
        PackLayout(ids)


def test_a_layout_is_kept_with_its_ids():
    ids = torch.tensor([[1, 1, 2, 0]])
    layout = PackLayout.of(ids)
    assert PackLayout.of(ids) is layout
    assert PackLayout.of(ids.clone()) is not layout


def test_ids_that_were_written_anew_get_a_new_layout():
    ids = torch.tensor([[1, 1, 2, 0]])
    before = PackLayout.of(ids)
    ids.numpy()[0, 1] = 2  # does not change the tensor's version
    assert PackLayout.of(ids).lengths.tolist() == [1, 2]
    assert before.lengths.tolist() == [2, 1]
    ids[0, 1] = 7
    with pytest.raises(ValueError, match="must count 1, 2, 3"):
        PackLayout.of(ids)


def test_a_kept_layout_does_not_keep_its_ids_alive():
    ids = torch.tensor([[1, 1, 2, 0]])
    PackLayout.of(ids)
    gone = weakref.ref(ids)
    gc.disable()
    try:
        del ids
        assert gone() is None
    finally:
        gc.enable()


def test_a_copy_of_a_batch_holds_tensors_alone():
    """The cache lies beside the tensor, so a batch can be copied and saved as before."""
    ids = torch.tensor([[1, 1, 2, 0]])
    layout = PackLayout.of(ids)
    copied = copy.deepcopy({"sequence_ids": ids})["sequence_ids"]
    assert vars(ids) == vars(copied) == {}
    copied[0, 2] = 1
    assert PackLayout.of(copied).lengths.tolist() == [3]
    assert PackLayout.of(ids) is layout and layout.lengths.tolist() == [2, 1]


def test_threads_get_the_layouts_of_their_own_ids():
    wrong = []

    def work(length):
        for _ in range(200):
            ids = torch.tensor([[1] * length + [2] * 3])
            if PackLayout.of(ids).lengths.tolist() != [length, 3] or PackLayout.of(ids) is not PackLayout.of(ids):
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
