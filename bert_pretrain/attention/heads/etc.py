"""`etc`: a window, and g transient global tokens, each the mean of a g-th of the sequence.

    block a  B_a = {j : floor(j g / n) = a},  a < g        (g is n in sequences of n < g tokens)
    key, value of global token a:  mean_{j in B_a} k_j,  mean_{j in B_a} v_j
    context_i = softmax attention of q_i over {j : |i - j| <= w} and the g global tokens together, scores / sqrt(K)

Cost: N (2 w + 2 g) K; memory N (2 w + g) K.
Source: ETC (Ainslie et al. 2020, arXiv 2004.08483), in the form of LongT5's transient global attention (Guo et al.
2021, arXiv 2112.07916, section 3.1.2): each layer makes its global tokens again, and all tokens see them. LongT5
projects a normalised sum of hidden states; here the mean of keys is the key of the mean hidden state, without a norm
and so without parameters. LongT5's blocks have a fixed length; here each sequence has g blocks. ETC's own global
tokens, which last from layer to layer, are the head `etc_stream`.

Isolation: positions and n are the sequence's own, and a global token is a mean of one sequence. With g >= n every token
appears a second time, as its own block; so with w >= n - 1 this is full softmax attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import without_autocast
from bert_pretrain.attention.heads.local import WindowOptions, WindowPattern, window_mask
from bert_pretrain.attention.options import whole
from bert_pretrain.attention.parts.blocks import BLOCK_SLOTS, MaskMod, spans_of, within
from bert_pretrain.attention.parts.pattern import Sees
from bert_pretrain.attention.parts.pieces import AddUp
from bert_pretrain.attention.parts.windows import Windows, attend, windows_of_tokens
from collate.layout import PackLayout
from collate.views import at_least_float32


@dataclass(frozen=True)
class EtcOptions(WindowOptions):
    """What `use_attention(model, "etc", …)` takes."""

    global_tokens: int = whole(16, 1, "without global tokens take local attention")
    """Means of the sequence that every token sees. More keep finer detail, and cost in proportion."""


class EtcAttention(WindowPattern):
    """Softmax attention over a window and means of the own sequence; no parameters."""

    Options = EtcOptions

    def sees(self, device: torch.device) -> Sees:
        near = super().sees(device)  # a key at -1: a mean of the sequence, no token
        return lambda head, query, key, length: near(head, query, key, length) | (key < 0)

    def extra_keys(self, k_THK: Tensor, v_THK: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor, Tensor]:
        key, value = (block_means(x, layout, self.options.global_tokens) for x in (k_THK, v_THK))
        return key, value, self.exists(layout)

    def extra_rows(self, x_THK: Tensor, layout: PackLayout) -> Tensor:
        """(B, H, (S + 1) G, K): the global tokens of each pack."""
        return means_in_packs(x_THK, layout, self.options.global_tokens).transpose(1, 2)

    def extra_ids(self, layout: PackLayout) -> Tensor:
        number, ids = self.options.global_tokens, layout.sequence_ids_BL
        lengths = ids.new_zeros(len(ids), layout.most_sequences + 2)
        lengths = lengths.scatter_add_(1, ids.long(), torch.ones_like(ids))[:, 1:, None]
        own = torch.arange(1, layout.most_sequences + 2, device=ids.device, dtype=ids.dtype)[:, None]
        return torch.where(torch.arange(number, device=ids.device) < lengths, own, 0).flatten(1)

    def seen_blocks(self, layout: PackLayout) -> Tensor:
        ids, number = layout.sequence_ids_BL, self.options.global_tokens
        slots = ids.shape[1]
        key_slots = slots + (layout.most_sequences + 1) * number
        has_extra = torch.arange(-(-key_slots // BLOCK_SLOTS), device=ids.device) >= slots // BLOCK_SLOTS
        return within(self.options.window, slots, key_slots, ids.device) | has_extra

    def mask_mod(self, layout: PackLayout) -> MaskMod:
        of_tokens, spans, ids = super().mask_mod(layout), spans_of(layout), layout.sequence_ids_BL
        starts, stops, numbers = spans.start, spans.stop, (ids.shape[1], self.options.global_tokens)

        def mask_mod(pack, head, query, key, numbers=numbers):
            slots, number = numbers
            extra, length = key - slots, stops[pack, query] - starts[pack, query]
            mean = (extra >= 0) & (extra // number == ids[pack, query] - 1) & (extra % number < length)
            return of_tokens(pack, head, query, key) | mean

        return mask_mod

    def prepare(self, layout: PackLayout) -> None:
        super().prepare(layout)
        if layout.runs_on.type != "cpu":
            layout.cu_seqlens, layout.most_sequences  # noqa: B018

    def prepare_chunks(self, layout: PackLayout) -> None:
        windows_of_tokens(layout, self.options.window)
        layout.length_groups  # noqa: B018

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        view = windows_of_tokens(layout, self.options.window)
        mask = layout.derived((*self.cache_key(), "mask"), lambda: self.chunk_mask(view, layout))
        key, value = (torch.cat([view.keys(x), self.means(x, view, layout)], 2) for x in (k_THK, v_THK))
        return view.to_tokens(attend(view.queries(q_THK), key, value, mask, dropout))

    def means(self, x_THK: Tensor, view: Windows, layout: PackLayout) -> Tensor:
        """(NC, H, G, K): the global tokens of each chunk's sequence."""
        means = block_means(x_THK, layout, self.options.global_tokens)
        return means.index_select(0, view.chunks.sequence).transpose(1, 2)

    def exists(self, layout: PackLayout) -> Tensor:
        """(N, G) bool: a sequence of fewer than G tokens has as many global tokens as tokens."""
        number = self.options.global_tokens
        return layout.derived(
            ("etc exists", number), lambda: torch.arange(number, device=layout.lengths.device) < layout.lengths[:, None]
        )

    def chunk_mask(self, view: Windows, layout: PackLayout) -> Tensor:
        """(NC, 1, C, M + G) bool: the window, then the global tokens."""
        near = window_mask(view, self.options.window)
        far = self.exists(layout)[view.chunks.sequence][:, None, None]
        return torch.cat([near, far.expand(-1, -1, near.shape[2], -1)], -1)


