"""BERT pretraining on packs: text to sequences, model, attention heads, and the run.

cli          the command bert-pretrain
options      config files and flags
stand_in     the options of a class that is slow to import
places       folders and names that a user gives
objective    OBJECTIVES: what is learned about sentence pairs, one row each
prepare/     text -> sequences
model        PackedBertForPreTraining
attention/   attention heads: the contract, and ATTENTION
block/       what stands around attention in a layer
moving       buffers that move after an optimizer step
train/       one pretraining run

Others import PackedBertForPreTraining from here, and what attention/ and block/ name.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bert_pretrain.model import PackedBertForPreTraining

__all__ = ["PackedBertForPreTraining"]


if not TYPE_CHECKING:  # else a checker would take any name for one of ours

    def __getattr__(name: str):
        # The model brings transformers with it; preparing text should not wait for that.
        if name != "PackedBertForPreTraining":
            raise AttributeError(f"module 'bert_pretrain' has no attribute {name!r}")
        from bert_pretrain.model import PackedBertForPreTraining

        return PackedBertForPreTraining
