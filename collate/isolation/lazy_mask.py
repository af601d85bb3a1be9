"""The mask for sdpa: a block-diagonal (B, 1, L, L) that attends by sequences, and is built only if somebody reads it.

    mask = LazyMask(layout, window=None, build=...)
    F.scaled_dot_product_attention(query, key, value, attn_mask=mask)     # each sequence by itself: no mask

Stock encoders hand their mask to scaled_dot_product_attention and do nothing else with it. So the mask itself can say
what to do there, as torch's own `torch.nn.attention.bias.CausalBias` does. The model and its config stay stock. Any
other use of the mask builds it, so a model that does something else with it is as exact, only slower.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from collate.isolation.exact_attention import attend_rows
from collate.isolation.varlen import attend_varlen, takes_varlen
from collate.layout import PackLayout

WANT_MEMORY = (
    *(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__deepcopy__, Tensor.__dlpack__, Tensor.share_memory_),
    *(Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage),
)
"""Methods that read a tensor's memory without any operator that reaches __torch_dispatch__."""


class LazyMask(Tensor):
    """True = attend: query and key of one sequence of `layout`, at most `window` tokens apart (None: any).

    build: makes the mask; called at most once for all layers.
    """

    pack_layout: PackLayout
    window: int | None
    build: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, layout: PackLayout, window: int | None, build: Callable[[], Tensor]) -> "LazyMask":
        packs, slots = layout.sequence_ids_BL.shape
        mask = Tensor._make_wrapper_subclass(
            cls, (packs, 1, slots, slots), dtype=torch.bool, device=layout.sequence_ids_BL.device
        )
        mask.pack_layout, mask.window, mask.build = layout, window, build
        return mask

    @property
    def built(self) -> Tensor:
        return self.pack_layout.derived(("built mask", self.window), self.build)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs or {})
        if function in WANT_MEMORY:
            args, kwargs = tree_map(_built, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # results are ordinary tensors, not masks
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return LazyMask(args[0].pack_layout, args[0].window, args[0].build)
        args, kwargs = tree_map(_built, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"LazyMask(shape={tuple(self.shape)}, window={self.window})"


def _built(value: Any) -> Any:
    return value.built if isinstance(value, LazyMask) else value


def _attend(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention where the mask, or by mistake another argument, is a LazyMask."""
    mask, same_heads = attn_mask, query.shape[1:2] == key.shape[1:2] == value.shape[1:2]
    if isinstance(mask, LazyMask) and not is_causal and _are_rows_of(mask, query, key, value) and same_heads:
        q, k, v = _as_autocast_has_it(query, key, value)
        if query.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled():  # the switch is for CPUs, too
            return attend_rows(q, k, v, mask.pack_layout, dropout_p, scale, mask.window)
        if _takes_varlen(mask, q, dropout_p, scale):
            layout = mask.pack_layout
            q, k, v = (layout.unpad(x.transpose(1, 2)) for x in (q, k, v))
            return layout.pad(attend_varlen(q, k, v, layout, window=mask.window)).transpose(1, 2)
    query, key, value, built = map(_built, (query, key, value, attn_mask))
    return F.scaled_dot_product_attention(
        query, key, value, built, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _are_rows_of(mask: LazyMask, *tensors: Tensor) -> bool:
    """Whether queries, keys and values are (B, H, L, K) of the mask's rows, all of one type."""
    packs, _, slots, _ = mask.shape
    first = tensors[0]
    return first.dim() == 4 and all(
        x.dim() == 4 and x.shape[0] == packs and x.shape[2:] == (slots, first.shape[3]) and x.device == first.device
        for x in tensors
    )


def _as_autocast_has_it(*tensors: Tensor) -> list[Tensor]:
    """Cast as torch's own function does under autocast."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind)) for x in tensors]


def _takes_varlen(mask: LazyMask, query: Tensor, dropout: float, scale: float | None) -> bool:
    """Whether FlashAttention's kernel can do this; no test runs it on a GPU."""
    width = query.shape[-1]
    is_usual = scale is None or math.isclose(scale, width**-0.5, rel_tol=1e-6)
    return (
        is_usual and not dropout and bool(mask.pack_layout.num_tokens) and takes_varlen(query, mask.window is not None)
    )
