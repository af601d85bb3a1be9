"""check_isolation: what leaks between the sequences of a pack, and by how much, in any model."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collate.isolation.encoders import SUPPORTED, is_a_decoder, obstacles, refuse_unfit
from collate.isolation.handover import named_parameters, outermost
from collate.isolation.hook import is_isolated
from collate.isolation.masks import TAKES_SEQUENCE_IDS
from collate.isolation.positions import own_positions, position_ids_start
from collate.layout import PADDING
from collate.vocabulary import token_ids, vocabulary_size

Row = tuple[Tensor, Tensor]
"""input_ids and sequence_ids, both (1, L)."""
Hold = tuple[Tensor, Tensor | None]
"""My slots, and what the first layer's input is to be there."""

PARTS = {
    "embeddings": "the first layer's input when the mate gets other tokens",
    "attention": "hidden states when the mate gets other tokens, my first layer's input held fixed",
    "token_types": "the first layer's input when the mate gets other token types",
    "positions": "hidden states when a lone sequence moves to another place in the row",
    "pooling": "pooled outputs, packed or alone",
    "alone": "hidden states, packed or alone: all of the above and whatever else depends on the row",
}
SAME_SHAPE_LIMIT = 1e-12
"""Another mate in a row of the same shape: the same rounding, so a model without leaks does not change one bit."""
OTHER_SHAPE_LIMIT = 1e-5
"""Another shape is another rounding: 1e-15 where all is float64, 1e-6 where a model does its softmax in float32."""


@dataclass(frozen=True)
class IsolationReport:
    """What `check_isolation` found: for each part the worst relative change, max |difference| / max |value|.

    None: the model has no such part (no token types, no pooled output), or its layers could not be found.
    told_by: "sequence_ids", or "attention_mask" for a model that knows no sequence_ids.
    lengths: the two sequences of each probed row. window: the longest window in the config that they exceed, or 0.
    """

    model: str
    told_by: str
    dtype: str
    lengths: tuple[tuple[int, int], ...]
    window: int
    other_shape_limit: float
    embeddings: float | None
    attention: float | None
    token_types: float | None
    positions: float | None
    pooling: float | None
    alone: float | None
    pools_rows: bool = False
    reason: str | None = None
    """Why it is known to leak, where it is."""

    def limit(self, part: str) -> float:
        return SAME_SHAPE_LIMIT if part in ("embeddings", "attention", "token_types") else self.other_shape_limit

    @property
    def leaking(self) -> tuple[str, ...]:
        """The parts that leak, in the order of PARTS."""
        leaks = {part: getattr(self, part) for part in PARTS}
        return tuple(part for part, leak in leaks.items() if leak is not None and not leak <= self.limit(part))

    @property
    def isolated(self) -> bool:
        return not self.leaking

    def raise_if_leaking(self, but_for: tuple[str, ...] = ()) -> None:
        """Raise ValueError that says where it leaks and by how much; parts in `but_for` may."""
        leaking = [part for part in self.leaking if part not in but_for]
        if leaking:
            where = "; ".join(f"{part} by {getattr(self, part):.2g} ({PARTS[part]})" for part in leaking)
            cure = self.reason or f"Call isolate_sequences on an encoder of {list(SUPPORTED)}"
            raise ValueError(
                f"{self.model} told by {self.told_by} does not keep packed sequences apart. Relative to being alone, "
                f"it leaks in {where}. {cure}"
            )

    def __str__(self) -> str:
        window = f", beyond its window of {self.window}" if self.window else ""
        lines = [
            f"{self.model}, told by {self.told_by}, in {self.dtype}: "
            f"{'isolated' if self.isolated else 'LEAKS in ' + ', '.join(self.leaking)}",
            f"two sequences a row, of {' and of '.join(f'{a} + {b}' for a, b in self.lengths)} tokens{window}",
            f"{'part':<12} {'change':>8} {'limit':>8}   of",
        ]
        for part, what in PARTS.items():
            leak = getattr(self, part)
            change = "-" if leak is None else f"{leak:.1e}" if leak else "0"
            lines.append(f"{part:<12} {change:>8} {self.limit(part):>8.0e}   {what}")
        if self.reason and self.leaking:
            lines.append(self.reason)
        if self.pools_rows:
            lines.append("A row has one pooled output, not one per sequence: pool each sequence at its cls_positions.")
        return "\n".join(lines)


