"""How many sequences, packs and tokens a packed dataset has now: those that it was made with, or fewer.

pack_dataset   37 packs of 76 sequences   ->   .select(range(20))   20 packs of 41; packed_info still says 37 of 76
"""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from collate.training.order import pack_lengths
from packing import PackedInfo, packed_info


def counted_info(split: Dataset) -> PackedInfo:
    """`packed_info`, with the counts of the packs that are there."""
    info = packed_info(split)
    if info.num_packs == len(split):
        return info
    lengths, offsets = pack_lengths(split)
    return replace(
        info,
        num_sequences=len(lengths),
        num_packs=len(split),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        max_depth=int(np.diff(offsets).max()),
    )
