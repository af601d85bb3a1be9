"""pack-dataset pack: write the packs of every split."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packing.command import sources
from packing.command.parser import Parser, Subcommand, add_options
from packing.files.errors import in_split
from packing.options import PackOptions
from packing.source.formats import endings

if TYPE_CHECKING:
    import datasets

    from packing.source.open import OpenedSource
    from packing.store.contents import Packing

ABOUT = "Pack the sequences of SOURCE, several to a pack, and write the packs to the folder TARGET."
EXAMPLES = f"""\
examples:
  pack-dataset pack tokenized packed                          packs of 512 tokens
  pack-dataset pack tokenized packed --max-sequence-length 128 --overlong truncate
  pack-dataset pack books packed --overlong split --cohort 256     pieces in order, for memory along a document
  pack-dataset pack tokenized packed --pad-token-id 0         rows with padding and without attention_mask
  pack-dataset pack tokenized packed --format parquet         for load_dataset, instead of load_from_disk
  pack-dataset pack s3://bucket/tokenized s3://bucket/packed
  pack-dataset pack reviews.jsonl packed --text-column review --tokenizer bert-base-uncased
  pack-dataset pack notes.txt packed --tokenizer bert-base-uncased            one sequence a document

{sources.SOURCES}
TARGET at a URL has no lock: start one run at a time. Credentials come from the environment (AWS_ACCESS_KEY_ID,
FSSPEC_S3_ENDPOINT_URL, ~/.config/fsspec). To resume an interrupted run, give the same command again.
"""
PLANNING = ("max_sequence_length", "max_sequences_per_pack", "packer", "seed", "balance", "cohort", "cohort_lanes")


def _add_options(parser: Parser) -> None:
    sources.add_source(parser)
    parser.add_argument("target", metavar="TARGET", help="folder to write, a path or a URL; must not exist")
    add_options(parser, PLANNING)
    sources.add_reading_options(parser)
    add_options(parser, {each.name for each in fields(PackOptions)} - {*PLANNING, *sources.READING})


def _run(arguments: Namespace) -> int:
    """Plan all splits, then write all of them: an error in the last one leaves nothing of the first."""
    # heavy imports wait until the arguments are parsed
    from packing.store.engines import check_engine, opened_engine, tokenizer_of
    from packing.store.writing import check_output, write_packings

    sources.check_text_options(arguments)
    if sources.is_lengths(arguments):
        what = f"SOURCE {arguments.source!r} is a file of lengths, which only pack-dataset plan and compare take"
        cure = f"give a folder of save_to_disk, or a file {endings()} with rows or texts"
        raise ValueError(f"{what}; {cure}")
    options = given_options(arguments)
    check_engine(options.engine)
    check_output(arguments.target, one_process=options.one_process)
    with opened_engine(options.engine):
        source = sources.load_sequences(arguments, run=tokenizer_of(options.engine))
        packings = prepare_splits(source, arguments, options, to_write=True)
        write_packings(packings, arguments.target, progress=True)
    print(f"written to {arguments.target}")
    return 0


def given_options(arguments: Namespace) -> PackOptions:
    """The options of packing that this subcommand has; the others by default."""
    given: dict[str, Any] = {each.name: getattr(arguments, each.name, each.default) for each in fields(PackOptions)}
    return PackOptions(**given)


def prepare_splits(
    source: OpenedSource, arguments: Namespace, options: PackOptions, to_write: bool = False
) -> dict[str, Packing]:
    """{split: its Packing}; prints each plan as soon as it is made."""
    from packing.dataset import prepare_packing

    packings = {}
    for name, dataset in source.splits.items():
        other_machines = None if source.are_tokenized else opener(name, arguments)  # they must see the cache of tokens
        with in_split(name):
            packings[name] = prepare_packing(dataset, options, to_write=to_write, opener=other_machines, progress=True)
        print(f"{sources.title(name)}{len(dataset):,} rows\n{packings[name].table}", flush=True)
        facts = packings[name].facts
        if facts.step_costs_after is not None:
            print(f"attention cost of {facts.step_costs_after.num_steps:,} batches of {facts.balance:,} packs")
            print(f"before   {facts.step_costs_before}\nafter    {facts.step_costs_after}", flush=True)
    return packings


def opener(split: str, arguments: Namespace) -> Callable[[], datasets.Dataset]:
    """How another machine opens the same rows in its own copy."""
    from glob import has_magic

    from packing.source.open import is_url, open_split, without_protocol

    source = arguments.source
    if not is_url(source):
        source = without_protocol(source)
        if has_magic(source) or Path(source).exists():
            source = str(Path(source).absolute())
    return partial(open_split, source, split)


COMMAND = Subcommand(ABOUT, EXAMPLES, _add_options, _run)
