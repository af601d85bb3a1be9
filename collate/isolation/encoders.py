"""Which encoders keep packed sequences apart once they are isolated, which cannot, and why, by their type and config.

`isolate_sequences` refuses those that are known to leak before anything runs, and tries out those that are unknown.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from collate.isolation.handover import base_of, named_parameters, pretrained_model, task_obstacle, wrapper_obstacle

SUPPORTED = (
    *("albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert"),
    *("gte", "jina_embeddings_v3", "modernbert", "nomic_bert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types that are exact on packs: tests/collate/isolation runs each against its sequences alone."""

_OWN_ATTENTION = "it computes attention itself and never calls the attention interface"
REFUSED = {
    "big_bird": f"in attention: {_OWN_ATTENTION}",
    "canine": "in attention: its windows and its downsampling run over neighbouring characters of the row",
    "convbert": "in attention: its convolutions run over neighbouring tokens of the row",
    "deberta": f"in attention: {_OWN_ATTENTION}",
    "deberta-v2": f"in attention: {_OWN_ATTENTION}",
    "esm": "in the embeddings: they read a mask of the row, and its token dropout the share of mask tokens in the row",
    "flaubert": f"in attention: {_OWN_ATTENTION}",
    "fnet": "in the Fourier transform that it has in place of attention: it mixes all tokens of the row",
    "funnel": "in its pooling: it merges neighbouring tokens of the row",
    "longformer": f"in attention: {_OWN_ATTENTION}, with windows over the row",
    "megatron-bert": f"in attention: {_OWN_ATTENTION}",
    "mobilebert": "in the embeddings: its trigrams mix each token with its neighbours in the row",
    "mpnet": f"in attention: {_OWN_ATTENTION}",
    "mra": f"in attention: {_OWN_ATTENTION}, in blocks of the row",
    "nystromformer": "in attention: its landmarks are means over the row, and its convolutions run over it",
    "reformer": "in attention: it sorts the tokens of the row into chunks",
    "roformer": f"in attention: {_OWN_ATTENTION}",
    "ultrabert": "in attention: one mask would replace its sliding windows, and it takes no mask per layer type",
    "xlm": f"in attention: {_OWN_ATTENTION}",
    "xlnet": f"in attention: {_OWN_ATTENTION}, with distances over the row",
    "yoso": "in attention: it hashes the tokens of the row together",
}
"""Where these leak, and why. Some would obey a 4-D mask, but their task models drop sequence_ids silently."""

CURE = f"take an encoder of {list(SUPPORTED)}"


def refuse_unfit(model: nn.Module, asks: str, may_be: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a model that no hook can isolate, with the reason and the cure.

    may_be: kinds of obstacle that are allowed, such as "causal" and "leaks".
    """
    for kind, reason in obstacles(model, asks):
        if kind not in may_be:
            raise ValueError(reason)


def obstacles(model: nn.Module, asks: str) -> Iterator[tuple[str, str]]:
    """(kind, reason and cure) of all that is known to keep a model from being isolated."""
    inner = pretrained_model(model, asks)
    encoder, config = base_of(inner), inner.config
    name, kind, arguments = type(inner).__name__, config.model_type, named_parameters(encoder)
    if "input_ids" not in arguments:
        taken = getattr(encoder, "main_input_name", "input_ids")
        taken = taken if taken != "input_ids" else ", ".join(arguments)
        yield "input", f"{name} takes no input_ids, only {taken}; {asks} is for encoders of tokens"
    if getattr(config, "is_encoder_decoder", False):
        yield "encoder-decoder", f"{name} is an encoder-decoder ({kind}); {asks} is for encoders alone: {CURE}"
    elif any(getattr(config, option, False) for option in ("is_decoder", "add_cross_attention")):
        yield (
            "causal",
            f"{kind} is configured as a decoder; {asks} is for encoders: set is_decoder=False and "
            "add_cross_attention=False",
        )
    elif _is_causal(encoder):
        yield "causal", is_a_decoder(kind, asks)
    if kind in REFUSED:
        yield "leaks", f"{kind} leaks between packed sequences {REFUSED[kind]}; use one of {list(SUPPORTED)}"
    if any(type(module).__module__.startswith("torch.ao.nn.quantized.dynamic") for module in encoder.modules()):
        yield (
            "leaks",
            f"{name} is quantized dynamically: one scale for all activations of a batch leaks between "
            "packed sequences; give the model as it was before it was quantized",
        )
    if (obstacle := task_obstacle(inner)) is not None:
        yield "leaks", obstacle
    if (obstacle := wrapper_obstacle(model, asks)) is not None:
        yield "wrapper", obstacle


def is_a_decoder(kind: str, asks: str) -> str:
    """The reason why a model whose tokens see one direction is refused."""
    return (
        f"{kind} is a decoder: its tokens see only those before them; {asks} is for encoders, whose tokens see "
        f"both directions: {CURE}"
    )


def _is_causal(encoder: PreTrainedModel) -> bool:
    """Whether tokens see only what comes before them: the layers say it, or else the type."""
    if getattr(encoder.config, "is_causal", None) is False:
        return False
    said = [value for module in encoder.modules() if isinstance(value := getattr(module, "is_causal", None), bool)]
    if said:
        return any(said)
    kind = encoder.config.model_type
    has_both = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in SUPPORTED or kind in REFUSED
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_both
