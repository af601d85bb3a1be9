"""Attention heads in transformers encoders: attach them to a model, load them again, call them from its layers."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from bert_pretrain.attention.choice import AUTO_ATTENTION, AutoAttention
from bert_pretrain.attention.head import AttentionHead
from bert_pretrain.attention.table import ATTENTION
from collate.isolate import isolate_sequences
from collate.layout import PackLayout
from packing.files.errors import check_known

IMPLEMENTATION = "packed_attention"
ATTENTION_HEAD = "attention_head"
"""The name of a head in the layer that owns it."""

Model = TypeVar("Model", bound=PreTrainedModel)


def use_attention(model: Model, attention: str | Callable | Sequence, **options: Any) -> Model:
    """Give every layer of an encoder an attention head, and return the model.

        use_attention(model, "local", window=64)
        use_attention(model, ["local"] * 10 + ["sdpa"] * 2, window=64)      one per layer

    attention: a name in ATTENTION, "auto" (the fastest full attention, wherever the model runs), a callable that builds
        a head, or a list of these, one per layer.
    options: each goes to the heads that have it; your own callable gets all. The config keeps names and options, and a
        reload finds them (`load_attention` for stock models). It cannot keep a callable: a reload then refuses.

    After this, call the model with `sequence_ids=` (B, L); each layer then attends within sequences only.
    Raises ValueError for an unknown name or option, a list that does not have one entry per layer, attention dropout
    that a head cannot honour, or a model that cannot take other attention, such as a causal one. The model then stays
    as it is.
    """
    layers = attention_layers(model)
    chosen = [attention] * len(layers) if isinstance(attention, str) or callable(attention) else attention
    if not isinstance(chosen, Sequence):
        raise ValueError(f"attention={attention!r} must be a name, a callable, or a list of these, one per layer")
    if len(chosen) != len(layers):
        raise ValueError(f"got {len(chosen)} attention heads for {len(layers)} layers; give one per layer, or one name")
    builders = [_builder(choice) for choice in chosen]
    _refuse_unknown_options(builders, options)
    config = model.config
    heads = []
    for index, (layer, builder) in enumerate(zip(layers, builders, strict=True)):
        head = builder(
            num_heads=config.num_attention_heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            max_sequence_length=config.max_position_embeddings,
            layer_index=index,
            **_hidden_size(builder, config),
            **{name: value for name, value in options.items() if _takes(builder, name)},
        )
        name, dropout = _attention_dropout(layer, config)
        if dropout and not getattr(head, "supports_dropout", True):
            raise ValueError(
                f"{type(head).__name__} cannot drop attention weights, but {name}={dropout}; set it to 0 in the config "
                f"that the model is made from, as by from_pretrained(…, {name}=0.0)"
            )
        heads.append(head.to(next(layer.parameters())))
    for layer, head in zip(layers, heads, strict=True):
        layer.attention_head = head
        if isinstance(head, AttentionHead):
            head.start_from(layer)
        if getattr(head, "needs_hidden", False) and _hand_on_input not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_hand_on_input, with_kwargs=True)
    names = [choice if isinstance(choice, str) else f"{_name(choice)} (a callable)" for choice in chosen]
    config.packed_attention = names[0] if len(set(names)) == 1 else names
    config.packed_attention_options = options
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    model.set_attn_implementation(IMPLEMENTATION)
    if "sequence_ids" not in inspect.signature(model.forward).parameters:
        isolate_sequences(model)  # a stock model: its positions, and what else the ids imply
    return model


def load_attention(model: Model, checkpoint: str | Path) -> Model:
    """Give a reloaded stock model its attention heads again, with their weights.

        model = load_attention(BertForMaskedLM.from_pretrained("local-bert"), "local-bert")

    A stock class knows no attention heads: it does not load their weights, and attends fully.
    checkpoint: the folder that the model was loaded from, with config and safetensors. The class may differ from the
        saved one, as BertModel and BertForMaskedLM do: their encoders are the same.

    Raises ValueError for a folder that does not hold the weights of the model's heads.
    """
    attention = getattr(model.config, "packed_attention", None)
    if attention is None:
        raise ValueError(f"the config of {checkpoint} names no packed_attention; it was not saved with attention heads")
    use_attention(model, attention, **model.config.packed_attention_options)
    # Names have a prefix in the checkpoint of a task model, and none in that of a base model.
    prefix = f"{model.base_model_prefix}."
    own = {name.removeprefix(prefix): name for name in model.state_dict() if ATTENTION_HEAD in name.split(".")}
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            stored = [name for name in tensors.keys() if ATTENTION_HEAD in name.split(".")]  # noqa: SIM118
            weights |= {name.removeprefix(prefix): tensors.get_tensor(name) for name in stored}
    if weights.keys() != own.keys():
        lacking, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise ValueError(
            f"{checkpoint} does not hold the weights of {attention} in {type(model).__name__}: it lacks "
            f"{lacking or 'none'} and also has {unknown or 'none'}; load a folder with safetensors, saved from "
            f"{' or '.join(model.config.architectures or ['this model'])}, into a model of the same kind"
        )
    model.load_state_dict({own[name]: tensor for name, tensor in weights.items()}, strict=False)
    return model


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of an encoder that call transformers' attention interface, layer by layer.

    Raises ValueError for a model without any, for causal layers, and for layers with a window of their own.
    """
    calling = {kind for kind in {type(module) for module in model.modules()} if _calls_interface(kind)}
    layers = [module for module in model.modules() if type(module) in calling]
    config = getattr(model, "config", None)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that calls transformers' attention interface, so it cannot be given "
            "another attention"
        )
    decoder = any(getattr(config, name, False) for name in ("is_decoder", "is_encoder_decoder", "add_cross_attention"))
    if decoder or any(getattr(layer, "is_causal", False) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} is causal or a decoder, but attention heads see both directions; "
            "take an encoder, with is_decoder=False and add_cross_attention=False"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"{type(model).__name__} has layers with a window of their own, which an attention head would not know of; "
            "use isolate_sequences(model) to pack sequences with its own attention"
        )
    return layers


