"""PackLayout: the drawing, its views against slow twins, and what it refuses."""

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
