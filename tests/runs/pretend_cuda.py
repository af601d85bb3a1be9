"""Real code on CPU tensors that say they are on a GPU, and a list of what would make the host wait for one.

    with PretendCuda() as gpu:
        model.to("cuda")
        model(**batch).loss.backward()
    gpu.waits        [Wait(kind="nonzero", where="collate/layout.py:94 token_index", …)]
    gpu.mixed        operations between tensors of the device and of the host: most raise on a GPU
    gpu.launches     {"forward": 61, "backward": 98}: operations that start a kernel; views start none

The numbers are right: every operation runs, on the CPU. What it cannot see: which types a GPU's kernels take, the order
of their additions, time. `python tests/runs/count_waits.py` counts for each attention head and for training.

How it works. DeviceTensor is a tensor of the CPU that calls its device cuda:0. A mode sees each call that names a
device; another sees each operation of ATen, in backward passes, too. Autocast for CUDA becomes that of the CPU.
Kernels that CPUs lack have stand-ins: pretend_kernels. What torch says of its devices: pretend_device.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

COPY_TO_HOST, COPY_TO_DEVICE = "copy to the host", "copy to the device"
NUMBER, BOOLEAN_INDEX, SYNCHRONIZE = "number read", "boolean index", "synchronize"

SIZE_READ = {
    aten.nonzero: 1,
    aten.masked_select: 1,
    aten.bincount: 2,  # the least and the largest
    aten.histc: 2,
    aten._unique: 1,
    aten._unique2: 1,
    aten.unique_dim: 1,
    aten.unique_consecutive: 1,
    aten.unique_dim_consecutive: 1,
    aten.equal: 1,
    aten.allclose: 1,
    aten.repeat_interleave: 1,
    aten.segment_reduce: 1,
    aten._linalg_check_errors: 1,
}
"""Operations whose CUDA kernels read something back, mostly the size of their result; how often."""
WITHOUT_SIZE = {aten.repeat_interleave: "output_size", aten.segment_reduce: "unsafe"}
"""The argument with which such an operation reads nothing."""

INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)

NO_KERNEL = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten._unsafe_view, aten.lift_fresh, aten.set_, aten.resize_, aten.record_stream, aten._has_same_storage_numel),
}
"""Operations that start no kernel, besides views."""


@dataclass(frozen=True)
class Wait:
    """The host waited for the device.

    where: the innermost line of ours on the stack. via: that of a library which we called there, or "".
    phase: "forward" or "backward". step: whatever PretendCuda.step was.
    """

    kind: str
    where: str
    via: str
    phase: str
    step: Any

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}" + (f", via {self.via}" if self.via else "") + f" ({self.phase})"


class DeviceTensor(Tensor):
    """A tensor of the CPU that says it is on cuda:0. Results of what it takes part in are of its class."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    active: ClassVar["PretendCuda | None"] = None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        with no_dispatch():
            return on_device(func(*args, **(kwargs or {})))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return 0

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._copied_to_host()

    def tolist(self) -> list:
        return self._copied_to_host().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        target, args, kwargs = without_device(args, kwargs)
        if target is None:
            return Tensor.to(self, *args, **kwargs)
        moved = self if target.type == "cuda" else self._copied_to_host()
        return Tensor.to(moved, torch.device("cpu"), *args, **kwargs)  # to C++ that is where both are

    def _copied_to_host(self) -> Tensor:
        if DeviceTensor.active is not None:
            DeviceTensor.active.note(COPY_TO_HOST)
        return ToHost.apply(self)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"on the device: {on_host(self)!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return on_host(self).__reduce_ex__(protocol)


class ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return on_host(x).clone()

    @staticmethod
    def backward(ctx, grad):
        return on_device(grad.clone())


def on_device(result: Any) -> Any:
    """Every tensor in it as a DeviceTensor."""
    return tree_map_only(Tensor, _on_device, result)


def _on_device(x: Tensor) -> Tensor:
    return x if isinstance(x, DeviceTensor) else Tensor._make_subclass(DeviceTensor, x, x.requires_grad)


def on_host(x: Tensor) -> Tensor:
    """The same values as an ordinary tensor, without a gradient."""
    with no_dispatch():
        return x.detach()


