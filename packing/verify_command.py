"""The command pack-dataset verify: a packed folder in, a table of what is wrong out."""

from __future__ import annotations

import argparse
import sys

DESCRIPTION = "Prove that a packed folder holds what was packed: unchanged, each sequence once, no pack over its limit."
EXAMPLES = """\
examples:
  pack-dataset verify packed                            files against their checksums, packs for themselves
  pack-dataset verify packed --source tokenized         every value against the source, too
  pack-dataset verify s3://bucket/packed                as pack-dataset wrote it there; nothing is kept here

A folder with several splits is verified split by split.
"""


def main(argv: list[str]) -> int:
    """Run the command. 0: nothing is wrong; 1: problems, which it prints; 2: an argument was refused."""
    parser = argparse.ArgumentParser(
        prog="pack-dataset verify",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packed", metavar="PACKED", help="folder, or URL, that pack-dataset or pack_dataset wrote")
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help="the sequences that were packed, to compare every value with: as pack-dataset takes them",
    )
    arguments = parser.parse_args(argv)
    try:
        return 0 if verify(arguments.packed, arguments.source) else 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def verify(packed: str, source: str | None) -> bool:
    """Print a table for each split; returns whether nothing is wrong."""
    from .load import load_splits
    from .output import DICT
    from .packed import split_names
    from .remote import place
    from .verify import verify_packed

    packed = place(packed)
    names = split_names(packed / DICT) if (packed / DICT).exists() else [""]
    sources = {} if source is None else load_splits(source)
    ok = True
    for name in names:
        title = f"{name}: " if name else ""
        if name and not (packed / name).is_dir():
            print(f"{title}not verified: the folder of this split is missing")
            ok = False
        elif source is not None and name not in sources:
            print(f"{title}not verified: the source has no such split")
            ok = False
        else:
            verification = verify_packed(packed / name, sources.get(name))
            print(f"{title}{verification}")
            ok &= verification.ok
    for name in sorted({*sources} - {*names}) if source is not None else ():
        print(f"not verified: split {name!r} of the source is not among the packed ones" if name else NO_SPLITS)
        ok = False
    return ok


NO_SPLITS = "not verified: the source has no splits, and the packed folder has"
