"""The pre-hook on an encoder: it turns `sequence_ids` (B, L) into positions, and into what the attention wants.

It works once per step for all layers, and patches nothing in transformers. `save_pretrained` writes the stock
checkpoint without it. So isolate a model again after loading it: a stock forward ignores `sequence_ids` silently.
"""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from collate.device.host import copy_on_host
from collate.isolation.masks import attention_arguments
from collate.isolation.positions import own_positions, position_ids_start
from collate.layout import PADDING, PackLayout

INSTEAD_OF_SEQUENCE_IDS = ("attention_mask", "past_key_values", "encoder_hidden_states")
"""Arguments that would contradict sequence_ids."""


class IsolateSequences:
    """The pre-hook. It holds no tensor and no module, so that copies and pickles of the model just work."""

    def __init__(self, encoder: PreTrainedModel, dense_mask: bool = False):
        self.arguments = tuple(inspect.signature(encoder.forward).parameters)
        self.dense_mask = dense_mask
        self.has_checked = False

    def __call__(self, encoder: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sequence_ids = kwargs.pop("sequence_ids", None)
        if sequence_ids is None:
            return args, kwargs
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        _refuse_contradictions(type(encoder).__name__, kwargs)
        start = position_ids_start(encoder.config)
        layout = self._checked_layout(sequence_ids, kwargs.get("position_ids"), start)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = own_positions(sequence_ids) + start
        return (), kwargs | attention_arguments(encoder, sequence_ids, None if self.dense_mask else layout)

    def _checked_layout(self, sequence_ids: Tensor, position_ids: Tensor | None, start: int) -> PackLayout | None:
        """The layout; None where the forward is traced or transformed, since shapes must not depend on ids there.

        Raises ValueError for ids that no packing produces, and for positions that begin below the model's own start.
        On an accelerator, where it may have to wait for the device, it checks positions of the first batch only.
        """
        if sequence_ids.dim() != 2:
            raise ValueError(f"sequence_ids must be (packs, slots) integers, got {tuple(sequence_ids.shape)}")
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return None
        layout = PackLayout.of(sequence_ids)
        if sequence_ids.device.type == "cpu" or not self.has_checked:
            _refuse_early_positions(sequence_ids, position_ids, start)
        self.has_checked = True
        return layout


def _refuse_contradictions(encoder_name: str, arguments: dict) -> None:
    """Raise ValueError for an argument that says something else than sequence_ids."""
    for other in INSTEAD_OF_SEQUENCE_IDS:
        if arguments.get(other) is not None:
            raise ValueError(
                f"{encoder_name} got sequence_ids and {other}; give sequence_ids alone, with 0 on padding: they say "
                "what a mask says, and which tokens belong together"
            )
    if arguments.get("is_causal"):
        raise ValueError(
            f"{encoder_name} got sequence_ids and is_causal=True; leave is_causal out: tokens of a sequence see both "
            "directions"
        )


def _refuse_early_positions(sequence_ids_BL: Tensor, position_ids_BL: Tensor | None, start: int) -> None:
    """Raise ValueError for positions below the model's first one. Waits for the device that they were made on."""
    if position_ids_BL is None or not start:
        return
    sequence_ids_BL, position_ids_BL = copy_on_host(sequence_ids_BL), copy_on_host(position_ids_BL)
    first = int(torch.where(sequence_ids_BL == PADDING, start, position_ids_BL).min())
    if first < start:
        raise ValueError(
            f"position_ids begin at {first}, but the first position of this model is {start}; build the collator "
            f"with position_ids_start={start}, or leave position_ids out"
        )


def attach_hook(encoder: PreTrainedModel, dense_mask: bool = False) -> RemovableHandle:
    """Make an encoder honour `sequence_ids`; its remove() undoes it."""
    return encoder.register_forward_pre_hook(IsolateSequences(encoder, dense_mask), with_kwargs=True)


def hooks_of(model: nn.Module) -> Iterator[IsolateSequences]:
    """The hooks in a model."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return (hook for hook in hooks if isinstance(hook, IsolateSequences))


def is_isolated(model: nn.Module) -> bool:
    """Whether `isolate_sequences` was called on this model."""
    return any(True for _ in hooks_of(model))
