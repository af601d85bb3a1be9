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

Shape letters: M sequences of a group, W its width, C clusters, B blocks of queries.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead, draw_normal, prefers_few_launches, without_autocast
from bert_pretrain.attention.options import HeadOptions, seed_option, whole
from bert_pretrain.attention.parts.choices import chosen
from bert_pretrain.attention.parts.windows import attend
from collate.layout import PackLayout
from collate.length_groups import Gather, LengthGroups, Scatter, length_groups, narrowest_length
from collate.views import at_least_float32

WIDEST_MASK = 256
"""Up to this width of a group the scores of all keys are cheaper than gathering some."""


@dataclass(frozen=True)
class ClusteredOptions(HeadOptions):
    """What `use_attention(model, "clustered", …)` takes."""

    num_clusters: int | None = whole(None, 1, "give the number of clusters, or None for about sqrt(n)")
    """Clusters of a sequence's queries, never more than it has tokens. None: about sqrt(n)."""
    top_keys: int = whole(32, 0, "0 is the paper's plain clustered attention")
    """Keys of each cluster that its queries see exactly: its mean's best. Up to this length the head is exact."""
    bits: int = whole(63, 1, "give the number of bits of a query's code")
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
        groups, contexts = self.groups(layout), []
        inputs = map(groups.lengths.gather, (q_THK, k_THK, v_THK))
        for group, *of_group in zip(groups.groups, *inputs, strict=True):
            query, key, value = (x.transpose(1, 2) for x in of_group)
            contexts.append(self.attend_group(query, key, value, group, dropout).transpose(1, 2))
        return groups.lengths.scatter(contexts)

    def attend_group(self, q_MHWK: Tensor, k_MHWK: Tensor, v_MHWK: Tensor, group: "Group", dropout: float) -> Tensor:
        """(M, H, W, K)"""
        width, best = q_MHWK.shape[2], self.options.top_keys
        if width <= best:
            return attend(q_MHWK, k_MHWK, v_MHWK, group.mask, dropout)
        wide_query, wide_key, wide_value = map(at_least_float32, (q_MHWK, k_MHWK, v_MHWK))
        with without_autocast(q_MHWK):
            cluster_MHW = chosen(lambda: self.cluster(wide_query, group), below=group.num_clusters + 1)
            member_MHWC = members(cluster_MHW, group.numbers).to(wide_query.dtype)
            mean_MHCK = member_MHWC.transpose(2, 3) @ wide_query / member_MHWC.sum(2).clamp(min=1)[..., None]
            scores = mean_MHCK * self.head_width**-0.5 @ wide_key.transpose(2, 3)
            if group.mask is not None:
                scores = scores.masked_fill(~group.mask, -torch.inf)
            weights = scores.softmax(-1)
            if not best:
                return (member_MHWC @ (F.dropout(weights, dropout) @ wide_value)).to(q_MHWK.dtype)
            # by scores, as a weight may be 0 like that of padding
            top = chosen(lambda: scores.detach().topk(best).indices, below=width)
            weights = weights.scatter(-1, top, 0.0)
            share = 1 - weights.sum(-1, keepdim=True)
            far = member_MHWC @ torch.cat([F.dropout(weights, dropout) @ wide_value, share], -1)
        attend_top = attend_with_mask if width <= WIDEST_MASK else attend_in_blocks
        near = attend_top(q_MHWK, k_MHWK, v_MHWK, cluster_MHW, top, group, dropout)
        return (far[..., :-1] + far[..., -1:] * near).to(q_MHWK.dtype)

    @torch.no_grad()
    def cluster(self, q_MHWK: Tensor, group: "Group") -> Tensor:
        """(M, H, W) int64: each query's cluster, from 0; C for padding."""
        codes = (q_MHWK.detach() @ self.rotation.to(q_MHWK.dtype) >= 0).float().mul_(2).sub_(1)
        if group.mask is not None:
            codes = codes.masked_fill(~group.mask.transpose(2, 3), 0)
        heads = codes.shape[1]
        first = group.first[:, None, :, None].expand(-1, heads, -1, codes.shape[3])
        centroids = codes.gather(2, first).flatten(0, 1)
        codes, preferred = codes.flatten(0, 1), group.preferred.repeat_interleave(heads, 0)
        for _ in range(self.options.iterations):
            member = members(nearest(codes, centroids, preferred), group.numbers).float()
            # the bit of most members; where they are as many, or none, the bit that it was
            centroids = torch.baddbmm(centroids, member.transpose(1, 2), codes, alpha=2).sign_()
        cluster = nearest(codes, centroids, preferred).unflatten(0, (-1, heads))
        return cluster if group.mask is None else cluster.masked_fill(~group.mask[:, 0], group.num_clusters)

    def groups(self, layout: PackLayout) -> "Groups":
        """The sequences of a batch, those of like length side by side."""
        doubled = prefers_few_launches(layout)
        key = ("clustered", self.options.num_clusters, doubled)
        return layout.table(key, lambda on_host: self._make_groups(on_host, doubled))

    def _make_groups(self, layout: PackLayout, doubled: bool) -> "Groups":
        starts, lengths = layout.cu_seqlens[:-1].long(), layout.lengths
        if doubled:  # and not layout.length_groups, which would be sent to the device, too
            groups = length_groups(starts, lengths, layout.sequence_of_token, layout.positions_T, doubled)
        else:
            groups = layout.length_groups
        made = []
        for (_, width), own, mask in zip(groups.shapes, groups.members, groups.key_masks, strict=True):
            # The width decides, not the members: nothing may depend on which sequences are in the group.
            shortest = narrowest_length(width, doubled)
            numbers = torch.arange(max(self.num_clusters(n) for n in range(shortest, width + 1)))
            length = lengths[own, None]
            count = torch.tensor([self.num_clusters(n) for n in length.flatten().tolist()])[:, None]
            made.append(
                Group(
                    mask=mask,
                    length=length,
                    shortest=shortest,
                    numbers=numbers,
                    first=torch.minimum(numbers, count - 1) * length // count,
                    preferred=torch.where(numbers < count, -numbers.float() / len(numbers), -torch.inf)[:, None],
                )
            )
        return Groups(groups, made)


