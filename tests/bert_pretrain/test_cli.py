"""`bert-pretrain train` as a user meets it: what it refuses, what it saves, several ranks, Trainer's options."""

import copy
import json
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict, load_from_disk
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file
from tiny_runs import SMALL, flags, history, make_folders, train, train_options
from transformers import AutoConfig, AutoTokenizer, BertForPreTraining, TrainerCallback

from bert_pretrain.cli import main as bert_pretrain
from bert_pretrain.train import pretrain as pretrain_module
from bert_pretrain.train.config import SHAPE
from bert_pretrain.train.hub import Secret
from bert_pretrain.train.new_model import longest_sequence
from bert_pretrain.train.trainer import PretrainTrainer
from packing.cli import main as pack_dataset

RUNS = Path(__file__).parents[1] / "runs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("cli"))


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    """Fail a test that builds a model."""

    def refuse(*args):
        raise AssertionError("a model was built before the input was refused")

    monkeypatch.setattr(pretrain_module, "build_model", refuse)


def refused(capsys, folders, output, *messages, **options):
    """`train` says these in one line, and leaves no folder."""
    before = Path(output).exists()
    assert train(folders, output, **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bert-pretrain train: "), error
    for message in messages:
        assert message in error, error
    assert Path(output).exists() == before


def other_tokenizer(folders, folder, change):
    """The tokenizer with another vocabulary: a function of the list of its tokens."""
    from transformers import BertTokenizer

    vocabulary = AutoTokenizer.from_pretrained(folders["tokenizer"]).get_vocab()
    tokens = change(sorted(vocabulary, key=vocabulary.get))
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    return str(folder)


def without_fingerprint(folders, folder):
    """Packs whose vocabulary is not known, like those of other programs."""
    prepared = load_from_disk(folders["prepared"])
    for split in prepared.values():
        split.info.config_name = None
    prepared.save_to_disk(folder / "prepared")
    assert pack_dataset([str(folder / "prepared"), str(folder / "packed"), "--max-sequence-length", "64"]) == 0
    return folders | {"dataset": str(folder / "packed")}


def test_packs_of_another_vocabulary_are_refused(folders, tmp_path, capsys, no_model):
    swapped = other_tokenizer(folders, tmp_path / "words", lambda tokens: [*tokens[:-2], tokens[-1], tokens[-2]])
    messages = ["was made with another vocabulary (vocabulary:", f"--tokenizer {swapped}", "prepared with"]
    refused(capsys, folders, tmp_path / "bert", folders["dataset"], *messages, tokenizer=swapped)


def test_packs_of_another_vocabulary_are_found_out_without_its_fingerprint(folders, tmp_path, capsys, no_model):
    unknown = without_fingerprint(folders, tmp_path)
    shorter = other_tokenizer(folders, tmp_path / "shorter", lambda tokens: tokens[:40])
    messages = ["holds token ", f"--tokenizer {shorter} has 40 tokens, up to 39", "prepared with"]
    refused(capsys, unknown, tmp_path / "bert", *messages, tokenizer=shorter)
    moved = other_tokenizer(folders, tmp_path / "moved", lambda tokens: [*tokens[4:], *tokens[:4]])
    messages = ["none of ", " sequences begins with ", f"the cls_token of --tokenizer {moved}; most often it is 2"]
    refused(capsys, unknown, tmp_path / "bert", *messages, tokenizer=moved)
    ended = other_tokenizer(folders, tmp_path / "ended", lambda t: [*t[:3], t[-1], *t[4:-1], t[3]])
    refused(capsys, unknown, tmp_path / "bert", "sequences ends with", "sep_token", "it is 3", tokenizer=ended)


def test_the_right_tokenizer_is_taken_with_and_without_a_fingerprint(folders, tmp_path):
    unknown = without_fingerprint(folders, tmp_path)
    assert load_from_disk(unknown["dataset"])["train"].info.config_name is None
    assert load_from_disk(folders["dataset"])["train"].info.config_name.startswith("vocabulary:")
    assert train(unknown, tmp_path / "bert", max_steps=1) == 0


def test_datasets_that_are_none_are_refused(folders, tmp_path, capsys, no_model):
    def refuses(dataset, *messages):
        refused(capsys, folders, tmp_path / "bert", f"--dataset {dataset}", *messages, dataset=dataset)

    refuses(str(tmp_path / "nowhere"), "does not exist; give the folder that pack-dataset wrote")
    (tmp_path / "empty").mkdir()
    refuses(str(tmp_path / "empty"), "is no folder of save_to_disk; give the folder that pack-dataset wrote")
    refuses(folders["prepared"], "was not packed", f"pack-dataset {folders['prepared']} PACKED")
    splits = load_from_disk(folders["dataset"])
    DatasetDict({"validation": splits["test"], "all": splits["train"]}).save_to_disk(tmp_path / "named")
    refuses(str(tmp_path / "named"), "has no split named train, only ['all', 'validation']; rename")
    DatasetDict({"train": splits["train"].select([]), "test": splits["test"]}).save_to_disk(tmp_path / "bare")
    refuses(str(tmp_path / "bare"), "has a split without packs")
    assert pack_dataset([f"{folders['prepared']}/test", str(tmp_path / "longer"), "--max-sequence-length", "96"]) == 0
    mixed = DatasetDict({"train": splits["train"], "test": load_from_disk(tmp_path / "longer")})
    mixed.save_to_disk(tmp_path / "mixed")
    refuses(str(tmp_path / "mixed"), "packed for max_sequence_length 64 and 96; pack both for the same")


def test_a_held_out_split_of_another_vocabulary_is_refused(folders, tmp_path, capsys, no_model):
    splits = load_from_disk(folders["dataset"])
    splits["test"].info.config_name = splits["train"].info.config_name[:-1] + "?"
    splits.save_to_disk(tmp_path / "mixed")
    messages = [f"--dataset {tmp_path / 'mixed'} was made with another vocabulary", "?) than that of --tokenizer "]
    refused(capsys, folders, tmp_path / "bert", *messages, dataset=str(tmp_path / "mixed"))


def with_columns(folders, folder, change):
    """The dataset with each pack changed."""
    load_from_disk(folders["dataset"]).map(change).save_to_disk(folder)
    return str(folder)


def test_columns_that_would_end_a_run_later_are_refused(folders, tmp_path, capsys):
    """Sentence types that the model has no embedding for, and tokens that masking inserts."""
    types = with_columns(folders, tmp_path / "types", lambda pack: {"token_type_ids": [2] * len(pack["input_ids"])})
    message = f"--dataset {types} has token_type_ids of 2, but the model knows 0 to 1"
    refused(capsys, folders, tmp_path / "bert", message, dataset=types)
    labels = with_columns(folders, tmp_path / "labels", lambda pack: {"labels": pack["next_sentence_label"]})
    refused(capsys, folders, tmp_path / "bert", "has a column 'labels', which is what masking makes", dataset=labels)


def test_evaluation_without_held_out_sequences_is_refused(folders, tmp_path, capsys, no_model):
    alone = folders | {"dataset": f"{folders['dataset']}/train"}
    messages = ["needs held-out sequences", f"--dataset {alone['dataset']}", "--test-fraction"]
    refused(capsys, alone, tmp_path / "bert", "--eval-strategy steps", *messages, eval_strategy="steps")
    refused(capsys, alone, tmp_path / "bert", "--eval-on-start True", *messages, eval_on_start=True)


def test_places_that_cannot_be_written_to_are_refused(folders, tmp_path, capsys, no_model):
    (tmp_path / "file").write_text("")
    refused(capsys, folders, tmp_path / "file", f"{tmp_path / 'file'} is a file; give a folder")
    refused(capsys, folders, tmp_path / "file" / "bert", f"{tmp_path / 'file'} is a file; give a folder")


def test_integrations_that_are_not_there_are_refused(folders, tmp_path, capsys, no_model):
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    missing = sorted(set(INTEGRATION_TO_CALLBACK) - {*get_available_reporting_integrations(), "flyte"})[0]
    messages = [f"--report-to {missing} needs a package that is not installed", "choose none"]
    refused(capsys, folders, tmp_path / "bert", *messages, report_to=missing)
    refused(capsys, folders, tmp_path / "bert", "--report-to paper is unknown", "tensorboard", report_to="paper")


def test_positions_are_those_of_the_longest_sequence(folders, tmp_path, capsys):
    """Positions restart in each sequence: 64 are enough for packs of 96 whose sequences are at most 64."""
    longer = str(tmp_path / "packed-96")
    assert pack_dataset([folders["prepared"], longer, "--max-sequence-length", "96"]) == 0
    splits = load_from_disk(longer).values()
    longest = max(max(lengths) for split in splits for lengths in split["sequence_lengths"])
    assert longest_sequence(*splits) == longest <= 64
    assert longest_sequence(next(iter(splits)).select([1, 0]), None) == max(
        max(lengths) for lengths in next(iter(splits))["sequence_lengths"][:2]
    )
    longer, new, continued = folders | {"dataset": longer}, tmp_path / "new", tmp_path / "continued"
    messages = [
        f"--max-position-embeddings {longest - 1}",
        f"longest sequence of {longer['dataset']} has {longest} tokens",
    ]
    refused(capsys, longer, tmp_path / "bert", *messages, max_position_embeddings=longest - 1)
    assert train(longer, new, max_steps=1, max_position_embeddings=longest) == 0
    assert AutoConfig.from_pretrained(new).max_position_embeddings == longest
    assert train(longer, continued, max_steps=1, model=str(new)) == 0
    assert AutoConfig.from_pretrained(continued).max_position_embeddings == longest


def test_a_checkpoint_keeps_its_shape_and_takes_the_dropout_that_is_given(folders, tmp_path, capsys):
    first = tmp_path / "first"
    assert train(folders, first, max_steps=1) == 0
    record, saved = json.loads((first / "pretrain.json").read_text()), AutoConfig.from_pretrained(first)
    for name in (*SHAPE, "hidden_dropout_prob"):
        assert record[name] == getattr(saved, name), name
    assert (record["max_position_embeddings"], record["hidden_dropout_prob"]) == (64, 0.1)
    for name in SHAPE:
        message = f"--{name.replace('_', '-')} 8 is for a new model, and --model {first} has its own"
        refused(capsys, folders, tmp_path / "bert", message, **{"model": str(first), name: 8})
    for given, dropout in ((None, 0.1), (0.25, 0.25), (0, 0)):
        output = tmp_path / f"dropout-{given}"
        assert train(folders, output, max_steps=1, model=str(first), hidden_dropout_prob=given) == 0
        assert AutoConfig.from_pretrained(output).hidden_dropout_prob == dropout
        record = json.loads((output / "pretrain.json").read_text())
        assert record["hidden_dropout_prob"] == given and not any(record[name] for name in SHAPE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 0}, "--mlm-probability 0.0 must be more than 0 and at most 1"),
        ({"eval_mlm_probability": 1.5}, "--eval-mlm-probability 1.5 must be more than 0 and at most 1"),
        ({"peak_tflops": -1}, "--peak-tflops -1.0 must be more than 0"),
        ({"fsdp": True}, "Using fsdp only works in distributed training"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"pwer": 2.0}'},
            "'pwer', which --lr-scheduler-type polynomial does not know; did you mean 'power'?; its options are [",
        ),
        ({"lr_scheduler_kwargs": '{"zzz": 2.0}'}, "--lr-scheduler-type linear does not know; it has no options"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 2},
            "--lr-scheduler-type constant has no warm-up, --warmup-steps 2.0 would be ignored; choose another, such",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs 'num_decay_steps': --lr-scheduler-kwargs '{\"num_decay"),
    ],
)
def test_options_out_of_bounds_are_refused(folders, tmp_path, capsys, options, message):
    refused(capsys, folders, tmp_path / "bert", message, **options)


