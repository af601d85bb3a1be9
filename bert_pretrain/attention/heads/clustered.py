"""`clustered`: queries that are alike share one attention, that of their mean; the keys it sees best are seen exactly.

    code_i = sign(q_i R), R (K, bits);     k-means of the codes in Hamming distance: i in cluster c(i)
    A_cj   = softmax_j(mean_{i in c} q_i . k_j / sqrt(K))                 j over the tokens of one sequence
    top_c  = the keys of the largest A_cj,   m_c = sum_{j in top_c} A_cj
    context_i = sum_{j not in top_c} A_cj v_j + m_c sum_{j in top_c} softmax_j(q_i . k_j / sqrt(K)) v_j,    c = c(i)

Each mean spreads its attention, and what falls on its best keys each query spreads anew. top_keys=0 leaves that out:
then context_i = sum_j A_cj v_j. With top_keys >= n this is full softmax attention.

Cost: N c K for c clusters, N top_keys K for the exact keys, and (iterations + 1) 2 N c bits for k-means; memory
N (c + top_keys). By default c is about sqrt(n).
Source: Vyas et al. 2020, Fast Transformers with Clustered Attention (arXiv 2007.04825), sections 3.2 and 3.3. K-means
starts from tokens at equal distances, there from the first ones. A cluster without members keeps its centroid, there it
gets a random one; a bit for which as many members are 1 as -1 stays, too. Gradients are those of the formula; the
published code takes m_c for a constant.

Isolation: a sequence has its own clusters, as many as its length asks for, and products of its own. The rotation R is a
buffer. Sums of signs are exact, so no rounding decides a step of k-means.

Shape letters: M sequences of a group, W its width, C clusters, B blocks of queries of one cluster.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead, draw_normal, prefers_few_launches, without_autocast
from bert_pretrain.attention.options import HeadOptions, seed_option, whole
from bert_pretrain.attention.parts.choices import chosen
from collate.layout import PackLayout
from collate.length_groups import Gather, LengthGroups, Scatter, length_groups, narrowest_length
from collate.views import at_least_float32


@dataclass(frozen=True)
class ClusteredOptions(HeadOptions):
    """What `use_attention(model, "clustered", …)` takes."""

    num_clusters: int | None = whole(None, 1, "give the number of clusters, or None for about sqrt(n)")
    """Clusters of a sequence's queries, never more than it has tokens. None: about sqrt(n)."""
    top_keys: int = whole(32, 0, "0 is the paper's plain clustered attention")
    """Keys of each cluster that its queries see exactly: its mean's best. Up to this length the head is exact."""
    bits: int = whole(32, 1, "give the number of bits of a query's code")
    """Bits of the code by which queries are compared. More tell more queries apart, and cost in proportion."""
    iterations: int = whole(10, 0, "0 keeps the first centroids")
    """Steps of k-means."""
    seed: int = seed_option()
    """Draws the rotation, another one for each layer."""


