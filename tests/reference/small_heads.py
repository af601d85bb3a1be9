"""Attention heads for small tests: options for each name of the table, and one that mixes sequences."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from bert_pretrain.attention import ATTENTION

NEEDS_CUDA = ("varlen", "flex")  # no kernel, or no gradient, on CPUs: tests/bert_pretrain/attention/test_cuda.py
HERE = [pytest.param(n, marks=pytest.mark.skipif(n in NEEDS_CUDA, reason="runs on CUDA only")) for n in ATTENTION]
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "persistent": {"vectors": 3},
    "local": {"window": 3},
    "strided": {"stride": 4},
    "fixed": {"stride": 4, "summary": 2},
    "axial": {"columns": 4},
    "longformer": {"window": 3},
    "etc": {"window": 3, "global_tokens": 3},
    "etc_stream": {"window": 3, "global_tokens": 2, "max_distance": 2},
    "bigbird": {"block": 4, "random_blocks": 1},
    "adaptive_span": {"ramp": 3, "initial": 0.1},
    "entmax": {"top_k": 4},
    "lsh": {"bucket_size": 4},
    "routing": {"decay": 1},
    "sinkhorn": {"block_size": 4},
    "clustered": {"num_clusters": 3, "top_keys": 4},
    "inducing": {"points": 3},
    "linformer": {"rank": 5},
    "nystrom": {"landmarks": 4},
    "performer": {"features": 16},
    "delta": {"chunk": 4},
}
"""So small that a test's sequences have several chunks, buckets, blocks."""


class RowWideAttention(nn.Module):
    """The mistake that packing invites: every real token of the row, instead of the sequence."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, query_THK, key_THK, value_THK, layout, dropout=0.0):
        query, key, value = (layout.pad(x).transpose(1, 2) for x in (query_THK, key_THK, value_THK))
        mask = layout.is_real_BL[:, None, None, :]
        return layout.unpad(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2))
