"""The base of heads that look at a whole sequence: sums, projections and pseudo-inverses over all of its tokens.

    lengths 3, 20, 5, 17    ->    one call of `mix` for the sequences of 1 to 16 tokens, one for those of 17 to 32

Sequences of like length lie side by side (`collate.length_groups`), each with its own place along the first dimension
of every product. So a sum over a sequence is a matrix product over its own rows: no scatter, and no order of addition
that another sequence could change. Which kernel computes a product depends on the processor and on the shape: the
width, a length rounded up to a multiple of 16, and the number of sequences that share it.

Shape letters: S sequences of a group, W its width, n a sequence's own length.
"""

from contextlib import nullcontext
from typing import ClassVar

from torch import Tensor

from bert_pretrain.attention.head import AttentionHead, without_autocast
from collate.layout import PackLayout
from collate.views import at_least_float32

Real = Tensor | None
"""(S, 1, 1, W) bool: False in padding slots; None where there are none."""


class WholeSequenceHead(AttentionHead):
    """A head whose subclass mixes the tokens of one group of sequences, with `mix`."""

    precise: ClassVar[bool] = False
    """Whether `mix` computes in float32 at least, even under autocast: for sums over whole sequences and inverses."""

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        tokens = [q_THK, k_THK, v_THK]
        if self.precise:
            tokens = list(map(at_least_float32, tokens))
        settings, groups = self.dropout_settings(dropout), layout.length_groups
        contexts = []
        with without_autocast(q_THK) if self.precise else nullcontext():
            for query, key, value, is_real in zip(*map(groups.gather, tokens), groups.key_masks, strict=True):
                # contiguous once: each product would copy a strided tensor again
                query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
                contexts.append(self.mix(query, key, value, is_real, **settings).transpose(1, 2))
        return groups.scatter(contexts).to(q_THK.dtype)

    def mix(self, q_SHWK: Tensor, k_SHWK: Tensor, v_SHWK: Tensor, real_S11W: Real, dropout: float = 0.0) -> Tensor:
        """The context (S, H, W, K) of one group. dropout: as in `attend`.

        Padding slots, at a sequence's end, show its last token; real_S11W is False there, None without padding.
        Mask them out of every sum over W: their gradient is dropped.
        """
        raise NotImplementedError


def zero_padding(x_SHWK: Tensor, real_S11W: Real) -> Tensor:
    """0 in padding slots, along W."""
    return x_SHWK if real_S11W is None else x_SHWK.masked_fill(~real_S11W.transpose(2, 3), 0)


def softmax_over_tokens(scores_SHMW: Tensor, real_S11W: Real) -> Tensor:
    """Softmax over the real tokens of each sequence; 0 in padding slots."""
    if real_S11W is not None:
        scores_SHMW = scores_SHMW.masked_fill(~real_S11W, float("-inf"))
    return scores_SHMW.softmax(-1)
