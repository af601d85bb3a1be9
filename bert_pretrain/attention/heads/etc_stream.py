"""`etc_stream`: a window, and a stream of global tokens with projections of its own (ETC).

    the first g tokens of each sequence are global (x^g), the others long (x^l); k, v, a below by pieces gg gl lg ll
    global:  softmax over all j of one sequence of                q^g_i . (k_j + a(i, j)) / sqrt(K)
    long:    softmax over global j and long j with |i - j| <= w   q^l_i . (k_j + a(i, j)) / sqrt(K)

    k^gg, v^gg and k^lg, v^lg: of the global tokens. k^gl, v^gl and k^ll, v^ll: of the long tokens.
    a, learned for each head: gg and ll by the distance j - i, beyond max_distance by its sign alone;
        gl and lg by whether the long token is in the part that the global token stands for, or in another

q^l, k^ll, v^ll are the layer's own; the other seven projections are the head's, and start as copies of these. Global
tokens are rows of the hidden states like all others. So they last from layer to layer, and pass the feed-forward that
all tokens share. Global token a stands for the a-th of g equal parts of the long tokens.

Cost: N (2 w + g) K, g n K for the global tokens of each sequence, and as much for distances as for the window; two
products of the width of the model for every token.
Source: ETC (Ainslie et al. 2020, arXiv 2004.08483, sections 3.1 and 3.2), with relative labels on keys as there. The
paper's global tokens stand for sentences, which a head does not know of; here for equal parts. Its masks within a piece
and its pretraining task for global tokens (CPC) are not here.

Isolation: positions, parts and global tokens are the sequence's own; chunks never hold two sequences.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bert_pretrain.attention.head import AttentionHead
from bert_pretrain.attention.heads.local import window_mask
from bert_pretrain.attention.options import HeadOptions, whole
from bert_pretrain.attention.parts.distances import by_distance, distance_scores
from bert_pretrain.attention.parts.global_tokens import GlobalTokens, global_tokens, replace_global, written
from bert_pretrain.attention.parts.pattern import attend_biased, attend_part, join_chunks, join_parts
from bert_pretrain.attention.parts.pieces import chunk_table, in_chunks
from bert_pretrain.attention.parts.projections import Projection
from bert_pretrain.attention.parts.windows import Windows, chunk_and_reach, windows_of_tokens
from collate.layout import PackLayout

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EtcStreamOptions(HeadOptions):
    """What `use_attention(model, "etc_stream", …)` takes."""

    window: int = whole(128, 0, "0 lets a long token see itself and global tokens")
    """Long tokens that a long token sees on each side; the paper's local radius is 84."""
    global_tokens: int = whole(1, 1, "without global tokens take local attention")
    """How many tokens at the start of each sequence are global; 1 is [CLS]. For more, let the tokenizer put as many
    special tokens there."""
    max_distance: int = whole(12, 0, "0 gives all distances one label")
    """Up to where distances have labels of their own. Each costs two vectors a head."""


class Masks(NamedTuple):
    """Who sees whom, True = attend, and whose part a long token is in. NC chunks of C queries with M key slots.

    long: (NC, 1, C, M + G), the window, then global tokens. to_long: (NC, 1, 1, C). to_global: (N, 1, 1, G).
    own: (NC, 1, C, G), whether the token of a slot is in the part of a global token.
    """

    long: Tensor
    to_long: Tensor
    to_global: Tensor
    own: Tensor


