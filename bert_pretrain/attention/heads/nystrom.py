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

from bert_pretrain.attention.options import check_integer
from bert_pretrain.attention.parts.whole_sequences import Real, WholeSequenceHead, softmax_over_tokens
from collate.length_groups import WIDTH_STEP


@dataclass(frozen=True)
class NystromOptions:
    """What `use_attention(model, "nystrom", …)` takes."""

    landmarks: int = 64
    """Segments a sequence is cut into, m. More follow the softmax closer; the cost grows with N m and m^3."""
    iterations: int = 6
    """Steps towards the pseudo-inverse. Fewer are cheaper and rougher; more help where the segments differ little."""

    def __post_init__(self) -> None:
        check_integer(self, "landmarks", 1, "give the number of segments that a sequence is cut into")
        check_integer(self, "iterations", 1, "give the number of steps towards the pseudo-inverse")


class NystromAttention(WholeSequenceHead):
    """Nystrom's approximation of softmax attention; no parameters."""

    Options = NystromOptions
    precise = True

    def mix(self, q_SHWK: Tensor, k_SHWK: Tensor, v_SHWK: Tensor, real_S11W: Real, dropout: float = 0.0) -> Tensor:
        width = q_SHWK.shape[2]
        # by the width, which is the sequence's own as well as its length is
        if width <= -(-self.options.landmarks // WIDTH_STEP) * WIDTH_STEP:
            mask = None if real_S11W is None else real_S11W.expand(-1, -1, width, -1)  # a row per query: faster
            return F.scaled_dot_product_attention(q_SHWK, k_SHWK, v_SHWK, attn_mask=mask)
        return nystrom(q_SHWK, k_SHWK, v_SHWK, real_S11W, self.options.landmarks, self.options.iterations)


def nystrom(q_SHWK: Tensor, k_SHWK: Tensor, v_SHWK: Tensor, real_S11W: Real, landmarks: int, iterations: int) -> Tensor:
    """The formula, for sequences of at least `landmarks` tokens."""
    means_S1MW = segment_means(q_SHWK, real_S11W, landmarks)
    q_SHWK = q_SHWK / q_SHWK.shape[3] ** 0.5
    query_SHMK, key_SHMK = means_S1MW @ q_SHWK, means_S1MW @ k_SHWK
    to_landmarks_SHWM = (q_SHWK @ key_SHMK.transpose(2, 3)).softmax(3)
    among_landmarks_SHMM = (query_SHMK @ key_SHMK.transpose(2, 3)).softmax(3)
    from_landmarks_SHMW = softmax_over_tokens(query_SHMK @ k_SHWK.transpose(2, 3), real_S11W)
    # from the right, as these products are the small ones
    return to_landmarks_SHWM @ (pseudo_inverse(among_landmarks_SHMM, iterations) @ (from_landmarks_SHMW @ v_SHWK))


def segment_means(x_SHWK: Tensor, real_S11W: Real, landmarks: int) -> Tensor:
    """(S, 1, M, W): the matrix that takes tokens to the means of M segments of each sequence.

    5 tokens, M = 2:   1/2 1/2  0   0   0
                        0   0  1/3 1/3 1/3
    """
    sequences, _, width, _ = x_SHWK.shape
    token_W = torch.arange(width, device=x_SHWK.device)
    length_S1 = torch.full((sequences, 1), width, device=x_SHWK.device)
    if real_S11W is not None:
        length_S1 = real_S11W.flatten(1).sum(1, keepdim=True)
    segment_SW = ((token_W + 1) * landmarks - 1) // length_S1  # segment m begins at token floor(m n / M)
    segment_SW = torch.where(token_W < length_S1, segment_SW, -1)
    is_in_SMW = segment_SW[:, None, :] == torch.arange(landmarks, device=x_SHWK.device)[:, None]
    is_in_S1MW = is_in_SMW[:, None].to(x_SHWK.dtype)
    return is_in_S1MW / is_in_S1MW.sum(3, keepdim=True)


def pseudo_inverse(a_SHMM: Tensor, iterations: int) -> Tensor:
    """The Moore-Penrose inverse of each matrix by itself, approached by the iteration of Razavi et al. (2014)."""
    norms_SH11 = a_SHMM.sum(2, keepdim=True).amax(3, keepdim=True) * a_SHMM.sum(3, keepdim=True).amax(2, keepdim=True)
    inverse_SHMM = a_SHMM.transpose(2, 3) / norms_SH11  # the entries of a softmax are their own absolute values
    one_MM = torch.eye(a_SHMM.shape[3], dtype=a_SHMM.dtype, device=a_SHMM.device)
    for _ in range(iterations):
        product = a_SHMM @ inverse_SHMM
        rest = 13 * one_MM - product @ (15 * one_MM - product @ (7 * one_MM - product))
        inverse_SHMM = inverse_SHMM @ rest / 4
    return inverse_SHMM
