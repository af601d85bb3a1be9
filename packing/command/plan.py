"""pack-dataset plan: print how well a source would pack, and write nothing."""

from __future__ import annotations

from argparse import Namespace

from packing.command import pack, sources
from packing.command.parser import Parser, Subcommand, add_options

ABOUT = "Print how well SOURCE would pack, and write nothing."
EXAMPLES = """\
examples:
  pack-dataset plan tokenized
  pack-dataset plan lengths.csv --max-sequence-length 384
  pack-dataset plan tokenized --balance 32                  and how evenly batches of 32 packs cost attention

A file of lengths has one whole number a sequence, or is a histogram: a .csv with the columns length,count, a .json
object {"length": count}, an .npy array of rows length, count. `pack-dataset --help` lists what else SOURCE may be.
"""


def _add_options(parser: Parser) -> None:
    sources.add_source(parser, sources.LENGTH_FILES)
    add_options(parser, pack.PLANNING)
    sources.add_reading_options(parser)


def _run(arguments: Namespace) -> int:
    if sources.is_lengths(arguments):
        _plan_lengths(arguments)
    else:
        sources.check_text_options(arguments)
        options = pack.given_options(arguments)
        pack.prepare_splits(sources.load_sequences(arguments), arguments, options)
    return 0


def _plan_lengths(arguments: Namespace) -> None:
    from packing.packers.table import plan_packs

    ((_, histogram),) = sources.load_histograms(arguments)
    limits = arguments.max_sequence_length, arguments.max_sequences_per_pack
    plan = plan_packs(histogram, *limits, arguments.packer, progress=True)
    print(f"{histogram.sum():,} sequences\n{plan}")


COMMAND = Subcommand(ABOUT, EXAMPLES, _add_options, _run, "plan writes no packs")