class ClusteredAttention(AttentionHead):
    """Softmax attention of clusters of queries; no parameters, one buffer."""

    Options = ClusteredOptions
    supports_dropout = True
    rotation: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_at_least_float32("rotation", (self.head_width, self.options.bits))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the rotation of this layer."""
        self.rotation.copy_(draw_normal(self.rotation.shape, self.generator()))

    def num_clusters(self, length: int) -> int:
        """c(n)"""
        return max(1, min(self.options.num_clusters or round(math.sqrt(length)), length))

    def is_one_graph(self, layout: PackLayout) -> bool:
        return False

    def prepare(self, layout: PackLayout) -> None:
        self.groups(layout)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        groups = self.groups(layout)
        found = []
        inputs = map(groups.lengths.gather, (q_THK, k_THK, v_THK))
        for group, *of_group in zip(groups.groups, *inputs, strict=True):
            query, key, value = (at_least_float32(x.transpose(1, 2)) for x in of_group)
            with without_autocast(query):
                found.append(self.by_means(query, key, value, group, dropout))
        context_THJ = groups.lengths.scatter([each.context.transpose(1, 2) for each in found])
        if not self.options.top_keys:
            return context_THJ.to(q_THK.dtype)
        near_THK = self.by_top_keys(q_THK, k_THK, v_THK, groups, found, dropout)
        return (context_THJ[..., :-1] + context_THJ[..., -1:] * near_THK).to(q_THK.dtype)

    def by_means(self, q_MHWK: Tensor, k_MHWK: Tensor, v_MHWK: Tensor, group: "Group", dropout: float) -> "Found":
        """What the queries of a group get from the mean of their cluster."""
        number = group.num_clusters
        cluster_MHW = chosen(lambda: self.cluster(q_MHWK, group), below=number + 1)
        member_MHWC = members(cluster_MHW, number).to(q_MHWK.dtype)
        count_MHC = member_MHWC.sum(2)
        mean_MHCK = member_MHWC.transpose(2, 3) @ q_MHWK / count_MHC.clamp(min=1)[..., None]
        scores = mean_MHCK * self.head_width**-0.5 @ k_MHWK.transpose(2, 3)
        if group.mask is not None:
            scores = scores.masked_fill(~group.mask, -torch.inf)
        weights = scores.softmax(-1)
        if not self.options.top_keys:
            return Found(member_MHWC @ (F.dropout(weights, dropout) @ v_MHWK), cluster_MHW, count_MHC, None)
        width = scores.shape[-1]
        best = min(self.options.top_keys, width)
        top = chosen(lambda: scores.detach().topk(best).indices, below=width)  # a weight may be 0, like padding's
        weights = weights.scatter(-1, top, 0.0)
        share = 1 - weights.sum(-1, keepdim=True)
        of_clusters = torch.cat([F.dropout(weights, dropout) @ v_MHWK, share], -1)
        return Found(member_MHWC @ of_clusters, cluster_MHW, count_MHC, top)

    @torch.no_grad()
    def cluster(self, q_MHWK: Tensor, group: "Group") -> Tensor:
        """(M, H, W) int64: each query's cluster, from 0; C for padding."""
        codes = (q_MHWK.detach() @ self.rotation.to(q_MHWK.dtype) >= 0).float().mul_(2).sub_(1)
        if group.mask is not None:
            codes = codes.masked_fill(~group.mask.transpose(2, 3), 0)
        heads, number = codes.shape[1], group.num_clusters
        first = group.first[:, None, :, None].expand(-1, heads, -1, codes.shape[3])
        centroids = codes.gather(2, first).flatten(0, 1)
        codes, preferred = codes.flatten(0, 1), group.preferred.repeat_interleave(heads, 0)
        for _ in range(self.options.iterations):
            member = members(nearest(codes, centroids, preferred), number).float()
            # the bit of most members; where they are as many, or none, the bit that it was
            centroids = torch.baddbmm(centroids, member.transpose(1, 2), codes, alpha=2).sign_()
        cluster = nearest(codes, centroids, preferred).unflatten(0, (-1, heads))
        return cluster if group.mask is None else cluster.masked_fill(~group.mask[:, 0], number)

    def by_top_keys(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, groups: "Groups", found: "list[Found]", dropout: float
    ) -> Tensor:
        """(T, H, K): exact attention of each query to the top keys of its cluster."""
        blocks, slot = self.blocks(groups, found, q_THK)
        queries = Gather.apply(q_THK.flatten(0, 1), torch.cat([each.query_row.flatten() for each in blocks]), slot)
        contexts = []
        of_blocks = queries.split([each.query_row.numel() for each in blocks])
        for each, query in zip(blocks, of_blocks, strict=True):
            query = query.unflatten(0, each.query_row.shape)
            key, value = (
                x.flatten(0, 1).index_select(0, each.key_row.flatten()).unflatten(0, each.key_row.shape)
                for x in (k_THK, v_THK)
            )
            mask = None if each.is_key is None else each.is_key[:, :, None].expand(-1, -1, query.shape[2], -1)
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            contexts.append(context.flatten(0, 2))
        return Scatter.apply(torch.cat(contexts), slot).view_as(q_THK)

    @torch.no_grad()
    def blocks(self, groups: "Groups", found: "list[Found]", like_THK: Tensor) -> "tuple[list[QueryBlocks], Tensor]":
        """The blocks of each group, and (T * H,) int64: the slot of each query among all blocks."""
        num_rows = like_THK.shape[0] * self.num_heads
        heads = torch.arange(self.num_heads, device=like_THK.device)[:, None]
        slot_of_row = torch.empty(num_rows + 1, dtype=torch.int64, device=like_THK.device)
        blocks, num_slots = [], 0
        for group, source, each in zip(groups.groups, groups.sources, found, strict=True):
            row_MHW = source[:, None] * self.num_heads + heads
            made, slot_MHW = query_blocks(row_MHW, each, group)
            # padding shows a token that has a slot of its own: it writes where nobody reads
            target = row_MHW if group.mask is None else torch.where(group.mask[:, 0], row_MHW, num_rows)
            slot_of_row.scatter_(0, target.flatten(), (slot_MHW + num_slots).flatten())
            blocks.append(made)
            num_slots += made.query_row.numel()
        return blocks, slot_of_row[:num_rows]

    def groups(self, layout: PackLayout) -> "Groups":
        """The sequences of a batch, those of like length side by side."""
        doubled = prefers_few_launches(layout)
        key = ("clustered", self.options.num_clusters, doubled)
        return layout.table(key, lambda on_host: self._make_groups(on_host, doubled))

    def _make_groups(self, layout: PackLayout, doubled: bool) -> "Groups":
        starts, lengths = layout.cu_seqlens[:-1].long(), layout.lengths
        groups = layout.length_groups
        if doubled:
            groups = length_groups(starts, lengths, layout.sequence_of_token, layout.positions_T, doubled)
        made = []
        for (_, width), own, mask in zip(groups.shapes, groups.members, groups.key_masks, strict=True):
            # The width decides, not the members: nothing may depend on which sequences are in the group.
            shortest = narrowest_length(width, doubled)
            number = torch.arange(max(self.num_clusters(n) for n in range(shortest, width + 1)))
            length = lengths[own, None]
            count = torch.tensor([self.num_clusters(n) for n in length.flatten().tolist()])[:, None]
            made.append(
                Group(
                    mask=mask,
                    length=length,
                    shortest=shortest,
                    first=torch.minimum(number, count - 1) * length // count,
                    preferred=torch.where(number < count, -number.float() / len(number), -torch.inf)[:, None],
                )
            )
        return Groups(groups, made)


