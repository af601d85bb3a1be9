"""BlockBertConfig: the config of a BERT whose block is not stock's.

Its tensors have stock names, so stock BERT would load them and compute nonsense. Hence a model type and architectures
of its own, which transformers' Auto classes refuse; `bert_pretrain.block` registers them.
"""

from typing import Any

from transformers import BertConfig, PreTrainedConfig

from bert_pretrain.block.options import BlockOptions

OWN = "Block"
"""What the names of architectures begin with."""


class BlockBertConfig(BertConfig):
    """BertConfig with an entry `block`: options and values, {"placement": "pre"}."""

    model_type = "block_bert"

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        names = values.get("architectures") or []
        return values | {"architectures": [OWN + name.removeprefix(OWN).removeprefix("Packed") for name in names]}


def check_type(config: PreTrainedConfig, options: BlockOptions) -> None:
    """Raise ValueError for a config whose type would let stock BERT load a model with this block."""
    if options.computes_stock or type(config) is BertConfig or isinstance(config, BlockBertConfig):
        return
    kind = type(config).__name__
    raise ValueError(
        f"a {kind} (model type {config.model_type}) with block={options.changed!r} would be saved as a checkpoint that "
        f"stock BERT loads and misreads; make the model of a BertConfig, or let {kind} inherit from BlockBertConfig"
    )


def set_block(config: PreTrainedConfig, options: BlockOptions) -> None:
    """Write the entry, and let the config be of the type that belongs to it."""
    config.block = options.changed or None
    if type(config) in (BertConfig, BlockBertConfig):
        config.__class__ = BertConfig if options.computes_stock else BlockBertConfig
    if config.block is None:
        del config.block
