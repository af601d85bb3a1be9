"""The slow, obvious versions: what the fast ones are compared with."""

from __future__ import annotations

import random

# Packing: one Python object per sequence.


def worst_fit_decreasing(lengths, max_sequence_length, max_sequences_per_pack=None):
    """Textbook: longest first, each into the open pack with the most space, a new pack if it does not fit there."""
    packs = []
    for length in sorted(lengths, reverse=True):
        roomy = [pack for pack in packs if max_sequences_per_pack is None or len(pack) < max_sequences_per_pack]
        emptiest = min(roomy, key=sum, default=None)
        if emptiest is not None and sum(emptiest) + length <= max_sequence_length:
            emptiest.append(length)
        else:
            packs.append([length])
    return packs


def trim(row, mask):
    """Tokens with mask 1."""
    return [token for token, real in zip(row, mask, strict=True) if real]


def pack_rows(rows, token_columns, sequence_indices):
    """A packed dataset from rows (dicts) and a list of packs, each a list of row numbers: (dicts, one a pack)."""
    packed = []
    for pack in sequence_indices:
        chosen = [rows[index] for index in pack]
        if "attention_mask" in rows[0]:
            chosen = [
                {n: trim(v, row["attention_mask"]) if n in token_columns else v for n, v in row.items()}
                for row in chosen
            ]
        columns = {
            name: [x for row in chosen for x in row[name]] if name in token_columns else [row[name] for row in chosen]
            for name in rows[0]
            if name != "attention_mask"
        }
        columns["sequence_lengths"] = [len(row["input_ids"]) for row in chosen]
        columns["sequence_indices"] = list(pack)
        packed.append(columns)
    return packed


def random_rows(seed, count, longest, padded=False):
    """Rows as a tokenizer makes them, with columns of every kind; padded: a random number of 0 at both ends."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        length = draw.randint(1, longest)
        left, right = (draw.randint(0, 3), draw.randint(0, 3)) if padded else (0, 0)
        row = {
            "input_ids": [0] * left + [draw.randint(5, 9) for _ in range(length)] + [0] * right,
            "token_type_ids": [0] * left + [draw.randint(0, 1) for _ in range(length)] + [0] * right,
            "weights": [0.0] * left + [draw.random() for _ in range(length)] + [0.0] * right,
            "words": [""] * left + [draw.choice("abc") * draw.randint(0, 3) for _ in range(length)] + [""] * right,
            "text": f"text {index}",
            "score": draw.random(),
            "answers": [draw.randint(0, 99) for _ in range(draw.randint(0, 2))],
            "label": draw.randint(0, 2),
        }
        if padded:
            row["attention_mask"] = [0] * left + [1] * length + [0] * right
        rows.append(row)
    return rows
