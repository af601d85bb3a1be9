"""The command pack-dataset: a folder of save_to_disk in, a folder of packs out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  pack-dataset tokenized --plan-only                     how well would it pack?
  pack-dataset tokenized packed                          packs of 512 tokens
  pack-dataset tokenized packed --max-sequence-length 128 --overlong truncate
  pack-dataset tokenized packed --pad-token-id 0         rows are padded, and have no attention_mask

A source with several splits is packed split by split, each under a plan of its own, into TARGET/<split>.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command. 0: done; 2: the input was refused, with one line on stderr that says why."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.target is None and not arguments.plan_only:
        parser.error("TARGET is missing: the folder to write (or give --plan-only)")
    try:
        pack_folder(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pack-dataset",
        description="Pack the sequences of a tokenized dataset into rows of one length, without padding.",
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder written by save_to_disk: a Dataset or a DatasetDict with input_ids")
    add("target", metavar="TARGET", nargs="?", help="folder to write; must not exist")
    add("--max-sequence-length", metavar="N", type=int, default=512, help="token slots in a pack")
    add("--max-sequences-per-pack", metavar="N", type=int, help="sequences in a pack at most; left out: no limit")
    add("--packer", metavar="NAME", default="spfhp", help="algorithm that makes the plan")
    add(
        "--overlong",
        choices=("error", "truncate", "split", "drop"),
        default="error",
        help="what to do with rows longer than a pack",
    )
    add("--seed", metavar="N", type=int, default=0, help="decides which equally long sequences lie together")
    add("--pad-token-id", metavar="ID", type=int, help="token to trim at row ends, if there is no attention_mask")
    add(
        "--token-columns",
        metavar="NAME",
        nargs="+",
        help="columns with one value per token; left out: those that are as long as input_ids in every row",
    )
    add("--plan-only", action="store_true", help="print the plan and write nothing")
    return parser


def pack_folder(arguments: argparse.Namespace) -> None:
    """Plan all splits, then write all of them: an error in the last one leaves nothing of the first."""
    from .folder import check_target, new_folder  # heavy imports wait until the arguments are known to be good

    if arguments.target is not None:
        check_target(arguments.target)
    splits = _load_splits(arguments.source)
    packings = {}
    for name, dataset in splits.items():
        packings[name] = _prepare(name, dataset, arguments)
        title = f"{name}: " if name else ""
        print(f"{title}{len(dataset):,} rows\n{packings[name].plan}\n", flush=True)
    if arguments.plan_only:
        return
    with new_folder(arguments.target) as folder:
        for name, packing in packings.items():
            if name:
                (folder / name).mkdir()
            packing.write(folder / name, progress=True)
        if "" not in packings:
            (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(packings)}), encoding="utf-8")
    print(f"written to {arguments.target}")


def _load_splits(source: str) -> dict:
    """{split: Dataset}; a Dataset without splits is {"": Dataset}."""
    import datasets

    if not Path(source).is_dir():
        raise FileNotFoundError(f"SOURCE {source!r} is not a folder; give one that save_to_disk wrote")
    try:
        loaded = datasets.load_from_disk(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"SOURCE {source!r} was not written by save_to_disk: {error}") from None
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}


def _prepare(name: str, dataset, arguments: argparse.Namespace):
    from .dataset import prepare_packing

    try:
        return prepare_packing(
            dataset,
            arguments.max_sequence_length,
            arguments.max_sequences_per_pack,
            arguments.packer,
            arguments.overlong,
            arguments.seed,
            token_columns=arguments.token_columns,
            pad_token_id=arguments.pad_token_id,
        )
    except ValueError as error:
        raise ValueError(f"split {name!r}: {error}" if name else str(error)) from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there is one, and the examples as they are written."""

    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


if __name__ == "__main__":
    sys.exit(main())
