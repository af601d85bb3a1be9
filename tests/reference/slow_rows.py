"""Rows as Python dicts: how they are packed, and the faults of packs."""

import random


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


def what_a_row_becomes(row, column, start, longest, overlong, keeps_closing):
    """The values of one token-level column in the sequence that begins with the row's token `start`."""
    mask = row.get("attention_mask", [1] * len(row["input_ids"]))
    values = trim(row[column], mask)
    if overlong == "split":
        first = start - mask.index(1)
        return values[first : first + longest]
    if overlong == "truncate" and len(values) > longest:
        return values[: longest - 1] + values[-1:] if keeps_closing else values[:longest]
    return values


def faults(packs, rows, token_columns, longest, depth, overlong):
    """Where packs (dicts) are not made of rows (dicts), by the rule for rows that are too long.

    A set of (pack, sequence, column); a column of another length than its pack: (pack, None, column); a row that is
    in no pack, or in none that adds up: (None, row, None)."""
    said, seen = set(), []
    last_tokens = {trim(r["input_ids"], r.get("attention_mask", [1] * len(r["input_ids"])))[-1] for r in rows}
    whole = [len(what_a_row_becomes(row, "input_ids", 0, longest, "error", True)) for row in rows]
    for number, pack in enumerate(packs):
        lengths, broken = pack["sequence_lengths"], set()
        broken |= {(number, i, "sequence_lengths") for i, n in enumerate(lengths) if not 1 <= n <= longest}
        for column, values in pack.items():
            if len(values) != (sum(lengths) if column in token_columns else len(lengths)):
                broken.add((number, None, column))
        said |= broken
        if sum(lengths) > longest or not lengths or len(lengths) > (depth or len(lengths)):
            said.add((number, None, "sequence_lengths"))
        if broken:
            continue
        end = 0
        for i, (row, length) in enumerate(zip(pack["sequence_indices"], lengths, strict=True)):
            first, end = end, end + length
            if (row in seen and overlong != "split") or (overlong == "drop" and whole[row] > longest):
                said.add((number, i, "sequence_indices"))
            seen.append(row)
            start = pack["sequence_starts"][i] if overlong == "split" else 0
            rule = start, longest, overlong, len(last_tokens) == 1
            if len(what_a_row_becomes(rows[row], "input_ids", *rule)) != length:
                said.add((number, i, "sequence_lengths"))
            else:
                for column in token_columns:
                    if pack[column][first:end] != what_a_row_becomes(rows[row], column, *rule):
                        said.add((number, i, column))
            for column in set(rows[row]) - set(token_columns) - {"attention_mask"}:
                if pack[column][i] != rows[row][column]:
                    said.add((number, i, column))
    dropped = {row for row in range(len(rows)) if overlong == "drop" and whole[row] > longest}
    return said | {(None, row, None) for row in set(range(len(rows))) - set(seen) - dropped}
