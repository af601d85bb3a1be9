"""Pretrain BERT on a packed dataset: the run, read from top to bottom."""

import json
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, load_from_disk
from transformers import TrainingArguments, set_seed

from bert_pretrain.attention.routing import RoutingAttention, RoutingCallback
from bert_pretrain.batch import set_batch
from bert_pretrain.config import CONFIG_FILE, PretrainConfig
from bert_pretrain.new_model import build_model
from bert_pretrain.optimizer import choose_optimizer
from bert_pretrain.objective import for_objective
from bert_pretrain.resume import find_checkpoint, run_record
from bert_pretrain.tokenizer import load_tokenizer
from collate import DataCollatorWithPacking, PackedTrainer
from collate.signals import SaveOnSignal
from packing import packed_info


def pretrain(config: PretrainConfig, training: TrainingArguments) -> PackedTrainer:
    """Train BERT on packed data; the loss is counted per sequence. Returns the trainer, its model trained and saved.

    Goes on from `training.resume_from_checkpoint`, or by itself from the last checkpoint in `training.output_dir`.
    SIGTERM and SIGUSR1 save a checkpoint and end with SystemExit: see collate.signals.
    """
    set_seed(training.seed)
    train, test = for_objective(config, *load_splits(config.dataset))
    tokenizer = load_tokenizer(config.tokenizer)
    model = build_model(config, len(tokenizer), tokenizer.pad_token_id, packed_info(train).max_sequence_length)
    set_batch(config, training, train)
    run = run_record(config, training, train, tokenizer)
    checkpoint = find_checkpoint(run, training)

    trainer = PackedTrainer(
        model,
        training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPacking(tokenizer, mlm_probability=config.mlm_probability, seed=training.seed),
        optimizer_cls_and_kwargs=choose_optimizer(config, training, model, train),
    )
    if any(isinstance(module, RoutingAttention) for module in model.modules()):
        trainer.add_callback(RoutingCallback())
    if trainer.is_world_process_zero():
        record = Path(training.output_dir) / CONFIG_FILE
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    trainer.run_record = run
    with SaveOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    stop.end_if_received()
    trainer.save_model()
    if test is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    return trainer


def load_splits(folder: str) -> tuple[Dataset, Dataset | None]:
    """The packed training split and, where there is one, the test (or validation) split."""
    loaded = load_from_disk(folder)
    if isinstance(loaded, Dataset):
        return loaded, None
    if "train" not in loaded:
        raise ValueError(f"{folder} has no split named train, only {sorted(loaded)}")
    test = loaded.get("test", loaded.get("validation"))
    return loaded["train"], test
