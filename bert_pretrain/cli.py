"""The command `bert-pretrain`: `prepare` makes sequences of text, `train` pretrains on their packs."""

import sys

USAGE = """usage: bert-pretrain prepare --text FILE_OR_FOLDER … --output FOLDER [options]
       bert-pretrain train --dataset PACKED --tokenizer FOLDER --output_dir FOLDER [options]

  prepare   text -> tokenizer and tokenized sequences (sentence pairs for NSP), ready for pack-dataset
  train     packed dataset -> a BERT checkpoint that transformers opens; run again, it goes on from the last
            checkpoint in its output_dir

bert-pretrain prepare --help and bert-pretrain train --help list the options.
"""


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
    except (ValueError, OSError) as error:
        print(f"bert-pretrain {arguments[0]}: {error}", file=sys.stderr)
        return 2
    return 0


def _prepare(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from bert_pretrain.prepare import PrepareConfig, prepare, summary_table

    (config,) = HfArgumentParser(PrepareConfig, prog="bert-pretrain prepare").parse_args_into_dataclasses(arguments)
    _, summary = prepare(config)
    print(summary_table(summary))


def _train(arguments: list[str]) -> None:
    import logging

    from transformers import HfArgumentParser, TrainingArguments

    from bert_pretrain.config import PretrainConfig
    from bert_pretrain.pretrain import pretrain

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    parser = HfArgumentParser((PretrainConfig, TrainingArguments), prog="bert-pretrain train")
    config, training = parser.parse_args_into_dataclasses(arguments)
    pretrain(config, training)


if __name__ == "__main__":
    sys.exit(main())
