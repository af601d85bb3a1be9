"""Terms that modules of a model add to its loss, such as a balance of experts or a penalty on spans.

A module, wherever it is in the model, says so by what it has:

    loss_rows      tuple[Mean, ...], its terms, each per "sequences" or "tokens"; () adds nothing
    penalties()    {total: scalar} of terms per "sequences" that depend on parameters alone; may be left out

The other totals come with the forward pass. An encoder whose layers have such totals adds them up and returns them as
`loss_sums`, {total: scalar}, beside the last hidden state; its class has `gives_loss_sums = True`. A total is a sum
over the batch's real sequences or tokens, and in the graph of the pass.

    term of the loss = weight · (totals of all passes and ranks of the step) / (sequences, or tokens, of the step)

So neither packing, nor accumulation, nor the number of ranks changes it. A penalty p counts p for each sequence of the
batch, and the term is p again. Modules that have the same term, such as layers, add up: it is the sum over layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from collate.layout import PackLayout
from collate.losses import COUNTS_OF_ADDED, Mean
from collate.views import at_least_float32
from packing.files.errors import check_known


def rows_of(model: nn.Module) -> tuple[Mean, ...]:
    """The terms that modules of a model add to its loss, each once; () for a model of transformers.

    Raises ValueError for a term that is not per "sequences" or "tokens", and for two of one name that differ.
    """
    found: dict[str, Mean] = {}
    for module in model.modules():
        for row in getattr(module, "loss_rows", ()):
            check_known(f"count of {type(module).__name__}'s loss row {row.name!r}:", row.per, COUNTS_OF_ADDED)
            first = found.setdefault(row.name, row)
            if first != row:
                raise ValueError(
                    f"modules of the model add {row.name!r} to its loss as {first} and as {row}; give all layers the "
                    "same options, or the terms different names"
                )
    return tuple(found.values())


def added_sums(
    model: nn.Module, rows: Sequence[Mean], layout: PackLayout, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{name: scalar} of one batch: the totals and the counts of the rows.

    given: the totals of the forward pass. Raises RuntimeError for a row whose total nobody gave.
    """
    if not rows:
        return {}
    counts = {"sequences": layout.is_real_sequence.sum(), "tokens": layout.is_real_token.sum()}
    found = dict(given)
    module: Any
    for module in model.modules():
        if hasattr(module, "loss_rows") and hasattr(module, "penalties"):
            for total, penalty in module.penalties().items():
                _add(found, total, at_least_float32(penalty) * counts["sequences"])
    for row in rows:
        if row.total not in found:
            raise RuntimeError(
                f"nobody gave {row.total!r}, the sum of the term {row.name!r}, in this pass; let the module give it by "
                "its penalties(), or the encoder by loss_sums in its output"
            )
    return {name: value for row in rows for name, value in ((row.total, found[row.total]), (row.per, counts[row.per]))}


@contextmanager
def heard_sums(model: nn.Module, rows: Sequence[Mean]) -> Iterator[dict[str, Tensor]]:
    """The totals that encoders give within this context. For stock models, whose output does not pass them on.

    rows: nobody listens where there are none.
    """
    heard: dict[str, Tensor] = {}

    def hear(module: nn.Module, inputs: Any, output: Any) -> None:
        for total, value in output.loss_sums.items():
            _add(heard, total, value)

    encoders = [module for module in model.modules() if rows and getattr(module, "gives_loss_sums", False)]
    handles = [encoder.register_forward_hook(hear) for encoder in encoders]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: dict[str, Tensor], total: str, value: Tensor) -> None:
    sums[total] = sums[total] + value if total in sums else value
