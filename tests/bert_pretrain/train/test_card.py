"""The model card beside the checkpoint, and what a push to the hub would send."""

import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from tiny_runs import history, make_folders, train
from transformers import BertForPreTraining

from packing import packed_info


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """The folder of a run with 4 steps and an evaluation."""
    output = tmp_path_factory.mktemp("run") / "tiny-bert"
    assert train(folders, output, mlm_loss="token", eval_mlm_probability=0.2) == 0
    return output


def table(card, head):
    """The rows of the table whose head begins with this, as {first cell: other cells}."""
    lines = card.split(f"| {head}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def test_metadata_is_valid_and_the_text_says_what_was_trained(folders, run):
    from datasets import load_from_disk

    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "fill-mask"
    assert "bert" in card.data.tags
    text = (run / "README.md").read_text(encoding="utf-8")
    _, metadata, _ = text.split("---\n", 2)
    assert yaml.safe_load(metadata)["pipeline_tag"] == "fill-mask"
    info = packed_info(load_from_disk(folders["dataset"])["train"])
    for fact in (
        f"`packed`: {info.num_sequences:,} sequences of {info.num_tokens:,} tokens",
        f"packing factor {info.num_sequences / info.num_packs:.3f}, at most {info.max_depth} sequences in a pack",
        "masked language modelling and next-sentence prediction",
        "mean per token, 15% of the tokens predicted in training, 20% in evaluation",
        "1 layers of 16, 2 attention heads, feed-forward 64, 64 positions",
        "trained for | 4 optimizer steps of",
        'BertForPreTraining.from_pretrained("tiny-bert")',
        "[MASK]",
        "tensor for tensor",
    ):
        assert fact in text, fact
    assert str(Path(folders["dataset"]).parent) not in text  # private
    assert table(text, "package")["transformers"] == [__import__("transformers").__version__]


def test_the_figures_are_those_of_the_log(run):
    text, logs = (run / "README.md").read_text(encoding="utf-8"), history(run)
    trained = [entry for entry in logs if "loss" in entry][-1]
    evaluated = [entry for entry in logs if "eval_loss" in entry][-1]
    rows = table(text, " | training, step 4 | held out")
    assert len(rows) == 8
    for name, cells in rows.items():
        key = name.replace(" ", "_")
        assert cells == [f"{trained[key]:.4f}", f"{evaluated[f'eval_{key}']:.4f}"], name
    assert f"{trained['sequences_seen']:,} sequences, {trained['tokens_seen']:,} real tokens" in text


def test_what_was_seen_since_the_last_log_counts(folders, run, tmp_path):
    assert train(folders, tmp_path / "bert", logging_strategy="no") == 0
    logged = [entry for entry in history(tmp_path / "bert") if "loss" in entry]
    everything = [entry for entry in history(run) if "loss" in entry][-1]
    assert not logged
    text = (tmp_path / "bert" / "README.md").read_text(encoding="utf-8")
    assert f"{everything['sequences_seen']:,} sequences, {everything['tokens_seen']:,} real tokens" in text


def test_other_attention_is_not_promised_to_load_as_stock(folders, tmp_path):
    options = {"attention": "local", "attention_options": '{"window": 8}', "max_steps": 1}
    assert train(folders, tmp_path / "bert", **options) == 0
    text = (tmp_path / "bert" / "README.md").read_text(encoding="utf-8")
    assert "attention head `local`" in text and "PackedBertForPreTraining.from_pretrained" in text
    assert "tensor for tensor" not in text


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What would reach the hub: a copy of each folder at the moment of its upload, and the repositories made."""
    sent, made = [], []

    class Repository(str):
        repo_id = property(lambda self: str(self))

    class Done:
        """An upload that has ended."""

        repo_url = "https://huggingface.co/someone/tiny-bert"

        def is_done(self):
            return True

        done, result = is_done, lambda self, timeout=None: self
        exception = lambda self: None  # noqa: E731

    def create_repo(self, repo_id, **kwargs):
        made.append(repo_id)
        return Repository(f"someone/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, commit_message="", **kwargs):
        copy = tmp_path / f"sent-{len(sent)}"
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns(*(ignore_patterns or [])))
        sent.append((repo_id, commit_message, copy))
        return Done()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent, made


@pytest.mark.parametrize("refused", [(0,), (1,), (2, 3), (4,)], ids=["model", "old", "newest", "end"])
def test_an_upload_that_fails_is_said_and_what_is_missing_at_the_end_is_an_error(
    folders, tmp_path, hub, monkeypatch, capsys, caplog, refused
):
    """The run has five uploads: the model and checkpoint-2, the model and checkpoint-4, and the model at the end."""
    sent, _ = hub
    upload = HfApi.upload_folder

    def fail(self, run_as_future=False, **kwargs):
        number = len(sent)
        upload(self, **kwargs)
        job = Future()
        if number not in refused:
            job.set_result(None)
        elif run_as_future:
            job.set_exception(HTTPError("413 Too Large\nhttps://hub"))
        else:
            raise HTTPError("413 Too Large\nhttps://hub")
        return job

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    output, model = tmp_path / "bert", "someone/tiny-bert"
    options = {"push_to_hub": True, "hub_model_id": model, "save_strategy": "steps", "save_steps": 2}
    status = train(folders, output, **options, hub_always_push=True, hub_strategy="all_checkpoints")
    error, log = capsys.readouterr().err, caplog.text
    assert len(sent) == 5 and BertForPreTraining.from_pretrained(output)
    why, to_model = "(413 Too Large)", f"hf upload {model} {output} . --exclude 'checkpoint-*' --exclude '_*'"
    if refused == (0,):  # later ones have sent the model
        assert status == 0
        assert f"the model of checkpoint-2 could not be uploaded to {model} {why}" in log and to_model in log
    elif refused == (4,):
        assert status == 2 and f"{why}; the model is saved in {output}: {to_model}" in error
    else:
        name = "checkpoint-2" if refused == (1,) else "checkpoint-4"
        said = f"{name} as {name} could not be uploaded to {model} {why}; {output / name} is complete on the disk: "
        assert status == 2 and said + f"hf upload {model} {output / name} {name}" in error
        assert said in log and to_model not in error


def test_a_push_sends_the_weights_with_a_card(folders, tmp_path, hub):
    sent, made = hub
    options = {"push_to_hub": True, "hub_model_id": "someone/tiny-bert", "save_strategy": "steps", "save_steps": 2}
    assert train(folders, tmp_path / "bert", **options, hub_always_push=True) == 0
    assert set(made) == {"someone/tiny-bert"} and {repository for repository, _, _ in sent} == {"someone/tiny-bert"}
    assert [message for _, message, _ in sent] == [
        "Training in progress, step 2",
        "Training in progress, step 4",
        "End of training",
    ]
    for _, _, folder in sent:
        BertForPreTraining.from_pretrained(folder)
        assert ModelCard.load(folder / "README.md").data.pipeline_tag == "fill-mask"
        assert {"pretrain.json", "versions.json", "tokenizer.json", "config.json"} <= {p.name for p in folder.iterdir()}
        assert not list(folder.glob("checkpoint-*"))
    last = (sent[-1][2] / "README.md").read_text(encoding="utf-8")
    assert '"someone/tiny-bert"' in last
    assert last == (tmp_path / "bert" / "README.md").read_text(encoding="utf-8")
    assert table(last, " | training, step 4 | held out")["loss"][1] != "–"  # the evaluation is in
