"""Attention heads: pluggable attention mechanisms, every one of which keeps packed sequences apart.

The contract. An attention head is a module

    head = ATTENTION[name](num_heads=, head_width=, max_sequence_length=, layer_index=, **options)
    context_THK = head(query_THK, key_THK, value_THK, layout, dropout=0.0)

over the T real tokens of a batch: padding is not there, so it can neither leak nor cost. A sequence's context and
gradients are those of the sequence alone, whatever else lies in its pack. A head scales its scores by 1/sqrt(K) itself;
one that cannot honour attention dropout says so with `supports_dropout = False` and is refused where dropout is on.

`use_attention` attaches heads to the layers of a transformers encoder, each a submodule of the layer that owns it. The
encoder's attention implementation becomes "packed_attention", which hands the layer's queries, keys and values on.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from bert_pretrain.attention.sdpa import SdpaAttention
from collate.layout import PackLayout

ATTENTION: dict[str, Callable[..., nn.Module]] = {"sdpa": SdpaAttention}

IMPLEMENTATION = "packed_attention"


def use_attention(model: PreTrainedModel, attention: str | Callable | Sequence, **options) -> PreTrainedModel:
    """Give every layer of a BERT encoder an attention head, and return the model.

    attention: a name in ATTENTION, a callable that builds a head, or a list of these, one per layer.
    options: go to every head. Names and options are kept in the config, so a reload finds them; a callable cannot be
    kept, so the config names it and a reload refuses, rather than to fall back on something else.

    After this, call the model with `sequence_ids=` (B, L); each layer then attends within sequences only.
    Raises ValueError for an unknown name, a list of another length than the layers, or an unsupported encoder.
    """
    layers = [module for module in model.modules() if isinstance(module, BertSelfAttention)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no BERT self-attention layer; use_attention supports BERT encoders"
        )
    choices = [attention] * len(layers) if isinstance(attention, str) or callable(attention) else list(attention)
    if len(choices) != len(layers):
        raise ValueError(
            f"got {len(choices)} attention heads for {len(layers)} layers; give one per layer, or one name"
        )
    for index, (layer, choice) in enumerate(zip(layers, choices, strict=True)):
        head = _builder(choice)(
            num_heads=layer.num_attention_heads,
            head_width=layer.attention_head_size,
            max_sequence_length=model.config.max_position_embeddings,
            layer_index=index,
            **options,
        )
        dropout = model.config.attention_probs_dropout_prob
        if dropout and not getattr(head, "supports_dropout", True):
            raise ValueError(
                f"{type(head).__name__} cannot drop attention weights, but attention_probs_dropout_prob={dropout}; "
                "set it to 0 in the model's config"
            )
        layer.attention_head = head.to(layer.query.weight)
    names = [choice if isinstance(choice, str) else f"{_name(choice)} (a callable)" for choice in choices]
    model.config.packed_attention = names[0] if len(set(names)) == 1 else names
    model.config.packed_attention_options = options
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PackLayout | None = None,
    sequence_ids: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """transformers' attention function: hand a layer's queries, keys and values to its attention head.

    Two callers. Our model runs on real tokens only: query (1, H, T, K) and their `layout`. A stock model runs on padded
    rows: query (B, H, L, K) and `sequence_ids` (B, L). Returns the context in transformers' order, (1, T, H, K) or
    (B, L, H, K).
    """
    if layout is not None:
        heads = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return module.attention_head(*heads, layout, dropout=dropout)[None], None
    if sequence_ids is None:
        raise ValueError(
            "packed_attention needs to know which tokens belong together: call the model with sequence_ids=, "
            "1, 2, 3… within each row and 0 on padding"
        )
    layout = PackLayout(sequence_ids)
    heads = (layout.unpad(x.transpose(1, 2)) for x in (query, key, value))
    return layout.pad(module.attention_head(*heads, layout, dropout=dropout)), None


def _name(choice: Callable) -> str:
    return getattr(choice, "__name__", type(choice).__name__)


def _builder(choice: str | Callable) -> Callable:
    if callable(choice):
        return choice
    if choice not in ATTENTION:
        raise ValueError(f"unknown attention {choice!r}; choose from {sorted(ATTENTION)} or give a callable")
    return ATTENTION[choice]
