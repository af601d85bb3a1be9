"""One pretraining run.

pretrain       the run, read from top to bottom
config         what a run is configured with
checks         what cannot be meant, refused before a model is built
new_model      configuration + vocabulary -> model
batch          what an optimizer step holds
counted        sequences, packs and tokens of a dataset
optimizer      optimizer, schedule and batch size
lamb           LAMB
trainer        PretrainTrainer
metrics        tokens per second, FLOPs, memory, waiting
console        the lines that a run prints
card           the model card
hub            what goes wrong on the way to the hub
resume         which checkpoint a run resumes
run_record     what a run was configured with
contents       what the inputs of a run hold
"""