# -- what is saved ------------------------------------------------------------------------------------------------


def test_the_saved_configuration_can_be_given_back(folders, tmp_path):
    options = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2.0}', "warmup_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 2, "mlm_loss": "token", "learning_rate": 1e-3, "seed": 7}
    assert train(folders, tmp_path / "first", **options) == 0
    file = tmp_path / "first" / "pretrain.json"
    assert bert_pretrain(["train", str(file), "--output_dir", str(tmp_path / "second")]) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    records = [json.loads((tmp_path / name / "pretrain.json").read_text()) for name in ("first", "second")]
    assert records[0].pop("output_dir") != records[1].pop("output_dir")
    assert records[0] == records[1]
    assert records[0]["lr_scheduler_kwargs"] == {"power": 2.0} and "weight_decay" not in records[0]
    for folder in (tmp_path / "first", tmp_path / "first" / "checkpoint-4"):
        assert (folder / "pretrain.json").read_text() == file.read_text()
        assert json.loads((folder / "versions.json").read_text())["torch"] == version("torch")


def test_secrets_are_not_saved(folders, tmp_path, monkeypatch):
    """In no file: Trainer would pickle the token into training_args.bin, and send that to the hub."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "bert" / "events"))
    options = {"hub_token": "hf_secret", "save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}
    assert train(folders, tmp_path / "bert", max_steps=1, **options) == 0
    files = [path for path in (tmp_path / "bert").rglob("*") if path.is_file()]
    assert [path.name for path in files].count("training_args.bin") == 2 and any(
        "tfevents" in path.name for path in files
    )
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]
    assert torch.load(tmp_path / "bert" / "training_args.bin", weights_only=False).hub_token is None


def test_a_secret_is_a_string_that_is_not_pickled():
    secret = Secret("hf_secret")
    assert f"Bearer {secret}" == "Bearer hf_secret" and secret == "hf_secret" and copy.copy([secret]) == [secret]
    assert pickle.loads(pickle.dumps({"hub_token": secret})) == {"hub_token": None}


# -- several ranks ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_ranks_by_ddp_and_by_fsdp(folders, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    data = [folders["dataset"], folders["tokenizer"], str(tmp_path)]
    run = subprocess.run([*launch, RUNS / "two_ranks.py", *data], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    ddp, fsdp = (
        BertForPreTraining.from_pretrained(tmp_path / name, dtype=torch.float64).state_dict()
        for name in ("ddp", "fsdp")
    )
    assert max(float((ddp[name] - fsdp[name]).abs().max()) for name in ddp) < 1e-10
    start = BertForPreTraining.from_pretrained(tmp_path / "fsdp" / "checkpoint-2", dtype=torch.float64).state_dict()
    assert max(float((start[name] - fsdp[name]).abs().max()) for name in ddp) > 1e-3  # they do learn
    steps = [[e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("ddp", "fsdp")]
    assert steps[0] == pytest.approx(steps[1], rel=1e-6) and len(steps[0]) == 4
    assert (tmp_path / "printed-by-rank-0.txt").read_text().count("trained to step 4") == 2
    assert (tmp_path / "printed-by-rank-1.txt").read_text() == ""


@pytest.mark.long
def test_accelerate_launches_it_on_several_processes(folders, tmp_path):
    """--multi_gpu: without it accelerate needs MPI to start several processes on CPUs."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "bert_pretrain.cli"]
    options = flags(train_options(folders, tmp_path / "bert", max_steps=2))
    run = subprocess.run([*launch, "train", *options], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 x 1 x" in run.stderr  # devices x passes x packs
    assert [entry["sequences_seen"] for entry in history(tmp_path / "bert") if "loss" in entry] == [12, 24]


# -- Trainer's options ---------------------------------------------------------------------------------------------


class Spy(TrainerCallback):
    """Sees the trained model and what it was given."""

    def on_train_begin(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        Spy.dtypes, Spy.forwards = set(), 0
        layer = next(module for module in model.modules() if type(module).__name__ == "BertLayer")

        def see(module, inputs, output):
            Spy.dtypes.add((output[0] if isinstance(output, tuple) else output).dtype)

        layer.intermediate.dense.register_forward_hook(see)
        layer.attention.register_forward_hook(lambda *_: setattr(Spy, "forwards", Spy.forwards + 1))


def run_with_spy(folders, output, monkeypatch, spy=Spy, **options):
    from bert_pretrain.train.trainer import PretrainTrainer

    class Spied(PretrainTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(spy())
            Spied.last = self

    monkeypatch.setattr(pretrain_module, "PretrainTrainer", Spied)
    given = {"max_steps": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | options
    alone = folders | {"dataset": f"{folders['dataset']}/train"}  # without evaluation
    assert train(alone, output, **given) == 0
    return Spied.last, [entry for entry in history(output) if "loss" in entry]


@pytest.fixture(scope="module")
def plain(folders, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        _, logs = run_with_spy(folders, tmp_path_factory.mktemp("plain") / "bert", monkeypatch)
    assert Spy.dtypes == {torch.float32}
    return {"logs": logs, "forwards": Spy.forwards}


def losses(logs):
    return [entry["loss"] for entry in logs]


def test_bf16(folders, tmp_path, monkeypatch, plain):
    trainer, logs = run_with_spy(folders, tmp_path / "bert", monkeypatch, bf16=True)
    assert Spy.dtypes == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert losses(logs) == pytest.approx(losses(plain["logs"]), rel=1e-2) and losses(logs) != losses(plain["logs"])
    BertForPreTraining.from_pretrained(tmp_path / "bert")


def test_activation_checkpointing_computes_twice_and_changes_nothing(folders, tmp_path, monkeypatch, plain):
    _, logs = run_with_spy(folders, tmp_path / "bert", monkeypatch, activation_checkpointing=True)
    assert Spy.forwards == 2 * plain["forwards"]
    assert losses(logs) == pytest.approx(losses(plain["logs"]), rel=1e-6)
    assert [e["grad_norm"] for e in logs] == pytest.approx([e["grad_norm"] for e in plain["logs"]], rel=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
def test_torch_compile_changes_nothing_but_rounding(folders, tmp_path, monkeypatch, plain):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    nobody = TrainerCallback  # torch would compile the spy's hooks, too
    trainer, logs = run_with_spy(folders, tmp_path / "bert", monkeypatch, nobody, **options)
    assert trainer.model.bert.encoder._compiled_call_impl is not None and "_sums" in trainer.model.__dict__
    assert trainer.model_wrapped is trainer.model  # accelerate compiled nothing around it
    assert losses(logs) == pytest.approx(losses(plain["logs"])[:2], rel=1e-5)
    BertForPreTraining.from_pretrained(tmp_path / "bert")


def test_polynomial_schedule(folders, tmp_path, monkeypatch):
    options = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2.0, "lr_end": 1e-5}'}
    _, logs = run_with_spy(folders, tmp_path / "bert", monkeypatch, **options, learning_rate=1e-3, max_steps=4)
    expected = [1e-5 + (1e-3 - 1e-5) * (1 - step / 4) ** 2 for step in range(1, 5)]
    assert [entry["learning_rate"] for entry in logs] in (
        pytest.approx([1e-3, *expected[:-1]]),  # the rate of the step just made
        pytest.approx(expected),  # the rate of the next step
    )


def test_gradients_are_clipped(folders, tmp_path, monkeypatch, plain):
    options = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
    moved = []
    for limit in (1e9, 1e-3):
        trainer, logs = run_with_spy(folders, tmp_path / str(limit), monkeypatch, **options, max_grad_norm=limit)
        moved.append((trainer, logs[0]["grad_norm"]))
        if limit < 1:
            before = load_file(tmp_path / "1000000000.0" / "model.safetensors")
            after = load_file(tmp_path / "0.001" / "model.safetensors")
    assert moved[0][1] == pytest.approx(moved[1][1], rel=1e-5) and moved[0][1] > 1  # the norm before clipping
    distance = torch.sqrt(sum(((before[name] - after[name]) ** 2).sum() for name in before))
    assert float(distance) == pytest.approx(moved[0][1] - 1e-3, rel=1e-3)


def test_options_have_no_effect_unless_given(folders, tmp_path):
    """The other tests of this file compare with this run."""
    given = flags(train_options(folders, tmp_path))
    assert not {"--bf16", "--torch_compile", "--max_grad_norm"} & set(given) and SMALL["hidden_size"] == 16


# -- runs that end otherwise --------------------------------------------------------------------------------------


def error_of(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_an_interrupt_says_what_stays(folders, tmp_path, capsys, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    assert train(folders, tmp_path / "saved", save_strategy="steps", save_steps=2, max_steps=2) == 0
    monkeypatch.setattr(PretrainTrainer, "train", interrupt)
    assert train(folders, tmp_path / "none") == 130
    assert error_of(capsys) == "bert-pretrain train: interrupted before a checkpoint was saved"
    assert train(folders, tmp_path / "saved", save_strategy="steps", save_steps=2, max_steps=4) == 130
    assert f"{tmp_path / 'saved' / 'checkpoint-2'} stays" in error_of(capsys)


def test_a_save_that_fails_names_the_last_checkpoint(folders, tmp_path, capsys, monkeypatch):
    save = PretrainTrainer._save_optimizer_and_scheduler

    def fail_at_4(self, folder):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(PretrainTrainer, "_save_optimizer_and_scheduler", fail_at_4)
    assert train(folders, tmp_path / "bert", save_strategy="steps", save_steps=2) == 2
    error = error_of(capsys)
    for words in ("checkpoint-4 could not be written", "No space left", " bytes are free", "checkpoint-2"):
        assert words in error


def test_a_hub_out_of_reach_is_one_line(folders, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert train(folders, tmp_path / "bert", push_to_hub=True) == 2
    assert "the hub cannot be reached, or refuses (Name or service not known)" in error_of(capsys)


def test_the_best_model_is_known_where_the_run_was_moved_and_the_card_says_its_step(folders, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1e-3}
    options["greater_is_better"] = True  # step 2, as if it were the worst
    assert train(folders, tmp_path / "old", **options) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    caplog.set_level("INFO")
    assert train(folders, tmp_path / "new", **options) == 0
    assert "finished already: step 4 of 4" in caplog.text
    state = json.loads((tmp_path / "new" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "new" / "checkpoint-2")
    assert "that of step 2, the best" in (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
