"""What all attention heads share: how they are built, and how they read their options."""

from collections.abc import Iterable
from dataclasses import fields
from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretrain.attention.options import HeadOptions
from bert_pretrain.moving import KeepsWideBuffers
from collate.layout import PackLayout, SlotLayout


class AttentionHead(KeepsWideBuffers):
    """One attention mechanism, for all heads of one layer. A subclass defines `Options` and `attend`.

    H heads, K head width, T real tokens of the batch.

    num_heads, head_width, max_sequence_length: of the model.
    layer_index: seeds what the layer draws when it is built: each layer draws its own, always the same.
    hidden_size: D, the width of the layer's input, for heads that need it; None: H * K, as in most models.
    options: fields of Options.
    """

    Options: ClassVar[type] = HeadOptions

    supports_dropout: ClassVar[bool] = False
    """Whether `attend` honours dropout > 0; if not, use_attention refuses a model with attention dropout."""
    is_full: ClassVar[bool] = False
    """Whether every token sees every token of its sequence, as in stock BERT."""
    survives_nan: ClassVar[bool] = True
    """Whether a NaN in one sequence leaves the others alone. It does not where a mask multiplies what it hides."""
    takes_key_layout: ClassVar[bool] = False
    """Whether keys may be others than the queries: `attend_others`."""
    needs_hidden: bool = False
    """Whether the head projects the layer's input itself: `attend` then gets it as `hidden_TD`, too. Where an option
    decides it, the instance says so."""

    def __init__(
        self,
        num_heads: int,
        head_width: int,
        max_sequence_length: int,
        layer_index: int = 0,
        hidden_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        self.num_heads, self.head_width = num_heads, head_width
        self.hidden_size = num_heads * head_width if hidden_size is None else hidden_size
        self.max_sequence_length, self.layer_index = max_sequence_length, layer_index
        known = [field.name for field in fields(self.Options)]
        for name, value in options.items():
            if name not in known:
                raise ValueError(
                    f"{type(self).__name__} has no option {name}={value!r}; "
                    + (f"its options are {', '.join(known)}" if known else "it has none")
                )
        self.options = self.Options(**options)

    def forward(
        self,
        query_THK: Tensor,
        key_THK: Tensor,
        value_THK: Tensor,
        layout: PackLayout,
        dropout: float = 0.0,
        key_layout: PackLayout | None = None,
        hidden_TD: Tensor | None = None,
    ) -> Tensor:
        """(T, H, K) each -> the context (T, H, K), of the value's type.

        They are made one type first: rotary encoders under autocast have queries and keys in float32, values in
        bfloat16.

        key_layout: of keys and values, if they are not the queries' tokens. Sequence i of `layout` sees sequence i of
            `key_layout`, which may be empty: then its context is 0. Keys end where queries end; by positions, the last
            query stands beside the last key.
        hidden_TD: (T, D) what the layer made its queries, keys and values of, for a head that needs it.
        """
        if dropout and not self.supports_dropout:
            raise ValueError(
                f"{type(self).__name__} cannot drop attention weights, but dropout={dropout}; "
                "make the model from a config with attention_probs_dropout_prob=0"
            )
        if key_layout is not None and not self.takes_key_layout:
            raise ValueError(
                f"{type(self).__name__} cannot take keys that are not the queries (key_layout); take sdpa, varlen or "
                "local attention"
            )
        if self.needs_hidden and hidden_TD is None:
            raise ValueError(
                f"{type(self).__name__} projects the input of its layer, but did not get it: give hidden_TD (tokens, "
                f"{self.hidden_size}); in a model, use_attention sees to it"
            )
        if layout.num_sequences == 0:
            # No token, but part of the graph: a rank without packs needs a gradient, of 0, for every parameter.
            nothing = sum(parameter.sum() * 0 for parameter in self.parameters())
            return (query_THK + key_THK + value_THK + nothing).to(value_THK.dtype)
        own: dict[str, Any] = {"hidden_TD": hidden_TD} if self.needs_hidden and hidden_TD is not None else {}
        query, key, value, *hidden = as_one_type(query_THK, key_THK, value_THK, *own.values())
        own = dict(zip(own, hidden, strict=True))
        if key_layout is not None:
            return self.attend_others(query, key, value, layout, key_layout, dropout, **own).to(value_THK.dtype)
        return self.attend(query, key, value, layout, **self.dropout_settings(dropout), **own).to(value_THK.dtype)

    def prepare(self, layout: PackLayout) -> None:
        """Ask a layout for each table that `attend` needs. Called once per batch, before the first layer, on the host.

        All of them then go to the device in one copy. A graph of torch.compile finds them ready, too. `layout.runs_on`
        says where `attend` will run. A table that is left out comes later, in a copy of its own.
        """

    def before_graph(self, layout: PackLayout) -> None:
        """Make what layers share and no graph of torch.compile can make, by `layout.derived`, where `attend` will run.

        Called once per batch, before a compiled encoder, after `prepare`.
        """

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        """The mechanism, for a batch with at least one sequence.

        dropout: 0 unless the head supports it. Your own head may leave the parameter out if it does not.

        A head with `needs_hidden` has one more parameter, hidden_TD (T, D): the layer's input.
        """
        raise NotImplementedError

    @property
    def shared_keys(self) -> int:
        """How many keys every token sees besides those of its sequence; FLOPs of full attention count them."""
        return 0

    def attend_others(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, key_layout: PackLayout, dropout: float
    ) -> Tensor:
        """The mechanism where keys are not the queries; for heads that take a key_layout.

        A head with `needs_hidden` gets hidden_TD here, too: of the queries' tokens.
        """
        raise NotImplementedError

    def is_one_graph(self, layout: PackLayout) -> bool:
        """Whether one graph of torch.compile holds for all batches with this form of layout, on its device.

        It does not where Python loops over what differs between batches, such as the number of different lengths.
        """
        return isinstance(layout, SlotLayout)

    def start_from(self, layer: nn.Module) -> None:
        """Take over what the layer knows, for a head that has projections of its own to start with.

        layer: the module that owns the head and makes its queries, keys and values. Called when the head is attached,
            and again where a checkpoint has the layer's weights and not the head's.
        """

    def dropout_settings(self, dropout: float) -> dict[str, Any]:
        """The keyword that `attend` gets where the head supports dropout."""
        return {"dropout": dropout} if self.supports_dropout else {}

    def generator(self) -> torch.Generator:
        """For what a layer draws when it is built, if the head has an option `seed`: each layer draws its own."""
        return torch.Generator().manual_seed(self.options.seed * 10_007 + self.layer_index)

    def refuse_longer(self, layout: PackLayout) -> None:
        """Raise ValueError for a sequence of more than max_sequence_length tokens, for heads that it sizes."""
        longer = longer_than(layout, self.max_sequence_length)
        if longer:
            raise ValueError(
                f"a sequence of {longer} tokens is longer than the max_sequence_length="
                f"{self.max_sequence_length} that {type(self).__name__} was built for; give it a larger one"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{field.name}={getattr(self.options, field.name)!r}" for field in fields(self.options))


def prepare_heads(heads: Iterable[AttentionHead], layout: PackLayout) -> None:
    """Make the tables of all heads on the host, and send them to the device."""
    if layout.num_sequences:
        for head in heads:
            head.prepare(layout.host or layout)
        layout.receive()


def prefers_few_launches(layout: PackLayout) -> bool:
    """Whether a head computes all lengths at once, at the price of padding: on accelerators, and over all slots.

    It follows from the device and the form of the layout alone, so that a resumed run computes the same.
    """
    return isinstance(layout, SlotLayout) or layout.runs_on.type != "cpu"


def longer_than(layout: PackLayout, limit: int) -> int:
    """The length of the longest sequence if it is above the limit, else 0: the host knows, and nobody waits."""

    def make(on_host: PackLayout) -> int:
        longest = int((on_host.lengths * on_host.is_real_sequence).max())
        return longest if longest > limit else 0

    return layout.table(("longer than", limit), make)


def initialize_head(head: nn.Module, layer: nn.Module) -> None:
    """Reset the weights of the layer's head that the checkpoint lacked; transformers marks the others."""
    own = [*head.parameters(), *head.buffers()]
    loaded = [(x, x.detach().clone()) for x in own if getattr(x, "_is_hf_initialized", False)]
    reset_parameters = getattr(head, "reset_parameters", None)
    if len(loaded) < len(own) and reset_parameters is not None:
        reset_parameters()
        if isinstance(head, AttentionHead):
            head.start_from(layer)
        with torch.no_grad():
            for tensor, value in loaded:
                tensor.copy_(value)


def draw_normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Float32 on the CPU, whatever torch's defaults are: the draws are the same everywhere."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def as_one_type(*tensors: Tensor) -> list[Tensor]:
    """All in autocast's type where it is on and none is in float64; otherwise in the widest of their types."""
    device = tensors[0].device.type
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if has_autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) for x in tensors]


def without_autocast(x: Tensor) -> torch.autocast:
    """A context for products that need wide numbers, such as sums over many tokens: autocast would use 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def unit_vectors(x: Tensor) -> Tensor:
    """x / |x|, and 0 for 0: torch's own epsilon, 1e-12, is 0 in float16 and gives NaN there."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))
