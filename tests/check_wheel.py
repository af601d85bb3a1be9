"""Is the built wheel whole? Run with `python -I` in an environment that holds the wheel and its base dependencies only.

A plain script: pytest is not there. Prints one line and exits with 0, or fails.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    import packing

    where = Path(packing.__file__).resolve()
    check(Path(sys.prefix).resolve() in where.parents, f"packing comes from {where}, outside {sys.prefix}")
    check((where.parent / "py.typed").exists(), "packing/py.typed is not in the wheel")
    for name in ("collate", "bert_pretrain"):
        check(importlib.util.find_spec(name) is not None, f"{name} is not in the wheel")
    check(packing.published_histogram("squad").sum() == 88_641, "the published histograms are not in the wheel")
    with tempfile.TemporaryDirectory() as folder:
        check_packing(Path(folder) / "packed")
    check(not {"torch", "transformers"} & set(sys.modules), "packing imports torch or transformers")
    check_command("pack-dataset")
    print(f"OK: the wheel packs without torch and transformers ({where.parent})")


def check_packing(output: Path) -> None:
    import datasets

    from packing import pack_dataset, packed_info

    rows = [[i] * (1 + i % 7) for i in range(100)]
    pack_dataset(datasets.Dataset.from_dict({"input_ids": rows}), 16, output=output, balance=4)
    loaded = datasets.load_from_disk(str(output))
    check(packed_info(loaded).num_sequences == 100, "the packed folder lost its facts")
    found = []
    for row in loaded.to_list():
        start = 0
        for index, length in zip(row["sequence_indices"], row["sequence_lengths"], strict=True):
            found.append((index, row["input_ids"][start : start + length]))
            start += length
    check(sorted(found) == list(enumerate(rows)), "the packed folder does not hold every sequence once")
    check(len(loaded) < 40, f"{len(loaded)} packs for 100 short sequences")


def check_command(name: str) -> None:
    command = Path(sys.executable).with_name(name)
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    check(done.returncode == 0 and "SOURCE" in done.stdout, f"{command} --help failed: {done.stderr}")


def check(condition: bool, problem: str) -> None:
    if not condition:
        sys.exit(f"FAILED: {problem}")


if __name__ == "__main__":
    main()