def check_isolation(
    model: nn.Module, tokenizer: Any = None, seed: int = 0, dtype: torch.dtype | None = None
) -> IsolationReport:
    """Measure whether the sequences of a pack influence each other, for any model.

    Two sequences are packed in a row, short ones and ones longer than any window in the config. One gets other tokens,
    or other token types, or moves. The other must not change, and both must be what they are alone:

        row      a a a b b b b -      first layer's input and hidden states of a
        other    a a a x x x x -      the same?   -> embeddings, attention
        alone    a a a                the same?   -> alone

    A model that honours `sequence_ids` (isolated, or with an argument of that name) gets them. Any other gets what
    plain packing gives: a 2-D attention_mask and positions that restart, and it leaks.

    The probe runs on a copy, in float64 (8 bytes for each parameter): in bfloat16 a leak may round to nothing. Flash
    and flex attention know no float64. There the copy keeps its type, and only a row of the same shape shows small
    leaks. The model, its mode and the random states stay as they are.

    tokenizer: gives the words and special tokens; None: the model's embeddings and config do.
    dtype: another type for the copy, where a model has parts that cannot run in float64.
    Raises ValueError for a model that takes no input_ids, is an encoder-decoder, or returns nothing per token. For a
    model that is known to leak, such as a decoder, the report gives the reason.
    """
    with torch.no_grad(), _random_states_kept():
        probe = _Probe(model, tokenizer, seed, dtype)
        rows = [probe.measure(*lengths) for lengths in probe.lengths]
        worst = {part: _worst([row[part] for row in rows]) for part in PARTS}
        reason = probe.reason
        if reason is None and (worst["alone"] or 0) > OTHER_SHAPE_LIMIT and probe.is_causal():
            reason = is_a_decoder(getattr(probe.config, "model_type", probe.name), "isolate_sequences")
    return IsolationReport(
        model=probe.name,
        told_by="sequence_ids" if probe.takes_ids else "attention_mask",
        dtype=str(probe.dtype).removeprefix("torch."),
        lengths=tuple(probe.lengths),
        window=probe.window if min(probe.lengths[-1]) > probe.window else 0,
        other_shape_limit=max(OTHER_SHAPE_LIMIT, 8 * torch.finfo(probe.dtype).eps),
        pools_rows=any(row["pools_rows"] for row in rows),
        reason=reason,
        **worst,
    )


