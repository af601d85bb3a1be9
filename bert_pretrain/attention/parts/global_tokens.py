"""Global tokens: a few tokens of each sequence that see all of it, and that all of it sees."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretrain.attention.parts.windows import attend
from collate.layout import PackLayout


@dataclass(frozen=True, eq=False)
class GlobalTokens:
    """The first and last few tokens of each of N sequences, each once: G slots per sequence.

    first, last: how many of each. index: (N, G) int64, the token in each slot; a slot without one shows a token of the
    same sequence. valid: (N, G) bool.
    """

    first: int
    last: int
    index: Tensor
    valid: Tensor

    def is_global(self, position: Tensor, length: Tensor) -> Tensor:
        return (position < self.first) | (position >= length - self.last)

    def gather(self, x_THK: Tensor) -> Tensor:
        """(T, H, K) -> (N, G, H, K)"""
        return x_THK.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def of_chunks(self, x_THK: Tensor, sequence: Tensor) -> Tensor:
        """(T, H, K) -> (NC, H, G, K): the global tokens of each chunk's sequence (NC,)."""
        return self.gather(x_THK).index_select(0, sequence).transpose(1, 2)


def global_tokens(layout: PackLayout, first: int, last: int = 0) -> GlobalTokens:
    """The first and last tokens of each sequence; found once for all layers that ask."""
    return layout.derived(("global tokens", first, last), lambda: _global_tokens(layout, first, last))


def _global_tokens(layout: PackLayout, first: int, last: int) -> GlobalTokens:
    length = layout.lengths[:, None]
    at_start = torch.arange(first, device=length.device).expand(len(length), first)
    at_end = length + torch.arange(-last, 0, device=length.device)
    position = torch.cat([at_start, at_end], 1)
    return GlobalTokens(
        first=first,
        last=last,
        index=layout.cu_seqlens[:-1, None].long() + torch.minimum(position.clamp(min=0), length - 1),
        valid=torch.cat([at_start < length, at_end >= first], 1),
    )


def replace_global(
    x_THK: Tensor, tokens: GlobalTokens, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float
) -> Tensor:
    """The contexts x_THK, with those of global tokens replaced by softmax attention over their whole sequence."""
    groups = layout.length_groups
    query = tokens.gather(q_THK).transpose(1, 2)
    found = []
    for members, mask, *key_value in zip(
        groups.members, groups.key_masks, *map(groups.gather, (k_THK, v_THK)), strict=True
    ):
        key, value = (x.transpose(1, 2) for x in key_value)
        found.append(attend(query.index_select(0, members), key, value, mask, dropout).transpose(1, 2))
    order = torch.cat(groups.members)
    valid = tokens.valid[order]
    return x_THK.index_copy(0, tokens.index[order][valid], torch.cat(found)[valid])
