"""Length histograms, pack plans and packed datasets: NumPy, Numba and Arrow, no tensors.

lengths -> length_histogram -> plan_packs -> assign;   pack_dataset does it all for a tokenized dataset.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .assignment import Assignment, assign
    from .balance import StepCosts, attention_cost, balance_packs, step_costs
    from .compare import Comparison, compare_packers
    from .dataset import pack_dataset
    from .epochs import EpochPacks
    from .histogram import length_histogram
    from .info import PackedInfo, packed_info
    from .lengths import published_histogram, read_histogram
    from .packed import load_packed
    from .packers import PACKERS, Packer, plan_packs
    from .plan import PackPlan
    from .report import write_report
    from .stream import pack_stream
    from .unpack import unpack_dataset
    from .verify import verify_packed

__all__ = [
    "PACKERS",
    "Assignment",
    "Comparison",
    "EpochPacks",
    "PackPlan",
    "PackedInfo",
    "Packer",
    "StepCosts",
    "assign",
    "attention_cost",
    "balance_packs",
    "compare_packers",
    "length_histogram",
    "load_packed",
    "pack_dataset",
    "pack_stream",
    "packed_info",
    "plan_packs",
    "published_histogram",
    "read_histogram",
    "step_costs",
    "unpack_dataset",
    "verify_packed",
    "write_report",
]

# Where each name lives. They load when first used: Numba takes a second to import, datasets three.
_MODULES = {
    "PACKERS": "packers",
    "Assignment": "assignment",
    "Comparison": "compare",
    "EpochPacks": "epochs",
    "PackPlan": "plan",
    "PackedInfo": "info",
    "Packer": "packers",
    "StepCosts": "balance",
    "assign": "assignment",
    "attention_cost": "balance",
    "balance_packs": "balance",
    "compare_packers": "compare",
    "length_histogram": "histogram",
    "load_packed": "packed",
    "pack_dataset": "dataset",
    "pack_stream": "stream",
    "packed_info": "info",
    "plan_packs": "packers",
    "published_histogram": "lengths",
    "read_histogram": "lengths",
    "step_costs": "balance",
    "unpack_dataset": "unpack",
    "verify_packed": "verify",
    "write_report": "report",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
