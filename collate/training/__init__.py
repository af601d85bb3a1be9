"""PackedTrainer, and what it needs to know about Trainer and about packs.

trainer          PackedTrainer: the task, the loss of a step, the log
predictions      its evaluation and prediction, over batches and ranks
dataloaders      its dataloaders: which packs they read, and in which order
resume           a resumed run ends as the uninterrupted one
checkpoints      checkpoints that are complete or not there
hooks            what we override of Trainer: one list, checked against the installed transformers
order            which packs meet in an optimizer step
progress         what training has seen
own_loss         a model's own loss, or an overridden compute_loss
plain_trainer    the callback for a plain Trainer
refused          TrainingArguments that packs cannot honour
agreement        ranks that must agree, and one run at a time in an output_dir
signals          a signal saves a checkpoint and ends the run
workers          a dataloader worker that was killed

Others import PackedTrainer from collate; bert_pretrain also takes hooks, agreement, checkpoints, order and signals.
"""
