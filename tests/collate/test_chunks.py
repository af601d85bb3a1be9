"""PackLayout.chunks: every sequence cut from its own start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collate import PackLayout
from collate.chunks import NO_CHUNK


def test_the_drawing():
    layout = PackLayout(torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]))
    chunks = layout.chunks(3)
    assert chunks.index.tolist() == [[0, 1, 2], [3, 4, 4], [5, 6, 6]]
    assert chunks.valid.tolist() == [[True] * 3, [True, True, False], [True, True, False]]
    assert (chunks.sequence.tolist(), chunks.number.tolist()) == ([0, 0, 1], [0, 1, 0])
    assert chunks.positions.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert chunks.neighbour(1).tolist() == [1, NO_CHUNK, NO_CHUNK]
    assert chunks.neighbour(-1).tolist() == [NO_CHUNK, 0, NO_CHUNK]
    assert layout.chunks(3) is chunks and layout.chunks(2) is not chunks
    with pytest.raises(ValueError, match="chunks of 0 tokens"):
        layout.chunks(0)


@st.composite
def rows(draw):
    """Rows of sequences with padding anywhere."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        row = []
        for number, length in enumerate(draw(st.lists(st.integers(1, 9), max_size=4)), start=1):
            row += [0] * draw(st.integers(0, 2)) + [number] * length
        made.append(row)
    width = max(1, *map(len, made))
    return [row + [0] * (width - len(row)) for row in made]


@given(rows(), st.integers(1, 12))
def test_chunks_hold_every_token_once_and_never_two_sequences(ids, size):
    layout = PackLayout(torch.tensor(ids))
    chunks = layout.chunks(size)
    assert chunks.index[chunks.valid].tolist() == list(range(layout.num_tokens))
    assert (layout.sequence_of_token[chunks.index] == chunks.sequence[:, None]).all()
    assert (chunks.positions[chunks.valid] == layout.positions_T).all()
    for number, sequence in enumerate(chunks.sequence.tolist()):
        for offset in (-2, -1, 1, 2):
            other = int(chunks.neighbour(offset)[number])
            if other != NO_CHUNK:
                assert int(chunks.sequence[other]) == sequence and other == number + offset
    tokens = torch.arange(layout.num_tokens, dtype=torch.float64)[:, None].requires_grad_()
    there = chunks.gather(tokens)
    assert (there[..., 0] == chunks.index).all()
    back = chunks.scatter(there)
    assert (back == tokens).all()
    (back * (tokens.detach() + 1)).sum().backward()
    assert (tokens.grad == tokens.detach() + 1).all()
