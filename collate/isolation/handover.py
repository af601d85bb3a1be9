"""Where the encoder is inside a task model, or inside what is wrapped around one, and whether sequence_ids get there.

DistributedDataParallel(BertForMaskedLM(BertModel))      the encoder is the BertModel; the others hand keywords down
"""

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def encoder_of(model: nn.Module, asks: str) -> PreTrainedModel:
    """The encoder inside a task model, or inside what PEFT, DDP or torch.compile wrapped around one."""
    return base_of(pretrained_model(model, asks))


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of a transformers model."""
    base = model.base_model
    assert isinstance(base, PreTrainedModel)
    return base


def pretrained_model(model: nn.Module, asks: str) -> PreTrainedModel:
    """The transformers model itself, or inside what DDP, PEFT or torch.compile wrapped around it.

    asks: the function that needs one, for the error.
    Raises ValueError for what is no model, or holds none of transformers'.
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
    for _, inner in outermost(model):
        return inner
    raise ValueError(f"{type(model).__name__} holds no transformers model; {asks} needs one")


def outermost(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """(path, model) of the transformers models in a module that are not inside another one."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            yield path, module


def task_obstacle(inner: PreTrainedModel) -> str | None:
    """Why a task model does not hand sequence_ids down to its encoder; None if it does."""
    if inner is inner.base_model or takes_any(inner) or "sequence_ids" in named_parameters(inner):
        return None
    return (
        f"{type(inner).__name__} takes no sequence_ids, so they never reach its encoder; call isolate_sequences on the "
        f"encoder inside: model.{inner.base_model_prefix}"
    )


def wrapper_obstacle(model: nn.Module, asks: str) -> str | None:
    """Why the module around an encoder cannot hand tokens and sequence_ids down; None if it may."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    (path, encoder), *others = outermost(model)
    if isinstance(model, PreTrainedModel) or others:
        return None
    named = named_parameters(model)
    needed = {name for name, parameter in named.items() if parameter.default is parameter.empty}
    told_apart = takes_any(model) or named.keys() & {"sequence_ids", "attention_mask"}
    if needed <= {"input_ids", "sequence_ids", "attention_mask"} and told_apart:
        return None
    path = "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in path.split("."))
    return (
        f"{type(model).__name__} is a module around a {type(encoder).__name__}, and its forward cannot be called with "
        f"input_ids= and sequence_ids=; call {asks} on the encoder inside: model{path}"
    )


def takes_any(module: nn.Module) -> bool:
    """Whether its forward takes keywords that it does not name."""
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def named_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters that its forward names."""
    parameters = inspect.signature(module.forward).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
