"""Each chunk of a sequence with its neighbours: the tokens that a window around the chunk's queries can reach.

    chunks of a sequence  0 1 2 3,  reach 1    ->    chunk 0: . 0 1    chunk 1: 0 1 2    chunk 3: 2 3 .

Where a neighbour is missing, the mask hides the chunk itself in its place: reads never leave the sequence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.chunks import NO_CHUNK, Chunks
from collate.layout import PackLayout

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 64
"""Larger chunks copy each key less often, but reach further beyond the window."""


@dataclass(frozen=True, eq=False)
class Windows:
    """NC chunks of C queries, each with M = (2 reach + 1) C key slots.

    chunks: the queries' chunks. source: (NC, 2 reach + 1) int64, the chunks side by side.
    query_position: (NC, C) int64; that of a padding slot is the last token's, which it shows.
    key_position: (NC, M) int64. key_valid: (NC, M) bool, True where a slot is a token of the sequence, there once.
    length: (NC,) int64, tokens of the chunk's sequence.
    """

    chunks: Chunks
    source: Tensor
    query_position: Tensor
    key_position: Tensor
    key_valid: Tensor
    length: Tensor

    def queries(self, x_THK: Tensor) -> Tensor:
        """(T, H, K) -> (NC, H, C, K)"""
        return self.chunks.gather(x_THK).transpose(1, 2)

    def keys(self, x_THK: Tensor) -> Tensor:
        """(T, H, K) -> (NC, H, M, K)"""
        return self.neighbours(self.chunks.gather(x_THK)).transpose(1, 2)

    def neighbours(self, x: Tensor) -> Tensor:
        """Each chunk (NC, C, …) -> its neighbours (NC, M, …)."""
        return x.index_select(0, self.source.flatten()).unflatten(0, self.source.shape).flatten(1, 2)

    def to_tokens(self, context: Tensor) -> Tensor:
        """(NC, H, C, …) -> (T, H, …)"""
        return self.chunks.scatter(context.transpose(1, 2))


def windows(layout: PackLayout, size: int, reach: int) -> Windows:
    """Chunks of `size` tokens with `reach` neighbours to each side; made once for all layers that ask."""
    return layout.derived(("windows", size, reach), lambda: _windows(layout, size, reach))


def windows_of_tokens(layout: PackLayout, window: int) -> Windows:
    """Chunks with neighbours for a window of `window` tokens to each side; sizes depend on the window only."""
    return windows(layout, *chunk_and_reach(window))


def chunk_and_reach(window: int) -> tuple[int, int]:
    """Tokens of a chunk, and how many chunks to each side the window reaches into."""
    size = max(SMALLEST_CHUNK, min(window, LARGEST_CHUNK))
    return size, -(-window // size)


def keys_per_query(window: int) -> int:
    """Key slots that each query meets. A sequence of as many tokens is cheaper whole: no key is copied."""
    size, reach = chunk_and_reach(window)
    return (2 * reach + 1) * size


def _windows(layout: PackLayout, size: int, reach: int) -> Windows:
    chunks = layout.chunks(size)
    own = torch.arange(chunks.num_chunks, device=chunks.index.device)
    neighbours = torch.stack([chunks.neighbour(offset) for offset in range(-reach, reach + 1)], 1)
    exists = neighbours != NO_CHUNK
    source = torch.where(exists, neighbours, own[:, None])
    length = layout.lengths[chunks.sequence]
    return Windows(
        chunks=chunks,
        source=source,
        query_position=torch.minimum(chunks.positions, length[:, None] - 1),
        key_position=chunks.positions[source].flatten(1, 2),
        key_valid=(chunks.valid[source] & exists[..., None]).flatten(1, 2),
        length=length,
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Softmax attention (B, H, Q, K), (B, H, M, K) x 2, bool mask that broadcasts to (B, H, Q, M) -> (B, H, Q, K)."""
    if mask is not None:
        mask = mask.expand(-1, -1, query.shape[-2], -1)  # torch's fast CPU kernel wants a row per query
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
