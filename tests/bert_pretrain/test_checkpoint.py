"""Checkpoints are stock BERT's, tensor for tensor, in both directions; and their files are complete, or not there."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from pretraining_models import make_config, make_models
from transformers import BertForMaskedLM, BertForPreTraining
from transformers.trainer_utils import get_last_checkpoint

from bert_pretrain import PackedBertForPreTraining
from collate.training import checkpoints
from collate.training.checkpoints import (
    MANIFEST,
    DamagedCheckpoint,
    check_checkpoint,
    delete_old,
    last_checkpoint,
    publish,
    remove_unfinished,
)

NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
NOT_IN_MASKED_LM = {
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
}
WORDS = torch.tensor([[2, 17, 23, 8, 3, 40, 3]])
TYPES = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
ONE_SEQUENCE = torch.ones_like(WORDS)


def load(model_class, folder):
    model, report = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    return model.eval(), {name: set(report[name]) for name in NOTHING}


def test_stock_bert_reads_our_checkpoint(tmp_path):
    _, packed = make_models()
    packed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    stock, report = load(BertForPreTraining, tmp_path)
    assert report == NOTHING
    ours = packed.eval()(WORDS, ONE_SEQUENCE, token_type_ids=TYPES)
    theirs = stock(WORDS, token_type_ids=TYPES)
    torch.testing.assert_close(ours.prediction_logits, theirs.prediction_logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.seq_relationship_logits, theirs.seq_relationship_logits, rtol=0, atol=1e-12)


def test_masked_lm_reads_our_checkpoint(tmp_path):
    _, packed = make_models()
    packed.save_pretrained(tmp_path)
    stock, report = load(BertForMaskedLM, tmp_path)
    assert report == NOTHING | {"unexpected_keys": NOT_IN_MASKED_LM}
    ours = packed.eval()(WORDS, ONE_SEQUENCE, token_type_ids=TYPES).prediction_logits
    torch.testing.assert_close(ours, stock(WORDS, token_type_ids=TYPES).logits, rtol=0, atol=1e-12)


def test_we_read_a_stock_checkpoint(tmp_path):
    stock, _ = make_models()
    stock.save_pretrained(tmp_path)
    packed, report = load(PackedBertForPreTraining, tmp_path)
    assert report == NOTHING
    ours = packed(WORDS, ONE_SEQUENCE, token_type_ids=TYPES)
    theirs = stock.eval()(WORDS, token_type_ids=TYPES)
    torch.testing.assert_close(ours.prediction_logits, theirs.prediction_logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.seq_relationship_logits, theirs.seq_relationship_logits, rtol=0, atol=1e-12)


def test_a_stock_checkpoint_takes_our_entries_of_the_config(tmp_path):
    stock, _ = make_models()
    stock.save_pretrained(tmp_path)
    ours = {"packed_attention": "local", "packed_attention_options": {"window": 2}, "mlm_loss": "token"}
    loaded = PackedBertForPreTraining.from_pretrained(tmp_path, **ours, attention_probs_dropout_prob=0.0)
    assert ours.items() <= vars(loaded.config).items() and loaded.config.attention_probs_dropout_prob == 0.0
    assert "packed_attention" not in vars(stock.config)
    assert PackedBertForPreTraining.from_pretrained(tmp_path, packed_attention="auto").config.packed_attention == "auto"
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'packed_atention'"):
        PackedBertForPreTraining.from_pretrained(tmp_path, packed_atention="auto")


def test_a_checkpoint_returns_to_us_as_it_was(tmp_path):
    _, packed = make_models("token")
    packed.save_pretrained(tmp_path)
    again, report = load(PackedBertForPreTraining, tmp_path)
    assert report == NOTHING
    assert again.config.mlm_loss == "token" and again.config.packed_attention == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones_like(WORDS)}, "no attention_mask"),
        ({}, "needs sequence_ids"),
        (
            {"sequence_ids": ONE_SEQUENCE, "next_sentence_label": torch.zeros(1, 1, dtype=torch.long)},
            "need cls_positions",
        ),
    ],
)
def test_inputs_that_cannot_tell_sequences_apart_are_refused(inputs, message):
    _, packed = make_models()
    with pytest.raises(ValueError, match=message):
        packed(WORDS, **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlm_loss": "batch"}, "unknown mlm_loss 'batch'"),
        ({"packed_attention": "full"}, "unknown attention 'full'; choose from .*sdpa"),
        ({"packed_attention": ["sdpa"]}, "1 attention heads for 2 layers"),
        ({"is_decoder": True}, "is for encoders"),
    ],
)
def test_configs_we_cannot_honour_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PackedBertForPreTraining(make_config(**changes))


# -- files: complete or not there --------------------------------------------------------------------------------


def write_checkpoint(run, step, contents=b"weights"):
    folder = run / "_unfinished" / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(contents)
    (folder / "shards" / "rank_0.pt").write_bytes(b"")
    publish(folder, run / folder.name)
    return run / folder.name


def sharded(folder):
    """A checkpoint whose weights lie in two files that an index names."""
    folder.mkdir()
    (folder / "parts").mkdir()
    for name in ("a.safetensors", "parts/b.safetensors"):
        (folder / name).write_text(name)
    weights = {"x": "a.safetensors", "y": "parts/b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    publish(folder, folder.with_name("checkpoint-1"))
    return folder.with_name("checkpoint-1")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", "..", "a\\b", "a\0", "parts/../../outside"])
def test_names_that_lead_out_of_a_checkpoint(tmp_path, name):
    """Each file of a checkpoint's manifest and of the index of its weights, with checksums that are right."""
    (tmp_path / "outside").write_text("a.safetensors")
    checkpoint = sharded(tmp_path / "written")
    check_checkpoint(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    files = dict(manifest["files"])
    files[name] = files.pop("a.safetensors")
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files}))
    with pytest.raises(DamagedCheckpoint, match="which is no file inside its folder"):
        check_checkpoint(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    (checkpoint / MANIFEST).unlink()
    publish(checkpoint, tmp_path / "again")
    with pytest.raises(DamagedCheckpoint, match="which is not among its files"):
        check_checkpoint(tmp_path / "again")


def test_a_checkpoint_with_a_link_that_leads_out_or_a_pipe(tmp_path):
    checkpoint = sharded(tmp_path / "written")
    (checkpoint / "a.safetensors").rename(tmp_path / "moved")
    (checkpoint / "a.safetensors").symlink_to(tmp_path / "moved")
    with pytest.raises(DamagedCheckpoint, match="is a link that leads out of"):
        check_checkpoint(checkpoint)
    (checkpoint / "a.safetensors").unlink()
    os.mkfifo(checkpoint / "a.safetensors")
    with pytest.raises(DamagedCheckpoint, match="is a pipe and no file"):
        check_checkpoint(checkpoint)
    (checkpoint / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json cannot be read"):
        check_checkpoint(checkpoint)


def test_a_published_checkpoint_is_complete(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 8)
    check_checkpoint(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest["files"].keys() == {"model.safetensors", "shards/rank_0.pt"}
    assert manifest["files"]["model.safetensors"]["bytes"] == 7
    assert os.listdir(tmp_path) == ["checkpoint-8"]
    assert last_checkpoint(tmp_path) == checkpoint == Path(get_last_checkpoint(str(tmp_path)))


def flip_a_byte(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"weightS")


DAMAGES = [
    (flip_a_byte, "model.safetensors has other contents than were written"),
    (lambda c: (c / "model.safetensors").write_bytes(b"weight"), "model.safetensors has 6 bytes, 7 were written"),
    (lambda c: (c / "shards" / "rank_0.pt").unlink(), "shards/rank_0.pt is missing"),
    (lambda c: (c / MANIFEST).unlink(), "has no manifest.json: it is incomplete"),
    (lambda c: (c / MANIFEST).write_text("{"), "manifest.json cannot be read"),
    (lambda c: (c / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, message):
    older, newest = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    damage(newest)
    with pytest.raises(DamagedCheckpoint, match=f"checkpoint-10.*{message}"):
        check_checkpoint(newest)
    with pytest.raises(DamagedCheckpoint, match=f"{message}.*; delete the folder to resume from checkpoint-9"):
        last_checkpoint(tmp_path)
    damage(older)
    with pytest.raises(DamagedCheckpoint, match=f"checkpoint-10.*{message}.*; delete the folder to start again"):
        last_checkpoint(tmp_path)
    shutil.rmtree(newest)
    shutil.rmtree(older)
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_flip_in_the_manifest_is_not_blamed_on_another_file(tmp_path, sixteenth):
    """Every sixteenth bit of the manifest in turn; the files that it lists are whole."""
    manifest = write_checkpoint(tmp_path, 8) / MANIFEST
    whole = manifest.read_bytes()
    for place in range(sixteenth, 8 * len(whole), 16):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        if bytes(flipped).split() == whole.split():
            continue  # a space between words
        manifest.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint, match=r"checkpoint-8 is damaged: manifest\.json (itself|cannot be read)"):
            check_checkpoint(manifest.parent)


def test_a_manifest_without_a_hash_of_its_own_was_written_before_there_was_one(tmp_path):
    manifest = write_checkpoint(tmp_path, 8) / MANIFEST
    manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}))
    check_checkpoint(manifest.parent)


@pytest.mark.parametrize("moment", ["sync", "checksum", "write_text", "rename"])
def test_whenever_a_save_ends_early_the_last_checkpoint_stays(tmp_path, monkeypatch, moment):
    whole = write_checkpoint(tmp_path, 8)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = {"write_text": Path, "rename": os}.get(moment, checkpoints)
        patch.setattr(target, moment, die)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 16)
    assert last_checkpoint(tmp_path) == whole
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-8"]
    assert write_checkpoint(tmp_path, 16) == last_checkpoint(tmp_path)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write_checkpoint(tmp_path, 8, b"before")
    again = write_checkpoint(tmp_path, 8, b"after")
    check_checkpoint(again)
    assert (again / "model.safetensors").read_bytes() == b"after" and os.listdir(tmp_path) == ["checkpoint-8"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 10]),
        (0, None, [1, 2, 10]),
        (2, None, [2, 10]),
        (1, 1, [1, 10]),
        (2, 1, [1, 10]),
        (1, 10, [10]),
    ],
)
def test_old_checkpoints_go(tmp_path, limit, best, kept):
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step)
    delete_old(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in kept}


