"""`nystrom`: the softmax matrix of a sequence, approximated from m landmarks.

    context = softmax(Q K~^T / sqrt(K)) pinv(softmax(Q~ K~^T / sqrt(K))) softmax(Q~ K^T / sqrt(K)) V

    Q~, K~: (m, K) landmarks, the means of m segments of the sequence, of equal length but for one token
    pinv(A): Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, some times, from Z = A^T / (|A|_1 |A|_inf)

Cost: N m K over the batch's N tokens, and m^3 a sequence and iteration; memory N m. Source: Xiong et al., Nystromformer
(2102.03902), section 3 (equations 11 to 15), without the convolution beside it.

Isolation: landmarks, the pseudo-inverse and the norms that it starts from belong to one sequence and head. (Public code
takes a norm over the batch, so every sequence shifts the others.)

Sequences of at most m tokens, m rounded up to a multiple of 16, get the softmax itself, which then costs no more. On a
CPU the softmax stays faster up to some hundreds of tokens, as the inverses take time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.options import HeadOptions, whole
from bert_pretrain.attention.parts.pieces import SequencePieces
from bert_pretrain.attention.parts.whole_sequences import WholeSequenceHead, softmax_means
from collate.length_groups import WIDTH_STEP


@dataclass(frozen=True)
class NystromOptions(HeadOptions):
    """What `use_attention(model, "nystrom", …)` takes."""

    landmarks: int = whole(64, 1, "give the number of segments that a sequence is cut into")
    """Segments a sequence is cut into, m. More follow the softmax closer; the cost grows with N m and m^3."""
    iterations: int = whole(6, 1, "give the number of steps towards the pseudo-inverse")
    """Steps towards the pseudo-inverse. Fewer are cheaper and rougher; more help where the segments differ little."""


class NystromAttention(WholeSequenceHead):
    """Nystrom's approximation of softmax attention; no parameters."""

    Options = NystromOptions
    precise = True
    apart = True

    @property
    def chunk(self) -> int:
        """The widest piece whose sequence gets the softmax itself."""
        return -(-self.options.landmarks // WIDTH_STEP) * WIDTH_STEP

    def mix(
        self, q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, dropout: float = 0.0
    ) -> Tensor:
        width = q_PHWK.shape[2]
        # by the width, which is the sequence's own as well as its length is
        if pieces.runs is None and width <= self.chunk:
            hidden, mask = pieces.is_padding, None
            if hidden is not None:  # a row per query: torch's fast kernel wants it
                mask = pieces.kept("mask", lambda: ~hidden).expand(-1, -1, width, -1)
            return F.scaled_dot_product_attention(q_PHWK, k_PHWK, v_PHWK, attn_mask=mask)
        return nystrom(q_PHWK, k_PHWK, v_PHWK, pieces, self.options.landmarks, self.options.iterations)


def nystrom(
    q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, landmarks: int, iterations: int
) -> Tensor:
    """The formula, for sequences of at least `landmarks` tokens."""
    means_P1MW = segment_means(pieces, landmarks, q_PHWK.dtype)
    q_PHWK = q_PHWK / q_PHWK.shape[3] ** 0.5
    query_SHMK, key_SHMK = (pieces.add_up(means_P1MW @ x) for x in (q_PHWK, k_PHWK))
    to_landmarks_PHWM = (q_PHWK @ pieces.spread(key_SHMK).transpose(2, 3)).softmax(3)
    among_landmarks_SHMM = (query_SHMK @ key_SHMK.transpose(2, 3)).softmax(3)
    scores_PHMW = pieces.spread(query_SHMK) @ k_PHWK.transpose(2, 3)
    (from_landmarks_SHMK,) = softmax_means(scores_PHMW, pieces, v_PHWK)
    # from the right, as these products are the small ones
    read_SHMK = pseudo_inverse(among_landmarks_SHMM, iterations) @ from_landmarks_SHMK
    return to_landmarks_PHWM @ pieces.spread(read_SHMK)


def segment_means(pieces: SequencePieces, landmarks: int, dtype: torch.dtype) -> Tensor:
    """(P, 1, M, W): the matrix that takes tokens to the means of M segments of each sequence.

    5 tokens, M = 2:   1/2 1/2  0   0   0
                        0   0  1/3 1/3 1/3
    """
    return pieces.kept(("segment means", landmarks, dtype), lambda: _segment_means(pieces, landmarks, dtype))


def _segment_means(pieces: SequencePieces, landmarks: int, dtype: torch.dtype) -> Tensor:
    length_P11, position_P1W = pieces.length[:, None, None], pieces.positions[:, None]
    segment_M1 = torch.arange(landmarks, device=length_P11.device)[:, None]
    # segment m begins at token floor(m n / M)
    first, next_first = (number * length_P11 // landmarks for number in (segment_M1, segment_M1 + 1))
    is_in_PMW = (first <= position_P1W) & (position_P1W < next_first)
    return (is_in_PMW.to(dtype) / (next_first - first))[:, None]


def pseudo_inverse(a_SHMM: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of each matrix by itself, approached by the iteration of Razavi et al. (2014)."""
    norms_SH11 = a_SHMM.sum(2, keepdim=True).amax(3, keepdim=True) * a_SHMM.sum(3, keepdim=True).amax(2, keepdim=True)
    inverse_SHMM = a_SHMM.transpose(2, 3) / norms_SH11  # the entries of a softmax are their own absolute values
    a, z = a_SHMM.flatten(0, 1), inverse_SHMM.flatten(0, 1)
    for _ in range(iterations):
        p = torch.bmm(a, z)
        rest = torch.baddbmm(p, p, torch.baddbmm(p, p, p, beta=-7), beta=15)
        z = torch.baddbmm(z, z, rest, beta=13 / 4, alpha=-1 / 4)
    return z.view_as(a_SHMM)