class EtcStreamAttention(AttentionHead):
    """Attention of a global stream and a long one.

    of_global makes of global tokens q^g, k^gg, v^gg, k^lg, v^lg, of_long of all tokens k^gl, v^gl. Labels: (2
    max_distance + 1, H, K) of distances, and (2, H, K) of parts: another, the own.
    """

    Options = EtcStreamOptions
    supports_dropout = True
    needs_hidden = True

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        distances = 2 * self.options.max_distance + 1
        self.of_global = Projection(self.hidden_size, 5 * self.num_heads, self.head_width)
        self.of_long = Projection(self.hidden_size, 2 * self.num_heads, self.head_width)
        self.labels_gg, self.labels_ll, self.labels_gl, self.labels_lg = (
            nn.Parameter(torch.empty(number, self.num_heads, self.head_width))
            for number in (distances, distances, 2, 2)
        )
        self.draw_labels()

    def reset_parameters(self) -> None:
        for projection in (self.of_global, self.of_long):
            projection.reset_parameters()
        self.draw_labels()

    def draw_labels(self) -> None:
        """As small as BERT's embeddings."""
        for labels in (self.labels_gg, self.labels_ll, self.labels_gl, self.labels_lg):
            nn.init.normal_(labels, std=0.02)

    def start_from(self, layer: nn.Module) -> None:
        self.of_global.start_from(layer, "query", "key", "value", "key", "value")
        self.of_long.start_from(layer, "key", "value")

    def prepare(self, layout: PackLayout) -> None:
        size, _ = chunk_and_reach(self.options.window)
        layout.chunks(size)
        chunk_table(layout, size, apart=False)
        written(layout, self.options.global_tokens, 0)

    def attend(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        layout: PackLayout,
        dropout: float = 0.0,
        hidden_TD: Tensor | None = None,
    ) -> Tensor:
        assert hidden_TD is not None
        view = windows_of_tokens(layout, self.options.window)
        tokens = global_tokens(layout, self.options.global_tokens)
        key = ("etc stream", self.options.window, self.options.global_tokens)
        masks = layout.derived(key, lambda: self.masks(view, tokens))
        of_global = self.of_global(tokens.gather(hidden_TD)).transpose(1, 2)
        query_g, key_gg, value_gg, key_lg, value_lg = of_global.chunk(5, 1)  # (N, H, G, K) each
        key_gl, value_gl = view.queries(self.of_long(hidden_TD)).chunk(2, 1)  # (NC, H, C, K) each
        key_lg, value_lg = (x.index_select(0, view.chunks.sequence) for x in (key_lg, value_lg))
        near = view.keys(k_THK), view.keys(v_THK)
        context = self.from_long(view, view.queries(q_THK), near, (key_lg, value_lg), masks, dropout)
        found = self.from_global(view, query_g, (key_gg, value_gg), (key_gl, value_gl), masks, layout, dropout)
        return replace_global(view.to_tokens(context), tokens, found.to(context.dtype), layout)

    def from_long(
        self, view: Windows, query: Tensor, near: KeysValues, far: KeysValues, masks: Masks, dropout: float
    ) -> Tensor:
        """(NC, H, C, K): what long tokens see, of the window (NC, H, M, K) and of global tokens (NC, H, G, K)."""
        key, value = (torch.cat(pair, 2) for pair in zip(near, far, strict=True))
        scaled, size = query * self.head_width**-0.5, view.chunks.size
        reach = (view.source.shape[1] - 1) // 2 * size
        distances = by_distance(self.labels_ll, 1 - size - reach, size - 1 + reach)
        bias = torch.cat([distance_scores(scaled, distances), self.of_parts(scaled, self.labels_lg, masks.own)], -1)
        return attend_biased(query, key, value, masks.long, bias, dropout)

    def from_global(
        self,
        view: Windows,
        query: Tensor,
        to_global: KeysValues,
        to_long: KeysValues,
        masks: Masks,
        layout: PackLayout,
        dropout: float,
    ) -> Tensor:
        """(N, H, G, K): what global tokens see, of each other (N, H, G, K) and of long tokens (NC, H, C, K)."""
        chunks, number, scale = view.chunks, self.options.global_tokens, self.head_width**-0.5
        bias = distance_scores(query * scale, by_distance(self.labels_gg, 1 - number, number - 1))
        of_global = attend_part(query, *to_global, masks.to_global, dropout, bias)
        query = query.index_select(0, chunks.sequence)
        bias = self.of_parts(query * scale, self.labels_gl, masks.own.transpose(2, 3))
        of_long = attend_part(query, *to_long, masks.to_long, dropout, bias)
        (pieces,) = in_chunks(layout, chunks.size).parts
        return join_parts(of_global, join_chunks(*of_long, pieces, chunks))

    def of_parts(self, query: Tensor, labels_2HK: Tensor, own: Tensor) -> Tensor:
        """(NC, H, Q, K), own (NC, 1, Q, M) -> q . a of the own part or of another (NC, H, Q, M)."""
        other, same = (query @ labels_2HK.permute(1, 2, 0)).split(1, -1)
        return torch.where(own, same, other)

    def masks(self, view: Windows, tokens: GlobalTokens) -> Masks:
        chunks, length, number = view.chunks, view.length[:, None], self.options.global_tokens
        near = window_mask(view, self.options.window) & ~tokens.is_global(view.key_position, length)[:, None, None]
        far = tokens.valid[chunks.sequence][:, None, None].expand(-1, -1, chunks.size, -1)
        part = (view.query_position - number) * number // (length - number).clamp(min=1)
        return Masks(
            long=torch.cat([near, far], -1),
            to_long=(chunks.valid & ~tokens.is_global(chunks.positions, length))[:, None, None],
            to_global=tokens.valid[:, None, None],
            own=(part[..., None] == torch.arange(number, device=part.device))[:, None],
        )
