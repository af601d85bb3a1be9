"""BlockOptions: the choices of a block, checked where they are made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bert_pretrain.block.feed_forwards import BALANCE, FEED_FORWARDS
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
OF_EXPERTS = ("experts", "top_k", "balance", "balance_weight", "bias_speed", "z_loss")
"""Options of feed_forward="moe"."""
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
    feed_forward: dense, or moe: each token goes to a few of many.
    initial: how a new model draws the output projections of both branches. deep: smaller by 1/√(2N), N layers.
    share_layers: one layer takes the place of all (ALBERT).
    chunk_size: tokens that the feed-forward takes at a time, and computes again in backward; None: all.
    gated: whether the feed-forward has a gate, act(W₁ x) · (V x).

    The rest is for feed_forward="moe"; see bert_pretrain.block.feed_forwards.moe.

    experts: of a layer, each of the config's intermediate_size. top_k: those that a token goes to.
    balance: what keeps experts in equal use. sequence: a term of the loss. bias: a bias that moves after each step.
    balance_weight: of the term. bias_speed: of the bias. z_loss: the weight of the router z-loss; 0: none.

    Raises ValueError for a name that a table lacks, for a reversible stream that no placement can invert, and for
    options of experts where there are none.
    """

    placement: str = "post"
    norm: str = "layer"
    stream: str = "plain"
    feed_forward: str = "dense"
    initial: str = "bert"
    share_layers: bool = False
    chunk_size: int | None = None
    gated: bool = False
    experts: int = 8
    top_k: int = 2
    balance: str = "sequence"
    balance_weight: float = 0.01
    bias_speed: float = 0.001
    z_loss: float = 0.001

    def __post_init__(self) -> None:
        for name, table in TABLES.items():
            check_known(name, getattr(self, name), table)
        for name in ("share_layers", "gated"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.chunk_size is not None:
            whole_number("chunk_size", self.chunk_size, 1, None, "; leave it out to take all tokens at once")
        if self.stream == "reversible" and self.placement != "pre":
            raise ValueError(
                f"stream='reversible' cannot invert placement={self.placement!r}, since a norm over a sum has no "
                "inverse; take placement='pre'"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        whole_number("experts", self.experts, 1, None, "; give the number of experts of a layer")
        whole_number("top_k", self.top_k, 1, self.experts, "; a token goes to some of the experts")
        check_known("balance", self.balance, BALANCE)
        for name in ("balance_weight", "bias_speed", "z_loss"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number from 0 on; 0 turns it off")
        self._check_given([name for name in OF_EXPERTS if getattr(self, name) != getattr(type(self), name)])

    def _check_given(self, given: Sequence[str]) -> None:
        """given: options of experts that somebody chose."""
        if given and self.feed_forward != "moe":
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} is for experts, which feed_forward={self.feed_forward!r} does "
                "not have; take feed_forward='moe', or leave it out"
            )
        other = {"sequence": "bias_speed", "bias": "balance_weight"}[self.balance]
        if other in given:
            raise ValueError(
                f"{other}={getattr(self, other)!r} has no meaning with balance={self.balance!r}; leave either out"
            )

    def with_changes(self, changes: Mapping[str, Any]) -> "BlockOptions":
        """The same options but for some. Raises ValueError for a name that is no option.

        Options of experts are refused by name where there are none, so a value that is the default is refused, too.
        """
        known = [field.name for field in fields(self)]
        for name, value in changes.items():
            if name not in known:
                raise ValueError(
                    f"a block has no option {name}={value!r}{suggestion(name, known)}; its options are "
                    f"{', '.join(known)}"
                )
        changed = replace(self, **changes)
        changed._check_given([name for name in OF_EXPERTS if name in changes])
        return changed

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
