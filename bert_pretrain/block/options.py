"""BlockOptions: the choices of a block, checked where they are made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bert_pretrain.block.feed_forwards import FEED_FORWARDS
from bert_pretrain.block.initial import INITIAL
from bert_pretrain.block.norms import NORMS
from bert_pretrain.block.placements import PLACEMENTS
from bert_pretrain.block.streams import STREAMS
from packing.files.errors import check_known, suggestion, whole_number

TABLES: dict[str, Mapping[str, Any]] = {
    "placement": PLACEMENTS,
    "norm": NORMS,
    "stream": STREAMS,
    "feed_forward": FEED_FORWARDS,
    "initial": INITIAL,
}
CHANGES_NO_NUMBER = ("stream", "chunk_size", "initial")
"""Options that leave the function of a trained model as it is: `reversible` alone is another one."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What stands around attention in a layer. The defaults are stock BERT's block.

    placement: of norms and residual sums. post: n(x + f(x)). pre: x + f(n(x)), and a norm at the end. residual: post,
        plus the sum of all branches, normalized at the end (ResiDual).
    norm: layer (LayerNorm) or rms (RMSNorm).
    stream: what backward keeps. plain: everything. checkpoint: what enters each layer, and computes it again.
        reversible: nothing of the layers, on two streams; only with pre.
    feed_forward: dense.
    initial: how a new model draws the output projections of both branches. deep: smaller by 1/√(2N), N layers.
    share_layers: one layer takes the place of all (ALBERT).
    chunk_size: tokens that the feed-forward takes at a time; None: all.

    Raises ValueError for a name that a table lacks, and for a reversible stream that no placement can invert.
    """

    placement: str = "post"
    norm: str = "layer"
    stream: str = "plain"
    feed_forward: str = "dense"
    initial: str = "bert"
    share_layers: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name, table in TABLES.items():
            check_known(name, getattr(self, name), table)
        if not isinstance(self.share_layers, bool):
            raise ValueError(f"share_layers={self.share_layers!r} must be true or false")
        if self.chunk_size is not None:
            whole_number("chunk_size", self.chunk_size, 1, None, "; leave it out to take all tokens at once")
        if self.stream == "reversible" and self.placement != "pre":
            raise ValueError(
                f"stream='reversible' cannot invert placement={self.placement!r}, since a norm over a sum has no "
                "inverse; take placement='pre'"
            )

    def with_changes(self, changes: Mapping[str, Any]) -> "BlockOptions":
        """The same options but for some. Raises ValueError for a name that is no option."""
        known = [field.name for field in fields(self)]
        for name, value in changes.items():
            if name not in known:
                raise ValueError(
                    f"a block has no option {name}={value!r}{suggestion(name, known)}; its options are "
                    f"{', '.join(known)}"
                )
        return replace(self, **changes)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "BlockOptions":
        """The options of a config entry; None: stock BERT's."""
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f'block={given!r} must be options and their values, such as {{"placement": "pre"}}')
        return cls().with_changes(given or {})

    @property
    def changed(self) -> dict[str, Any]:
        """What differs from stock BERT: the entry of a config."""
        default = asdict(BlockOptions())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    @property
    def computes_stock(self) -> bool:
        """Whether stock BERT computes the same from the same tensors."""
        return self.stream != "reversible" and not self.changed.keys() - set(CHANGES_NO_NUMBER)
