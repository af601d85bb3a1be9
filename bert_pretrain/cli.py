"""The command `bert-pretrain`: `prepare` makes sequences of text, `train` pretrains on their packs."""

import sys
from dataclasses import fields

from bert_pretrain.failure import say_end, say_failure
from bert_pretrain.options import names_in_source, parse, read_config_file, refuse_unknown, split_config_file

USAGE = """usage: bert-pretrain prepare [CONFIG.yaml] --text FILE_OR_FOLDER … --output FOLDER [options]
       bert-pretrain train [CONFIG.yaml] --dataset PACKED --tokenizer FOLDER --output_dir FOLDER [options]

  prepare   text -> tokenizer and tokenized sequences (sentence pairs for NSP), ready for pack-dataset
  train     packed dataset -> a BERT checkpoint that transformers opens; run again, it goes on from the last
            checkpoint in its output_dir

Options may stand in a YAML or JSON file; flags beside it win.
bert-pretrain prepare --help and bert-pretrain train --help list the options.
"""

PREPARE_OPTIONS = (("bert_pretrain.prepare.prepare", "PrepareConfig"),)
TRAIN_OPTIONS = (("bert_pretrain.train.config", "PretrainConfig"), ("transformers.training_args", "TrainingArguments"))

MODEL = [
    *("model", "attention", "attention_options", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob"),
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
"""Of transformers' hundred options those that a pretraining run may want; --help shows them before the others."""


def help_groups(own: list[str], others: list[str]) -> dict[str, list[str]]:
    """Which options `train --help` shows under which title; an option is shown where it is named first."""
    return {
        "data, objective and steps": [name for name in own if name not in MODEL],
        "model": MODEL,
        "how to optimize (transformers.TrainingArguments)": OPTIMIZATION,
        "logs, evaluation and checkpoints (transformers.TrainingArguments)": LOGGING,
        "the other TrainingArguments": others,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 for bad input, which is said in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"prepare": _prepare, "train": _train}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(f"bert-pretrain: unknown command {arguments[0]!r}; choose from {list(commands)}", file=sys.stderr)
        return 2
    try:
        commands[arguments[0]](arguments[1:])
    except (ValueError, OSError, ImportError) as error:
        say_failure(f"bert-pretrain {arguments[0]}: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        say_end(f"bert-pretrain {arguments[0]}: interrupted{interrupt}")
        return 130
    except SystemExit as stop:  # --help, or a signal after which a checkpoint was saved
        if isinstance(stop.code, int) and stop.code > 128:
            say_end(f"bert-pretrain {arguments[0]}: {stop}")
            return stop.code
        raise
    return 0


def _read(sources, arguments: list[str]) -> tuple[str | None, dict, list[str]]:
    """The config file, its values, and the flags; typos are refused before anything slow is imported."""
    config_file, flags = split_config_file(arguments)
    values = {} if config_file is None else read_config_file(config_file)
    names = [names_in_source(module, class_name) for module, class_name in sources]
    if None not in names:
        refuse_unknown(set().union(*names), config_file, values, flags)
    return config_file, values, flags


def _prepare(arguments: list[str]) -> None:
    given = _read(PREPARE_OPTIONS, arguments)

    from bert_pretrain.prepare.prepare import PrepareConfig, prepare
    from bert_pretrain.prepare.summary import summary_table

    everything = {"options": [field.name for field in fields(PrepareConfig)]}
    (config,) = parse((PrepareConfig,), "bert-pretrain prepare", *given, groups=everything)
    _, summary = prepare(config, progress=True)
    print(summary_table(summary))


def _train(arguments: list[str]) -> None:
    given = _read(TRAIN_OPTIONS, arguments)

    import logging
    import os

    from huggingface_hub.utils import logging as hub_logging
    from transformers import TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils.logging import disable_progress_bar

    from bert_pretrain.train.config import PretrainConfig
    from bert_pretrain.train.pretrain import pretrain

    # What goes wrong on one rank goes wrong there; what goes right is said once.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    hub_logging.disable_propagation()  # it has a handler of its own, and would say everything twice
    own, others = ([field.name for field in fields(options)] for options in (PretrainConfig, TrainingArguments))
    groups = help_groups(own, others)
    config, training = parse((PretrainConfig, TrainingArguments), "bert-pretrain train", *given, groups=groups)
    if training.disable_tqdm:
        disable_progress_bar()  # transformers' own bars, of saving, too
    try:
        pretrain(config, training)
    except KeyboardInterrupt:
        last = get_last_checkpoint(training.output_dir) if os.path.isdir(training.output_dir) else None
        there = f"; {last} stays, and the same command goes on from it" if last else " before a checkpoint was saved"
        raise KeyboardInterrupt(there) from None


if __name__ == "__main__":
    sys.exit(main())
