"""`routing`: attention within clusters of tokens, found by online k-means (Routing Transformer, arXiv 2003.05997, 4.1).

    members_c(x) = the w tokens i of the sequence with the largest  x_i/|x_i| . centroid_c     for queries, and for keys
    context_i    = mean over the clusters c with i in members_c(q) of
                   sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over members_c(k);    0 in no cluster
    centroid_c  <- d centroid_c + (1 - d) normalize(sum of the q_i/|q_i| and k_i/|k_i| nearest to it)

Cost: N (c + w) K per head, with c about sqrt(n) clusters of w = ceil(n / c) tokens: N sqrt(n) K. Memory N (c + w).

Isolation: a token's rank is among the tokens of its own sequence, and c and w follow from the sequence's own length. A
sequence of n tokens uses the first c(n) centroids.

Centroids are a buffer. It moves once after each optimizer step, by what all micro-batches and all ranks saw:

    trainer.add_callback(RoutingCallback())          # under Trainer
    update_after_step(optimizer, model)              # in your own loop: once, before training

Both are those of bert_pretrain.moving, and move all such buffers of a model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import (
    AttentionHead,
    draw_normal,
    longer_than,
    prefers_few_launches,
    unit_vectors,
    without_autocast,
)
from bert_pretrain.attention.options import HeadOptions, number, seed_option, whole
from bert_pretrain.attention.parts.choices import chosen
from bert_pretrain.moving import MOST_MICRO_BATCHES, AfterStepCallback, MovesAfterStep, after_step, update_after_step
from collate.layout import PackLayout
from collate.length_groups import LengthGroups, length_groups, narrowest_length

__all__ = ["RoutingAttention", "RoutingCallback", "RoutingOptions", "update_after_step", "update_centroids"]

RoutingCallback, update_centroids = AfterStepCallback, after_step
"""The names of earlier versions."""
PATIENCE = MOST_MICRO_BATCHES
"""After so many micro-batches without an update the head refuses."""


@dataclass(frozen=True)
class RoutingOptions(HeadOptions):
    """What `use_attention(model, "routing", …)` takes."""

    num_clusters: int | None = whole(None, 1, "give the number of clusters, or None for about sqrt(n)")
    """Clusters of a sequence (never more than it has tokens); each holds n / num_clusters of its queries and as many
    keys. None: about sqrt(n), the cheapest. 1: full attention."""
    decay: float = number(0.999, "from 0 to 1", "1 keeps the centroids as they are")
    """How much of a centroid stays at each optimizer step; less follows the model faster. In its first moves it is
    (1 + moves) / (10 + moves), if that is less, to forget the random start. 1: centroids never move."""
    seed: int = seed_option()
    """Draws the first centroids, others for each layer."""


class RoutingAttention(AttentionHead, MovesAfterStep):
    """Softmax within the clusters of each sequence; no parameters, centroids in a buffer."""

    Options = RoutingOptions
    centroids_HCK: Tensor
    num_updates: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_clusters = self.num_clusters(self.max_sequence_length)
        self.register_at_least_float32("centroids_HCK", (self.num_heads, self.max_clusters, self.head_width))
        self.register_buffer("num_updates", torch.empty(self.centroids_HCK.shape[:2], dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw this layer's first centroids: random directions."""
        self.centroids_HCK.copy_(F.normalize(draw_normal(self.centroids_HCK.shape, self.generator()), dim=-1))
        self.num_updates.zero_()
        self.forget()

    def num_clusters(self, length: int) -> int:
        """c(n)"""
        return max(1, min(self.options.num_clusters or round(math.sqrt(length)), length))

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        self.refuse_longer(layout)
        if self._micro_batches >= PATIENCE:
            raise RuntimeError(
                f"routing centroids were not updated in {PATIENCE} micro-batches; add RoutingCallback() to the "
                "Trainer, call update_after_step(optimizer, model), or set decay=1 to keep the centroids as they are"
            )
        parts = self.clusters(layout)
        queries, keys = (self._unit_groups(x, parts.groups) for x in (q_THK, k_THK))
        # each group fills its own clusters of (sequences, H, c, w) rows of (T * H, K)
        rows, contexts, seen = [], [], []
        for query, key, source, clusters in zip(queries, keys, parts.sources, parts.clusters, strict=True):
            query_row, key_row = (self._members(x, source, clusters) for x in (query, key))
            context = self._attend_clusters(q_THK, k_THK, v_THK, query_row, key_row, clusters)
            rows.append(query_row.flatten())
            contexts.append(context.flatten(0, -2))
            seen.append(clusters.member.expand(query_row.shape).flatten())
        context_THK = _mean_by_row(torch.cat(rows), torch.cat(contexts), torch.cat(seen), q_THK)
        if self.training and self.options.decay < 1 and torch.is_grad_enabled():
            with without_autocast(q_THK):
                statistics = self._count(queries, keys, parts.clusters)
            context_THK = self.collected(context_THK, *statistics)
        return context_THK

    @torch.no_grad()
    def _unit_groups(self, x_THK: Tensor, groups: LengthGroups) -> list[Tensor]:
        """Unit vectors of each group, (M, H, width, K)."""
        return [x.transpose(1, 2) for x in groups.gather(unit_vectors(x_THK.detach()))]

    def is_one_graph(self, layout: PackLayout) -> bool:
        return False

    def prepare(self, layout: PackLayout) -> None:
        longer_than(layout, self.max_sequence_length)
        self.clusters(layout)

    def clusters(self, layout: PackLayout) -> "ClusterGroups":
        """The clusters of a batch, sequences of like length side by side."""
        doubled = prefers_few_launches(layout)
        key = ("routing", self.options.num_clusters, self.max_clusters, doubled)
        return layout.table(key, lambda on_host: self._make_clusters(on_host, doubled))

    def _make_clusters(self, layout: PackLayout, doubled: bool) -> "ClusterGroups":
        starts, lengths = layout.cu_seqlens[:-1].long(), layout.lengths
        if doubled:  # and not layout.length_groups, which would be sent to the device, too
            groups = length_groups(starts, lengths, layout.sequence_of_token, layout.positions_T, doubled)
        else:
            groups = layout.length_groups
        clusters = []
        for (_, width), members, mask in zip(groups.shapes, groups.members, groups.key_masks, strict=True):
            is_real = layout.is_real_sequence[members]
            counted = mask
            if not is_real.all():
                counted = (is_real if mask is None else mask.flatten(1) & is_real[:, None]).view(len(members), 1, 1, -1)
            own = lengths[members]
            clusters.append(self._clusters(narrowest_length(width, doubled), width, own, mask, counted))
        return ClusterGroups(groups, clusters)

    def _clusters(
        self, narrowest: int, widest: int, own: Tensor, mask: Tensor | None, counted: Tensor | None
    ) -> "Clusters":
        """The clusters of a group: as many and as wide as any of its lengths asks for; the rest are not used."""
        # The width decides, not the members: nothing may depend on which sequences are in the group.
        lengths = range(narrowest, widest + 1)
        counts = torch.tensor([min(self.num_clusters(n), self.max_clusters) for n in lengths])
        windows = (torch.tensor(lengths) + counts - 1) // counts
        rank, number = torch.arange(int(windows.max())), torch.arange(int(counts.max()))
        place = own - lengths[0]
        return Clusters(
            used=(number < counts[place][:, None])[:, None, :, None],
            ranked=(rank < windows[place][:, None])[:, None, None, :],
            mask=mask,
            counted=counted,
        )

    def _scores(self, unit: Tensor, num_clusters: int) -> Tensor:
        """(M, H, width, K) -> (M, H, c, width)"""
        return self.centroids_HCK[:, :num_clusters].type_as(unit) @ unit.transpose(-1, -2)

    @torch.no_grad()
    def _members(self, unit: Tensor, source: Tensor, clusters: "Clusters") -> Tensor:
        """(M, H, c, w) rows of (T * H, K): the tokens nearest to each centroid, nearest first."""

        def choose() -> Tensor:
            scores = self._scores(unit, clusters.num_clusters)
            if clusters.mask is not None:
                scores = scores.masked_fill(~clusters.mask, -torch.inf)
            return scores.topk(clusters.window, dim=-1).indices

        place = chosen(choose, below=source.shape[1])
        token = source[:, None, None, :].expand(*place.shape[:3], -1).gather(-1, place)
        return token * self.num_heads + torch.arange(self.num_heads, device=token.device)[:, None, None]

    def _attend_clusters(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        query_row: Tensor,
        key_row: Tensor,
        clusters: "Clusters",
    ) -> Tensor:
        """(M, H, c, w, K)"""
        query, key, value = (
            x.flatten(0, 1).index_select(0, row.flatten()).unflatten(0, row.flatten(1, 2).shape)
            for x, row in ((q_THK, query_row), (k_THK, key_row), (v_THK, key_row))
        )
        mask = clusters.ranked.expand(-1, -1, clusters.window, -1)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return context.unflatten(1, query_row.shape[1:3])

    @torch.no_grad()
    def _count(self, queries: list[Tensor], keys: list[Tensor], groups: "list[Clusters]") -> tuple[Tensor, Tensor]:
        """Sums (H, C, K) and numbers (H, C) of the queries and keys nearest to each centroid of their sequence's."""
        dtype = torch.promote_types(queries[0].dtype, torch.float32)
        sums = queries[0].new_zeros(self.centroids_HCK.shape, dtype=dtype)
        counts = sums.new_zeros(self.centroids_HCK.shape[:2])
        for query, key, clusters in zip(queries, keys, groups, strict=True):
            for unit in (query, key):
                scores = self._scores(unit, clusters.num_clusters).masked_fill(~clusters.used, -torch.inf)
                nearest = scores.argmax(2, keepdim=True)
                is_nearest = torch.zeros_like(scores, dtype=dtype).scatter_(2, nearest, 1.0)
                if clusters.counted is not None:
                    is_nearest = is_nearest.masked_fill(~clusters.counted, 0)
                counts[:, : clusters.num_clusters] += is_nearest.sum((0, 3))
                sums[:, : clusters.num_clusters] += (is_nearest @ unit.to(dtype)).sum(0)
        return sums, counts

    def routing_statistics(self) -> tuple[Tensor, Tensor]:
        """Sums (H, C, K) and counts (H, C) since the last update, on this rank."""
        if self._statistics is not None:
            sums, counts = self._statistics
            return sums, counts
        dtype = torch.promote_types(self.centroids_HCK.dtype, torch.float32)
        sums = torch.zeros_like(self.centroids_HCK, dtype=dtype)
        return sums, sums.new_zeros(sums.shape[:2])

    @torch.no_grad()
    def update_centroids(self) -> None:
        """Move the centroids towards what all ranks saw since the last update; every rank must call it."""
        if self.options.decay == 1:
            return
        sums, counts = self.routing_statistics()
        both = self.over_ranks(torch.cat([sums, counts[..., None]], dim=-1))
        sums, counts = both[..., :-1], both[..., -1]
        moves = self.num_updates.to(sums)[..., None]  # each centroid's own: many are first seen late
        decay = torch.clamp((1 + moves) / (10 + moves), max=self.options.decay)
        moved = decay * self.centroids_HCK.to(sums) + (1 - decay) * F.normalize(sums, dim=-1)
        seen = (counts > 0) & sums.isfinite().all(-1)  # a NaN would stay for good
        self.centroids_HCK.copy_(torch.where(seen[..., None], moved, self.centroids_HCK.to(sums)))
        self.num_updates += seen
        self.forget()

    def after_step(self) -> None:
        self.update_centroids()


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of a group of M sequences.

    used: (M, 1, c, 1) bool, True on the clusters that a sequence has. ranked: (M, 1, 1, w) bool, True on the ranks
    within a cluster that it fills. mask: (M, 1, 1, width) bool, True on tokens; None where all are. counted: the same,
    without tokens that are padding.
    """

    used: Tensor
    ranked: Tensor
    mask: Tensor | None
    counted: Tensor | None

    @property
    def num_clusters(self) -> int:
        return self.used.shape[2]

    @property
    def window(self) -> int:
        return self.ranked.shape[3]

    @property
    def member(self) -> Tensor:
        """(M, 1, c, w)"""
        return self.used & self.ranked


@dataclass(frozen=True, eq=False)
class ClusterGroups:
    """Sequences in groups of like length, and the clusters of each group."""

    groups: LengthGroups
    clusters: list[Clusters]

    @property
    def sources(self) -> list[Tensor]:
        """Of each group (M, width): the token in each slot."""
        return self.groups.part(self.groups.source)


def _mean_by_row(row: Tensor, context: Tensor, seen: Tensor, like_THK: Tensor) -> Tensor:
    """The mean of each row's contexts where `seen`; 0 where it has none. row, seen (P,), context (P, K)."""
    count = torch.zeros(like_THK.shape[:2], dtype=torch.float32, device=row.device)
    count = count.flatten().index_add(0, row, seen.float())
    context = torch.where(seen[:, None], context / count.clamp(min=1).type_as(context)[row, None], 0)
    return torch.zeros_like(like_THK).flatten(0, 1).index_add(0, row, context).view_as(like_THK)