def _calls_interface(module: type[nn.Module]) -> bool:
    if not module.__module__.startswith("transformers."):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module.forward)


def _hand_on_input(layer: nn.Module, args: tuple, keywords: dict) -> tuple[tuple, dict]:
    """A pre-hook of layers whose head needs their input: they pass keywords on to the attention interface."""
    if not getattr(layer.attention_head, "needs_hidden", False):  # it may have another head by now
        return args, keywords
    return args, keywords | {"layer_input": args[0] if args else keywords["hidden_states"]}


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
    layer_input: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: pass a layer's queries, keys and values to its attention head.

    Two callers. Our model runs on real tokens only: query (1, H, T, K) and their `layout`. A stock model runs on padded
    rows: query (B, H, L, K) and `sequence_ids` (B, L). Returns the context in transformers' order, (1, T, H, K) or
    (B, L, H, K).

    layer_input: (1, T, D) or (B, L, D), for heads that need it.
    """
    if scaling is not None and not math.isclose(scaling, query.shape[-1] ** -0.5, rel_tol=1e-6):
        raise ValueError(
            f"{type(module).__name__} scales its scores by {scaling}; attention heads scale by 1/sqrt(K), "
            f"{query.shape[-1] ** -0.5} here"
        )
    if key.shape[1] != query.shape[1]:  # grouped queries: several heads share a key
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    head: Any = module.attention_head
    if layout is not None:
        heads = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        hidden = {} if layer_input is None else {"hidden_TD": layer_input.squeeze(0)}
        return head(*heads, layout, dropout=dropout, **hidden)[None], None
    if sequence_ids is None:
        raise ValueError(
            "packed_attention needs to know which tokens belong together: call the model with sequence_ids=, "
            "1, 2, 3… within each row and 0 on padding"
        )
    layout = PackLayout.of(sequence_ids)
    heads = (layout.unpad(x.transpose(1, 2)) for x in (query, key, value))
    hidden = {} if layer_input is None else {"hidden_TD": layout.unpad(layer_input)}
    return layout.pad(head(*heads, layout, dropout=dropout, **hidden)), None


def _attention_dropout(layer: nn.Module, config: PreTrainedConfig) -> tuple[str, float]:
    """The config's name of attention dropout, and how much the layer applies, which was fixed when it was built."""
    name = next((n for n in ("attention_probs_dropout_prob", "attention_dropout") if hasattr(config, n)), None)
    configured = getattr(config, name) if name else 0.0
    for own in ("attention_dropout", "dropout"):
        module = getattr(layer, own, None)
        if isinstance(module, nn.Dropout):
            return name or own, max(module.p, configured)
    return name or "attention_dropout", configured


def _hidden_size(builder: Callable, config: PreTrainedConfig) -> dict[str, int]:
    """The width of the layers' input, for heads of ours and those like them: their widths need not add up to it."""
    while isinstance(builder, partial):
        builder = builder.func
    is_head = isinstance(builder, type) and issubclass(builder, AttentionHead)
    size = getattr(config, "hidden_size", None)
    if not is_head or size is None:
        return {}
    kinds = inspect.signature(builder).parameters
    takes_it = "hidden_size" in kinds or any(each.kind is each.VAR_KEYWORD for each in kinds.values())
    return {"hidden_size": size} if takes_it else {}


def _refuse_unknown_options(builders: Sequence[Callable], options: dict) -> None:
    for name, value in options.items():
        if not any(_takes(builder, name) for builder in builders):
            known = {_name(builder): _options(builder) for builder in builders}
            raise ValueError(f"no attention head here has an option {name}={value!r}; the heads' options are {known}")


def _takes(builder: Callable, option: str) -> bool:
    options = _options(builder)
    return options is None or option in options


def _options(builder: Callable) -> list[str] | None:
    """The options of a head; None for a user's callable, which may take any."""
    if isinstance(builder, type) and issubclass(builder, AttentionHead):
        return [field.name for field in fields(builder.Options)]
    return None


def _name(choice: Callable) -> str:
    return getattr(choice, "__name__", type(choice).__name__)


def _builder(choice: str | Callable) -> Callable:
    if callable(choice):
        return choice
    if choice == AUTO_ATTENTION:
        return AutoAttention
    check_known("attention", choice, [AUTO_ATTENTION, *sorted(ATTENTION)], " or give a callable")
    return ATTENTION[choice]
