"""PackedTrainer, and what it needs to know about Trainer and about packs.

trainer          PackedTrainer: the task, the denominators of a step, the log
predictions      its evaluation and prediction, over batches and ranks
own_loss         its loss: the task's, a model's own, or an overridden compute_loss
dataloaders      its dataloaders: which packs they read, and in which order
resume           it saves whole checkpoints; a resumed run ends as the uninterrupted one
checkpoints      folders of checkpoints that are complete or not there
hooks            what we override of Trainer: one list, checked against the installed transformers
order            which packs meet in an optimizer step
rounds           the same for packs with cohorts: a document's pieces in order, on one rank
progress         what training has seen
plain_trainer    the callback for a plain Trainer
refused          TrainingArguments that packs cannot honour
agreement        ranks that must agree, and one run at a time in an output_dir
signals          a signal saves a checkpoint and ends the run

Others import PackedTrainer from collate; bert_pretrain also takes hooks, agreement, checkpoints, order and signals.
"""
