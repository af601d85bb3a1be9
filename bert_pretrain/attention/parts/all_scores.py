"""The base of heads that turn all scores of a sequence into weights by a rule of their own, other than a softmax.

    scores_ij = q_i . k_j / sqrt(K)    ->    weights_ij    ->    context_i = sum_j weights_ij v_j

On CPUs sequences of like length lie side by side (`collate.length_groups`): no product joins two of them. Accelerators
and batches by slots get the scores of all packs in one call, (B, H, L, L) under a mask, whatever the lengths are. What
the mask hides has the weight 0: a huge number stays where it is, a NaN does not.

Scores and weights are in float32 at least.

Shape letters: G packs, or sequences of a group, C queries, M keys.
"""

import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead, prefers_few_launches, without_autocast
from collate.layout import PackLayout
from collate.views import at_least_float32


class AllScoresHead(AttentionHead):
    """A head whose subclass defines `weigh`."""

    supports_dropout = True

    def prepare(self, layout: PackLayout) -> None:
        if not prefers_few_launches(layout):
            layout.length_groups  # noqa: B018

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        inputs = (q_THK, k_THK, v_THK)
        if prefers_few_launches(layout):
            mask = layout.derived("same sequence", lambda: same_sequence(layout))
            query, key, value = (layout.in_rows(x).transpose(1, 2) for x in inputs)
            return layout.unpad(self.attend_keys(query, key, value, mask, dropout).transpose(1, 2))
        groups, contexts = layout.length_groups, []
        for of_group, mask_of_group in zip(
            zip(*map(groups.gather, inputs), strict=True), groups.key_masks, strict=True
        ):
            query, key, value = (x.transpose(1, 2) for x in of_group)
            contexts.append(self.attend_keys(query, key, value, mask_of_group, dropout).transpose(1, 2))
        return groups.scatter(contexts)

    def attend_keys(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """(G, H, C, K), (G, H, M, K) x 2, a mask as in `weigh` -> (G, H, C, K)."""
        with without_autocast(query):
            scores = at_least_float32(query) * self.head_width**-0.5 @ at_least_float32(key).transpose(2, 3)
            weights = F.dropout(self.weigh(scores, mask), dropout)
            return (weights @ at_least_float32(value)).to(value.dtype)

    def weigh(self, scores_GHCM: Tensor, mask: Tensor | None) -> Tensor:
        """The weights (G, H, C, M).

        mask: bool, broadcasts to the scores, True on keys that are real tokens of the query's sequence; None: all are.
            A query that is no token may have none: its weights must be finite all the same.
        """
        raise NotImplementedError


def same_sequence(layout: PackLayout) -> Tensor:
    """(B, 1, L, L) bool; padding sees padding."""
    ids = layout.sequence_ids_BL
    return ids[:, None, :, None] == ids[:, None, None]
