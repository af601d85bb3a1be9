"""The command `bert-pretrain`: `prepare` turns text into sequences, `train` pretrains on their packs.

A command that cannot continue ends with one line, once, for any number of processes:

alone                   the line on stderr
rank 0 under torchrun   the line in torchrun's report, at its end; printed, it would stand above torchrun's traceback
other ranks             nothing at first: most faults meet all ranks, and torchrun ends the others after rank 0. A rank
                        that still runs after PATIENCE has a fault of its own, and prints the line.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import version

from bert_pretrain.options import named, parse, read_arguments
from bert_pretrain.stand_in import stand_in
from packing.files.collector import few_collections
from packing.files.errors import notes, said_in_command, suggestion

USAGE = """usage: bert-pretrain prepare [CONFIG.yaml] --text FILE_OR_FOLDER … --output FOLDER [options]
       bert-pretrain train [CONFIG.yaml] --dataset PACKED --tokenizer FOLDER --output-dir FOLDER [options]

  prepare   text -> tokenizer and tokenized sequences (sentence pairs for NSP), ready for pack-dataset
  train     packed dataset -> a BERT checkpoint that transformers opens; the same command again resumes from the
            last checkpoint in its output_dir

examples:
  bert-pretrain prepare --text corpus --output prepared
  pack-dataset prepared packed
  bert-pretrain train --dataset packed --tokenizer prepared/tokenizer --output-dir bert --max-steps 1000
  bert-pretrain train run.yaml --seed 1            options from a file; flags beside it win

bert-pretrain prepare --help and bert-pretrain train --help list the options, bert-pretrain --version says the version.
"""

MODEL = [
    *("model", "attention", "attention_options", "block", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "max_position_embeddings", "hidden_dropout_prob"),
    "attention_probs_dropout_prob",
]
OPTIMIZATION = [
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "bf16", "fp16", "activation_checkpointing", "gradient_checkpointing"),
    *("torch_compile", "seed", "use_cpu"),
]
LOGGING = [
    *("logging_steps", "report_to", "run_name", "disable_tqdm", "eval_strategy", "eval_steps"),
    *("per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint"),
    *("dataloader_num_workers", "push_to_hub", "hub_model_id"),
]
"""The options of transformers that a pretraining run may want; --help shows them before the hundred others."""

PATIENCE = 20
"""Seconds in which rank 0 finds the same fault and torchrun ends the other ranks."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 for bad input, with one line on stderr that says why."""
    if arguments is None:
        with few_collections() if sys.argv[1:2] == ["prepare"] else nullcontext():
            return main(sys.argv[1:])
    commands = {"prepare": _prepare, "train": _train}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        print("bert-pretrain", version("dataset-packing"))
        return 0
    if name not in commands:
        near = suggestion(name, commands)
        print(f"bert-pretrain: unknown command {name!r}{near}; choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        commands[name](arguments[1:])
    except (ValueError, OSError, ImportError) as error:
        _say_failure(f"bert-pretrain {name}: {said_in_command(error)}")
        return 2
    except KeyboardInterrupt as interrupt:
        _say_end(f"bert-pretrain {name}: {'; '.join([f'interrupted{interrupt}', *notes(interrupt)])}")
        return 130
    except SystemExit as stop:  # --help, or a signal after which a checkpoint was saved
        if isinstance(stop.code, int) and stop.code > 128:
            _say_end(f"bert-pretrain {name}: {stop}")
            return stop.code
        raise
    return 0


def _say_failure(message: str) -> None:
    """Report a fault. Call it last: torchrun may end other ranks than the first while they wait here."""
    if rank := int(os.environ.get("RANK", "0")):
        time.sleep(PATIENCE)
        message = f"rank {rank}: {message}"
    # What torchrun reads after a failure: https://docs.pytorch.org/docs/stable/elastic/errors.html
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is None:
        print(message, file=sys.stderr)
        return
    with open(report, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)


def _say_end(message: str) -> None:
    """Report an end that was asked for, which all ranks reach together: only the first prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def _prepare(arguments: list[str]) -> None:
    given = read_arguments(arguments)

    from bert_pretrain.prepare.prepare import PrepareConfig, prepare
    from bert_pretrain.prepare.summary import summary_table

    everything = {"options": [field.name for field in fields(PrepareConfig)]}
    (config,) = parse((PrepareConfig,), "bert-pretrain prepare", *given, groups=everything)
    _, summary = prepare(config, progress=sys.stderr.isatty())
    print(summary_table(summary))


def _train(arguments: list[str]) -> None:
    from bert_pretrain.train.config import PretrainConfig

    given = read_arguments(arguments)
    quick = stand_in("transformers.training_args", "TrainingArguments")
    if quick is not None:  # --help and mistakes are answered before torch is imported
        _parse_training((PretrainConfig, quick), given)

    import logging

    from huggingface_hub.utils import logging as hub_logging
    from transformers import TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils.logging import disable_progress_bar

    from bert_pretrain.train.pretrain import pretrain

    # Every rank reports its own faults; only the first reports progress.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    hub_logging.disable_propagation()  # it has a handler of its own: each line would appear twice
    config, training = _parse_training((PretrainConfig, TrainingArguments), given)
    if training.disable_tqdm or not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own bars, for saving, too
    try:
        pretrain(config, training, said=named(given))
    except KeyboardInterrupt:
        last = get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
        there = f"; {last} stays, and the same command resumes from it" if last else " before a checkpoint was saved"
        raise KeyboardInterrupt(there) from None


def _parse_training(options: tuple[type, type], given: tuple[str | None, dict, list[str]]) -> tuple:
    own, others = ([field.name for field in fields(each)] for each in options)
    groups = {  # an option is shown where it is named first
        "data, objective and steps": [name for name in own if name not in MODEL],
        "model": MODEL,
        "how to optimize (transformers.TrainingArguments)": OPTIMIZATION,
        "logs, evaluation and checkpoints (transformers.TrainingArguments)": LOGGING,
        "the other TrainingArguments": others,
    }
    return parse(options, "bert-pretrain train", *given, groups=groups)


if __name__ == "__main__":
    sys.exit(main())
