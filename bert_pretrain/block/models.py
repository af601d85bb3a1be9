"""Stock BERT with the block that its config names. Importing this tells transformers' Auto classes of them.

    AutoModelForMaskedLM.from_pretrained("folder")      a BlockBertForMaskedLM

PackedBertForPreTraining with a block is BlockBertForPreTraining: see bert_pretrain.model.
"""

from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig

from bert_pretrain.block.config import BlockBertConfig
from bert_pretrain.block.options import BlockOptions
from bert_pretrain.block.use import initialize_block, place_block, use_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Stock
else:
    _Stock = object


class _WithBlock(_Stock):
    """Before a stock class: the model gets its block and its attention heads when it is built."""

    def __init__(self, config: BlockBertConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        place_block(self, BlockOptions.of(getattr(config, "block", None)), is_new=True)
        use_block(self)  # attention heads

    def initialize_weights(self) -> None:
        super().initialize_weights()
        initialize_block(self)


class BlockBertModel(_WithBlock, transformers.BertModel):
    config: BlockBertConfig


class BlockBertForMaskedLM(_WithBlock, transformers.BertForMaskedLM):
    config: BlockBertConfig


class BlockBertForNextSentencePrediction(_WithBlock, transformers.BertForNextSentencePrediction):
    config: BlockBertConfig


class BlockBertForSequenceClassification(_WithBlock, transformers.BertForSequenceClassification):
    config: BlockBertConfig


class BlockBertForMultipleChoice(_WithBlock, transformers.BertForMultipleChoice):
    config: BlockBertConfig


class BlockBertForTokenClassification(_WithBlock, transformers.BertForTokenClassification):
    config: BlockBertConfig


class BlockBertForQuestionAnswering(_WithBlock, transformers.BertForQuestionAnswering):
    config: BlockBertConfig


AutoConfig.register(BlockBertConfig.model_type, BlockBertConfig, exist_ok=True)
transformers.AutoModel.register(BlockBertConfig, BlockBertModel, exist_ok=True)
transformers.AutoModelForMaskedLM.register(BlockBertConfig, BlockBertForMaskedLM, exist_ok=True)
transformers.AutoModelForNextSentencePrediction.register(
    BlockBertConfig, BlockBertForNextSentencePrediction, exist_ok=True
)
transformers.AutoModelForSequenceClassification.register(
    BlockBertConfig, BlockBertForSequenceClassification, exist_ok=True
)
transformers.AutoModelForMultipleChoice.register(BlockBertConfig, BlockBertForMultipleChoice, exist_ok=True)
transformers.AutoModelForTokenClassification.register(BlockBertConfig, BlockBertForTokenClassification, exist_ok=True)
transformers.AutoModelForQuestionAnswering.register(BlockBertConfig, BlockBertForQuestionAnswering, exist_ok=True)
