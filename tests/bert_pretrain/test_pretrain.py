"""All commands that a user types, in order: text -> sequences -> packs -> checkpoint -> stock transformers."""

import json
from typing import ClassVar

import numpy as np
import pytest
from datasets import DatasetDict, load_from_disk
from flag_runs import train
from transformers import BertForPreTraining, TrainerCallback, TrainingArguments, pipeline

from bert_pretrain.cli import main as bert_pretrain
from bert_pretrain.train.batch import counted_info, set_batch, split_step
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.pretrain import pretrain
from collate.training.order import pack_depths, plan_steps
from collate.training.rounds import plan_rounds
from packing import packed_info
from packing.cli import main as pack_dataset


def test_a_checkpoint_that_stock_transformers_opens(folders, tmp_path):
    assert train(folders, tmp_path / "bert", "--eval_strategy", "steps", "--eval_steps", "2") == 0
    BertForPreTraining.from_pretrained(tmp_path / "bert")
    guesses = pipeline("fill-mask", model=str(tmp_path / "bert"))("the cat sat on the [MASK] .")
    assert len(guesses) == 5
    state = json.loads((tmp_path / "bert" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4] and len(evaluations) == 3
    assert steps[3]["sequences_seen"] > steps[2]["sequences_seen"] > 20
    assert {"mlm_loss_per_sequence", "mlm_accuracy_per_token", "nsp_accuracy", "nsp_majority"} <= steps[0].keys()


def test_an_interrupted_run_goes_on_where_it_was(folders, tmp_path):
    every_two = ["--save_steps", "2", "--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0"]
    constant = ["--lr_scheduler_type", "constant"]
    assert train(folders, tmp_path / "whole", *every_two, *constant) == 0
    assert train(folders, tmp_path / "parts", *every_two, *constant, "--max_steps", "2") == 0
    assert train(folders, tmp_path / "parts", *every_two, *constant) == 0
    whole, parts = (BertForPreTraining.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all((a == b).all() for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    histories = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "parts")]
    seen = [[e["sequences_seen"] for e in h["log_history"] if "loss" in e] for h in histories]
    assert seen[0] == seen[1]


def test_training_can_continue_from_a_checkpoint(folders, tmp_path):
    assert train(folders, tmp_path / "first") == 0
    assert train(folders, tmp_path / "second", "--model", str(tmp_path / "first"), "--mlm_loss", "token") == 0


def test_objective_none_trains_without_nsp(folders, tmp_path):
    text, prepared, packed = str(folders["folder"] / "text.txt"), str(tmp_path / "prepared"), str(tmp_path / "packed")
    prepare = ["prepare", "--text", text, "--output", prepared, "--objective", "none", "--max_sequence_length", "64"]
    assert bert_pretrain([*prepare, "--tokenizer", folders["tokenizer"]]) == 0
    assert pack_dataset([prepared, packed, "--max-sequence-length", "64"]) == 0
    assert train(folders | {"packed": packed}, tmp_path / "bert") == 0
    state = json.loads((tmp_path / "bert" / "trainer_state.json").read_text())
    assert "nsp_accuracy" not in state["log_history"][0] and "mlm_loss_per_token" in state["log_history"][0]


class Steps(TrainerCallback):
    """A user's own."""

    seen: ClassVar[list] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((state.global_step, args.gradient_accumulation_steps))


def test_from_python_callbacks_are_called_and_the_arguments_stay(folders, tmp_path, monkeypatch):
    """As a class or an object; the passes of a step are found in the trainer's own arguments."""
    monkeypatch.setattr(Steps, "seen", [])
    data = {"dataset": folders["packed"], "tokenizer": folders["tokenizer"], "sequences_per_step": 12}
    config = PretrainConfig(**data, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    training = TrainingArguments(
        str(tmp_path / "bert"),
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    before = training.to_dict()
    trainer = pretrain(config, training, callbacks=[Steps, Steps()])
    assert training.to_dict() == before and trainer.args is not training
    passes = trainer.args.gradient_accumulation_steps
    assert passes > 1 and Steps.seen == [(1, passes), (1, passes), (2, passes), (2, passes)]
    assert pretrain(config, training).state.global_step == 2  # given again, they mean the same


def test_passes_that_are_cut_otherwise_change_what_dropout_draws_and_nothing_else(folders, tmp_path):
    def losses(output, *options):
        assert train(folders, output, *options, "--max_steps", "2", "--learning_rate", "0.01") == 0
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    for name, dropout in (("without", ["--hidden_dropout_prob", "0"]), ("with", [])):
        big, small = (
            losses(tmp_path / f"{name}-{packs}", "--per_device_train_batch_size", packs, *dropout)
            for packs in ("8", "2")
        )
        assert (big == pytest.approx(small, rel=1e-5)) == (name == "without")


@pytest.mark.parametrize(
    ("most_packs", "devices", "most_per_pass", "expected"),
    [(14, 1, 32, (1, 14)), (149, 2, 32, (3, 25)), (109, 1, 32, (4, 28)), (3, 1, 2, (2, 2)), (1, 1, 8, (1, 1))],
)
def test_a_step_is_split_into_passes(most_packs, devices, most_per_pass, expected):
    passes, packs = split_step(most_packs, devices, most_per_pass)
    assert (passes, packs) == expected and packs <= most_per_pass and passes * packs * devices >= most_packs


def test_sequences_per_step_decide_packs_per_pass(folders, tmp_path, caplog):
    packs = load_from_disk(folders["packed"])["train"]
    factor = packed_info(packs).num_sequences / packed_info(packs).num_packs
    config = PretrainConfig(dataset="", tokenizer="", sequences_per_step=20)
    training = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
    with caplog.at_level("INFO"):
        assert set_batch(config, training, packs) == 20
    most = plan_steps(pack_depths(packs), 20).most_packs
    slots = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert training.per_device_train_batch_size <= 4 and most <= slots < most + training.gradient_accumulation_steps
    assert f"packing factor {factor:.3f}: 20 sequences a step" in caplog.text
    steps = plan_steps(pack_depths(packs), 20).num_steps
    assert f"an epoch is {steps} steps, the run {3 * steps}; a model learns little in so few" in caplog.text
    long = TrainingArguments(str(tmp_path), max_steps=100, use_cpu=True)
    caplog.clear()
    with caplog.at_level("INFO"):
        set_batch(config, long, packs)
    assert f"an epoch is {steps} steps, the run 100" in caplog.text and "learns little" not in caplog.text


def test_packs_with_cohorts_are_trained_on_in_rounds(folders, tmp_path, caplog):
    """A step stays in a round, and each of 8 lanes gives its share of the sequences."""
    text, prepared, packed = str(folders["folder"] / "text.txt"), str(tmp_path / "prepared"), str(tmp_path / "packed")
    prepare = ["prepare", "--text", text, "--output", prepared, "--objective", "none", "--max_sequence_length", "64"]
    assert bert_pretrain([*prepare, "--tokenizer", folders["tokenizer"]]) == 0
    cohorts = ["--overlong", "split", "--cohort", "64", "--packer", "lpfhp", "--max-sequences-per-pack", "4"]
    assert pack_dataset([prepared, packed, "--max-sequence-length", "32", *cohorts]) == 0
    packs = load_from_disk(packed)["train"]
    plan = plan_rounds(packs, 64, ranks=1)
    training = TrainingArguments(str(tmp_path), per_device_train_batch_size=16, use_cpu=True)
    assert set_batch(PretrainConfig(dataset="", tokenizer="", sequences_per_step=64), training, packs) == 64
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps >= plan.most_packs
    assert train(folders | {"packed": packed}, tmp_path / "bert", "--sequences_per_step", "64") == 0
    assert f"of {plan.num_steps} steps in an epoch" in caplog.text
    config = PretrainConfig(dataset="", tokenizer="", sequences_per_step=20)
    with pytest.raises(ValueError, match="sequences_per_step=20 cannot be shared out to the 8 lanes of the cohorts"):
        set_batch(config, TrainingArguments(str(tmp_path), use_cpu=True), packs)


@pytest.mark.parametrize("policy", ["sequences", "packs"])
def test_passes_are_sized_in_tokens_or_in_packs(folders, tmp_path, policy):
    """4 packs of 64 slots, said in either way; 300 tokens have room for 4."""
    packs, results = load_from_disk(folders["packed"])["train"], []
    steps: dict = {"sequences_per_step": 20} if policy == "sequences" else {}
    for tokens, packs_given in ((300, {}), (None, {"per_device_train_batch_size": 4})):
        config = PretrainConfig("", "", batch_policy=policy, tokens_per_pass=tokens, **steps)
        training = TrainingArguments(str(tmp_path), use_cpu=True, **packs_given)
        of_step = set_batch(config, training, packs)
        results.append((of_step, training.per_device_train_batch_size, training.gradient_accumulation_steps))
    assert results[0] == results[1] and results[0][1] <= 4


def test_with_the_policy_of_packs_arguments_stay_and_the_factor_is_told(folders, tmp_path, caplog):
    packs = load_from_disk(folders["packed"])["train"]
    factor = packed_info(packs).num_sequences / packed_info(packs).num_packs
    config = PretrainConfig(dataset="", tokenizer="", batch_policy="packs")
    training = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, use_cpu=True
    )
    with caplog.at_level("INFO"):
        assert set_batch(config, training, packs) is None
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (3, 2)
    assert "6 packs a step" in caplog.text and f"hold about {6 * factor:.1f} sequences" in caplog.text


@pytest.mark.parametrize("reassign", ["True", "False"])
def test_steps_have_as_many_sequences_in_all_epochs(folders, tmp_path, caplog, reassign):
    """12 in each step but the last of an epoch; each epoch has all sequences. The last log counts them."""
    caplog.set_level("INFO")
    whole = ["--max_steps", "-1", "--num_train_epochs", "3", "--per_device_train_batch_size", "4"]
    assert train(folders, tmp_path / "bert", *whole, "--reassign", reassign) == 0
    info = packed_info(load_from_disk(folders["packed"])["train"])
    steps = -(-info.num_sequences // 12)
    history = json.loads((tmp_path / "bert" / "trainer_state.json").read_text())["log_history"]
    seen = [entry["sequences_seen"] for entry in history if "loss" in entry]
    assert np.diff([0, *seen]).tolist() == ([12] * (steps - 1) + [(info.num_sequences - 1) % 12 + 1]) * 3
    last = [entry for entry in history if "loss" in entry][-1]
    assert last["packing_factor"] == pytest.approx(info.num_sequences / info.num_packs)
    assert last["packs_per_step"] == pytest.approx(info.num_packs / steps)
    said = f"{3 * info.num_sequences:,} sequences, {3 * info.num_tokens:,} real tokens; realised packing factor"
    assert f"seen by step {3 * steps}: {said} {info.num_sequences / info.num_packs:.3f}" in caplog.text


def test_packs_that_were_left_out_are_not_counted(folders, tmp_path, capsys):
    """packed_info tells what was packed, of a selection, too."""
    splits = load_from_disk(folders["packed"])
    some = splits["train"].select(range(5, 25))
    lengths = [length for pack in some["sequence_lengths"] for length in pack]
    depth = max(map(len, some["sequence_lengths"]))
    DatasetDict({"train": some, "test": splits["test"]}).save_to_disk(tmp_path / "some")
    counted = counted_info(load_from_disk(tmp_path / "some")["train"])
    facts = counted.num_packs, counted.num_sequences, counted.num_tokens, counted.max_depth
    assert facts == (20, len(lengths), sum(lengths), depth)
    assert packed_info(some).num_packs > 20 and counted_info(splits["train"]) == packed_info(splits["train"])
    chosen = folders | {"packed": str(tmp_path / "some")}
    assert train(chosen, tmp_path / "bert", "--max_steps", "1") == 0
    card = (tmp_path / "bert" / "README.md").read_text(encoding="utf-8")
    assert f"`some`: {len(lengths):,} sequences of {sum(lengths):,} tokens" in card and "into 20 packs" in card
    assert train(chosen, tmp_path / "other", "--sequences_per_step", str(len(lengths) + 1)) == 2
    assert f"is more than the {len(lengths)} sequences of the training split" in capsys.readouterr().err


def test_steps_of_packs(folders, tmp_path):
    """--batch-policy and --batch_policy; a step then holds as many sequences as its packs."""
    options = [
        "--sequences_per_step",
        "256",
        "--per_device_train_batch_size",
        "3",
        "--gradient_accumulation_steps",
        "2",
    ]
    assert train(folders, tmp_path / "bert", *options, "--batch-policy", "packs", "--beta_power", "True") == 0
    history = json.loads((tmp_path / "bert" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["packs_per_step"] for entry in steps] == [6, 6, 6, 6]
    assert steps[-1]["sequences_seen"] == pytest.approx(24 * steps[-1]["packing_factor"])
    assert train(folders, tmp_path / "other", *options, "--batch_policy", "packs") == 0


def test_resuming_is_of_the_same_run_and_from_where_it_is_told(folders, tmp_path, capsys):
    assert train(folders, tmp_path / "first", "--save_steps", "2") == 0
    assert train(folders, tmp_path / "first", "--mlm_probability", "0.2") == 2
    assert "was trained with --mlm-probability 0.15, now it is 0.2" in capsys.readouterr().err
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    assert train(folders, tmp_path / "second", "--resume_from_checkpoint", checkpoint) == 0
    history = json.loads((tmp_path / "second" / "trainer_state.json").read_text())["log_history"]
    unbroken = json.loads((tmp_path / "first" / "trainer_state.json").read_text())["log_history"]
    seen = [[(e["step"], e["sequences_seen"]) for e in h if "loss" in e] for h in (history, unbroken)]
    assert seen[0] == seen[1] and len(seen[0]) == 4
    assert train(folders, tmp_path / "third", "--resume_from_checkpoint", "nowhere") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gradient_accumulation_steps", "2"], "--gradient-accumulation-steps 2 follows from --sequences-per-step"),
        (["--attention", "nothing"], "unknown attention 'nothing'"),
        (["--attention", "locl"], "unknown attention 'locl'; did you mean 'local'?; choose from"),
        (["--mlm_loss", "pack"], "unknown mlm_loss 'pack'"),
        (["--mlm_loss", "tokn"], "unknown mlm_loss 'tokn'; did you mean 'token'?; choose from sequence, token"),
        (["--num_attention_heads", "3"], "--hidden-size 16 must be a multiple of --num-attention-heads 3"),
        (["--sequences_per_step", "0"], "--sequences-per-step 0 must be"),
        (["--sequences_per_step", "1"], "--sequences-per-step 1 is less than the"),
        (["--batch_policy", "packs"], "--sequences-per-step 12 is for --batch-policy sequences"),
        (["--batch_policy", "tokens"], "unknown batch_policy 'tokens'"),
        (["--num_attention_heads", "0"], "--num-attention-heads 0 must be a whole number, at least 1"),
        (["--auto_find_batch_size", "True"], "--auto-find-batch-size would change"),
        (["--per_device_train_batch_size", "0"], "--per-device-train-batch-size 0 must be a whole number, at least 1"),
        (["--tokens_per_pass", "63"], "--tokens-per-pass 63 is less than the 64 token slots of one pack"),
        (
            ["--tokens_per_pass", "640", "--per_device_train_batch_size", "4"],
            "--tokens-per-pass 640 is 10 packs of 64 token slots, but --per-device-train-batch-size 4 disagrees; leave",
        ),
        (["--sequences_per_step", "3000"], "--sequences-per-step 3000 is more than the "),
        (["--fp16"], "--fp16 True needs a GPU"),
        (["--include_num_input_tokens_seen", "some"], "choose from all, non_padding, no"),
        (["--metric_for_best_model", "foo"], "--metric-for-best-model foo is no metric of evaluation; choose from "),
    ],
)
def test_bad_options_are_one_clear_line(folders, tmp_path, capsys, options, message):
    assert train(folders, tmp_path / "bert", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bert-pretrain train: ") and message in error
    assert not (tmp_path / "bert").exists()


def test_a_dataset_that_was_not_packed_is_refused(folders, tmp_path, capsys):
    assert train(folders | {"packed": folders["prepared"]}, tmp_path / "bert") == 2
    assert "was not packed" in capsys.readouterr().err


def test_packs_in_parquet_or_at_a_url_train_the_same(folders, tmp_path):
    packs = {
        "arrow": folders["packed"],
        "parquet": str(tmp_path / "parquet"),
        "url": "memory://test_packs_in_parquet_or_at_a_url/packed",
    }
    options = ["--max-sequence-length", "64"]
    assert pack_dataset([folders["prepared"], packs["parquet"], *options, "--format", "parquet"]) == 0
    assert pack_dataset([folders["prepared"], packs["url"], *options]) == 0
    weights = {}
    for name, packed in packs.items():
        assert train(folders | {"packed": packed}, tmp_path / name, "--max_steps", "2") == 0
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["arrow"] == weights["parquet"] == weights["url"]


def test_a_checkpoint_that_does_not_fit_is_refused(folders, tmp_path, capsys):
    from pretraining_models import make_config
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    BertForPreTraining(make_config()).save_pretrained(tmp_path / "words")
    assert train(folders, tmp_path / "bert", "--model", str(tmp_path / "words")) == 2
    vocabulary = len(AutoTokenizer.from_pretrained(folders["tokenizer"]))
    assert f"vocabulary of 60, the tokenizer one of {vocabulary}" in capsys.readouterr().err
    short = make_config()
    short.vocab_size = vocabulary
    BertForPreTraining(short).save_pretrained(tmp_path / "short")
    assert train(folders, tmp_path / "bert", "--model", str(tmp_path / "short")) == 2
    assert "has 48 positions, but the longest sequence of" in capsys.readouterr().err
    DistilBertModel(DistilBertConfig(n_layers=1, dim=8, n_heads=1, hidden_dim=8)).save_pretrained(tmp_path / "other")
    assert train(folders, tmp_path / "bert", "--model", str(tmp_path / "other")) == 2
    assert "is a distilbert model; only BERT checkpoints" in capsys.readouterr().err


def test_help(capsys):
    assert bert_pretrain([]) == 2 and bert_pretrain(["--help"]) == 0
    assert "bert-pretrain prepare" in capsys.readouterr().out
    assert bert_pretrain(["fly"]) == 2
    assert "unknown command 'fly'; choose from prepare, train" in capsys.readouterr().err
