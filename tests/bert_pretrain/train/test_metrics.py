"""What a run reports of its speed: counted FLOPs, a clock for training only, one line per log."""

import itertools
import re
import sys

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from tiny_runs import history, make_folders, train, train_options
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils.logging import enable_progress_bar

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.train import metrics
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.console import LinesCallback
from bert_pretrain.train.metrics import Meter, ModelFlops, known_peak, peak_flops
from bert_pretrain.train.pretrain import pretrain
from collate import PackLayout, to_device
from collate.layout import SlotLayout
from collate.losses import count_denominators
from collate.training.progress import count_packs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("metrics"))


def make_model(attention="sdpa", **options):
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        packed_attention=attention,
        packed_attention_options=options,
    )
    torch.manual_seed(0)
    return PackedBertForPreTraining(config)


# -- FLOPs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "options"), [("sdpa", {}), ("persistent", {"vectors": 5})])
def test_model_flops_are_those_that_torch_counts(monkeypatch, attention, options):
    """Every product of a forward and backward pass; lengths are multiples of 16, so sdpa's groups have no padding."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)  # groups: torch does not count its CPU kernel's products
    model, lengths = make_model(attention, **options), [16, 48, 32, 16]
    sequence_ids = torch.zeros(2, 64, dtype=torch.int32)
    sequence_ids[0, :16], sequence_ids[0, 16:64] = 1, 2
    sequence_ids[1, :32], sequence_ids[1, 32:48] = 1, 2
    labels = torch.full((2, 64), -100)
    labels[0, [3, 20, 21]], labels[1, [5, 40]] = 7, 8
    batch = {
        "input_ids": torch.randint(5, 50, (2, 64)),
        "sequence_ids": sequence_ids,
        "labels": labels,
        "cls_positions": torch.tensor([[0, 16], [0, 32]]),
        "next_sentence_label": torch.tensor([[0, 1], [1, 1]]),
    }
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).loss.backward()
    sequences, tokens, slots, squares = count_packs(batch).tolist()
    assert (sequences, tokens, slots, squares) == (4, 112, 128, sum(n * n for n in lengths))
    pooler_and_pairs = 6 * sequences * (32 * 32 + 32 * 2)  # left out, as one token in a sequence
    assert counter.get_total_flops() == ModelFlops(model)(tokens, squares, 5) + pooler_and_pairs


def test_padding_slots_are_no_work():
    """Counts by slots, for the FLOPs of a step and for the loss: see collate.layout."""
    ids = torch.tensor([[1, 1, 2, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    batch = {"sequence_ids": ids, "labels": torch.where(ids > 0, 7, -100), "cls_positions": torch.full((3, 4), -1)}
    sent = to_device({name: x.clone() for name, x in batch.items()}, "cpu", by_slots=True)
    assert isinstance(PackLayout.of(sent["sequence_ids"]), SlotLayout)
    assert count_packs(sent).tolist() == count_packs(batch).tolist() == [3, 8, 10, 4 + 1 + 25]
    assert count_denominators(sent).tolist() == count_denominators(batch).tolist()


def test_empty_packs_have_no_slots():
    sequence_ids = torch.tensor([[1, 1, 1, 2], [0, 0, 0, 0]], dtype=torch.int32)
    assert count_packs({"sequence_ids": sequence_ids}).tolist() == [2, 4, 4, 10]


def test_other_attention_has_no_quadratic_term_and_no_mfu():
    full, local = ModelFlops(make_model()), ModelFlops(make_model("local", window=4))
    assert full.attention and not local.attention
    assert full(100, 2000, 7) - local(100, 2000, 7) == 12 * 3 * 32 * 2000
    own = ModelFlops(make_model("linformer"))  # its own weights cost something else
    assert own(100, 2000, 7) == local(100, 2000, 7)
    meter = Meter(make_model("local", window=4), torch.device("cpu"), peak=1e12)
    meter.run()
    meter.add_step(torch.tensor([2, 100, 128, 2000]), torch.tensor(7))
    logs = meter.read()
    assert "mfu" not in logs and "model_tflops" not in logs and logs["model_tflops_without_attention"] > 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(name, teraflops):
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_a_peak_that_is_given_counts():
    assert known_peak(torch.device("cpu"), None) is None
    assert known_peak(torch.device("cpu"), 2.5) == 2.5e12


# -- the clock ----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_rates_are_of_the_time_that_training_ran(clock):
    model = make_model()
    meter = Meter(model, torch.device("cpu"), peak=1e9)

    def slow_batches():
        for batch in ("first", "second"):
            clock.now += 1.0
            yield batch

    meter.run()
    assert list(meter.waiting(slow_batches())) == ["first", "second"]
    meter.add_step(torch.tensor([4, 96, 128, 3000]), torch.tensor(10))
    clock.now += 4.0
    with meter.stopped():
        clock.now += 100.0
    clock.now += 2.0
    logs = meter.read(num_processes=2)
    flops = ModelFlops(model)(96, 3000, 10)
    assert logs.pop("peak_memory_gib") > 0.01
    assert logs == pytest.approx(
        {
            "tokens_per_second": 96 / 8,
            "sequences_per_second": 4 / 8,
            "model_tflops": flops / 8 / 2 / 1e12,
            "mfu": flops / 8 / 2 / 1e9,
            "data_wait_share": 2 / 8,
        }
    )
    clock.now += 50.0
    assert meter.read() == {}  # between a log and the next step nothing runs
    meter.run()
    clock.now += 1.0
    meter.add_step(torch.tensor([1, 10, 64, 100]), torch.tensor(2))
    assert meter.read()["tokens_per_second"] == 10


def test_of_several_ranks_the_slowest_and_largest_count(clock):
    meter = Meter(make_model(), torch.device("cpu"))
    meter.run()
    clock.now += 1.0
    meter.add_step(torch.tensor([1, 10, 64, 100]), torch.tensor(2))

    def gather(own):
        return torch.cat([own, torch.tensor([[2.0, 1.0, 2.0**40]], dtype=torch.float64)])

    logs = meter.read(2, gather)
    assert logs["tokens_per_second"] == 5 and logs["peak_memory_gib"] == 1024 and logs["data_wait_share"] == 0.25
    assert "mfu" not in logs


class PassTime(TrainerCallback):
    """A training step takes 1 s, a batch of evaluation 1000 s."""

    def __init__(self, clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.now += 1.0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.clock.now += 1000.0


def test_logs_of_a_run_leave_out_evaluation_and_saving_also_after_a_resume(folders, tmp_path, clock, monkeypatch):
    from bert_pretrain.train import pretrain as module
    from bert_pretrain.train.trainer import PretrainTrainer

    class TimedTrainer(PretrainTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(PassTime(clock))

        def _save_optimizer_and_scheduler(self, output_dir):
            clock.now += 10_000.0
            super()._save_optimizer_and_scheduler(output_dir)

    monkeypatch.setattr(module, "PretrainTrainer", TimedTrainer)
    often = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 3}
    assert train(folders, tmp_path / "bert", **often, max_steps=5) == 0
    assert train(folders, tmp_path / "bert", **often, max_steps=9) == 0
    logs = [entry for entry in history(tmp_path / "bert") if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 5, 6, 8, 9]  # each run's last step, too
    for before, entry in itertools.pairwise(logs):
        steps = entry["step"] - before["step"]
        tokens = entry["tokens_seen"] - before["tokens_seen"]
        sequences = entry["sequences_seen"] - before["sequences_seen"]
        assert entry["tokens_per_second"] == pytest.approx(tokens / steps)
        assert entry["sequences_per_second"] == pytest.approx(sequences / steps)
        if entry["step"] == 4:  # the epoch ends within the last interval
            assert entry["packing_efficiency"] == pytest.approx(tokens / (2 * entry["packs_per_step"] * 64))
        assert 0 < entry["packing_efficiency"] <= 1 and entry["model_tflops"] > 0 and entry["peak_memory_gib"] > 0
        assert entry["data_wait_share"] == 0 and "mfu" not in entry


def test_mfu_is_logged_where_the_peak_is_given(folders, tmp_path):
    assert train(folders, tmp_path / "bert", peak_tflops=0.5, max_steps=2) == 0
    for entry in (entry for entry in history(tmp_path / "bert") if "loss" in entry):
        assert entry["mfu"] == pytest.approx(entry["model_tflops"] / 0.5)


# -- held-out evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlm_loss", ["sequence", "token"])
def test_evaluation_is_that_of_the_unpacked_sequences_at_a_rate_of_its_own(folders, tmp_path, mlm_loss):
    """In float64: the packed test split of `train`, and the rows of `prepare`, one sequence a row."""
    options = train_options(folders, tmp_path / "bert", mlm_probability=0.4, mlm_loss=mlm_loss, max_steps=1)
    config_names = PretrainConfig.__dataclass_fields__.keys()
    config = PretrainConfig(**{k: v for k, v in options.items() if k in config_names})
    training = TrainingArguments(**{k: v for k, v in options.items() if k not in config_names})
    trainer = pretrain(config, training)
    trainer.model.double()
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    packed = trainer.evaluate()
    again = trainer.evaluate()
    rows = load_from_disk(folders["prepared"])["test"]
    trainer.eval_data_collator.unpacked_rows = "keep"
    unpacked = trainer.evaluate(rows.add_column("sequence_indices", list(range(len(rows)))))
    names = [name for name in packed if not name.endswith(("runtime", "per_second"))]
    assert {"eval_loss", "eval_mlm_accuracy_per_token", "eval_nsp_accuracy", "eval_nsp_majority"} <= set(names)
    assert packed["eval_sequences"] == len(rows) and packed["eval_tokens"] == sum(map(len, rows["input_ids"]))
    for name in names:
        assert unpacked[name] == pytest.approx(packed[name], rel=1e-10), name
        assert again[name] == packed[name], name
    trainer.eval_data_collator = trainer.data_collator  # the training rate gives something else
    assert abs(trainer.evaluate()["eval_mlm_loss_per_token"] - packed["eval_mlm_loss_per_token"]) > 1e-6


# -- the console --------------------------------------------------------------------------------------------------


def test_lines_are_aligned_and_say_their_units_once():
    lines = LinesCallback().lines
    logs = {"epoch": 0.5, "loss": 7.1203, "learning_rate": 1e-4, "tokens_per_second": 17442.3, "nsp_majority": 0.7}
    first = lines(logs, 80)
    assert len(first) == 3 and "tokens" in first[0] and "/s" in first[1] and first[2].startswith("train     80")
    assert first[2].endswith(" 1.00e-04    17,442") and "(0.7000)" in first[2] and len(first[1]) == len(first[2])
    (second,) = lines(logs | {"loss": 6.5}, 160)
    assert len(second) == len(first[2]) and "6.5000" in second
    (evaluated,) = lines({"eval_loss": 7.0, "eval_runtime": 2.0, "epoch": 0.5}, 160)
    assert evaluated.startswith("eval     160") and evaluated.index("7.0000") == first[2].index("7.1203")
    more = lines(logs | {"mfu": 0.5}, 240)
    assert len(more) == 3 and "MFU" in more[1]
    assert lines({"train_runtime": 3725.0, "train_loss": 1.0}, 240) == ["trained to step 240 in 1 h 2 min 5 s"]


@pytest.mark.parametrize("disable_tqdm", [True, False])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_prints_lines_and_no_dictionaries(folders, tmp_path, capsys, monkeypatch, disable_tqdm, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert train(folders, tmp_path / "bert", disable_tqdm=disable_tqdm, max_steps=2) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.strip()]
    assert [re.split(r"\s+", line.strip())[0] for line in lines] == ["MLM", "step", "train", "train", "trained", "eval"]
    assert "{" not in shown.out and ("2/2" in shown.err) == (is_terminal and not disable_tqdm)


def test_a_redirected_log_holds_lines_alone(folders, tmp_path, capsys):
    """No progress bar of Trainer, evaluation or save leaves carriage returns or blank lines in a file."""
    enable_progress_bar()  # as in a process where nothing has disabled it
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    assert train(folders, tmp_path / "bert", disable_tqdm=False, max_steps=2, **saves) == 0
    for shown in capsys.readouterr():
        assert not set(shown) & {"\r", "\x1b", "█"} and "it/s" not in shown
        assert all(line.strip() for line in shown.splitlines())


def test_a_run_that_diverges_ends_and_spoils_no_checkpoint(folders, tmp_path, capsys):
    """Trainer would log 0 for NaN, continue, and replace the last good checkpoint by a bad one."""
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    assert train(folders, tmp_path / "bert", max_steps=4, learning_rate=1e30, **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "training diverged: the loss is nan at step" in error and "lower learning_rate" in error
    (last,) = (tmp_path / "bert").glob("checkpoint-*")
    assert str(last) in error and not (tmp_path / "bert" / "model.safetensors").exists()
    assert all(torch.isfinite(weights).all() for weights in load_file(last / "model.safetensors").values())


def test_no_checkpoint_between_logs_is_of_a_run_that_diverged(folders, tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 100}
    assert train(folders, tmp_path / "bert", max_steps=4, learning_rate=1e30, **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not finite at step 3" in error and "there is no checkpoint yet" in error
    assert not list((tmp_path / "bert").glob("checkpoint-*"))


@pytest.mark.parametrize(("logging_steps", "steps"), [(500, [4]), (3, [3, 4]), (2, [2, 4])])
def test_the_last_step_is_logged_once(folders, tmp_path, logging_steps, steps):
    assert train(folders, tmp_path / "bert", logging_steps=logging_steps) == 0
    assert [entry["step"] for entry in history(tmp_path / "bert") if "loss" in entry] == steps


def test_logs_count_tokens_and_nothing_by_rows(folders, tmp_path):
    options = {"include_num_input_tokens_seen": "non_padding", "eval_strategy": "steps", "eval_steps": 2}
    assert train(folders, tmp_path / "bert", metric_for_best_model="mlm_loss_per_token", **options) == 0
    log = history(tmp_path / "bert")
    trained = [entry for entry in log if "loss" in entry]
    assert all(entry["num_input_tokens_seen"] == entry["tokens_seen"] > 0 for entry in trained)
    assert any("eval_loss" in entry for entry in log)
    assert not {"total_flos", "eval_steps_per_second"} & {name for entry in log for name in entry}


def test_trainers_own_printer_is_gone(folders, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("transformers' printer was called")

    monkeypatch.setattr(PrinterCallback, "on_log", refuse)
    assert train(folders, tmp_path / "bert", max_steps=1) == 0


def test_tensorboard_has_what_the_log_has(folders, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = {"report_to": "tensorboard", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    assert train(folders, tmp_path / "bert", **options) == 0
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logs = [entry for entry in history(tmp_path / "bert") if "loss" in entry]
    for name in ("mlm_loss_per_sequence", "nsp_accuracy", "nsp_majority", "packing_efficiency", "tokens_seen"):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in logs]
    assert len(events.Scalars("eval/mlm_loss_per_token")) >= 2
