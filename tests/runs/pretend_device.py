"""What torch says of its devices, while tests/runs/pretend_cuda.py pretends that there is one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from pretend_cuda import DEVICE, SYNCHRONIZE, PretendCuda
from torch.utils.data._utils import pin_memory

MEMORY = 80 * 2**30
CAPABILITY, NAME = (9, 0), "NVIDIA H100 80GB HBM3"
STATE = torch.zeros(16, dtype=torch.uint8)


def answers(gpu: PretendCuda) -> list[tuple[Any, dict[str, Any]]]:
    """(module, {function: what it returns}); a callable is called."""
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, warp_size=32
    )

    def synchronize(*_: Any) -> None:
        gpu.note(SYNCHRONIZE)

    cuda = {
        "_lazy_init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "mem_get_info": (MEMORY, MEMORY),
        "empty_cache": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state": STATE,
        "set_rng_state": None,
        "get_rng_state_all": [STATE],
        "set_rng_state_all": None,
        "max_memory_allocated": 2**30,
        "memory_allocated": 2**30,
        "max_memory_reserved": 2**30,
        "memory_reserved": 2**30,
        "reset_peak_memory_stats": None,
        "synchronize": synchronize,
    }
    accelerator = {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "device_count": 1,
        "current_device_index": 0,
        "set_device_index": None,
        "synchronize": synchronize,
        "current_stream": SimpleNamespace(is_capturing=lambda: False, synchronize=synchronize),
    }
    return [(torch.cuda, cuda), (torch.accelerator, accelerator)]


@contextmanager
def pretend_device(gpu: PretendCuda) -> Iterator[None]:
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for module, values in answers(gpu):
            for name, value in values.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, answering(value)))
        for where, name, function in (*autocast_of_cpu(), *others(gpu)):
            stack.enter_context(patch.object(where, name, function))
        torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay tied
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        yield


def answering(value: Any) -> Any:
    return value if callable(value) else lambda *args, **kwargs: value


def autocast_of_cpu() -> list[tuple[Any, str, Any]]:
    """Autocast for CUDA is that of the CPU, in bfloat16: DeviceTensors are tensors of the CPU to C++."""
    init, is_enabled, dtype = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def of_cpu(device_type: str | None) -> str:
        return "cpu" if device_type is None or device_type.startswith("cuda") else device_type

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, of_cpu(device_type), *args, **kwargs)

    return [
        (torch.autocast, "__init__", __init__),
        (torch, "is_autocast_enabled", lambda device_type=None: is_enabled(of_cpu(device_type))),
        (torch, "get_autocast_dtype", lambda device_type: dtype(of_cpu(device_type))),
        (torch, "get_autocast_gpu_dtype", lambda: dtype("cpu")),
    ]


def others(gpu: PretendCuda) -> list[tuple[Any, str, Any]]:
    loop = pin_memory._pin_memory_loop

    def pin_memory_loop(*args: Any) -> None:
        with gpu.operations_of_a_thread():
            loop(*args)

    def dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        return torch.native_dropout(x, p, train)[0] if train and 0 < p < 1 else cpu_dropout(x, p, train)

    cpu_dropout, group = torch.dropout, torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> dict:
        """By the device that tensors say they are on; C++ knows another."""
        found = group(lists, with_indices).items()
        return {(lists[0][0].device, dtype): value for (_, dtype), value in found}

    return [
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),
        (pin_memory, "_pin_memory_loop", pin_memory_loop),
        (torch._VF, "dropout", dropout),  # one kernel on CUDA, several on a CPU
    ]


__all__ = ["DEVICE", "pretend_device"]
