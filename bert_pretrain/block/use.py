"""use_block: give a BERT another block."""

import inspect
from typing import Any, TypeVar

from torch import nn
from transformers import BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertEncoder

from bert_pretrain.attention import AttentionHead, use_attention
from bert_pretrain.attention.head import initialize_head
from bert_pretrain.block.config import check_type, set_block
from bert_pretrain.block.encoder import BlockEncoder, refuse_checkpointing
from bert_pretrain.block.layer import BlockLayer
from bert_pretrain.block.norms import BlockLayerNorm, BlockRMSNorm
from bert_pretrain.block.options import BlockOptions
from bert_pretrain.block.placements import PLACEMENTS
from collate.isolation.handover import base_of, encoder_of, pretrained_model
from collate.isolation.hook import attach_hook, is_isolated

DEFAULT_ATTENTION = "sdpa"
ASKS = "use_block"

Model = TypeVar("Model", bound=PreTrainedModel)


def use_block(model: Model, **options: Any) -> Model:
    """Give the layers of a BERT another block, and return the model.

        use_block(model, placement="pre", norm="rms")

    model: PackedBertForPreTraining, or BertModel and the task models around it. Call these with `sequence_ids=` (B, L)
        afterwards. They get attention heads, too: sdpa, where `use_attention` has not chosen others.
    options: of BlockOptions; what is left out stays as it is. Without any, and with stock BERT's, nothing changes.

    Parameters stay, with their names and values. New ones are the weights of a norm at the end, and whatever another
    feed-forward needs. initial="deep" shrinks the output projections: choose it for new models only.
    Two choices drop what they have no place for. norm="rms" drops the biases of norms, which start at 0 if norm="layer"
    comes back. share_layers drops every layer but the first.
    The config keeps the options in one entry, `block`. What is saved is then no stock checkpoint: load it by AutoModel
    and its like, once `bert_pretrain.block` is imported; AutoModelForPreTraining wants `bert_pretrain.model`.

    Raises ValueError for an unknown name or option, for a model of another kind, for a placement without a norm at
    the end where that norm is trained, and for a config of a class of your own, which stock BERT would load. The model
    then stays as it is.
    """
    place_block(model, BlockOptions.of(_entry(model)).with_changes(options))
    encoder = _bert(model).encoder
    if isinstance(encoder, BlockEncoder) and not hasattr(encoder.passes[0].attention.self, "attention_head"):
        attention = getattr(model.config, "packed_attention", None) or DEFAULT_ATTENTION
        use_attention(model, attention, **(getattr(model.config, "packed_attention_options", None) or {}))
    return model


def place_block(model: PreTrainedModel, options: BlockOptions, is_new: bool = False) -> None:
    """`use_block` without attention heads, and with all options; for a model that attaches its heads later.

    is_new: draw what another feed-forward adds. Otherwise it starts so that the model computes what it did, if it can.
    """
    base = _bert(model)
    before = base.encoder
    is_placed = isinstance(before, BlockEncoder)
    if options == (before.options if is_placed else BlockOptions()):
        return
    if is_placed:
        _check_what_goes(before, options)
    check_type(model.config, options)
    if any(layer.gradient_checkpointing for layer in before.layer):
        refuse_checkpointing(options)
    takes_ids = "sequence_ids" in inspect.signature(model.forward).parameters
    if not is_placed and not takes_ids and not is_isolated(model):
        attach_hook(encoder_of(model, ASKS))  # positions that begin again in each sequence
    shrinks = options.initial != (before.options.initial if is_placed else BlockOptions.initial)
    base.encoder = BlockEncoder(model.config, before, options).train(before.training)
    base.encoder.is_shrunk = not shrinks
    for module in base.encoder.modules() if is_new else ():
        if _draws_itself(module):
            module.reset_parameters()
    base.encoder.shrink_outputs()
    for part in (model, base):
        names = set(part._no_split_modules or ()) - {"BertLayer"}
        part._no_split_modules = names | {BlockLayer.__name__}
    set_block(model.config, options)


def _check_what_goes(before: BlockEncoder, options: BlockOptions) -> None:
    """Raise ValueError for options that part shared layers, or have no place for a trained norm at the end."""
    if before.options.share_layers and not options.share_layers:
        raise ValueError("share_layers=False cannot part layers that are one; make the model anew")
    if PLACEMENTS[options.placement].has_final_norm or not before.placement.has_final_norm:
        return
    start = {"weight": 1, "bias": 0}
    trained = [name for name, x in before.LayerNorm.named_parameters() if not x.is_meta and (x != start[name]).any()]
    if trained:
        raise ValueError(
            f"placement={options.placement!r} has no norm at the end, and would drop the trained {trained[0]} of that "
            f"of placement={before.options.placement!r}; keep the placement, or make the model anew"
        )


def initialize_block(model: PreTrainedModel) -> None:
    """Draw what a checkpoint lacks of attention heads and feed-forwards; call it where a model initializes weights."""
    for owner in model.modules():
        for module in owner.children():
            if isinstance(module, AttentionHead) or _draws_itself(module):
                initialize_head(module, owner)
    for module in model.modules():
        if isinstance(module, BlockEncoder):
            module.shrink_outputs()


def _draws_itself(module: nn.Module) -> bool:
    """Whether a module of this folder draws its weights, and not transformers."""
    is_ours = type(module).__module__.startswith(f"{__package__}.")
    return is_ours and hasattr(module, "reset_parameters") and not isinstance(module, BlockLayerNorm | BlockRMSNorm)


def _bert(model: PreTrainedModel) -> Any:
    """The BertModel that has the encoder. Raises ValueError for a model of another kind."""
    if not isinstance(model, PreTrainedModel):
        inner = pretrained_model(model, ASKS)
        raise ValueError(
            f"{ASKS} got a {type(model).__name__} around a {type(inner).__name__}, which may hold its parameters "
            "already; give the model its block before it is wrapped"
        )
    base = base_of(pretrained_model(model, ASKS))
    config: Any = model.config
    if not isinstance(base, BertModel) or not isinstance(base.encoder, BertEncoder | BlockEncoder):
        raise ValueError(
            f"{type(model).__name__} ({config.model_type}) has no encoder of BERT's layers; {ASKS} takes "
            "PackedBertForPreTraining, BertModel and the task models around it"
        )
    if config.is_decoder or config.add_cross_attention:
        raise ValueError(
            f"{type(model).__name__} is a decoder, and blocks are for encoders; set is_decoder=False and "
            "add_cross_attention=False"
        )
    return base


def _entry(model: PreTrainedModel) -> dict[str, Any] | None:
    encoder = _bert(model).encoder
    return encoder.options.changed if isinstance(encoder, BlockEncoder) else None
