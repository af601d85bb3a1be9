"""Packs -> batches, layouts and packed training: what stands between `packing` and a model.

collator         DataCollatorWithPacking: packs -> the tensors of one batch
rows             rows in whatever form -> flat arrays
mask_rows        flat arrays -> masked tokens and labels
masking, words   which tokens to predict, how to corrupt them, and which of them make a word
columns          names of columns, and values of labels
layout           PackLayout, SlotLayout: where the sequences of a batch lie
chunks           sequences cut into chunks, for attention over blocks
length_groups    sequences of like length side by side
views            views that a layout makes once; where parts begin; values widened for sums
losses           the terms of every loss, and what divides them
vocabulary       which ids a tokenizer's tokens have
isolate          isolate_sequences: a stock encoder honours sequence_ids
probe            check_isolation: what leaks between sequences, and by how much
device/          to_device: a batch goes to a GPU with its layout
isolation/       how an encoder keeps sequences apart
heads/           packed task heads of stock models
training/        PackedTrainer, and a callback for a plain Trainer

Import the names in __all__ from here.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # "as": type checkers take these for public names
    from collate.collator import DataCollatorWithPacking as DataCollatorWithPacking
    from collate.device.transfer import to_device as to_device
    from collate.heads import packed_predictions as packed_predictions
    from collate.heads import task_for as task_for
    from collate.isolate import isolate_sequences as isolate_sequences
    from collate.isolation.positions import position_ids_start as position_ids_start
    from collate.layout import PackLayout as PackLayout
    from collate.probe import check_isolation as check_isolation
    from collate.training.trainer import PackedTrainer as PackedTrainer

# torch and transformers take seconds to import: whoever prepares text, or wants a layout, should not wait for them.
_MODULES = {
    "DataCollatorWithPacking": "collate.collator",
    "PackLayout": "collate.layout",
    "PackedTrainer": "collate.training.trainer",
    "check_isolation": "collate.probe",
    "isolate_sequences": "collate.isolate",
    "packed_predictions": "collate.heads",
    "position_ids_start": "collate.isolation.positions",
    "task_for": "collate.heads",
    "to_device": "collate.device.transfer",
}
__all__ = sorted(_MODULES)


if not TYPE_CHECKING:  # else a checker would take any name for one of ours

    def __getattr__(name: str):
        if name not in _MODULES:
            raise AttributeError(f"module 'collate' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
