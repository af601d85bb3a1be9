"""Global tokens: a few tokens of each sequence that see all of it, and that all of it sees."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import without_autocast
from bert_pretrain.attention.parts.pieces import in_chunks
from bert_pretrain.attention.parts.windows import attend
from collate.layout import PackLayout
from collate.views import at_least_float32


@dataclass(frozen=True, eq=False)
class GlobalTokens:
    """The first and last few tokens of each of N sequences, each once: G slots per sequence.

    first, last: how many of each. index: (N, G) int64, the token in each slot; a slot without one shows a token of the
    same sequence, but in an empty sequence. valid: (N, G) bool.
    """

    first: int
    last: int
    index: Tensor
    valid: Tensor

    def is_global(self, position: Tensor, length: Tensor) -> Tensor:
        return (position < self.first) | (position >= length - self.last)

    def gather(self, x_T: Tensor) -> Tensor:
        """(T, …) -> (N, G, …)"""
        return x_T.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

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
        index=(layout.cu_seqlens[:-1, None].long() + torch.minimum(position.clamp(min=0), length - 1)).clamp(min=0),
        valid=torch.cat([at_start < length, at_end >= first], 1),
    )


def attend_from_global(
    x_THK: Tensor,
    tokens: GlobalTokens,
    q_NGHK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: PackLayout,
    dropout: float,
) -> Tensor:
    """The contexts x_THK, with those of global tokens replaced by softmax attention over their whole sequence."""
    query = q_NGHK.transpose(1, 2)
    attend_all = attend_in_groups if query.device.type == "cpu" else attend_by_chunks
    return replace_global(x_THK, tokens, attend_all(query, k_THK, v_THK, layout, dropout), layout)


def replace_global(x_THK: Tensor, tokens: GlobalTokens, found_NHGK: Tensor, layout: PackLayout) -> Tensor:
    """The contexts x_THK, with those of global tokens replaced by what was found for them."""
    token, slot = written(layout, tokens.first, tokens.last)
    return x_THK.index_copy(0, token, found_NHGK.transpose(1, 2).flatten(0, 1).index_select(0, slot))


def prepare_global(layout: PackLayout, first: int, last: int = 0) -> None:
    """Make the tables of `attend_from_global`."""
    written(layout, first, last)
    layout.length_groups if layout.runs_on.type == "cpu" else in_chunks(layout, CHUNK)


def written(layout: PackLayout, first: int, last: int) -> tuple[Tensor, Tensor]:
    """All global tokens, and the slot of each among the N * G."""
    return layout.table(("written global tokens", first, last), lambda layout: _written(layout, first, last))


def _written(layout: PackLayout, first: int, last: int) -> tuple[Tensor, Tensor]:
    tokens = global_tokens(layout, first, last)
    slot = tokens.valid.flatten().nonzero().squeeze(1)
    return tokens.index.flatten()[slot], slot


def attend_in_groups(
    query_NHGK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0
) -> Tensor:
    """A few queries of each sequence over all of it: (N, H, G, K). Sequences of like length side by side."""
    groups = layout.length_groups
    found = []
    for members, mask, *key_value in zip(
        groups.members, groups.key_masks, *map(groups.gather, (k_THK, v_THK)), strict=True
    ):
        key, value = (x.transpose(1, 2) for x in key_value)
        found.append(attend(query_NHGK.index_select(0, members), key, value, mask, dropout))
    return torch.zeros_like(query_NHGK).index_copy(0, torch.cat(groups.members), torch.cat(found))


CHUNK = 64


def attend_by_chunks(
    query_NHGK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0
) -> Tensor:
    """The same in products over chunks of keys and sums over the chunks of a sequence: as many for any lengths."""
    chunks, (pieces,) = layout.chunks(CHUNK), in_chunks(layout, CHUNK).parts
    with without_autocast(query_NHGK):
        query = at_least_float32(query_NHGK) * query_NHGK.shape[-1] ** -0.5
        key, value = (at_least_float32(chunks.gather(x).transpose(1, 2)) for x in (k_THK, v_THK))
        scores = query.index_select(0, chunks.sequence) @ key.transpose(-1, -2)
        scores = scores.masked_fill(~chunks.valid[:, None, None], torch.finfo(scores.dtype).min)
        weights = (scores - pieces.largest(scores.detach().amax(-1, keepdim=True))).exp()
        context = pieces.total(F.dropout(weights, dropout) @ value) / pieces.total(weights.sum(-1, keepdim=True))
        first = chunks.first.clamp(max=chunks.num_chunks - 1)  # an empty sequence has none
        return context.index_select(0, first).to(query_NHGK.dtype)
