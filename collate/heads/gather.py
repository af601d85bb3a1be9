"""The hook on the encoder that gathers what a stock head reads, and the models that it is for."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from collate.heads.values import mean_by_sequence
from collate.isolate import isolate_sequences
from collate.isolation.handover import pretrained_model


class GatherForHead:
    """Forward hook of the encoder: hand a stock head P sequences of one token instead of B packs.

    head_slots (P,): which of the B * L slots the head reads.
    head_lengths (N,): if given, the slots are those of N sequences in turn, and the head reads their means.
    pooler_slots (N,): whose hidden states the encoder's pooler reads; without them there is no pooler_output.

        last_hidden_state (2, 4, D), head_slots [0, 2, 4]  ->  (3, 1, D): slots 0 and 2 of pack 0, slot 0 of pack 1

    It holds no tensor and no module, so that copies and pickles of the model just work.
    """

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> ModelOutput | None:
        head_slots = kwargs.get("head_slots")
        if head_slots is None:
            return None
        if not isinstance(output, ModelOutput):
            raise ValueError(
                f"{type(encoder).__name__} returned a {type(output).__name__}; set model.config.return_dict=True"
            )
        hidden = output["last_hidden_state"].flatten(0, 1)
        gathered = hidden.index_select(0, head_slots)
        if kwargs.get("head_lengths") is not None:
            gathered = mean_by_sequence(gathered, kwargs["head_lengths"])
        output["last_hidden_state"] = gathered[:, None]
        if "pooler_output" in output:
            # the pooler has read each pack's first token: nobody may take that for a sequence's
            slots = kwargs.get("pooler_slots")
            output["pooler_output"] = None if slots is None else _pool(encoder, hidden.index_select(0, slots)[:, None])
        return output


def _pool(encoder: nn.Module, hidden_N1D: Tensor) -> Tensor:
    """The encoder's own pooler, as its forward applies it."""
    pooler = encoder.get_submodule("pooler")
    if hasattr(encoder, "pooler_activation"):  # ALBERT
        return encoder.get_submodule("pooler_activation")(pooler(hidden_N1D[:, 0]))
    return pooler(hidden_N1D)


def prepare_head(model: nn.Module) -> nn.Module:
    """Isolate the sequences, and let the model's own head read gathered slots; returns the model.

    Without `sequence_ids` and `head_slots` the model is the stock one. Calling it twice changes nothing.
    Raises ValueError for models whose sequences cannot be isolated, with the reason.
    """
    isolate_sequences(model)
    encoder = task_model(model).base_model
    if not has_gather(encoder):
        encoder.register_forward_hook(GatherForHead(), with_kwargs=True)
    return model


def has_gather(encoder: nn.Module) -> bool:
    """Whether prepare_head has hooked this encoder."""
    return any(isinstance(hook, GatherForHead) for hook in encoder._forward_hooks.values())


def task_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what DDP, PEFT or torch.compile wrapped around it."""
    return pretrained_model(model, "a packed task")