@pytest.mark.parametrize("ages", [(3, 2, 1), (1, 1, 3), (-9, 1, -5)], ids=["set back", "alike", "from the future"])
def test_the_lowest_steps_go_whatever_their_times(tmp_path, ages):
    """A clock that was set back, a copied run."""
    for step, age in zip((1, 2, 10), ages, strict=True):
        past = time.time() - 86_400 * (4 - age)
        os.utime(write_checkpoint(tmp_path, step), (past, past))
    delete_old(tmp_path, 2, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-10"}


def test_the_checkpoint_just_written_stays_beside_higher_steps_of_another_run(tmp_path):
    for step in (4, 5, 8, 12):
        write_checkpoint(tmp_path, step)
    delete_old(tmp_path, 2, None, newest=tmp_path / "checkpoint-5")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-12"}


def test_the_best_checkpoint_is_known_by_any_path(tmp_path, monkeypatch):
    for step in (4, 8, 12):
        write_checkpoint(tmp_path / "run", step)
    monkeypatch.chdir(tmp_path)
    delete_old(Path("run"), 2, str(tmp_path / "run" / "checkpoint-4"), Path("run/checkpoint-12"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-4", "checkpoint-12"}


def test_of_a_checkpoint_that_was_moved_away_the_link_goes(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path / "run", step)
    moved = (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "moved")
    (tmp_path / "run" / "checkpoint-1").symlink_to(moved)
    delete_old(tmp_path / "run", 1, None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    check_checkpoint(moved)


def test_an_old_checkpoint_stays_whole_or_goes(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)

    def die(folder, ignore_errors=False):
        if os.path.isdir(folder):
            os.unlink(os.path.join(folder, "model.safetensors"))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", die)
        delete_old(tmp_path, 1, None)
    assert {path.name for path in tmp_path.iterdir()} == {"_unfinished", "checkpoint-2"}