def block_means(x_THK: Tensor, layout: PackLayout, number: int) -> Tensor:
    """(T, H, K) -> (N, G, H, K): means over the blocks of each sequence; 0 where a sequence has fewer tokens."""
    if x_THK.device.type != "cpu":
        make = lambda: MeanTable.of(layout.sequence_of_token, layout.num_sequences, layout, number)  # noqa: E731
        return layout.derived(("blocks", number), make).means(x_THK).unflatten(0, (-1, number))
    groups = layout.length_groups
    key = ("block means", number, x_THK.dtype)
    weights = layout.derived(key, lambda: mean_weights(layout, number, x_THK.dtype))
    found = [weight @ x.flatten(2) for weight, x in zip(weights, groups.gather(x_THK), strict=True)]
    means = x_THK.new_zeros(layout.num_sequences, number, x_THK[0].numel())
    return means.index_copy(0, torch.cat(groups.members), torch.cat(found)).unflatten(2, x_THK.shape[1:])


def mean_weights(layout: PackLayout, number: int, dtype: torch.dtype) -> list[Tensor]:
    """For each length group (S, G, width): 1 / (tokens of the block) on the tokens of each block, 0 elsewhere."""
    weights = []
    for members, (_, width) in zip(layout.length_groups.members, layout.length_groups.shapes, strict=True):
        length = layout.lengths[members, None]
        position = torch.arange(width, device=length.device)
        block = torch.where(position < length, position * length.clamp(max=number) // length, -1)
        inside = block[:, None] == torch.arange(number, device=length.device)[:, None]
        weights.append(inside.to(dtype) / inside.sum(-1, keepdim=True).clamp(min=1).to(dtype))
    return weights


def means_in_packs(x_THK: Tensor, layout: PackLayout, number: int) -> Tensor:
    """(T, H, K) -> (B, (S + 1) G, H, K): the same, in each pack S sequences and padding."""
    packs, slots = len(layout.sequence_ids_BL), layout.most_sequences + 1
    make = lambda: MeanTable.of(_slot_of_token(layout), packs * slots, layout, number)  # noqa: E731
    return layout.derived(("blocks in packs", number), make).means(x_THK).unflatten(0, (packs, -1))


def _slot_of_token(layout: PackLayout) -> Tensor:
    """(T,) the sequence slot of each token, counted through all packs of S + 1 slots; that of padding is the last."""
    (packs, slots), most = layout.sequence_ids_BL.shape, layout.most_sequences
    own = layout.unpad(layout.sequence_ids_BL).long() - 1
    pack = layout.unpad(torch.arange(packs, device=own.device)[:, None].expand(-1, slots))
    return pack * (most + 1) + torch.where(own < 0, most, own)


@dataclass(frozen=True, eq=False)
class MeanTable:
    """Which block each token adds to. place: (T,) int64, ascending. count: (T,) int64, tokens of that block.

    bounds: (blocks + 1,) int64, where each block begins among the tokens.
    """

    place: Tensor
    count: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, slot_T: Tensor, num_slots: int, layout: PackLayout, number: int) -> "MeanTable":
        """slot_T: which sequence slot each token is in, ascending; each slot has `number` blocks."""
        length = layout.lengths[layout.sequence_of_token]
        blocks = length.clamp(max=number)
        block = layout.positions_T * blocks // length
        first, after = ((b * length + blocks - 1) // blocks for b in (block, block + 1))
        place = slot_T * number + block
        counts = place.new_zeros(num_slots * number).index_add_(0, place, torch.ones_like(place))
        return cls(place, after - first, F.pad(counts.cumsum(0), (1, 0)))

    def means(self, x_THK: Tensor) -> Tensor:
        """(T, H, K) -> (blocks, H, K), 0 for a block of no token."""
        with without_autocast(x_THK):
            shares = at_least_float32(x_THK) / self.count[:, None, None]
            return AddUp.apply(shares, self.place, self.bounds).to(x_THK.dtype)
