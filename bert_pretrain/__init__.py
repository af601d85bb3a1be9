"""BERT pretraining on packed rows: pairs, model, attention heads, loss and run."""

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
