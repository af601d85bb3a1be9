"""The base of heads that look at a whole sequence: sums, projections and pseudo-inverses over all of its tokens.

    lengths 3, 20, 5, 17    ->    one call of `mix` for the sequences of 1 to 16 tokens, one for those of 17 to 32

Sequences of like length lie side by side, each with its own place along the first dimension of every product. So a sum
over a sequence is a matrix product over its own rows: no scatter, and no order of addition that another sequence could
change. An accelerator gets all sequences at once, in chunks (`pieces`): `mix` says what is to be added up over the
chunks of a sequence. Which kernel computes a product depends on the processor and on the shape.

Shape letters: P pieces of a part, W its width, n a sequence's own length.
"""

from contextlib import nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead, prefers_few_launches, without_autocast
from bert_pretrain.attention.parts.pieces import (
    Cut,
    SequencePieces,
    chunk_table,
    in_chunks,
    whole_sequences,
)
from collate.layout import PackLayout
from collate.views import at_least_float32


class WholeSequenceHead(AttentionHead):
    """A head whose subclass mixes the tokens of one part of the batch, with `mix`."""

    precise: ClassVar[bool] = False
    """Whether `mix` computes in float32 at least, even under autocast: for sums over whole sequences and inverses."""
    apart: ClassVar[bool] = False
    """Whether sequences of one chunk are a part of their own."""

    widens: ClassVar[bool] = True
    """Whether a precise head gets wide inputs. If not, `mix` widens them itself: both at once, for instance."""

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, where sequences are cut into chunks."""
        return 64

    def prepare(self, layout: PackLayout) -> None:
        if prefers_few_launches(layout):
            layout.chunks(self.chunk)
            chunk_table(layout, self.chunk, self.apart)
        else:
            whole_sequences(layout)

    def cut(self, layout: PackLayout) -> Cut:
        return in_chunks(layout, self.chunk, self.apart) if prefers_few_launches(layout) else whole_sequences(layout)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        cut, settings, contexts = self.cut(layout), self.dropout_settings(dropout), []
        with without_autocast(q_THK) if self.precise else nullcontext():
            for *inputs, pieces in zip(*map(cut.gather, (q_THK, k_THK, v_THK)), cut.parts, strict=True):
                query, key, value = map(at_least_float32, inputs) if self.precise and self.widens else inputs
                contexts.append(self.mix(query, key, value, pieces, **settings))
            return cut.scatter(contexts).to(q_THK.dtype)

    def mix(
        self, q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, dropout: float = 0.0
    ) -> Tensor:
        """The context (P, H, W, K) of one part. dropout: as in `attend`.

        Padding slots show the last token of their sequence: mask them out of every sum over W, as their gradient is
        dropped. What is a sum over W is then added up over the pieces of each sequence.
        """
        raise NotImplementedError


def softmax_means(
    scores_PHMW: Tensor, pieces: SequencePieces, *x_PHWK: Tensor, dropout: float = 0.0, spread: bool = False
) -> tuple[Tensor, ...]:
    """Softmax over all tokens of each sequence, and the means of each x by these weights: (S, H, M, K) each.

    spread: at each piece of the sequence, (P, H, M, K) each.
    """
    if pieces.is_padding is not None:
        scores_PHMW = scores_PHMW.masked_fill(pieces.is_padding, float("-inf"))
    if pieces.runs is None:
        weights_PHMW = F.dropout(scores_PHMW.softmax(3), dropout)
        return tuple(weights_PHMW @ x for x in x_PHWK)
    weights_PHMW = (scores_PHMW - pieces.largest(scores_PHMW.detach().amax(3, keepdim=True))).exp()
    total_PHM1 = weights_PHMW.sum(3, keepdim=True)
    weights_PHMW = F.dropout(weights_PHMW, dropout)
    # all sums as one tensor: they are added up in one step
    sums_SHMJ = pieces.add_up(torch.cat([*(weights_PHMW @ x for x in x_PHWK), total_PHM1], dim=3))
    means_SHMJ = sums_SHMJ[..., :-1] * sums_SHMJ[..., -1:].reciprocal()
    if spread:
        means_SHMJ = pieces.spread(means_SHMJ)
    return means_SHMJ.split([x.shape[3] for x in x_PHWK], dim=3)
