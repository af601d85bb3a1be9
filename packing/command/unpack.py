"""pack-dataset unpack: a packed folder -> the rows that were packed, as a folder or a file."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from packing.command.parser import Parser, Subcommand

if TYPE_CHECKING:
    import datasets

    from packing.files.hashed import HashedFile

ABOUT = "Write the rows that were packed into PACKED to TARGET."
EXAMPLES = """\
examples:
  pack-dataset unpack packed rows                  a folder, for load_from_disk; splits stay splits
  pack-dataset unpack packed rows.parquet          one file; also .jsonl
  pack-dataset unpack s3://bucket/packed rows

Rows come back in their order, with their columns, one sequence each. Padding stays trimmed, and rows that --overlong
dropped or truncated stay dropped or truncated.
"""


def _add_options(parser: Parser) -> None:
    parser.add_argument("packed", metavar="PACKED", help="folder, or URL, that pack-dataset wrote")
    parser.add_argument(
        "target", metavar="TARGET", help="folder to write, or a file .parquet or .jsonl; must not exist"
    )


def _run(arguments: Namespace) -> int:
    import datasets

    from packing.files.folder import check_target
    from packing.store.loading import load_packed
    from packing.unpack import unpack_dataset

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would fill a log
    target = check_target(arguments.target)
    if target.suffix not in ("", *FILES):
        raise ValueError(f"TARGET {arguments.target!r} must end in {' or '.join(FILES)}, or as a folder in none")
    packed = load_packed(arguments.packed)
    splits = packed if isinstance(packed, datasets.DatasetDict) else {"": packed}
    if target.suffix in FILES:
        _write_file(splits, target)
    elif "" in splits:
        unpack_dataset(packed, target)
    else:
        _write_splits(splits, target)
    print(f"written to {arguments.target}")
    return 0


def _write_splits(splits: dict, target: Path) -> None:
    from packing.files.folder import new_folder
    from packing.files.hashed import write_file
    from packing.files.saved import DICT
    from packing.unpack import unpack_dataset

    with new_folder(target) as folder:
        for name, packed in splits.items():
            unpack_dataset(packed, folder / name)
        write_file(folder / DICT, json.dumps({"splits": list(splits)}).encode())


def _write_file(splits: dict, target: Path) -> None:
    from packing.files.hashed import hashed_file
    from packing.unpack import unpack_dataset

    if "" not in splits:
        what = f"PACKED has the splits {', '.join(splits)}, and {target.suffix} is one file"
        raise ValueError(f"{what}; give a folder as TARGET, or the folder of one split as PACKED")
    rows = unpack_dataset(splits[""])
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with hashed_file(target) as file:
        FILES[target.suffix](rows, file)
        file.publish()


def _write_lines(rows: datasets.Dataset, file: HashedFile) -> None:
    """Dataset.to_json would round numbers to ten places."""
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


FILES = {".parquet": lambda rows, file: rows.to_parquet(file), ".jsonl": _write_lines}

COMMAND = Subcommand(ABOUT, EXAMPLES, _add_options, _run, "unpack takes the rows as they were packed")