@dataclass(frozen=True, eq=False)
class Group:
    """M sequences of like length.

    mask: (M, 1, 1, W) bool, True on tokens; None where all are. length: (M, 1) int64. shortest: that would belong here.
    first: (M, C) int64, the tokens whose codes are the first centroids, at equal distances. preferred: (M, 1, C), to be
    added to what a code has in common with a centroid: of equals the first wins, and what a sequence has not, never.
    """

    mask: Tensor | None
    length: Tensor
    shortest: int
    first: Tensor
    preferred: Tensor

    @property
    def num_clusters(self) -> int:
        return self.first.shape[1]


@dataclass(frozen=True, eq=False)
class Groups:
    """Sequences in groups of like length, and what each group needs."""

    lengths: LengthGroups
    groups: list[Group]

    @property
    def sources(self) -> list[Tensor]:
        """Of each group (M, W): the token in each slot."""
        return self.lengths.part(self.lengths.source)


@dataclass(frozen=True, eq=False)
class Found:
    """What a group's clusters are, and what their means see.

    context: (M, H, W, K), without the top keys; beside it their share (M, H, W, K + 1). cluster: (M, H, W) int64.
    count: (M, H, C), queries of each cluster. top: (M, H, C, top keys) int64, their places; None without them.
    """

    context: Tensor
    cluster: Tensor
    count: Tensor
    top: Tensor | None


class QueryBlocks(NamedTuple):
    """Queries of one cluster in blocks of equal size: P = M * H, B blocks each. Rows are those of (T * H, K).

    query_row: (P, B, size) int64; in free slots any of the sequence. key_row: (P, B, top keys) int64.
    is_key: like key_row, bool: a short sequence has fewer keys. None where all are.
    """

    query_row: Tensor
    key_row: Tensor
    is_key: Tensor | None


def query_blocks(row_MHW: Tensor, found: Found, group: Group) -> tuple[QueryBlocks, Tensor]:
    """The blocks of a group, and (M, H, W) int64: the slot of each query in them.

    clusters 0 1 0 1 1, blocks of 2    ->    [0 2] [1 3] [4 .]

    How many blocks there are follows from the width: enough for any clusters, since nobody asks the device.
    """
    (_, heads, width), number, top = row_MHW.shape, group.num_clusters, found.top
    assert top is not None
    size = -(-width // number)
    num_blocks = min(width // size + number, width)
    count = found.count.long()
    blocks = (count + size - 1) // size
    end = blocks.cumsum(-1)
    # queries sorted by cluster: the i-th of them is in slot i + shift of its cluster
    shift = (end - blocks) * size - (count.cumsum(-1) - count)
    order = found.cluster.argsort(dim=-1, stable=True)
    in_order = found.cluster.gather(-1, order).clamp(max=number - 1)
    slot_in_order = torch.arange(width, device=order.device) + shift.gather(-1, in_order)
    slot = torch.empty_like(order).scatter_(-1, order, slot_in_order)
    slot += torch.arange(slot[..., 0].numel(), device=slot.device).view(-1, heads, 1) * (num_blocks * size)
    own = (end[..., None, :] <= torch.arange(num_blocks, device=end.device)[:, None]).sum(-1).clamp(max=number - 1)
    place = torch.arange(num_blocks * size, device=order.device).view(num_blocks, size)
    place = (place - shift.gather(-1, own)[..., None]).clamp(0, width - 1)
    query = order.gather(-1, place.flatten(2))
    key = top.gather(2, own[..., None].expand(-1, -1, -1, top.shape[-1]))
    return (
        QueryBlocks(
            query_row=row_MHW.gather(-1, query).unflatten(-1, place.shape[2:]).flatten(0, 1),
            key_row=row_MHW.gather(-1, key.flatten(2)).view_as(key).flatten(0, 1),
            is_key=(key < group.length[..., None, None]).flatten(0, 1) if group.shortest < key.shape[-1] else None,
        ),
        slot,
    )


def nearest(codes: Tensor, centroids: Tensor, preferred: Tensor) -> Tensor:
    """(P, W, bits), (P, C, bits), (P, 1, C) -> (P, W) int64: the centroid with most bits in common."""
    return torch.baddbmm(preferred, codes, centroids.transpose(1, 2)).argmax(-1)


def members(cluster: Tensor, number: int) -> Tensor:
    """(…, W) -> (…, W, C) bool"""
    return cluster[..., None] == torch.arange(number, device=cluster.device)
