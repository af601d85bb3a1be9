"""Published weights of other models that have one of these blocks, under the names of a BERT with that block.

config, weights = published_weights(RobertaPreLayerNormForMaskedLM.from_pretrained(…))
model = PackedBertForPreTraining(config)
model.load_state_dict(weights, strict=False)

RoBERTa-PreLayerNorm   placement "pre"     the whole model: embeddings, layers, the norm at the end, MLM head
ALBERT                 share_layers        the layer; its embeddings are of another width
"""

import re
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from bert_pretrain.block.config import BlockBertConfig
from collate.isolation.positions import position_ids_start
from packing.files.errors import check_known

POSITIONS = "bert.embeddings.position_embeddings.weight"
SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "initializer_range", "layer_norm_eps"),
    "pad_token_id",
)


class Published(NamedTuple):
    """block: the options. names: patterns of tensors' names, and what becomes of them; in turn. kept: which to keep."""

    block: dict[str, Any]
    names: dict[str, str]
    kept: str


PUBLISHED = {
    "roberta-prelayernorm": Published(
        {"placement": "pre"},
        {
            r"^(?!roberta_prelayernorm\.|lm_head\.)": "bert.",
            r"^roberta_prelayernorm\.": "bert.",
            r"^bert\.LayerNorm\.": "bert.encoder.LayerNorm.",
            r"\.attention\.LayerNorm\.": ".attention.output.LayerNorm.",
            r"\.intermediate\.LayerNorm\.": ".output.LayerNorm.",
            r"^lm_head\.dense\.": "cls.predictions.transform.dense.",
            r"^lm_head\.layer_norm\.": "cls.predictions.transform.LayerNorm.",
            r"^lm_head\.": "cls.predictions.",
        },
        kept="",
    ),
    "albert": Published(
        {"share_layers": True},
        {
            r"^.*encoder\.albert_layer_groups\.0\.albert_layers\.0\.": "bert.encoder.layer.0.",
            r"\.attention\.(query|key|value)\.": r".attention.self.\1.",
            r"\.attention\.(dense|LayerNorm)\.": r".attention.output.\1.",
            r"\.ffn\.": ".intermediate.dense.",
            r"\.ffn_output\.": ".output.dense.",
            r"\.full_layer_layer_norm\.": ".output.LayerNorm.",
        },
        kept="bert.encoder.layer.",
    ),
}
"""Model type -> what is published of it."""


def published_weights(published: PreTrainedModel) -> tuple[BlockBertConfig, dict[str, Tensor]]:
    """The config of a BERT with the same block, and the tensors by its names.

    Raises ValueError for a model of another type, and for an ALBERT with more than one layer.
    """
    config: Any = published.config
    check_known("type of published weights", config.model_type, PUBLISHED)
    rules = PUBLISHED[config.model_type]
    for name in ("num_hidden_groups", "inner_group_num"):
        if getattr(config, name, 1) != 1:
            raise ValueError(f"{config.model_type} with {name}={getattr(config, name)} shares no single layer; take 1")
    start = position_ids_start(config)  # rows before it belong to no position
    weights = {}
    for name, tensor in published.state_dict().items():
        for pattern, new in rules.names.items():
            name = re.sub(pattern, new, name)
        if name.startswith(rules.kept):
            weights[name] = tensor[start:] if name == POSITIONS else tensor
    shared = {name: getattr(config, name) for name in SHARED}
    positions = config.max_position_embeddings - start
    made: Any = BlockBertConfig(max_position_embeddings=positions, **shared)
    made.block = rules.block
    return made, weights
