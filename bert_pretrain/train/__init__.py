"""One pretraining run.

pretrain       the run, read from top to bottom
config         PretrainConfig: what a run is configured with
checks         what cannot be meant, refused before a model is built
new_model      configuration + vocabulary -> model
gpu            what the command chooses on a GPU where the user says nothing
batch          what an optimizer step holds
optimizer      which optimizer, and LAMB
trainer        PretrainTrainer
metrics        tokens per second, FLOPs, memory, waiting
console        the lines that a run prints
card           the model card
hub            what goes wrong on the way to the hub
run_record     what a run is, as JSON: options, and what its inputs hold
resume         which checkpoint a run resumes, and whether it is one of the same run

Others import `pretrain`, `PretrainConfig` and `PretrainTrainer`.
"""
