"""pack-dataset verify: print a table of everything that is wrong with a packed folder."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from packing.command import sources
from packing.command.parser import Parser, Subcommand

if TYPE_CHECKING:
    from packing.files.paths import Place

ABOUT = "Prove that a packed folder holds every sequence once and unchanged, and that no pack is too long."
EXAMPLES = """\
examples:
  pack-dataset verify packed                            files against their checksums, packs by themselves
  pack-dataset verify packed --source tokenized         and every value against the source
  pack-dataset verify packed --source reviews.jsonl --text-column review --tokenizer bert-base-uncased
                                                        texts, with the options of packing
  pack-dataset verify s3://bucket/packed                read at the URL, nothing is copied

Exit status: 0 if nothing is wrong, 1 if something is, 2 if an argument was refused. Splits are verified one by one.
"""


def _add_options(parser: Parser) -> None:
    parser.add_argument("packed", metavar="PACKED", help="folder, or URL, that pack-dataset or pack_dataset wrote")
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help="the source that was packed, to compare every value with; as pack-dataset takes it",
    )
    sources.add_text_options(parser)
    parser.set_defaults(num_proc=1)


def _run(arguments: Namespace) -> int:
    """Print a table for each split. 0: nothing is wrong; 1: there are problems."""
    from packing.files.cache import new_cache

    sources.check_text_options(arguments)
    if arguments.source is None:
        if arguments.text_column is not None:
            raise ValueError(f"--text-column {arguments.text_column!r} is for texts in a source; also give --source")
        return 0 if verify(arguments.packed, None) else 1
    with new_cache() as cache:  # the cache that packing used may be damaged
        return 0 if verify(arguments.packed, sources.load_sequences(arguments, cache).splits) else 1


def verify(packed: str, source: dict | None) -> bool:
    """Print a table for each split; returns whether nothing is wrong. source: {split: dataset}; None: not given."""
    from packing.files.paths import place
    from packing.files.saved import DICT, split_names

    folder, names, faults = place(packed), [""], []
    if (folder / DICT).exists():
        try:
            names = split_names(folder / DICT)
        except (ValueError, OSError) as error:
            print(f"not verified: {error}")
            return False
        faults = list(_beside_splits(folder, names))
    for name in sorted({*(source or ())} - {*names}):
        faults.append(f"split {name!r} of the source is not among the packed ones" if name else NO_SPLITS)
    for fault in faults:
        print(f"not verified: {fault}")
    verified = [_verify_split(folder, name, source) for name in names]
    return all(verified) and not faults


def _verify_split(folder: Place, name: str, source: dict | None) -> bool:
    from packing.files.saved import check_split
    from packing.verify.verify import verify_packed

    fault = None
    if name and not (folder / name).is_dir():
        fault = "the folder of this split is missing"
    elif source is not None and name not in source:
        fault = "the source has no such split"
    if fault is None:
        try:
            check_split(folder, name)
            verification = verify_packed(folder / name, None if source is None else source[name])
            print(f"{sources.title(name)}{verification}")
            return verification.ok
        except (ValueError, FileNotFoundError) as error:
            if not name:  # the argument itself
                raise
            fault = str(error)
    print(f"{sources.title(name)}not verified: {fault}")
    return False


def _beside_splits(folder: Place, names: list[str]) -> Iterator[str]:
    """Files that load_from_disk would leave out, or open instead of the splits."""
    from packing.files.saved import DICT, INFO, STATE
    from packing.store.manifest import FILE

    for file in sorted(str(file) for file in folder.rglob(FILE) if file.parent.name not in names):
        yield f"{file!r} belongs to packs that {DICT} does not list; remove its folder, or list it there"
    for name in (INFO, STATE):
        if (folder / name).exists():
            yield f"{name} does not belong beside {DICT}: load_from_disk would open it instead of the splits; remove it"


NO_SPLITS = "the source has no splits, and the packed folder has"

COMMAND = Subcommand(ABOUT, EXAMPLES, _add_options, _run, "verify finds in PACKED how it was packed")
