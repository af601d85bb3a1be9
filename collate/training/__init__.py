"""PackedTrainer, and what it needs to know about Trainer and about packs.

trainer          PackedTrainer
plain_trainer    the callback for a plain Trainer
order            which packs meet in an optimizer step
own_loss         an overridden compute_loss
predictions      evaluation and prediction over batches and ranks
refused          TrainingArguments that packs cannot honour
checkpoints      checkpoints that are complete or not there
resume           a resumed run ends as the uninterrupted one
agreement        ranks that must agree on what is on the disk
one_run          one run at a time in an output_dir
signals          a signal saves a checkpoint and ends the run
workers          a dataloader worker that was killed
"""
