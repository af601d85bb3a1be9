"""Full softmax attention within each sequence of a batch, by torch's kernels.

    context_i = sum_j softmax_j(scale q_i . k_j) v_j,    j over the tokens of i's own sequence

There are four executions. Other than under the mask, no two sequences meet in a product: not even a NaN passes.

one by one    On CPUs, without dropout: torch's CPU kernel gets each sequence as a slice of the batch. Nothing is
              gathered, padded or masked. Cost: sum of n^2 K over the sequences; memory N. Other sequences do not even
              change rounding. A window w cuts a long sequence into pieces of C queries, each with the keys that it
              reaches: n (2 w + C) K.
grouped       Elsewhere on CPUs: sequences of like length side by side (`collate.length_groups`), each group one call of
              scaled_dot_product_attention, n rounded up to a multiple of 16.
varlen        On CUDA in 16 bits, without dropout: see `collate.isolation.varlen`.
mask          Elsewhere on GPUs: one call for all packs, under a mask of (B, 1, L, L). A launch for each of many lengths
              would cost more than the products of L^2 that the mask wastes, a third at Wikipedia's lengths. What it
              hides is multiplied by 0: a huge number stays where it is, a NaN does not.

One by one works in parallel on the heads of one sequence only, so with more threads than heads groups take its place.
The choice depends on the device, dropout, heads and threads alone, so a resumed run repeats it.
`python benchmarks/exact_attention.py` measures both.

Keys that are not the queries have a layout of their own: `collate.isolation.other_keys`.

Shape letters as in collate.layout; H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.isolation.in_graph import attend_in_graph
from collate.isolation.pieces import OneByOne, pieces_of_rows, pieces_of_tokens
from collate.isolation.varlen import attend_varlen, takes_varlen
from collate.layout import PackLayout


def attend_tokens(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
    """The context (T, H, K) of queries, keys and values (T, H, K) of real tokens, scores scaled by 1/sqrt(K)."""
    inputs = (q_THK, k_THK, v_THK)
    if torch.compiler.is_compiling() and q_THK.device.type == "cpu" and not dropout:
        return attend_in_graph(*inputs, layout.cu_seqlens)
    if takes_one_by_one(q_THK, num_heads=q_THK.shape[1], dropout=dropout):
        pieces = layout.derived("pieces of tokens", lambda: pieces_of_tokens(layout))
        rows = (x.transpose(0, 1).unsqueeze(0) for x in inputs)
        return OneByOne.apply(*rows, pieces).squeeze(0).transpose(0, 1)  # [0] would copy the gradient
    if q_THK.device.type == "cpu":
        return attend_grouped(*inputs, layout, dropout)
    if not dropout and takes_varlen(q_THK):
        return attend_varlen(*inputs, layout)
    return attend_under_mask(*inputs, layout, dropout)


def prepare_tokens(layout: PackLayout) -> None:
    """Make the tables of `attend_tokens`, but those of rare executions."""
    if layout.runs_on.type == "cpu":
        layout.derived("pieces of tokens", lambda: pieces_of_tokens(layout))
    else:
        layout.cu_seqlens  # noqa: B018


def attend_rows(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLK: Tensor,
    layout: PackLayout,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The context (B, H, L, K) of padded rows; 0 in padding slots.

    scale: of the scores; None: 1/sqrt(K). window: a token sees those of its sequence at most so many tokens away.
    """
    rows, layout = (query_BHLK, key_BHLK, value_BHLK), layout.exact
    if takes_one_by_one(query_BHLK, num_heads=query_BHLK.shape[1], dropout=dropout):
        pieces = layout.derived(("pieces of rows", window), lambda: pieces_of_rows(layout, window))
        return OneByOne.apply(*rows, pieces, scale)
    if layout.num_sequences == 0:  # no token, but a part of the graph
        return (query_BHLK + key_BHLK + value_BHLK) * 0
    q_THK, k_THK, v_THK = (layout.unpad(x.transpose(1, 2)) for x in rows)
    return layout.pad(attend_grouped(q_THK, k_THK, v_THK, layout, dropout, scale, window)).transpose(1, 2)


def takes_one_by_one(query: Tensor, num_heads: int, dropout: float) -> bool:
    """Whether sequences attend one by one; if not, in groups."""
    return query.device.type == "cpu" and not dropout and torch.get_num_threads() <= num_heads


def attend_grouped(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: PackLayout,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(T, H, K) each -> the context (T, H, K), sequences of like length together."""
    groups = layout.length_groups
    masks = layout.derived(("masks of groups", window), lambda: _group_masks(layout, window))
    contexts = []
    for query, key, value, mask in zip(*map(groups.gather, (q_THK, k_THK, v_THK)), masks, strict=True):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        contexts.append(context.transpose(1, 2))
    return groups.scatter(contexts)


def _group_masks(layout: PackLayout, window: int | None) -> list[Tensor | None]:
    """For each length group (sequences, 1, width, width) bool, True = attend; None where all attend to all."""
    groups = layout.length_groups
    masks: list[Tensor | None] = []
    for (_, width), mask in zip(groups.shapes, groups.key_masks, strict=True):
        if window is not None and width > window + 1:
            lengths = layout.lengths[groups.members[len(masks)], None, None, None]
            place = torch.arange(width, device=lengths.device)
            query = torch.minimum(place, lengths - 1).transpose(2, 3)  # a padding query shows the last token
            mask = ((query - place).abs() <= window) & (place < lengths)
        elif mask is not None:
            mask = mask.expand(-1, -1, width, -1)  # torch's fast CPU kernel wants a row per query
        masks.append(mask)
    return masks


def attend_under_mask(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
    """(T, H, K) each -> the context (T, H, K), all packs in one call."""
    bias = layout.derived(("bias of packs", q_THK.dtype), lambda: bias_of_packs(layout, q_THK.dtype))
    query, key, value = (layout.in_rows(x).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    return layout.unpad(context.transpose(1, 2))


def bias_of_packs(layout: PackLayout, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L), -inf between sequences; padding sees padding, since a softmax over nothing is NaN."""
    ids = layout.sequence_ids_BL
    other = ids[:, None, :, None] != ids[:, None, None]
    return torch.zeros(other.shape, dtype=dtype, device=ids.device).masked_fill_(other, float("-inf"))
