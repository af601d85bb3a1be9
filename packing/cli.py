"""The command pack-dataset: sequences or texts in, a folder of packs out; or lengths in, a plan out."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from packing.files.errors import whole_number
from packing.options import PackOptions

TEXT_OPTIONS = ("text_column", "text_pair_column", "keep_text", "tokenizer")

EXAMPLES = """\
examples:
  pack-dataset tokenized --plan-only                     how well would it pack?
  pack-dataset lengths.csv --compare                     which packer, how deep? one table
  pack-dataset tokenized --report report.html            the same with pictures (or .png)
  pack-dataset tokenized packed                          packs of 512 tokens
  pack-dataset tokenized packed --max-sequence-length 128 --overlong truncate
  pack-dataset tokenized packed --pad-token-id 0         rows are padded, and have no attention_mask
  pack-dataset tokenized packed --format parquet         for load_dataset, instead of load_from_disk
  pack-dataset s3://bucket/tokenized s3://bucket/packed  any file system that fsspec knows, see below
  pack-dataset verify packed --source tokenized          is all of it there? (--help says more)

sources:
  pack-dataset tokenized packed                          a folder of save_to_disk
  pack-dataset rows.parquet packed                       a file: .parquet, .jsonl, .json, .jsonl.gz, .arrow
  pack-dataset data packed                               a folder of such files, all of one kind
  pack-dataset 'data/train-*.parquet' packed             a glob, in quotes
  pack-dataset owner/name packed                         a dataset of the hub; of several: owner/name:config
  pack-dataset reviews.jsonl packed --text-column review --tokenizer bert-base-uncased
                                                         texts; labels and other columns stay. A text that spells
                                                         a special token ("[MASK]") is text
  pack-dataset 's3://bucket/data/*.parquet' packed       files, folders and globs at a URL

Files are converted once, and tokens of texts are kept, in the cache of the datasets library: HF_DATASETS_CACHE says
where. (Arrow streams, as save_to_disk writes them, are read where they lie.) Files at a URL are copied into that cache
first, and again once they have changed.

SOURCE and TARGET may be URLs of any file system that fsspec knows: s3://, gs://, abfs://, hf://, sftp://, … ("pip
install s3fs" for the first). Credentials and settings come from the environment, as it reads them: AWS_ACCESS_KEY_ID,
FSSPEC_S3_ENDPOINT_URL, ~/.config/fsspec. TARGET at a URL has no lock: start one run at a time. Its state.json (of
Parquet: dataset_info.json) comes last.

Files whose names say train, validation and test are splits.
A source with several splits is packed split by split, each under a plan of its own, into TARGET/<split>.