class _Probe:
    """A copy of a model, and what it takes to run packs through it.

    Inside, a row is a pair (input_ids, sequence_ids), both (1, L); `mine` are the slots of one of its sequences.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, seed: int, dtype: torch.dtype | None):
        self.reason: str | None = None  # why it is known to leak
        if not isinstance(model, nn.Module) or any(outermost(model)):
            refuse_unfit(model, "check_isolation", may_be=("causal", "leaks"))
            self.reason = next((reason for _, reason in obstacles(model, "isolate_sequences")), None)
        model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
        pretrained = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        self.name = type(model if pretrained is None else pretrained).__name__
        self.config: Any = getattr(model if pretrained is None else pretrained, "config", None)
        inside = [] if pretrained is None else [pretrained, pretrained.base_model]  # task models hand keywords down
        self.takes = {name for module in (model, *inside) for name in named_parameters(module)}
        if "input_ids" not in self.takes:
            raise ValueError(f"{self.name} takes no input_ids, only {sorted(self.takes)}; check_isolation needs tokens")
        implementation = getattr(self.config, "_attn_implementation", None) or ""
        self.is_hooked = is_isolated(model)
        self.needs_ids = "sequence_ids" in self.takes or implementation in TAKES_SEQUENCE_IDS
        self.takes_ids = self.is_hooked or self.needs_ids
        self.model: Any = copy.deepcopy(model).eval()
        if dtype is None and not any(name in implementation for name in ("flash", "flex")):
            dtype = torch.float64
            self.model = self.model.to("cpu" if self._device.type == "mps" else self._device)  # Metal has no float64
        self.model = self.model if dtype is None else self.model.to(dtype)
        copied = next((m for m in self.model.modules() if isinstance(m, PreTrainedModel)), None)
        self.encoder = None if copied is None or copied.base_model is self.model else copied.base_model
        self.dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float64)
        self.first_layer = next((m[0] for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
        self.start = position_ids_start(self.config) if self.config and hasattr(self.config, "model_type") else 0
        has_token_types = "token_type_ids" in self.takes
        self.num_token_types = (getattr(self.config, "type_vocab_size", 0) or 0) if has_token_types else 0
        self.words, self.special = self._vocabulary(tokenizer)
        self.random = np.random.default_rng(seed)
        self.window = max([0, *_windows(self.config)])
        self.lengths = self._lengths()

    def measure(self, first: int, second: int) -> dict[str, float | bool | None]:
        """The changes of one row with two sequences, by part."""
        row = self.row([self.tokens(first), self.tokens(second)])
        base = self.run(row)
        alone = [self.run(self.row([row[0][row[1] == number]], padding=0), alone=True) for number in (1, 2)]
        found: dict[str, list] = {part: [] for part in PARTS}
        for number in (1, 2):
            mine, mate = row[1] == number, row[1] == 3 - number
            other = torch.where(mate, self.other_tokens(row[0]), row[0])
            found["embeddings"].append(self.run((other, row[1])).change_of_input(base, mine))
            found["attention"].append(self.run((other, row[1]), hold=(mine, base.embedded)).change(base, mine))
            if self.num_token_types > 1:
                found["token_types"].append(self.run(row, token_types=mate.long()).change_of_input(base, mine))
            everything = torch.ones_like(row[1][:, : int(mine.sum())], dtype=torch.bool)
            found["alone"].append(base.change(alone[number - 1], mine, everything))
            tokens = row[0][mine]
            here, there = self.row([tokens]), self.row([tokens], shift=3)
            found["positions"].append(self.run(there).change(self.run(here), there[1] == 1, here[1] == 1))
        for name, value in base.pooled.items():  # one per pack: the first sequence's; or one per sequence: each its own
            expected = torch.cat([run.outputs[name] for run in alone])
            found["pooling"].append(_relative(value, expected[: len(value)]))
        worst = {part: _worst(changes) for part, changes in found.items()}
        return worst | {"pools_rows": any(len(value) == 1 for value in base.pooled.values())}

    def run(self, row: Row, alone: bool = False, token_types: Tensor | None = None, hold: Hold | None = None) -> "_Run":
        """Run a row; `hold` = (mine, embedded) gives the first layer the embedded input for my slots."""
        input_ids, sequence_ids = row
        arguments = {"input_ids": input_ids}
        if self.needs_ids or (self.is_hooked and not alone):
            arguments["sequence_ids"] = sequence_ids
        elif not alone:
            arguments["attention_mask"] = (sequence_ids != PADDING).long()
        if not alone and not self.is_hooked and "position_ids" in self.takes:
            arguments["position_ids"] = own_positions(sequence_ids) + self.start
        if token_types is not None or self.num_token_types:
            arguments["token_type_ids"] = torch.zeros_like(input_ids) if token_types is None else token_types
        tap, of_encoder = _Tap(sequence_ids, hold), {}
        with contextlib.ExitStack() as hooks:
            if self.first_layer is not None:
                hooks.enter_context(self.first_layer.register_forward_pre_hook(tap, with_kwargs=True))
            if self.encoder is not None:  # a classifier's own output has nothing per token
                keep = lambda _module, _args, result: of_encoder.update(_named(result, "encoder."))  # noqa: E731
                hooks.enter_context(self.encoder.register_forward_hook(keep))
            result = self._call(arguments)
        run = _Run(sequence_ids, of_encoder | _named(result), tap.embedded)
        if not run.hidden:
            raise ValueError(
                f"{self.name} returns nothing per token, so there is nothing to compare: {sorted(run.outputs)}"
            )
        return run

    def _call(self, arguments: dict[str, Tensor]) -> Any:
        try:
            return self.model(**arguments)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.name} cannot be tried out: given {', '.join(arguments)} it fails, as the error above says; "
                "check_isolation is for encoders that need no more than tokens"
            ) from error

    def is_causal(self) -> bool:
        """Whether another last token changes nothing before it, in a sequence alone."""
        tokens = self.tokens(9)
        rows = [self.row([torch.cat([tokens[:-1], last])], padding=0) for last in (tokens[-1:], self.tokens(1))]
        one, other = (self.run(row, alone=True) for row in rows)
        before = torch.arange(9, device=self._device)[None] < 8
        return other.change(one, before) == 0 and bool((rows[0][0] != rows[1][0]).any())

    def row(self, sequences: list[Tensor], padding: int | None = None, shift: int = 0) -> Row:
        """[a a a], [b b] -> input_ids a a a b b - - and sequence_ids 1 1 1 2 2 0 0; `shift` moves padding in front."""
        used = sum(map(len, sequences))
        if padding is None:  # a row as long as a last dimension would make token outputs look like pooled ones
            sizes = {value for value in (vars(self.config) if self.config else {}).values() if isinstance(value, int)}
            padding = next(n for n in range(3, 99) if used + n not in {*sizes, getattr(self.config, "num_labels", 2)})
        pad = torch.full((padding,), self.special.get("pad", 0), device=self._device)
        numbers = [torch.full_like(tokens, number + 1) for number, tokens in enumerate(sequences)]
        input_ids = torch.cat([pad[:shift], *sequences, pad[shift:]])
        sequence_ids = torch.cat([torch.zeros_like(pad[:shift]), *numbers, torch.zeros_like(pad[shift:])])
        return input_ids[None], sequence_ids[None].int()

    def tokens(self, length: int) -> Tensor:
        return torch.from_numpy(self.random.choice(self.words, length)).to(self._device)

    def other_tokens(self, input_ids: Tensor) -> Tensor:
        """Another word in every slot, and a mask token in some: a few models rescale by the number of these."""
        other = self.random.choice(self.words, tuple(input_ids.shape))
        if "mask" in self.special:
            other[self.random.random(other.shape) < 0.2] = self.special["mask"]
        return torch.from_numpy(other).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _vocabulary(self, tokenizer: Any) -> tuple[np.ndarray, dict[str, int]]:
        """Ordinary words, and the padding and mask tokens where there are any."""
        try:
            size = self.model.get_input_embeddings().weight.shape[0]
        except (AttributeError, NotImplementedError):
            size = getattr(self.config, "vocab_size", None)
        known = None if tokenizer is None else token_ids(tokenizer)
        if size is None and known is not None:
            size = vocabulary_size(tokenizer)
        if size is None:
            raise ValueError(f"{self.name} does not say how many words it knows; give check_isolation its tokenizer")
        source = self.config if tokenizer is None else tokenizer
        names = ("pad", "mask", "cls", "sep", "bos", "eos")
        named = {name: getattr(source, f"{name}_token_id", None) for name in names}
        special = {name: value for name, value in named.items() if isinstance(value, int) and 0 <= value < size}
        words = np.arange(size) if known is None else known[known < size]
        words = np.setdiff1d(words, [*special.values(), *getattr(tokenizer, "all_special_ids", [])])
        if len(words) < 2:
            raise ValueError(f"{self.name} has {len(words)} words besides special tokens; the probe needs two")
        return words, special

    def _lengths(self) -> list[tuple[int, int]]:
        """A short pair, and a long one: beyond every window, within the positions that the model has."""
        most = getattr(self.config, "max_position_embeddings", None) or 0
        most = (most if most > 0 else 4096) - self.start  # XLNet says -1
        long = max(2 * self.window + 7, 40)
        in_one_row = (most - 10) // 2  # for models that count through the row, or keep tables of that length
        if in_one_row > self.window or not (self.takes_ids or "position_ids" in self.takes):
            most = in_one_row
        return [(min(9, most), min(14, most)), (min(long, most), min(long + 3, most))]


class _Run:
    """The outputs of one row: `hidden` per token, by name (1, L, …), `pooled` per row or per sequence (1 or 2, C)."""

    def __init__(self, sequence_ids: Tensor, outputs: dict[str, Tensor], embedded: Tensor | None):
        self.sequence_ids, self.outputs, self.embedded = sequence_ids, outputs, embedded
        slots = tuple(sequence_ids.shape)
        self.hidden = {k: v for k, v in self.outputs.items() if tuple(v.shape[:2]) == slots}
        self.pooled = {k: v for k, v in self.outputs.items() if k not in self.hidden and v.dim() == 2 and len(v) < 3}

    def change(self, reference: "_Run", mine: Tensor, theirs: Tensor | None = None) -> float | None:
        """The worst change of my slots, over all outputs."""
        theirs = mine if theirs is None else theirs
        return _worst([_relative(v[mine], reference.outputs[name][theirs]) for name, v in self.hidden.items()])

    def change_of_input(self, reference: "_Run", mine: Tensor) -> float | None:
        """The worst change of my slots in the first layer's input."""
        if self.embedded is None or reference.embedded is None:
            return None
        mine = _slots_of(self.embedded, mine, self.sequence_ids)
        return _relative(self.embedded[mine], reference.embedded[mine])


