"""What our classes override, call or set of transformers' Trainer: one list, checked when such a class is made.

Python never says that an override overrides nothing. After a rename upstream our method would be dead code, and
training would silently go wrong. So each class here and in bert_pretrain/train that overrides any has a decorator:

    @overrides_trainer
    class ResumesExactly(Trainer): ...

Trainer's private methods are in the list because it has no public place for what they do. AfterStepCallback has
no decorator: attention heads load without Trainer. A test checks its event, too.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import transformers
from transformers import Trainer, TrainerCallback

Class = TypeVar("Class", bound=type)

FIRST, TESTED, NEXT = "5.17", "5.23", "5.24"
"""The versions of transformers: the first supported, the newest that the tests ran with, and the one after it."""

TRAINER_METHODS: Mapping[str, str] = {
    # models and arguments
    "_hp_search_setup": "trial",
    "_prepare_inputs": "inputs",
    "_wrap_model": "model training",
    "call_model_init": "trial",
    "compute_loss_context_manager": "",
    "hyperparameter_search": "hp_space compute_objective",
    # data
    "_get_collator_with_removed_columns": "data_collator description",
    "_get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "_get_train_sampler": "train_dataset",
    "_remove_unused_columns": "dataset description",
    "get_batch_samples": "epoch_iterator num_batches device",
    "num_examples": "dataloader",
    # training
    "_get_num_items_in_batch": "batch_samples device",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_run_epoch": "model epoch train_dataloader",
    "_track_num_input_tokens": "inputs",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "floating_point_ops": "inputs",
    "log": "logs start_time",
    "train": "resume_from_checkpoint trial",
    "training_step": "model inputs num_items_in_batch",
    # evaluation
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "predict": "test_dataset ignore_keys metric_key_prefix",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    # checkpoints
    "_get_output_dir": "trial",
    "_issue_warnings_after_load": "load_result",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_load_scaler": "checkpoint",
    "_save_checkpoint": "model trial",
    "save_model": "output_dir _internal_call",
    # the hub
    "_finish_current_push": "",
    "_push_from_checkpoint": "checkpoint_folder",
    "create_model_card": "language license tags model_name",
    "init_hf_repo": "token",
    "push_to_hub": "commit_message blocking token revision",
}
"""Methods of Trainer that we override or call, and the first parameters of each. Others may follow."""

TRAINER_ATTRIBUTES = (
    *("_globalstep_last_logged", "_total_loss_scalar", "_tr_loss", "_train_batch_size"),
    *("loss_is_scaled_for_ga", "model_accepts_loss_kwargs"),
)
"""What we read or set of a Trainer, and its own methods use."""

CALLBACK_METHODS: Mapping[str, str] = {
    f"on_{event}": "args state control"
    for event in (
        *("train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "substep_end", "step_end"),
        *("pre_optimizer_step", "optimizer_step", "prediction_step", "evaluate", "predict", "log", "save"),
    )
}
"""Events that our callbacks listen to."""


def overrides_trainer(part: Class) -> Class:
    """Decorator of a Trainer, or of a part of one: refuse it if the installed Trainer would not call what it overrides.

    Raises ImportError for a Trainer that lacks a method or attribute in the lists, or whose method has other
    parameters; TypeError for an override that is not in the list.
    """
    return checked(part, Trainer, TRAINER_METHODS, TRAINER_ATTRIBUTES)


def overrides_callback(part: Class) -> Class:
    """The same for a TrainerCallback."""
    return checked(part, TrainerCallback, CALLBACK_METHODS)


def checked(part: Class, base: type, methods: Mapping[str, str], attributes: Sequence[str] = ()) -> Class:
    """`part`, which overrides only listed methods of `base`, all of which `base` has as they are listed."""
    for name, value in vars(part).items():
        is_override = hasattr(base, name) or name.startswith("on_")
        if inspect.isfunction(value) and not name.startswith("__") and is_override and name not in methods:
            raise TypeError(
                f"{part.__name__}.{name} overrides a method of {base.__name__} that collate/training/hooks.py does not "
                "list; add it there, with its parameters"
            )
    _check_methods(base, tuple(methods.items()))
    _check_attributes(base, tuple(attributes))
    return part


@cache
def _check_methods(base: type, methods: Sequence[tuple[str, str]]) -> None:
    for name, parameters in methods:
        expected, method = parameters.split(), getattr(base, name, None)
        wanted = f"{base.__name__}.{name}({', '.join(expected)})"
        if not callable(method):
            raise _unsupported(wanted, "no such method")
        found = list(inspect.signature(method).parameters)[1:]
        if found[: len(expected)] != expected:
            raise _unsupported(wanted, f"parameters ({', '.join(found)})")


@cache
def _check_attributes(base: type, attributes: Sequence[str]) -> None:
    source = Path(inspect.getfile(base)).read_text(encoding="utf-8")
    for name in attributes:
        if not re.search(rf"\bself\.{name}\b", source):
            raise _unsupported(f"{base.__name__}.{name}", f"no method of {base.__name__} that uses it")


def _unsupported(expected: str, found: str) -> ImportError:
    return ImportError(
        f"transformers {transformers.__version__} does not fit: expected {expected}, found {found}. dataset-packing "
        f"supports transformers {FIRST} to {TESTED}; pip install 'transformers>={FIRST},<{NEXT}', or install a newer "
        "dataset-packing"
    )
