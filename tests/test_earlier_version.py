"""What an earlier version wrote still works: packs load, verify, unpack; a killed packing and a run are resumed.

tests/data/README.md says how it was made. Bytes are compared where the libraries are those of then.
"""

import json
import shutil
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from packing import EpochPacks, load_packed, packed_info, unpack_dataset, verify_packed
from packing.cli import main as pack_dataset

EARLIER = Path(__file__).parent / "data" / "0.1.0"
SPLITS = ["train", "test"]
LONGEST = ["--max-sequence-length", "32"]


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy of all that the earlier version wrote, which is the working folder."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


def changed_versions(file: str) -> dict[str, str]:
    """{package: its version then} of those that a file names and that are another now."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    return {name: then for name, then in content.get("versions", content).items() if metadata.version(name) != then}


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def source_rows(split: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"rows/{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["arrow", "parquet"])
def test_packs_load_verify_and_unpack(earlier, name):
    assert pack_dataset(["verify", name, "--source", "rows"]) == 0
    packed = load_packed(name)
    assert list(packed) == SPLITS
    for split in SPLITS:
        rows = source_rows(split)
        verification = verify_packed(f"{name}/{split}", datasets.Dataset(pa.Table.from_pylist(rows)))
        assert verification.ok, str(verification)
        info = packed_info(packed[split])
        assert (info.source_rows, info.max_sequence_length) == (len(rows), 32)
        assert list(info.overlong_rows) == list(range(9, len(rows), 10))
        if info.overlong == "truncate":  # all but the closing special token of what is too long
            rows = [row | {"input_ids": [*row["input_ids"][:-1][:31], row["input_ids"][-1]]} for row in rows]
        assert unpack_dataset(packed[split]).to_list() == rows


def test_packs_are_assigned_anew_each_epoch(earlier):
    packed = load_packed("arrow")["train"]
    epochs = EpochPacks(packed, seed=1)
    orders = []
    for epoch in range(2):
        epochs.set_epoch(epoch)
        packs = [epochs[i] for i in range(len(epochs))]
        orders.append([index for pack in packs for index in pack["sequence_indices"]])
        tokens = sorted(token for pack in packs for token in pack["input_ids"])
        assert tokens == sorted(token for row in source_rows("train") for token in row["input_ids"])
    assert orders[0] == [index for pack in packed["sequence_indices"] for index in pack]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_the_same_packing_makes_the_same_packs(earlier):
    pack_dataset(["rows", "again", *LONGEST, "--overlong", "split"])
    pack_dataset(["prepared", "pairs again", *LONGEST])
    for then, now in (("arrow", "again"), ("pairs", "pairs again")):
        packs = [load_packed(folder) for folder in (then, now)]
        assert all(packs[0][split].to_list() == packs[1][split].to_list() for split in SPLITS)
        if not changed_versions(f"{then}/train/manifest.json"):
            assert contents(now) == contents(then)


def test_a_killed_packing_is_resumed(earlier, monkeypatch, capsys):
    """Or refused, where the libraries that shape its bytes are others: with the versions and the cure."""
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 4000)
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 256)
    options = [*LONGEST, "--overlong", "split"]
    changed = changed_versions(".half.partial/train/manifest.json")
    finished = contents(".half.partial")
    status = pack_dataset(["rows", "half", *options])
    if changed:
        said = capsys.readouterr().err
        assert status == 2 and "remove it" in said
        assert all(f"{name} was {then!r} and is {metadata.version(name)!r}" in said for name, then in changed.items())
        return
    assert status == 0
    pack_dataset(["rows", "anew", *options])
    resumed = contents("half")
    assert resumed == contents("anew")
    kept = [name for name in finished if name.endswith(".arrow")]
    assert len(kept) == 3 and all(resumed[name] == finished[name] for name in kept)


def test_a_run_is_resumed(earlier, capsys):
    """Or refused, where other libraries have other options: then the option is named, and the cure."""
    from safetensors.numpy import load_file

    from bert_pretrain.cli import main as bert_pretrain

    changed = changed_versions("run/checkpoint-2/versions.json")
    status = bert_pretrain(["train", "run/checkpoint-2/pretrain.json"])
    if status and changed:
        said = capsys.readouterr().err
        assert "was trained with" in said and "give the old value to resume" in said
        return
    assert status == 0
    then, now = (load_file(f"{folder}/model.safetensors") for folder in ("whole", "run"))
    assert then.keys() == now.keys()
    for name in then:
        np.testing.assert_allclose(now[name], then[name], rtol=0, atol=1e-5, err_msg=name)
    logs = [json.loads(Path(folder, "trainer_state.json").read_text())["log_history"] for folder in ("whole", "run")]
    losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    assert [step for step, _ in losses[1]] == [1, 2, 3, 4]
    assert losses[1][:2] == losses[0][:2]  # of the checkpoint: it did not start again
    assert losses[1] == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in losses[0]]
