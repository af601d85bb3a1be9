"""isolate_sequences: make a stock encoder honour `sequence_ids`.

isolate_sequences(model)                      # once, after loading
model(input_ids, sequence_ids=...)            # each sequence as if it were alone
"""

from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from collate.isolation.encoders import CURE, SUPPORTED, refuse_unfit
from collate.isolation.handover import encoder_of, outermost, pretrained_model
from collate.isolation.hook import attach_hook, hooks_of, is_isolated
from collate.probe import check_isolation

ASKS = "isolate_sequences"

Model = TypeVar("Model", bound=nn.Module)


def isolate_sequences(model: Model, dense_mask: bool = False) -> Model:
    """Make a stock encoder honour `sequence_ids=` (B, L), with any task head on it, and return it.

        sequence_ids [[1, 1, 1, 2, 2, 0]]  ->  position_ids [[0, 1, 2, 0, 1, 0]]  and, True = attend,
                                               1 1 1 0 0 0
                                               1 1 1 0 0 0
                                               1 1 1 0 0 0
                                               0 0 0 1 1 0
                                               0 0 0 1 1 0
                                               0 0 0 0 0 1    padding attends to padding: no row without a key

    Without `sequence_ids` the model is the stock one. Given `position_ids` stay. A second call changes nothing.
    Under sdpa each sequence attends by itself, at a cost of n^2 and not of L^2, on CPUs and on CUDA in 16 bits.
    Elsewhere, and in a compiled forward, the mask above is built. dense_mask: True always builds it.

    A head that pools a row still pools the row: `collate.heads` has heads that pool sequences.

    The types in SUPPORTED are known to be exact, those in REFUSED known to leak (`isolation.encoders`). Any other
    encoder, and any class around it or derived from it that is not transformers' own, must pass `check_isolation`.

    Raises ValueError for a model that cannot be isolated from outside, with the reason, and for several encoders in
    one module. Later a forward raises ValueError for `sequence_ids` beside an `attention_mask` or `is_causal`, for ids
    that no packing produces, and for positions that begin below the model's.
    """
    refuse_unfit(model, ASKS)
    _refuse_several(model)
    if is_isolated(model):
        for hook in hooks_of(model):
            hook.dense_mask |= dense_mask
        return model
    handle = attach_hook(encoder_of(model, ASKS), dense_mask)
    if not _is_known(model):
        try:
            _try_out(model)
        except ValueError:
            handle.remove()
            raise
    return model


def _try_out(model: nn.Module) -> None:
    """Raise ValueError for a hooked model of unknown type that leaks, or that does not run."""
    where = "" if isinstance(model, PreTrainedModel) else f" inside of {type(model).__name__}"
    name = f"{encoder_of(model, ASKS).config.model_type}{where}"
    try:
        report = check_isolation(model)
    except Exception as error:
        raise ValueError(
            f"{name} is not known to isolate, and it cannot be tried out: it fails on input_ids, sequence_ids and "
            f"masks of packs, as the error above says; {CURE}"
        ) from error
    if report.reason and not report.isolated:
        raise ValueError(report.reason)
    try:
        report.raise_if_leaking(but_for=("pooling",))
    except ValueError as error:
        raise ValueError(f"{name} is not known to isolate; probed, it failed: {error}") from error


def _is_known(model: nn.Module) -> bool:
    """Whether this is a supported type, all of it known code: a subclass, or a module around, may drop sequence_ids."""
    encoder = encoder_of(model, ASKS)
    stock = all(type(part).__module__.startswith("transformers.") for part in (pretrained_model(model, ASKS), encoder))
    stock &= type(model).__module__.startswith(("transformers.", "torch.", "peft."))
    return stock and encoder.config.model_type in SUPPORTED


def _refuse_several(model: nn.Module) -> None:
    """Raise ValueError for two encoders side by side, of which only one would be isolated."""
    models = [module for _, module in outermost(model)]
    if len(models) > 1 and not all(map(is_isolated, models)):
        raise ValueError(
            f"{type(model).__name__} holds {len(models)} transformers models, "
            f"{' and '.join(type(module).__name__ for module in models)}; call isolate_sequences on each of them"
        )
