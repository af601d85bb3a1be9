"""Length histograms, pack plans and packed datasets: NumPy, Numba and Arrow, no tensors.

source -> lengths -> length_histogram -> plan_packs -> assign -> store;   pack_dataset does it all.

dataset        pack_dataset: read, plan, assign, write
options        what may be chosen: PackOptions
source/        whatever rows come from: files, folders, URLs, the hub; texts to tokens
text/          texts -> ids by a tokenizer, each distinct word once
histogram      lengths -> sequences per length
packers/       histogram -> plan; PACKERS has one file a packer
plan           PackPlan: strategies, how often each repeats, and how good that is
bounds         packs that no packing can go under
assignment     plan -> which sequences lie together, by a seed
balance        the order of packs in which steps cost attention nearly the same
cohorts        packs in which a document's pieces come one after the other
store/         a packed folder, here or at a URL: written, resumed, opened
epochs         EpochPacks: another assignment in every epoch
stream         pack_stream: packs of an endless source
unpack         packs -> rows again
verify/        proof that a packed folder holds what was packed
report/        every packer at several depths, as a table and as a page
cli, command/  the command pack-dataset
files/         files and folders that are whole or not there; errors
draws          random numbers by a key; the same on any machine
numba_tools    njit with a cache that notices edits

Import the names below from `packing`; what is inside the modules may move.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # "as": type checkers take these for public names
    __version__: str
    from packing.assignment import Assignment as Assignment
    from packing.assignment import assign as assign
    from packing.balance import StepCosts as StepCosts
    from packing.balance import attention_cost as attention_cost
    from packing.balance import balance_packs as balance_packs
    from packing.balance import step_costs as step_costs
    from packing.dataset import pack_dataset as pack_dataset
    from packing.epochs import EpochPacks as EpochPacks
    from packing.histogram import length_histogram as length_histogram
    from packing.packers.table import PACKERS as PACKERS
    from packing.packers.table import Packer as Packer
    from packing.packers.table import plan_packs as plan_packs
    from packing.plan import PackPlan as PackPlan
    from packing.report.compare import Comparison as Comparison
    from packing.report.compare import compare_packers as compare_packers
    from packing.report.page import write_report as write_report
    from packing.source.lengths import published_histogram as published_histogram
    from packing.source.lengths import read_histogram as read_histogram
    from packing.store.info import PackedInfo as PackedInfo
    from packing.store.info import packed_info as packed_info
    from packing.store.loading import load_packed as load_packed
    from packing.stream import pack_stream as pack_stream
    from packing.unpack import unpack_dataset as unpack_dataset
    from packing.verify.verify import verify_packed as verify_packed

# Where each name lives. They load when first used: Numba takes a second to import, datasets three.
_NAMES = {
    "assignment": "Assignment assign",
    "balance": "StepCosts attention_cost balance_packs step_costs",
    "dataset": "pack_dataset",
    "epochs": "EpochPacks",
    "histogram": "length_histogram",
    "packers.table": "PACKERS Packer plan_packs",
    "plan": "PackPlan",
    "report.compare": "Comparison compare_packers",
    "report.page": "write_report",
    "source.lengths": "published_histogram read_histogram",
    "store.info": "PackedInfo packed_info",
    "store.loading": "load_packed",
    "stream": "pack_stream",
    "unpack": "unpack_dataset",
    "verify.verify": "verify_packed",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


if not TYPE_CHECKING:  # else a checker would take any name for one of ours

    def __getattr__(name: str):
        if name == "__version__":
            return version("dataset-packing")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value  # the next look-up does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
