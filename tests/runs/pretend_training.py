"""Training on the GPU that pretend_cuda pretends: what each step waits for."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import stock_runs
import tiny_runs
from pretend_cuda import PretendCuda, per_line
from transformers.trainer_callback import CallbackHandler

STEPS, LOGGED = 6, 5
"""Steps of a run, and the first that logs."""


@contextmanager
def pretend_training() -> Iterator[PretendCuda]:
    """PretendCuda whose waits know their step. To step k belongs what follows its beginning: k's passes, the optimizer,
    the log, and the packs of step k + 1."""
    begin = CallbackHandler.on_step_begin

    with PretendCuda() as gpu:

        def on_step_begin(self, args, state, control):
            gpu.step = state.global_step + 1
            return begin(self, args, state, control)

        with patch.object(CallbackHandler, "on_step_begin", on_step_begin):
            yield gpu


def command(folders: dict[str, str], output, **options) -> PretendCuda:
    """`bert-pretrain train` with evaluation at the end. folders: of tiny_runs.make_folders."""
    shape: dict = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    lengths: dict = {"max_steps": STEPS, "logging_steps": LOGGED, "use_cpu": None}
    with pretend_training() as gpu:
        assert tiny_runs.train(folders, output, **shape | lengths | options) == 0
    return gpu


def stock(head: str, **options) -> PretendCuda:
    """PackedTrainer with a stock BERT and the task head of this name in stock_runs.

    logging_nan_inf_filter, which is on by default, looks at the loss in each pass: Trainer waits for the device there.
    """
    settings: dict = {"max_steps": STEPS, "logging_steps": LOGGED, "num_train_epochs": STEPS, "bf16": True}
    settings |= {"optim": "adamw_torch_fused", "max_grad_norm": 1.0, "include_num_input_tokens_seen": "no"}
    settings |= {
        "logging_nan_inf_filter": False,
        "use_cpu": False,
        "dataloader_pin_memory": True,
        "per_device_train_batch_size": 4,
    }
    data = {"train_dataset": stock_runs.make_packs(head), "data_collator": stock_runs.make_collator(head)}
    model = stock_runs.make_model(head).float()
    with pretend_training() as gpu, stock_runs.make_trainer(model, **data | settings | options) as trainer:
        trainer.train()
    return gpu


def waits_of_step(gpu: PretendCuda, step: int) -> Counter[str]:
    return per_line([wait for wait in gpu.waits if wait.step == step])
