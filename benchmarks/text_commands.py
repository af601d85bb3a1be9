"""How long do the commands take from text to sequences, beside an earlier commit and beside `--tokenize exact`?

    python benchmarks/text_commands.py --text prose.txt --tokenizer FOLDER
    python benchmarks/text_commands.py --text prose.txt --tokenizer FOLDER --before CHECKOUT     a clone of that commit
    python benchmarks/text_commands.py --text prose.txt --commands training                     a vocabulary is trained

pack       `pack-dataset pack rows.jsonl --text-column text`: each paragraph of the text is a row
prepare    `bert-pretrain prepare` with --tokenizer
training   `bert-pretrain prepare` without it

Each run is a process of its own, from its first import to its end, with an empty HF_DATASETS_CACHE. The first round is
not counted: it compiles what a text of this size needs. All take turns, round by round. Seconds are the median, with
the least and the most: wall, and processor time of the command and all of its processes. A ratio is of processor time
in the same round. All contenders of a command must write the same folder, byte for byte; "differs" says where they do
not, as an earlier commit may.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packers import machine

HERE = Path(__file__).resolve().parent.parent
COMMANDS = ("pack", "prepare", "training")


class Contender(NamedTuple):
    """A checkout, and how it tokenizes; None: as it does by default."""

    name: str
    checkout: Path
    mode: str | None = None


class Measured(NamedTuple):
    wall: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="a text file, with blank lines between paragraphs")
    add("--tokenizer", type=Path, help="a folder of save_pretrained, for pack and prepare")
    add("--before", type=Path, help="a checkout of an earlier commit")
    add("--exact", action="store_true", help="--tokenize exact, too")
    add("--commands", nargs="+", choices=COMMANDS, default=COMMANDS[:2])
    add("--num-proc", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.tokenizer is None and set(options.commands) != {"training"}:
        parser.error("give --tokenizer")
    print(f"{machine()}\n\n{options.text.name}: {options.text.stat().st_size / 1e6:.1f} MB\n")
    print("| command | processes | contender | wall, s (least, most) | processor, s (least, most) | x ours | folder |")
    print("|---|--:|---|--:|--:|--:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for command in options.commands:
            for num_proc in options.num_proc:
                for line in compare(command, num_proc, options, Path(folder)):
                    print(line, flush=True)


def compare(command: str, num_proc: int, options: argparse.Namespace, folder: Path) -> Iterator[str]:
    contenders = [Contender("**ours**", HERE)]
    if options.exact:
        contenders.append(Contender("ours, exact", HERE, "exact"))
    if options.before is not None:
        contenders.append(Contender("before", options.before.resolve()))
    paragraphs = [" ".join(part.split()) for part in options.text.read_text(encoding="utf-8").split("\n\n")]
    paragraphs = [text for text in paragraphs if text]
    source = write(folder / "all", command, paragraphs)
    found: dict[str, list[Measured]] = defaultdict(list)
    outputs = {}
    for number in range(options.rounds + 1):
        for contender in contenders:
            place = folder / contender.name.strip("*")
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            measured = run(contender, command, source, num_proc, options.tokenizer, place)
            if number:  # the first round compiles
                found[contender.name].append(measured)
                outputs[contender.name] = place / "out"
    first = contenders[0].name
    for contender in contenders:
        rounds = found[contender.name]
        ratios = [each.processor / ours.processor for each, ours in zip(rounds, found[first], strict=True)]
        times = (spread([getattr(each, name) for each in rounds]) for name in Measured._fields)
        is_same = same(outputs[first], outputs[contender.name])
        cells = [command, str(num_proc), contender.name, *times, spread(ratios), "same" if is_same else "differs"]
        yield f"| {' | '.join(cells)} |"


def write(path: Path, command: str, paragraphs: list[str]) -> Path:
    """The text as the command reads it."""
    if command == "pack":
        path = path.with_suffix(".jsonl")
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in paragraphs)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path = path.with_suffix(".txt")
        path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def run(
    contender: Contender, command: str, source: Path, num_proc: int, tokenizer: Path | None, place: Path
) -> Measured:
    """In `place`, with what it writes in `out`: the command records the name that it is given."""
    if command == "pack":
        arguments = ["packing.cli", "pack", str(source), "out", "--text-column", "text", "--overlong", "split"]
    else:
        arguments = ["bert_pretrain.cli", "prepare", "--text", str(source), "--output", "out"]
    arguments += ["--num-proc", str(num_proc)]
    if command != "training":
        arguments += ["--tokenizer", str(tokenizer and tokenizer.resolve())]
    if contender.mode is not None:
        arguments += ["--tokenize", contender.mode]
    environment = os.environ | {"PYTHONPATH": str(contender.checkout), "HF_DATASETS_CACHE": str(place / "cache")}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=place, env=environment, capture_output=True, text=True
    )  # fmt: skip
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
        sys.exit(f"{contender.name}: {ran.stderr[-2000:]}")
    return Measured(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


def same(folder: Path, other: Path) -> bool:
    """Whether both have the same files, byte for byte."""
    names = [sorted(str(file.relative_to(each)) for file in each.rglob("*") if file.is_file())
             for each in (folder, other)]  # fmt: skip
    return names[0] == names[1] and not any(filecmp.cmpfiles(folder, other, names[0], shallow=False)[1:])


if __name__ == "__main__":
    main()