class _Tap:
    """A pre-hook of the first layer: keeps its input, or replaces my slots of it."""

    def __init__(self, sequence_ids: Tensor, hold: Hold | None):
        self.sequence_ids, self.hold = sequence_ids, hold
        self.embedded: Tensor | None = None

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        sizes = (self.sequence_ids.shape[1], int((self.sequence_ids != PADDING).sum()))
        is_usable = isinstance(hidden, Tensor) and hidden.dim() == 3 and len(hidden) == 1 and hidden.shape[1] in sizes
        if self.embedded is not None or not is_usable or hidden is None:
            return None  # the second run of a shared layer, or a layer with another kind of input
        if self.hold is not None and self.hold[1] is not None:
            mine = _slots_of(hidden, self.hold[0], self.sequence_ids)
            hidden = torch.where(mine[..., None], self.hold[1], hidden)
        self.embedded = hidden
        return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})


def _named(result: Any, prefix: str = "") -> dict[str, Tensor]:
    """The float tensors that a model returned, whatever it wraps them in."""
    if not isinstance(result, dict):
        result = dict(enumerate(result if isinstance(result, tuple | list) else [result]))
    floats = {k: v for k, v in result.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {f"{prefix}{name}": value for name, value in floats.items()}


def _slots_of(hidden: Tensor, mine: Tensor, sequence_ids: Tensor) -> Tensor:
    """(1, L) or, for a model that runs on real tokens only, (1, T)."""
    return mine if hidden.shape[1] == mine.shape[1] else mine[sequence_ids != PADDING][None]


def _relative(value: Tensor, reference: Tensor) -> float:
    """max |difference| / max |value|, infinite where either is not finite."""
    change = float((value.double() - reference.double()).abs().max() / reference.double().abs().max().clamp(min=1e-300))
    return change if np.isfinite(change) else float("inf")


def _worst(changes: Sequence[float | None]) -> float | None:
    return max((change for change in changes if change is not None), default=None)


def _windows(config: Any) -> Iterator[int]:
    """Every attention window in the config."""
    for name in ("sliding_window", "local_attention", "attention_window", "block_size", "window_size"):
        value = getattr(config, name, None)
        yield from value if isinstance(value, list | tuple) else [value] if isinstance(value, int) else []


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    numpy_state = np.random.get_state()  # noqa: NPY002  (BigBird seeds it in every forward)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