def without_device(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.device | None, tuple, dict[str, Any]]:
    """The device that arguments of Tensor.to name, and the other arguments."""
    kwargs = dict(kwargs)
    target = kwargs.pop("device", None)
    if target is None and args:
        first = args[0]
        if isinstance(first, str | torch.device | int) and not isinstance(first, bool):
            target, args = first, args[1:]
        elif isinstance(first, Tensor):  # like another tensor
            target, args = first.device, (first.dtype, *args[1:])
    if isinstance(target, int):
        target = torch.device("cuda", target)
    return target if target is None else torch.device(target), args, kwargs


class _NamedDevices(TorchFunctionMode):
    """Sees functions of torch before they look for a CUDA device that is not there."""

    MAKES_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.sparse_coo_tensor)

    def __init__(self, gpu: "PretendCuda"):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], DEVICE)
        if func is Tensor.to and not isinstance(args[0], DeviceTensor):
            target, rest, kwargs = without_device(args[1:], kwargs)
            if target is None:
                return func(args[0], *rest, **kwargs)
            return func(args[0], DEVICE if target.type == "cuda" else target, *rest, **kwargs)
        device = kwargs.get("device")
        if device is None or not is_cuda(device):
            return func(*args, **kwargs)
        if func in self.MAKES_FROM_DATA:
            return self._from_data(func, *args, **kwargs)
        return func(*args, **kwargs | {"device": DEVICE})

    def _from_data(self, func: Any, data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, DeviceTensor):
            return func(data, *args, **kwargs | {"device": None})
        self.gpu.note(COPY_TO_DEVICE)
        return on_device(func(data, *args, **kwargs | {"device": "cpu"}))

    def _backward(self, tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
        with self:  # so that backward passes written in Python are seen
            torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def is_cuda(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


class _Operations(TorchDispatchMode):
    """Sees every operation of ATen, of forward and backward passes."""

    def __init__(self, gpu: "PretendCuda"):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu._run(func, args, dict(kwargs or {}))


class PretendCuda:
    """A context in which "cuda" exists; it keeps what happened."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.mixed: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.step: Any = None
        self._quiet = 0
        self._pinned: dict[int, Any] = {}  # kept alive, or another tensor could get the address

    def __enter__(self) -> "PretendCuda":
        from pretend_device import pretend_device
        from pretend_kernels import pretend_kernels

        with ExitStack() as stack:
            stack.enter_context(pretend_device(self))
            stack.enter_context(pretend_kernels(self))
            stack.enter_context(_NamedDevices(self))
            stack.enter_context(_Operations(self))
            self._entered = stack.pop_all()
        DeviceTensor.active = self
        return self

    def __exit__(self, *error: Any) -> None:
        DeviceTensor.active = None
        self._entered.__exit__(*error)

    def operations_of_a_thread(self) -> TorchDispatchMode:
        """For a thread of its own: modes are of one thread."""
        return _Operations(self)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """For stand-ins: what they do inside is not what the device would do."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def note(self, kind: str, times: int = 1) -> None:
        """The host waits."""
        if not self._quiet:
            where, via = lines_on_stack()
            self.waits += [Wait(kind, where, via, phase(), self.step)] * times

    def launched(self, name: str) -> None:
        """A kernel starts."""
        if not self._quiet:
            self.launches[phase()] += 1
            self.operations[name] += 1

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._pinned

    def _pin(self, x: Tensor) -> Tensor:
        if x.numel():
            self._pinned[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        if packet is aten.is_pinned:
            return self.is_pinned(args[0])
        if packet is aten._pin_memory:
            with no_dispatch():
                return self._pin(args[0].clone())
        wants_pinned = kwargs.pop("pin_memory", False)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        of_device = sum(isinstance(x, DeviceTensor) for x in tensors)
        to_device = _names_device(kwargs) or (not tensors and is_called_by_backward())
        if to_device:
            kwargs["device"] = torch.device("cpu")
        with no_dispatch():
            result = func(*args, **kwargs)
        if wants_pinned:
            self._pin(result)
        if not (of_device or to_device):
            return result
        if self._copies_between(packet, args, kwargs, to_device):
            pass
        elif any(not isinstance(x, DeviceTensor) and x.dim() for x in not_indices(packet, tensors, args)) or (
            _draws_on_host(kwargs)
        ):
            self._note_mixed(packet)
        self._note_wait(packet, args, kwargs)
        if starts_kernel(func):
            self.launched(func.name())
        if packet is aten.copy_ and not isinstance(args[0], DeviceTensor):
            return args[0]
        return on_device(result)

    def _copies_between(self, packet: Any, args: tuple, kwargs: dict[str, Any], to_device: bool) -> bool:
        """Whether the operation copies from the one memory to the other, which may make the host wait."""
        if packet is aten.copy_:
            target, source, *rest = args
            kinds, non_blocking = (target, source), any(rest) or kwargs.get("non_blocking", False)
        elif packet is aten._to_copy and to_device:
            kinds, non_blocking = (None, args[0]), kwargs.get("non_blocking", False)
        else:
            return False
        of_device = [x is None or isinstance(x, DeviceTensor) for x in kinds]
        if of_device == [False, True]:
            self.note(COPY_TO_HOST)
        if of_device == [True, False] and args[-1].numel() and not (non_blocking and self.is_pinned(kinds[1])):
            self.note(COPY_TO_DEVICE)
        return True

    def _note_wait(self, packet: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if packet is aten._local_scalar_dense:
            self.note(NUMBER)
        elif packet in SIZE_READ:
            if kwargs.get(WITHOUT_SIZE.get(packet, "")) is None:
                self.note(packet.__name__.strip("_"), SIZE_READ[packet])
        elif packet in INDEXED:
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            self._note_copied(x for x in args[1] if x is not None)
            fills = packet is not aten.index and len(args) > 2 and args[2].numel() == 1  # as masked_fill does
            if masks and not fills:
                self.note(BOOLEAN_INDEX, len(masks))

    def _note_copied(self, indices: Iterable[Tensor]) -> None:
        """An index of the host, such as a list: allowed, and copied to the device."""
        for x in indices:
            if x.dim() and not isinstance(x, DeviceTensor):
                self.note(COPY_TO_DEVICE)

    def _note_mixed(self, packet: Any) -> None:
        if not self._quiet:
            where, _ = lines_on_stack()
            self.mixed[f"{packet.__name__}: {where}"] += 1


def not_indices(packet: Any, tensors: list[Tensor], args: tuple) -> list[Tensor]:
    """Tensors that must be on one device: all but indices."""
    return [args[0], *args[2:3]] if packet in INDEXED else tensors


def _names_device(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and is_cuda(device)


def _draws_on_host(kwargs: dict[str, Any]) -> bool:
    generator = kwargs.get("generator")
    return generator is not None and generator.device.type == "cpu"


@cache
def starts_kernel(func: Any) -> bool:
    if func.overloadpacket in NO_KERNEL:
        return False
    returns = func._schema.returns
    is_view = [each.alias_info is not None and not each.alias_info.is_write for each in returns]
    return not (is_view and all(is_view))


def phase() -> str:
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def frames() -> Iterator[tuple[str, Any]]:
    """File and frame, from the innermost outwards, this file left out."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.endswith("torch/utils/_python_dispatch.py"):
            yield name, frame
        frame = frame.f_back  # type: ignore[assignment]


def is_called_by_backward() -> bool:
    """Whether a backward pass of torch's own makes a tensor: on the device, as all of the graph."""
    return phase() == "backward" and next(frames())[0].endswith("torch/autograd/graph.py")


def lines_on_stack() -> tuple[str, str]:
    """The innermost line of ours, and that of a library inside it: "collate/layout.py:94 token_index"."""
    via = ""
    for name, frame in frames():
        line = f"{frame.f_lineno} {frame.f_code.co_name}"
        if "site-packages" in name:
            package = name.split("site-packages/")[-1]
            if not via and not package.startswith(("torch/", "_pytest", "pluggy")):
                via = f"{package}:{line}"
        elif is_ours(name):
            return f"{Path(name).relative_to(ROOT)}:{line}", via
    return "", via


@cache
def is_ours(name: str) -> bool:
    file = Path(name)
    return file.is_relative_to(ROOT) and not file.name.startswith("pretend_")


def per_line(waits: list[Wait]) -> Counter[str]:
    """{"nonzero: collate/layout.py:94 token_index (forward)": 3}"""
    return Counter(map(str, waits))
