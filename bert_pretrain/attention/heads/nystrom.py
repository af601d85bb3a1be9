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
            hidden, bias = pieces.is_padding, None
            if hidden is not None:  # a row per query: torch's fast kernel wants it
                bias = pieces.kept(("bias", q_PHWK.dtype), lambda: bias_of(hidden, q_PHWK.dtype))
                bias = bias.expand(-1, -1, width, -1)
            return F.scaled_dot_product_attention(q_PHWK, k_PHWK, v_PHWK, attn_mask=bias)
        return nystrom(q_PHWK, k_PHWK, v_PHWK, pieces, self.options.landmarks, self.options.iterations)


def bias_of(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where it is True, 0 elsewhere. A mask of bools would be turned into such in each layer."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))


def nystrom(
    q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, landmarks: int, iterations: int
) -> Tensor:
    """The formula, for sequences of at least `landmarks` tokens."""
    shape, heads = (len(q_PHWK), q_PHWK.shape[1]), q_PHWK.shape[1]
    # Products take sequences and heads as one dimension, J. With two, their gradients would be copied.
    q_JWK, k_JWK = q_PHWK.flatten(0, 1), k_PHWK.flatten(0, 1)
    means_JMW = means_of_heads(pieces, landmarks, heads, q_PHWK.dtype)
    query_SHMK, key_SHMK = (pieces.add_up((means_JMW @ x).unflatten(0, shape)) for x in (q_JWK, k_JWK))
    query_SHMK = query_SHMK / q_PHWK.shape[3] ** 0.5
    among_landmarks = torch.bmm(query_SHMK.flatten(0, 1), key_SHMK.flatten(0, 1).mT).softmax(2)
    scores = torch.bmm(pieces.spread(query_SHMK).flatten(0, 1), k_JWK.mT)
    (from_landmarks_SHMK,) = softmax_means(scores.unflatten(0, shape), pieces, v_PHWK)
    # from the right, as these products are the small ones
    read = torch.bmm(pseudo_inverse(among_landmarks, iterations), from_landmarks_SHMK.flatten(0, 1))
    read_SHMK = read.view_as(from_landmarks_SHMK)
    return F.scaled_dot_product_attention(q_PHWK, pieces.spread(key_SHMK), pieces.spread(read_SHMK))


def means_of_heads(pieces: SequencePieces, landmarks: int, heads: int, dtype: torch.dtype) -> Tensor:
    """(P * H, M, W): the segment means for each head, as a batched product wants them."""
    means = segment_means(pieces, landmarks, dtype)
    return pieces.kept(
        ("means of heads", landmarks, heads, dtype), lambda: means.expand(-1, heads, -1, -1).flatten(0, 1)
    )


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


def pseudo_inverse(a_JMM: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of each matrix by itself, approached by the iteration of Razavi et al. (2014).

    a_JMM: each row is a softmax. So its entries are their own absolute values, and |A|_inf, the largest sum of a row,
        is 1; |A|_1 is the largest sum of a column.
    """
    return PseudoInverse.apply(a_JMM, a_JMM.sum(1, keepdim=True).amax(2, keepdim=True), iterations)


class PseudoInverse(torch.autograd.Function):
    """A (J, M, M), its norm (J, 1, 1), steps -> the inverse Z (J, M, M), and the gradient written out.

        Z = A^T / norm, and then in each step     P = A Z,   S = P^2 - 7 P,   R = P S + 15 P,   Z <- Z (13 - R) / 4

    P is a polynomial of A A^T: symmetric. So of a gradient of P its symmetric part alone counts. Where G is the
    gradient of R, and B = G + G^T, half of 15 B + P B P + 2 S B will do for P. Autograd takes twice as many steps.
    """

    @staticmethod
    def forward(ctx, a, norm, iterations):
        z, steps = a.mT / norm, []
        for _ in range(iterations):
            p = torch.bmm(a, z)
            s = torch.baddbmm(p, p, p, beta=-7)
            r = torch.baddbmm(p, p, s, beta=15)
            steps += [z, p, s, r]
            z = torch.baddbmm(z, z, r, beta=13 / 4, alpha=-1 / 4)
        ctx.save_for_backward(a, norm, *steps)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_z):
        a, norm, *steps = ctx.saved_tensors
        of_a = torch.zeros(())  # that of the first step takes its place
        for i in range(len(steps) - 4, -1, -4):
            z, p, s, r = steps[i : i + 4]
            of_r = torch.bmm(z.mT, of_z)  # and -1/4
            b = of_r + of_r.mT
            of_p = torch.baddbmm(b, torch.bmm(p, b), p, beta=-15 / 8, alpha=-1 / 8)
            of_p = torch.baddbmm(of_p, s, b, alpha=-1 / 4)
            of_z = torch.baddbmm(of_z, of_z, r, beta=13 / 4, alpha=-1 / 4)
            of_z = torch.baddbmm(of_z, a.mT, of_p)
            of_a = torch.baddbmm(of_a, of_p, z.mT) if of_a.dim() else torch.bmm(of_p, z.mT)
        of_norm = (of_z * steps[0]).sum((1, 2), keepdim=True) / -norm
        return torch.addcdiv(of_a, of_z.mT, norm), of_norm, None
