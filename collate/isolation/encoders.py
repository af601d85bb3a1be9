"""Which models keep packed sequences apart once they are isolated, which cannot, and why: the one table of reasons.

A model is refused by its type or its config, before anything is run. What no line here speaks of is tried out.
"""

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

SUPPORTED = (
    *("albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert"),
    *("gte", "jina_embeddings_v3", "modernbert", "nomic_bert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types that are exact on packed rows: tests/collate/isolation runs each against its sequences alone."""

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
"""Where these leak as they are, and why. (Some happen to add a 4-D float mask to their scores and would obey it, but
nothing promises so, and nothing would tell when it ends.)"""

STARTS_AFTER_PADDING_IDX = (
    *("camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""RoBERTa and its relatives: the first position is padding_idx + 1, and 0-based positions degrade silently."""

CURE = f"take an encoder of {list(SUPPORTED)}"


def position_ids_start(config: PretrainedConfig) -> int:
    """The position of a sequence's first token: 0, or padding_idx + 1 for RoBERTa and its relatives."""
    return config.pad_token_id + 1 if config.model_type in STARTS_AFTER_PADDING_IDX else 0


def pretrained_model(model: nn.Module, asks: str) -> PreTrainedModel:
    """The transformers model itself, or inside what DDP, PEFT or torch.compile wrapped around it.

    asks: the function that needs one, for the error.
    """
    if isinstance(model, type):
        raise ValueError(f"{asks} got the class {model.__name__}; give it a model, {model.__name__}.from_pretrained(…)")
    if not isinstance(model, nn.Module):
        cure = "give it a model"
        if isinstance(getattr(model, "model", None), nn.Module):
            cure = "give it its .model"
        elif isinstance(model, str) or hasattr(model, "__fspath__"):
            cure = f"load the model first, as by AutoModel.from_pretrained({str(model)!r})"
        raise ValueError(f"{asks} got {model!r:.80}, a {type(model).__name__}; {cure}")
    for _, inner in _outermost(model):
        return inner
    raise ValueError(f"{type(model).__name__} holds no transformers model; {asks} needs one")


def refuse_unfit(model: nn.Module, asks: str, may_be: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a model that no hook can isolate, or none can try out, with the reason and the cure.

    may_be: kinds of obstacle that are allowed: "causal", "leaks".
    """
    pretrained_model(model, asks)
    for kind, reason in obstacles(model, asks):
        if kind not in may_be:
            raise ValueError(reason)


def obstacles(model: nn.Module, asks: str) -> Iterator[tuple[str, str]]:
    """(kind, reason and cure) of all that is known beforehand to keep a model from being isolated."""
    inner = pretrained_model(model, asks)
    encoder, config = inner.base_model, inner.config
    kind, arguments = config.model_type, _parameters(encoder)
    if "input_ids" not in arguments:
        taken = getattr(encoder, "main_input_name", "input_ids")
        taken = taken if taken != "input_ids" else ", ".join(arguments)
        yield "input", f"{type(inner).__name__} takes no input_ids, only {taken}; {asks} is for encoders of tokens"
    if getattr(config, "is_encoder_decoder", False):
        yield (
            "encoder-decoder",
            f"{type(inner).__name__} is an encoder-decoder ({kind}); {asks} is for encoders alone: {CURE}",
        )
    elif any(getattr(config, name, False) for name in ("is_decoder", "add_cross_attention")):
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
            f"{type(inner).__name__} is quantized dynamically: one scale for all activations of a batch leaks between "
            "packed sequences; give the model as it was before it was quantized",
        )
    if inner is not encoder and not _takes_any(inner) and "sequence_ids" not in _parameters(inner):
        yield (
            "leaks",
            f"{type(inner).__name__} takes no sequence_ids, so they never reach its encoder; call isolate_sequences on "
            f"the encoder inside: model.{inner.base_model_prefix}",
        )
    wrapped = _wrapper_obstacle(model, asks)
    if wrapped is not None:
        yield "wrapper", wrapped


def is_a_decoder(kind: str, asks: str) -> str:
    """The reason why a model whose tokens see one direction is refused."""
    return (
        f"{kind} is a decoder: its tokens see only those before them; {asks} is for encoders, whose tokens see "
        f"both directions: {CURE}"
    )


def _is_causal(encoder: PreTrainedModel) -> bool:
    """Whether tokens see only what comes before them, as the layers say it, or else the type."""
    if getattr(encoder.config, "is_causal", None) is False:
        return False
    said = [value for module in encoder.modules() if isinstance(value := getattr(module, "is_causal", None), bool)]
    if said:
        return any(said)
    kind = encoder.config.model_type
    has_both = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in SUPPORTED or kind in REFUSED
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_both


def _wrapper_obstacle(model: nn.Module, asks: str) -> str | None:
    """Why the module around an encoder cannot hand tokens and sequence_ids down; None if it may."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if isinstance(model, PreTrainedModel) or len(list(_outermost(model))) != 1:
        return None
    named = _parameters(model)
    needed = {name for name, parameter in named.items() if parameter.default is parameter.empty}
    told_apart = _takes_any(model) or named.keys() & {"sequence_ids", "attention_mask"}
    if needed <= {"input_ids", "sequence_ids", "attention_mask"} and told_apart:
        return None
    path, encoder = next(_outermost(model))
    path = "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in path.split("."))
    return (
        f"{type(model).__name__} is a module around a {type(encoder).__name__}, and its forward cannot be called with "
        f"input_ids= and sequence_ids=; call {asks} on the encoder inside: model{path}"
    )


def _outermost(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """(path, model) of the transformers models in a module that are not inside of another one."""
    inside = set()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            yield path, module


def outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a module that are not inside of another one."""
    return [module for _, module in _outermost(model)]


def _takes_any(module: nn.Module) -> bool:
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def _parameters(module: nn.Module) -> dict:
    parameters = inspect.signature(module.forward).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
