"""pack-dataset compare: what every packer makes of a source at several depths, as a table or a report."""

from __future__ import annotations

from argparse import Namespace

from packing.command import sources
from packing.command.parser import Parser, Subcommand, add_options

ABOUT = "Print what every packer makes of SOURCE at several depths, or at the given one."
EXAMPLES = """\
examples:
  pack-dataset compare tokenized
  pack-dataset compare lengths.csv --max-sequences-per-pack 3     only at this depth
  pack-dataset compare tokenized --report report.html             with pictures; or .png

`pack-dataset --help` lists what SOURCE may be, `pack-dataset plan --help` what a file of lengths is.
"""


def _add_options(parser: Parser) -> None:
    sources.add_source(parser, sources.LENGTH_FILES)
    add_options(parser, ("max_sequence_length", "max_sequences_per_pack"))
    sources.add_reading_options(parser)
    parser.add_argument("--report", metavar="FILE", help="also write the comparison to FILE, .html or .png")


def _run(arguments: Namespace) -> int:
    from packing.report.compare import DEPTHS, compare_packers
    from packing.report.page import check_report, write_report

    if arguments.report is not None:
        check_report(arguments.report)
    depths = DEPTHS if arguments.max_sequences_per_pack is None else (arguments.max_sequences_per_pack,)
    comparisons = {}
    for name, histogram in sources.load_histograms(arguments):
        comparisons[name] = compare_packers(histogram, arguments.max_sequence_length, depths, progress=True)
        print(f"{sources.title(name)}{comparisons[name]}", flush=True)
    if arguments.report is not None:
        write_report(comparisons, arguments.report)
        print(f"written to {arguments.report}")
    return 0


COMMAND = Subcommand(ABOUT, EXAMPLES, _add_options, _run, "compare tries all packers and writes no packs")
