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
    largest,
    totals,
    whole_sequences,
)
from collate.layout import PackLayout


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
            widens = self.precise and self.widens
            inputs = (cut.gather(x, widens) for x in (q_THK, k_THK, v_THK))
            for query, key, value, pieces in zip(*inputs, cut.parts, strict=True):
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
    weights_PHMW = (
        scores_PHMW.softmax(3) if pieces.runs is None else SequenceSoftmax.apply(scores_PHMW, *pieces.runs[1:])
    )
    weights_PHMW = F.dropout(weights_PHMW, dropout)
    means = [weights_PHMW @ x for x in x_PHWK]
    if pieces.runs is None:
        return tuple(means)
    # all means as one tensor: they are added up in one step
    together = means[0] if len(means) == 1 else torch.cat(means, dim=3)
    together = pieces.total(together) if spread else pieces.add_up(together)
    return (together,) if len(means) == 1 else together.split([x.shape[3] for x in x_PHWK], dim=3)


class SequenceSoftmax(torch.autograd.Function):
    """scores (P, H, M, W), sequence (P,), bounds (S + 1,) -> softmax over the slots of all pieces of each sequence.

    Its gradient is written out: autograd would take twice as many passes over the weights.
    """

    @staticmethod
    def forward(ctx, scores, sequence, bounds):
        weights = (scores - largest(scores.amax(3, keepdim=True), sequence, bounds)).exp_()
        weights /= totals(weights.sum(3, keepdim=True), sequence, bounds)
        ctx.save_for_backward(weights, sequence, bounds)
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weights, sequence, bounds = ctx.saved_tensors
        weighted = weights * grad
        mean = totals(weighted.sum(3, keepdim=True), sequence, bounds)
        return torch.addcmul(weighted, weights, mean, value=-1), None, None