@dataclass(frozen=True, eq=False)
class Group:
    """M sequences of like length.

    mask: (M, 1, 1, W) bool, True on tokens; None where all are. length: (M, 1) int64. shortest: that would belong here.
    numbers: (C,) int64, of the clusters, as many as any length here asks for.
    first: (M, C) int64, the tokens whose codes are the first centroids, at equal distances. preferred: (M, 1, C), to be
    added to what a code has in common with a centroid: of equals the first wins, and what a sequence has not, never.
    """

    mask: Tensor | None
    length: Tensor
    shortest: int
    numbers: Tensor
    first: Tensor
    preferred: Tensor

    @property
    def num_clusters(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, eq=False)
class Groups:
    """Sequences in groups of like length, and what each group needs."""

    lengths: LengthGroups
    groups: list[Group]


def attend_with_mask(
    q_MHWK: Tensor, k_MHWK: Tensor, v_MHWK: Tensor, cluster_MHW: Tensor, top: Tensor, group: Group, dropout: float
) -> Tensor:
    """Attention of each query to the top keys (M, H, C, best) of its cluster: all scores, most of them hidden."""
    is_top = torch.zeros(*top.shape[:3], q_MHWK.shape[2], dtype=torch.bool, device=top.device).scatter_(3, top, True)
    if group.mask is not None:
        is_top &= group.mask  # a short sequence has fewer keys
    own = cluster_MHW.clamp(max=group.num_clusters - 1)[..., None].expand(-1, -1, -1, is_top.shape[3])
    return attend(q_MHWK, k_MHWK, v_MHWK, is_top.gather(2, own), dropout)


def attend_in_blocks(
    q_MHWK: Tensor, k_MHWK: Tensor, v_MHWK: Tensor, cluster_MHW: Tensor, top: Tensor, group: Group, dropout: float
) -> Tensor:
    """The same by gathered keys: queries of one cluster in blocks of equal size, each with the cluster's top keys.

    clusters 0 1 0 1 1, blocks of 2    ->    [0 2] [1 3] [4 .]

    How many blocks there are follows from the width: enough for any clusters, since nobody asks the device.
    """
    (sequences, heads, width, _), number = q_MHWK.shape, group.num_clusters
    slot_MHW, query, own = query_blocks(cluster_MHW, number)
    num_blocks, size = query.shape[2:]
    # from places in a sequence to rows of all
    row = torch.arange(sequences * heads, device=top.device).view(sequences, heads, 1)
    slot_row, query_row = ((slot_MHW + row * (num_blocks * size)).flatten(), (query.flatten(2) + row * width).flatten())
    key = top.gather(2, own[..., None].expand(-1, -1, -1, top.shape[3]))
    key_row = (key.flatten(2) + row * width).flatten()
    queries = Gather.apply(q_MHWK.flatten(0, 2), query_row, slot_row).view(-1, num_blocks, size, q_MHWK.shape[3])
    keys, values = (
        x.flatten(0, 2).index_select(0, key_row).view(-1, num_blocks, key.shape[3], x.shape[3])
        for x in (k_MHWK, v_MHWK)
    )
    is_key = None
    if group.shortest < key.shape[3]:
        is_key = (key < group.length[..., None, None]).flatten(0, 1)[:, :, None]
    context = attend(queries, keys, values, is_key, dropout)
    return Scatter.apply(context.flatten(0, 2), slot_row).view_as(v_MHWK)


def query_blocks(cluster_MHW: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of equal size, each of one cluster, and padding as one cluster more.

    -> the slot of each query (M, H, W); the queries of each block (M, H, B, size), in free slots any of the sequence;
    the cluster of each block (M, H, B).
    """
    width, device = cluster_MHW.shape[2], cluster_MHW.device
    size = -(-width // number)
    num_blocks = min(width // size + number + 1, width)
    count = members(cluster_MHW, torch.arange(number + 1, device=device)).sum(2)
    blocks = (count + size - 1) // size
    end = blocks.cumsum(-1)
    # queries sorted by cluster: the i-th of them is in slot i + shift of its cluster
    shift = (end - blocks) * size - (count.cumsum(-1) - count)
    order = cluster_MHW.argsort(dim=-1, stable=True)
    slot_in_order = torch.arange(width, device=device) + shift.gather(-1, cluster_MHW.gather(-1, order))
    slot = torch.empty_like(order).scatter_(-1, order, slot_in_order)
    block = torch.arange(num_blocks, device=device)[:, None]
    own = (end[..., None, :] <= block).sum(-1).clamp(max=number)
    place = block * size + torch.arange(size, device=device) - shift.gather(-1, own)[..., None]
    query = order.gather(-1, place.clamp(0, width - 1).flatten(2)).unflatten(2, (num_blocks, size))
    return slot, query, own.clamp(max=number - 1)


def nearest(codes: Tensor, centroids: Tensor, preferred: Tensor) -> Tensor:
    """(P, W, bits), (P, C, bits), (P, 1, C) -> (P, W) int64: the centroid with most bits in common."""
    return torch.baddbmm(preferred, codes, centroids.transpose(1, 2)).argmax(-1)


def members(cluster: Tensor, numbers: Tensor) -> Tensor:
    """(…, W), the clusters' numbers (C,) -> (…, W, C) bool"""
    return cluster[..., None] == numbers
