"""Scores of relative positions: a vector for each distance between query and key, met by the query.

b_cm = q_c . t_(m - c)         queries c and keys m in a row
"""

import torch
from torch import Tensor


def by_distance(labels_LHK: Tensor, low: int, high: int) -> Tensor:
    """Vectors of the distances -k to k, (2 k + 1, H, K) -> those of low to high, (H, high - low + 1, K).

    What is farther than k has the vector of k: a b c, low -2, high 3 -> a a b c c c. low <= 0 <= high.
    """
    reach = len(labels_LHK) // 2
    near = labels_LHK[max(0, low + reach) : high + reach + 1]
    before, after = (
        x.expand(max(0, n), -1, -1) for x, n in ((labels_LHK[:1], -reach - low), (labels_LHK[-1:], high - reach))
    )
    return torch.cat([before, near, after]).transpose(0, 1)


def distance_scores(query: Tensor, table: Tensor) -> Tensor:
    """(…, C, K), table (…, C + M - 1, K) of the distances m - c, from 1 - C to M - 1 -> (…, C, M).

    One product with all distances, and then a view in which each row begins one further to the left:

        C = 2, M = 3: distances -1 0 1 2    row 0: . 0 1 2    row 1: -1 0 1 .
    """
    rows = query.shape[-2]
    scores = query @ table.transpose(-1, -2)
    distances = scores.shape[-1]
    if rows == 1:
        return scores
    flat = scores.flatten(-2)[..., rows - 1 :][..., : rows * (distances - 1)]
    return flat.unflatten(-1, (rows, distances - 1))[..., : distances - rows + 1]