A file of lengths (.txt, .csv, .json, .npy, .npz) has one whole number a sequence, or is a histogram: a .csv with the
columns length,count, a .json object {"length": count}, an .npy array of rows length, count.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command. 0: done; 2: the input was refused, with one line on stderr that says why."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["verify"]:  # a SOURCE of that name is ./verify
        from packing.verify.command import main as verify_main

        return verify_main(argv[1:])
    parser = make_parser()
    arguments, others = parser.parse_known_args(argv)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)} (several files? quote the glob: 'data/*.parquet')")
    comparing = arguments.compare or arguments.report is not None
    if arguments.target is None and not (arguments.plan_only or comparing):
        parser.error("TARGET is missing: the folder to write (or give --plan-only or --compare)")
    try:
        refuse_ignored(arguments)
        if comparing:
            compare(arguments)
        elif _is_lengths(arguments.source):
            plan_file(arguments)
        else:
            pack_folder(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{parser.prog}: {'; '.join([in_command_words(str(error)), *notes(error)])}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{parser.prog}: interrupted; {'; '.join(notes(error)) or 'nothing was written'}", file=sys.stderr)
        return 130
    return 0


def notes(error: BaseException) -> list[str]:
    """How to go on, where something was written."""
    return getattr(error, "__notes__", [])


def make_parser() -> argparse.ArgumentParser:
    """The options of `pack-dataset`."""
    parser = argparse.ArgumentParser(
        prog="pack-dataset",
        description="Pack the sequences of a tokenized dataset into rows of one length, without padding.",
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    source = (
        "sequences (input_ids) or texts: a folder, a file, a glob or a hub name, see below; for a plan also a "
        "file of lengths"
    )
    add("source", metavar="SOURCE", help=source)
    add("target", metavar="TARGET", nargs="?", help="folder to write, a path or a URL; must not exist")
    add("--max-sequence-length", metavar="N", type=int, default=512, help="token slots in a pack")
    add("--max-sequences-per-pack", metavar="N", type=int, help="sequences in a pack at most; left out: no limit")
    add("--packer", metavar="NAME", default="optimal", help="algorithm that makes the plan")
    add(
        "--overlong",
        choices=("error", "truncate", "split", "drop"),
        default="error",
        help="what to do with rows longer than a pack",
    )
    add("--seed", metavar="N", type=int, default=0, help="decides which equally long sequences lie together")
    add("--balance", metavar="N", type=int, help="order packs so that every N of them cost attention nearly the same")
    add("--pad-token-id", metavar="ID", type=int, help="token to trim at row ends, if there is no attention_mask")
    add(
        "--token-columns",
        metavar="NAME",
        nargs="+",
        help="columns with one value per token; left out: those that are as long as input_ids in every row",
    )
    add_text_options(parser)
    add(
        "--num-proc",
        metavar="N",
        type=int,
        default=1,
        help="processes that tokenize and (unless --engine ray does) write; the same bytes for any number",
    )
    add(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="who does it, the same bytes: processes of this machine, or a Ray cluster that sees SOURCE and TARGET",
    )
    add(
        "--format",
        choices=("arrow", "parquet"),
        default="arrow",
        help="files of TARGET: arrow is mapped into memory, by load_from_disk; parquet is compressed, for load_dataset",
    )
    add("--plan-only", action="store_true", help="print the plan and write nothing")
    add(
        "--compare",
        action="store_true",
        help="print every packer's plan at several depths (or at the one that is given), and write nothing",
    )
    add("--report", metavar="FILE", help="--compare, also written to FILE with pictures: .html or .png")
    return parser


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Of texts that become sequences: TEXT_OPTIONS."""
    add = parser.add_argument
    add("--text-column", metavar="NAME", help="texts to tokenize; the column is left out afterwards")
    add("--text-pair-column", metavar="NAME", help="the second texts, where tokens are those of pairs")
    add("--keep-text", action="store_true", help="keep the columns of texts beside their tokens")
    add("--tokenizer", metavar="FOLDER_OR_NAME", help="tokenizer of transformers, for --text-column")


def check_text_options(arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """A column of texts and a tokenizer, or neither."""
    if arguments.text_column is None:
        _refuse(arguments, defaults, TEXT_OPTIONS, "there is no --text-column")
    elif arguments.tokenizer is None:
        raise ValueError("--text-column needs --tokenizer: a folder that save_pretrained wrote, or a name on the hub")


def refuse_ignored(arguments: argparse.Namespace) -> None:
    """An option that the chosen work would not use is a mistake, and is said."""
    defaults = make_parser().parse_args([arguments.source])
    if arguments.compare or arguments.report is not None:
        work, unused = (
            "--compare and --report try all packers and write no packs",
            ("target", "packer", "seed", "balance", "engine", "format"),
        )
    elif arguments.plan_only and _is_lengths(arguments.source):
        unused = ("target", "seed", "balance", "token_columns", "pad_token_id", "num_proc", "engine", "format")
        unused += TEXT_OPTIONS
        work = "a file of lengths can be planned for, not packed"
    elif arguments.plan_only:
        work, unused = "--plan-only writes no packs", ("target", "engine", "format")
    else:
        work, unused = "", ()
    check_text_options(arguments, defaults)
    _refuse(arguments, defaults, unused, work)
    if arguments.text_pair_column is not None and arguments.overlong == "truncate":
        raise ValueError(
            "--overlong truncate would take from the second text of a pair alone; choose split or drop, or raise "
            "--max-sequence-length"
        )


def _refuse(arguments: argparse.Namespace, defaults: argparse.Namespace, unused: Iterable[str], work: str) -> None:
    for name in unused:
        if getattr(arguments, name) != getattr(defaults, name):
            option = "TARGET" if name == "target" else f"--{name.replace('_', '-')}"
            value = getattr(arguments, name)
            given = option if value is True else f"{option} {value!r}"
            raise ValueError(f"{given} would be ignored: {work}; leave it out")


def pack_folder(arguments: argparse.Namespace) -> None:
    """Plan all splits, then write all of them: an error in the last one leaves nothing of the first."""
    # heavy imports wait until the arguments are known to be good
    from packing.store.engines import check_engine, opened_engine
    from packing.store.writing import check_output

    check_engine(arguments.engine)
    whole_number("num_proc", arguments.num_proc)
    if arguments.target is not None:
        one_process = arguments.num_proc == 1 and arguments.engine == "processes"
        check_output(arguments.target, one_process=one_process)
    splits = load_sequences(arguments)
    with opened_engine(arguments.engine):
        _pack_splits(splits, arguments)


def _pack_splits(splits: dict, arguments: argparse.Namespace) -> None:
    from packing.files.folder import write_file
    from packing.store.writing import check_room, output_folder, refuse_other_splits

    packings = {}
    for name, dataset in splits.items():
        packings[name] = _prepare(name, dataset, arguments)
        title = f"{name}: " if name else ""
        print(f"{title}{len(dataset):,} rows\n{packings[name].plan}\n", flush=True)
        facts = packings[name].facts
        if facts.balance is not None:
            print(f"attention cost of {facts.step_costs_after.num_steps:,} batches of {facts.balance:,} packs")
            print(f"before   {facts.step_costs_before}\nafter    {facts.step_costs_after}\n", flush=True)
    if arguments.plan_only:
        return
    with output_folder(arguments.target) as folder:
        refuse_other_splits(folder, list(packings))
        for name, packing in packings.items():
            packing.begin(folder / name)
        check_room(folder, sum(packing.bytes_missing(folder / name) for name, packing in packings.items()))
        for name, packing in packings.items():
            packing.write(folder / name, progress=True)
        if "" not in packings:
            write_file(folder / "dataset_dict.json", json.dumps({"splits": list(packings)}).encode())
    print(f"written to {arguments.target}")


def plan_file(arguments: argparse.Namespace) -> None:
    """Print the plan for a file of lengths."""
    from packing.packers.table import plan_packs

    if not arguments.plan_only:
        raise ValueError(
            f"SOURCE {arguments.source!r} is a file of lengths, which can be planned for (--plan-only, --compare) but "
            "not packed; give a folder of save_to_disk, or a file .parquet, .jsonl, .json or .arrow with rows"
        )
    ((_, histogram),) = _load_histograms(arguments)
    limits = arguments.max_sequence_length, arguments.max_sequences_per_pack
    plan = plan_packs(histogram, *limits, arguments.packer, progress=True)
    print(f"{histogram.sum():,} sequences\n{plan}\n")


def compare(arguments: argparse.Namespace) -> None:
    """Print what every packer makes of each split, and write the report."""
    from packing.report.compare import DEPTHS, compare_packers
    from packing.report.page import check_report, write_report

    if arguments.report is not None:
        check_report(arguments.report)
    depths = DEPTHS if arguments.max_sequences_per_pack is None else (arguments.max_sequences_per_pack,)
    comparisons = {}
    for name, histogram in _load_histograms(arguments):
        comparisons[name] = compare_packers(histogram, arguments.max_sequence_length, depths, progress=True)
        title = f"{name}: " if name else ""
        print(f"{title}{comparisons[name]}\n", flush=True)
    if arguments.report is not None:
        write_report(comparisons, arguments.report)
        print(f"written to {arguments.report}")


def _load_histograms(arguments: argparse.Namespace):
    """(split, histogram) one after the other, cut to max_sequence_length; "" is a source without splits."""
    from packing.packers.table import checked_length
    from packing.source.lengths import cut_histogram, dataset_histogram, read_histogram

    limit = checked_length(arguments.max_sequence_length)
    if _is_lengths(arguments.source):
        yield "", cut_histogram(read_histogram(arguments.source), limit, arguments.overlong)
        return
    for name, dataset in load_sequences(arguments).items():
        with _in_split(name):
            read = arguments.overlong, arguments.token_columns, arguments.pad_token_id
            histogram = dataset_histogram(dataset, limit, *read)
        yield name, histogram


def _is_lengths(source: str) -> bool:
    from packing.source.open import holds_rows

    return Path(source).is_file() and not holds_rows(source)


def load_sequences(arguments: argparse.Namespace, cache: Path | None = None) -> dict:
    """{split: Dataset with input_ids}; a Dataset without splits is {"": Dataset}.

    cache: where converted files and tokens are kept; None: in that of the datasets library."""
    from packing.files.errors import suggestion
    from packing.source.open import open_splits

    num_proc = whole_number("num_proc", arguments.num_proc)
    splits = open_splits(arguments.source, cache=cache)
    if arguments.text_column is not None:
        return _tokenized(splits, arguments, num_proc, cache)
    for name, dataset in splits.items():
        with _in_split(name):
            if "input_ids" not in dataset.column_names:
                names = dataset.column_names
                raise ValueError(
                    f"no column 'input_ids' among {', '.join(names)}{suggestion('input_ids', names)}; tokenize before "
                    f"packing, or let it be done here: --text-column NAME --tokenizer FOLDER_OR_NAME{_hint(dataset)}"
                )
    return splits


def _tokenized(splits: dict, arguments: argparse.Namespace, num_proc: int, cache: Path | None) -> dict:
    """The splits with tokens. The tokenizer, which takes long to load, comes after all that can be seen without."""
    from packing.packers.table import checked_length
    from packing.source.text import check_texts, open_tokenizer, tokenize

    texts = [name for name in (arguments.text_column, arguments.text_pair_column) if name is not None]
    for name, dataset in splits.items():
        with _in_split(name):
            check_texts(dataset, texts)
    longest = None
    if getattr(arguments, "overlong", None) == "error":
        longest = checked_length(arguments.max_sequence_length)
    tokenizer = open_tokenizer(arguments.tokenizer)
    tokenized = {}
    for name, dataset in splits.items():
        with _in_split(name):
            tokenized[name] = tokenize(
                dataset, tokenizer, texts, arguments.keep_text, num_proc, longest=longest, cache=cache
            )
    return tokenized


def _hint(dataset) -> str:
    """Where the rows may be, if a source is one JSON object that holds them (GeoJSON, SQuAD)."""
    from packing.source.json_rows import describe_object

    if len(dataset) != 1:
        return ""
    row = dataset[0]
    holds_rows = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values())
    return f" (the source is {describe_object(row)})" if holds_rows else ""


@contextmanager
def _in_split(name: str):
    """Errors say which split they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"split {name!r}: {error}" if name else str(error)) from None


COMMAND_WORDS = (  # of Python -> of the command line; not within quotes, where names of columns and files are
    "max_sequence_length", "max_sequences_per_pack", "overlong", "pad_token_id", "token_columns", "num_proc", "balance",
    "packer", "engine", "format", "seed",
)  # fmt: skip


def in_command_words(message: str) -> str:
    """max_sequence_length=8 -> --max-sequence-length 8; overlong="drop" -> --overlong drop"""

    def option(found: re.Match) -> str:
        if found["quoted"]:
            return found["quoted"]
        name, value = found["name"], found["value"]
        if value is None and "_" not in name:
            return name  # an ordinary word
        value = "" if value is None else f" {value.strip(QUOTES)}"
        return f"--{name.replace('_', '-')}{value}"

    names = "|".join(COMMAND_WORDS)
    value = r"""(?:=(?P<value>"[^"]*"|'[^']*'|[^\s,;:()"']+)?)?"""
    return re.sub(rf"""(?P<quoted>(?<![=\w])'[^']*')|(?<![-\w])(?P<name>{names})\b{value}""", option, message)


QUOTES = "\"'"


def _prepare(name: str, dataset, arguments: argparse.Namespace):
    from packing.dataset import prepare_packing

    with _in_split(name):
        options = PackOptions(**{each.name: getattr(arguments, each.name) for each in fields(PackOptions)})
        return prepare_packing(
            dataset, options, to_write=not arguments.plan_only, opener=_opener(name, arguments), progress=True
        )


def _opener(split: str, arguments: argparse.Namespace):
    """How another machine opens the same rows, of its own copy. Tokens of texts are in a cache that it must see."""
    from functools import partial
    from glob import has_magic

    from packing.source.open import is_url, open_split, without_protocol

    if arguments.text_column is not None:
        return None
    source = arguments.source
    if not is_url(source):
        source = without_protocol(source)
        if has_magic(source) or Path(source).exists():
            source = str(Path(source).absolute())
    return partial(open_split, source, split)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there is one, and the examples as they are written."""

    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


if __name__ == "__main__":
    sys.exit(main())
