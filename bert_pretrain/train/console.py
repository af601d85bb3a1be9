"""What a run prints: one aligned line for each log, under a heading that says the units once.

                        MLM loss MLM loss       NSP (major-      tokens
        step   loss    /seq.   /token …  accuracy    ity) …        /s …
train     80 7.1203   6.4310   6.4281      0.6900 (0.7100)     17,442
eval      80 7.0020   6.3120   6.3300      0.7100 (0.7152)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from bert_pretrain.objective import pair_columns
from collate.training.hooks import overrides_callback


@dataclass(frozen=True)
class Measure:
    """One metric: its heading in two lines, its name in the logs, and how it is written."""

    title: str
    unit: str
    key: str
    form: str = "{:.4f}"
    least: int = 6
    """Characters that the largest numbers need."""

    @property
    def width(self) -> int:
        return max(len(self.title), len(self.unit), len(self.form.format(0.0)), self.least)

    def text(self, logs: Mapping[str, Any]) -> str:
        return self.form.format(logs[self.key]) if self.key in logs else ""


MEASURES = (
    Measure("", "epoch", "epoch", "{:.2f}"),
    Measure("", "loss", "loss"),
    Measure("MLM loss", "/seq.", "mlm_loss_per_sequence"),
    Measure("MLM loss", "/token", "mlm_loss_per_token"),
    Measure("MLM acc.", "/seq.", "mlm_accuracy_per_sequence"),
    Measure("MLM acc.", "/token", "mlm_accuracy_per_token"),
    *(
        column
        for pair in pair_columns()
        for column in (
            Measure(f"{pair.upper()}", "accuracy", f"{pair}_accuracy"),
            Measure("(major-", "ity)", f"{pair}_majority", "({:.4f})"),
        )
    ),
    Measure("gradient", "norm", "grad_norm", "{:.3f}"),
    Measure("learning", "rate", "learning_rate", "{:.2e}"),
    Measure("sequences", "seen", "sequences_seen", "{:,.0f}", 11),
    Measure("seq.", "/s", "sequences_per_second", "{:,.1f}", 8),
    Measure("tokens", "/s", "tokens_per_second", "{:,.0f}", 9),
    Measure("packing", "eff.", "packing_efficiency"),
    Measure("model", "TFLOP/s", "model_tflops", "{:.3g}"),
    Measure("TFLOP/s but", "attention's", "model_tflops_without_attention", "{:.3g}"),
    Measure("", "MFU", "mfu", "{:.3f}"),
    Measure("memory", "GiB", "peak_memory_gib", "{:.2f}"),
    Measure("data", "wait", "data_wait_share", "{:.1%}"),
)


def _duration(seconds: float) -> str:
    """3725.0 -> 1 h 2 min 5 s"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number or unit == "s")


@overrides_callback
class LinesCallback(TrainerCallback):
    """Logs -> lines, on the first rank alone. A heading comes first, and again when a log has other columns."""

    columns: tuple[Measure, ...] = ()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for line in self.lines(logs, state.global_step):
                self.write(line)

    def lines(self, logs: Mapping[str, Any], step: int) -> list[str]:
        if "train_runtime" in logs:
            return [f"trained to step {step} in {_duration(logs['train_runtime'])}"]
        name = "train"
        if any(key.startswith("eval_") for key in logs):
            name, logs = "eval", {key.removeprefix("eval_"): value for key, value in logs.items()}
        present = tuple(column for column in MEASURES if column.key in logs)
        lines = []
        if not set(present) <= set(self.columns):
            self.columns = present
            lines = [
                f"{'':12}" + "".join(f" {column.title:>{column.width}}" for column in present),
                f"{'step':>12}" + "".join(f" {column.unit:>{column.width}}" for column in present),
            ]
        numbers = "".join(f" {column.text(logs):>{column.width}}" for column in self.columns)
        return [*lines, f"{name:5}{step:>7,}{numbers}".rstrip()]

    def write(self, line: str) -> None:
        print(line, flush=True)


class LinesAboveBar(LinesCallback, ProgressCallback):
    """Trainer's progress bar, with the lines above it instead of dictionaries."""

    def write(self, line: str) -> None:
        if self.training_bar is None:
            super().write(line)
        else:
            self.training_bar.write(line)
