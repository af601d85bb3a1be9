"""pack-dataset compare: every packer at several depths, as a table and as a report with pictures."""

from __future__ import annotations

from argparse import Namespace

from packing.command import sources
from packing.command.parser import Parser, Subcommand, add_pack_options

EXAMPLES = """\
examples:
  pack-dataset compare tokenized
  pack-dataset compare lengths.csv --max-sequences-per-pack 3     at this depth alone
  pack-dataset compare tokenized --report report.html             with pictures; or .png

`pack-dataset --help` lists what SOURCE may be, `pack-dataset plan --help` what a file of lengths is.
"""


def _add_options(parser: Parser) -> None:
    """SOURCE, and how to read it."""
    sources.add_source(parser, f"; {sources.LENGTHS}")
    add_pack_options(parser, ("max_sequence_length", "max_sequences_per_pack"))
    sources.add_reading_options(parser)
    parser.add_argument("--report", metavar="FILE", help="write the comparison to FILE, too: .html or .png")


def _run(arguments: Namespace) -> int:
    """Print what every packer makes of each split, and write the report."""
    from packing.report.compare import DEPTHS, compare_packers
    from packing.report.page import check_report, write_report

    if arguments.report is not None:
        check_report(arguments.report)
    depths = DEPTHS if arguments.max_sequences_per_pack is None else (arguments.max_sequences_per_pack,)
    comparisons = {}
    for name, histogram in sources.load_histograms(arguments):
        comparisons[name] = compare_packers(histogram, arguments.max_sequence_length, depths, progress=True)
        print(f"{sources.title(name)}{comparisons[name]}\n", flush=True)
    if arguments.report is not None:
        write_report(comparisons, arguments.report)
        print(f"written to {arguments.report}")
    return 0


COMMAND = Subcommand(
    description="Print what every packer makes of SOURCE at several depths (or at the one that is given).",
    examples=EXAMPLES,
    add_options=_add_options,
    run=_run,
    lacks="compare tries all packers and writes no packs",
)
