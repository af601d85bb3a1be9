"""Pretrain BERT on a packed dataset: the run, read from top to bottom."""

import logging
from collections.abc import Collection, Sequence
from copy import copy
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed

from bert_pretrain.moving import AfterStepCallback, moves_after_step
from bert_pretrain.prepare.tokenizer import load_tokenizer
from bert_pretrain.train import checks, gpu
from bert_pretrain.train.batch import set_batch
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.hub import Secret
from bert_pretrain.train.metrics import attends_fully
from bert_pretrain.train.new_model import build_model, longest_sequence, resolve_attention, resolve_shape
from bert_pretrain.train.optimizer import choose_optimizer, freeze_unlearned
from bert_pretrain.train.resume import find_checkpoint, recorded_run
from bert_pretrain.train.run_record import config_record, run_record, write_config_record
from bert_pretrain.train.trainer import PretrainTrainer
from collate import DataCollatorWithPacking
from collate.training.agreement import one_run
from collate.training.checkpoints import RUN_FILE, write_json
from collate.training.signals import SaveOnSignal
from collate.vocabulary import vocabulary_size
from packing import EpochPacks, packed_info

logger = logging.getLogger(__name__)

Callbacks = Sequence[TrainerCallback | type[TrainerCallback]]


def pretrain(
    config: PretrainConfig,
    training: TrainingArguments,
    callbacks: Callbacks = (),
    said: Collection[str] | None = None,
) -> PretrainTrainer:
    """Train BERT on packed data; the loss is counted per sequence. Returns the trainer, its model trained and saved.

        trainer = pretrain(PretrainConfig("packed", "prepared/tokenizer"), TrainingArguments("bert"))

    callbacks: of transformers, beside those of the run. `training` stays as it is; `trainer.args` is a copy of it, with
        what follows from the data, such as the number of passes in a step.
    said: the options that the user named; `bert_pretrain.train.gpu` chooses others on a GPU, and sets torch's flags for
        TF32. None, as from Python: all arguments are meant.

    Resumes from `training.resume_from_checkpoint`, or by itself from the last checkpoint in `training.output_dir`.
    Raises BlockingIOError while another run writes there. SIGTERM and SIGUSR1 save a checkpoint and end with
    SystemExit: see collate.training.signals.
    """
    training = copy(training)  # the run writes what follows from the data into its own
    training.hub_token = training.hub_token and Secret(training.hub_token)
    set_seed(training.seed)
    train, test = checks.for_objective(config, *checks.load_splits(config.dataset))
    checks.check_arguments(training, test, config.dataset)
    with one_run(training, str(training.output_dir)):
        return _pretrain(config, training, callbacks, said, train, test)


def _pretrain(
    config: PretrainConfig,
    training: TrainingArguments,
    callbacks: Callbacks,
    said: Collection[str] | None,
    train: Dataset,
    test: Dataset | None,
) -> PretrainTrainer:
    before = None if said is None else recorded_run(training)
    is_tf32 = bool(training.tf32) if said is None else gpu.choose_precision(training, said, before)
    config = resolve_shape(config, packed_info(train).max_sequence_length)
    config = resolve_attention(config, training)
    tokenizer = load_tokenizer(config.tokenizer)
    splits = [split for split in (train, test) if split is not None]
    for split in splits:
        checks.check_tokenizer(config.dataset, split, config.tokenizer, tokenizer)
    model = build_model(config, vocabulary_size(tokenizer), tokenizer.pad_token_id, longest_sequence(*splits))
    for split in splits:
        checks.check_token_types(config.dataset, split, model.config.type_vocab_size)
    checks.check_stream(model, training)
    objective = checks.check_objective(config, train)
    freeze_unlearned(model, objective)
    slots = packed_info(train).max_sequence_length
    if said is not None:
        config = gpu.choose_passes(config, training, said, before, model, slots)
    output = Path(str(training.output_dir))
    record = config_record(config, training)  # must precede set_batch, which cannot run twice
    if said is not None:
        gpu.choose_loading(config, training, said, slots)
    sequences_per_step = set_batch(config, training, train)
    if training.ddp_find_unused_parameters is None and attends_fully(model):
        training.ddp_find_unused_parameters = False  # even a rank without packs uses all; looking costs time
    run = run_record(config, training, train, tokenizer, test, model, is_tf32) if training.should_save else None
    checkpoint = find_checkpoint(run, training)
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is nothing to pin it for, and torch would warn

    def collator(mlm_probability: float) -> DataCollatorWithPacking:
        return DataCollatorWithPacking(tokenizer, mlm_probability=mlm_probability, seed=training.seed)

    trainer = PretrainTrainer(
        model,
        training,
        train_dataset=EpochPacks(train, training.seed) if config.reassign else train,
        eval_dataset=test,
        sequences_per_step=sequences_per_step,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        data_collator=collator(config.mlm_probability),
        eval_data_collator=collator(config.eval_mlm_probability),
        config=config,
        record=record,
        objective=objective,
        optimizer_cls_and_kwargs=choose_optimizer(config, training, model, train),
    )
    if moves_after_step(model):
        trainer.add_callback(AfterStepCallback())
    if trainer.is_world_process_zero():
        write_config_record(output, record)
    trainer.run_record, trainer.checked_checkpoint = run, checkpoint
    with SaveOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    model.requires_grad_(True)  # so that whoever continues can train all of it
    stop.end_if_received()
    if run is not None and trainer.is_world_process_zero():
        write_json(output / RUN_FILE, run)
    trainer.save_model(_internal_call=True)  # not to the hub yet: its card still lacks the figures of evaluation
    if test is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    trainer.create_model_card()
    logger.info("%s has the model, its tokenizer and its card, README.md", output)
    if training.push_to_hub:
        trainer.push_to_hub()
    return trainer
