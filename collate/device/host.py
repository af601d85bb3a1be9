"""From the host to a device: many tensors in one copy that nobody waits for, and what the host still has of them.

    there = send(values, device)     the same tree; its tensors are parts of one buffer
    on_host(there_tensor)            the values on the host, or None

A question that needs an answer in Python, such as how long a sequence is or where a label stands, makes the host wait
for a GPU. The host had the values a moment ago, so it answers from them.
"""

from collections.abc import MutableMapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Tree = TypeVar("Tree")

ALIGNED = 16
"""Bytes: each tensor begins at a multiple, as its type and wide loads need."""


class _Sent(NamedTuple):
    """What the host has of a tensor, and the versions of both then."""

    host: Tensor
    host_version: int | None
    version: int | None


_SENT: MutableMapping[Tensor, _Sent] = WeakIdKeyDictionary()
"""Of each tensor that was sent and is alive: what the host has."""


def send(values: Tree, device: torch.device) -> Tree:
    """Tensors of the host in a tree of tuples, lists, dicts and dataclasses -> the same tree on a device.

    One pinned buffer, one copy. The host goes on while it runs.
    """
    found = tensors_in(values)
    sizes = [-(-x.numel() * x.itemsize // ALIGNED) * ALIGNED for x in found]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for x, part in zip(found, buffer.split(sizes), strict=True):
        _as(part, x).copy_(x)
    arrived = buffer.to(device, non_blocking=True).split(sizes)
    # Parts of one buffer would share a version: a write to one would look like a write to all. `data` has its own.
    sent = [_as(part, x).data for part, x in zip(arrived, found, strict=True)]
    for x, there in zip(found, sent, strict=True):
        _SENT[there] = _Sent(x, version_of(x), version_of(there))
    parts = iter(sent)
    return _map(values, lambda _: next(parts))


def on_host(tensor: Tensor) -> Tensor | None:
    """What a device's tensor was sent from. None if it was made on the device, or if either was written to since.

    torch counts no write by a collective, such as broadcast, and none through numpy: they are not seen.
    """
    if tensor.device.type == "cpu":
        return tensor
    sent = _SENT.get(tensor)
    if sent is None or (sent.host_version, sent.version) != (version_of(sent.host), version_of(tensor)):
        return None
    return sent.host


def copy_on_host(tensor: Tensor) -> Tensor:
    """The values on the host; waits for the device unless they came from there."""
    found = on_host(tensor)
    return tensor.cpu() if found is None else found


def version_of(tensor: Tensor) -> int | None:
    """Another number after each write. None for tensors of torch.inference_mode(), whose writes nobody counts."""
    return None if tensor.is_inference() else tensor._version


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a tree, from left to right."""
    found: list[Tensor] = []
    _map(tree, found.append)
    return found


def _as(part: Tensor, like: Tensor) -> Tensor:
    """Bytes as a tensor of the same type and shape as another."""
    return part[: like.numel() * like.itemsize].view(like.dtype).view(like.shape)


def _map(tree: Any, change: Any) -> Any:
    """The same tree with each tensor changed, from left to right."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _map(value, change) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [_map(value, change) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: _map(getattr(tree, field.name), change) for field in fields(tree)})
    return tree
