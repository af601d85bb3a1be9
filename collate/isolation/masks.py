"""What keeps sequences apart under each attention implementation, as arguments of an encoder's forward.

    sdpa               a mask that is not built: `lazy_mask`
    eager              an additive mask
    flex_attention     a BlockMask
    flash_attention    boundaries of the flattened rows

All layers of a forward share a mask. Where an encoder has sliding windows, there is one for each type of layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from collate.isolation.lazy_mask import LazyMask
from collate.layout import PackLayout, SlotLayout, is_start

TAKES_SEQUENCE_IDS = frozenset({"packed_attention"})
"""Attention implementations that get `sequence_ids` instead of a mask: see bert_pretrain.attention."""


def attention_arguments(encoder: PreTrainedModel, sequence_ids_BL: Tensor, layout: PackLayout | None) -> dict[str, Any]:
    """The arguments of the encoder's forward that keep sequences apart under its attention implementation.

    layout: None asks for a mask that is built.
    Raises ValueError for an implementation that has no mask function.
    """
    implementation = encoder.config._attn_implementation or ""
    if implementation in TAKES_SEQUENCE_IDS:
        return {"sequence_ids": sequence_ids_BL}
    if "flash" in implementation:
        return flash_arguments(sequence_ids_BL, layout)
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        raise ValueError(
            f"attention implementation {implementation!r} has no mask function, so it cannot be told which tokens "
            f"belong together; choose sdpa, eager, flex_attention or flash_attention_2, or register a mask function"
        )
    dtype: Any = encoder.get_input_embeddings().weight.dtype
    build: Callable[..., Any] = partial(built_mask, implementation, sequence_ids_BL, dtype)
    if implementation == "sdpa" and layout is not None:
        build = partial(_lazy_mask, layout, build)
    layer_types = set(getattr(encoder.config, "layer_types", None) or ())
    if "sliding_attention" not in layer_types:
        return {"attention_mask": build()}
    windows = {"full_attention": None, "sliding_attention": encoder.config.sliding_window}
    return {"attention_mask": {layer_type: build(window=windows[layer_type]) for layer_type in layer_types}}


def _lazy_mask(layout: PackLayout, build: Callable[..., Tensor], window: int | None = None) -> LazyMask:
    return LazyMask(layout, window, partial(build, window=window))


def built_mask(implementation: str, sequence_ids_BL: Tensor, dtype: torch.dtype, window: int | None = None) -> Any:
    """The implementation's own kind of mask: query and key of one sequence and at most `window` tokens apart."""

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = sequence_ids_BL[batch, query] == sequence_ids_BL[batch, key]
        # a sequence lies in one piece: slots are as far apart as positions
        return same if window is None else same & ((query - key).abs() <= window)

    packs, slots = sequence_ids_BL.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=packs,
        q_length=slots,
        kv_length=slots,
        mask_function=attends,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=sequence_ids_BL.device,
    )


def flash_arguments(sequence_ids_BL: Tensor, layout: PackLayout | None = None) -> dict[str, Any]:
    """Boundaries among the B * L slots; a stretch of padding is a sequence of its own.

    [[1, 1, 2, 0], [1, 1, 1, 1]] -> cu_seqlens [0, 2, 3, 4, 8]
    """
    if layout is None:
        boundaries = _stretches(sequence_ids_BL)
    elif isinstance(layout, SlotLayout):
        boundaries = layout.cu_seqlens
    else:
        boundaries = layout.table("stretches", lambda layout: _stretches(layout.sequence_ids_BL))
    longest = sequence_ids_BL.shape[1]  # an upper bound is enough, and needs no wait for the device
    return {
        "attention_mask": None,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _stretches(sequence_ids_BL: Tensor) -> Tensor:
    starts = is_start(sequence_ids_BL).flatten().nonzero().squeeze(1)
    return torch.nn.functional.pad(starts, (0, 1), value=sequence_ids_BL.numel()).int()
