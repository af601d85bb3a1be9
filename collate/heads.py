"""Packed task heads: fine-tuning and inference of stock transformers models on packed rows.

    model = AutoModelForSequenceClassification.from_pretrained(...)      # stays the stock model, and so its checkpoints
    task = task_for(model)                                               # decides the task, prepares the model
    output = task(model, batch, denominators=task.count(batch))          # loss, logits per sequence

One trick serves all heads of all architectures. A stock head reads the encoder's last hidden state (B, L, D): token 0
of each row, or all tokens. So a hook on the encoder gathers what the head should read and hands it on as P sequences
of one token, (P, 1, D): the [CLS] of every sequence, the predicted tokens, the real tokens. The head is the stock one,
and it runs on nothing else: no padding, and no vocabulary projection but for predicted tokens.

The loss is not the stock one, which is a mean over the micro-batch and so depends on accumulation and on the number of
processes; it is the same formula with denominators that may be counted over a whole optimizer step.

Shape letters as in collate.layout; P slots that a head reads, S sequence slots per pack, C labels, V vocabulary.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from collate.isolation import is_isolated, isolate_sequences
from collate.layout import PADDING, PackLayout
from collate.masking import IGNORED
from collate.mlm import MLM_SUMS, check_mlm_loss, mlm_loss_of, mlm_metrics, mlm_sums

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
MODEL_INPUTS = ("input_ids", "position_ids", "token_type_ids")

# 1. What comes out: values by sequence.


class PerSequence(NamedTuple):
    """One value for each sequence, or one for each of its tokens; sequences in the batch's order.

    values [[.1, .9], [.7, .3]], lengths None  ->  a row for each of 2 sequences
    values [3, 4, 5, 6, 7], lengths [3, 2]     ->  [3, 4, 5] and [6, 7]
    """

    values: Tensor
    lengths: Tensor | None = None

    def split(self) -> tuple[Tensor, ...]:
        """N tensors, one per sequence."""
        return self.values.unbind() if self.lengths is None else self.values.split(self.lengths.tolist())

    def padded(self, fill: float = float("-inf")) -> Tensor:
        """(N, longest, …): values [3, 4, 5, 6, 7], lengths [3, 2] -> [[3, 4, 5], [6, 7, fill]]."""
        if self.lengths is None:
            return self.values
        sequence_T, position_T = _places(self.lengths)
        longest = max(self.lengths.tolist(), default=1)
        padded = self.values.new_full((len(self.lengths), longest, *self.values.shape[1:]), fill)
        return padded.index_put((sequence_T, position_T), self.values)

    def take(self, order: Tensor) -> "PerSequence":
        """The sequences in another order: sequence i of the result is sequence order[i] of this."""
        if self.lengths is None:
            return PerSequence(self.values[order])
        first = self.lengths.cumsum(0) - self.lengths
        lengths = self.lengths[order]
        sequence_T, position_T = _places(lengths)
        return PerSequence(self.values[first[order][sequence_T] + position_T], lengths)

    @staticmethod
    def concatenate(parts: Sequence["PerSequence"]) -> "PerSequence":
        """Those of several batches as one."""
        lengths = None if parts[0].lengths is None else torch.cat([part.lengths for part in parts])
        return PerSequence(torch.cat([part.values for part in parts]), lengths)


@dataclass(frozen=True, eq=False)
class PackedOutput:
    """What a task makes of one batch.

    loss: scalar; None for a batch that has sequences but no labels.
    sums: 1-D float64 statistics that add up over batches and ranks; `task.metrics(sums)` says what they mean.
    logits: the stock head's, one row per slot that it read; see each task.
    predictions: what `predict` collects.
    labels: their targets, where the batch has them.
    """

    loss: Tensor | None
    sums: Tensor
    logits: Tensor
    predictions: PerSequence
    labels: PerSequence | None = None


def _places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """lengths [3, 2] -> the sequence [0, 0, 0, 1, 1] and the position [0, 1, 2, 0, 1] of each of its tokens."""
    sequences = torch.arange(len(lengths), device=lengths.device)
    sequence_T = torch.repeat_interleave(sequences, lengths)
    first = lengths.cumsum(0) - lengths
    return sequence_T, torch.arange(len(sequence_T), device=lengths.device) - first[sequence_T]


def mean_by_sequence(values_T: Tensor, lengths: Tensor) -> Tensor:
    """(T, …) -> (N, …): values [1, 3, 5], lengths [2, 1] -> [2, 5]. Adds in float32 at least."""
    sequence_T, _ = _places(lengths)
    wide = _at_least_float32(values_T)
    sums = wide.new_zeros(len(lengths), *values_T.shape[1:]).index_add(0, sequence_T, wide)
    return (sums / lengths.view(-1, *[1] * (values_T.dim() - 1))).to(values_T.dtype)


# 2. The hook: gather what the head reads.


class GatherForHead:
    """Forward hook of the encoder: hand a stock head P sequences of one token instead of B packs.

    head_slots (P,): which of the B * L slots the head reads.
    head_lengths (N,): if given, the slots are those of N sequences in turn, and the head reads their means.
    pooler_slots (N,): whose hidden states the encoder's pooler reads; without them there is no pooler_output.

        last_hidden_state (2, 4, D), head_slots [0, 2, 4]  ->  (3, 1, D): slots 0 and 2 of pack 0, slot 0 of pack 1

    It holds no tensor and no module, so that copies and pickles of the model just work.
    """

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict, output):
        head_slots = kwargs.get("head_slots")
        if head_slots is None:
            return None
        if not isinstance(output, ModelOutput):
            raise ValueError(
                f"{type(encoder).__name__} returned a {type(output).__name__}; set model.config.return_dict=True"
            )
        hidden = output.last_hidden_state.flatten(0, 1)
        gathered = hidden.index_select(0, head_slots)
        if kwargs.get("head_lengths") is not None:
            gathered = mean_by_sequence(gathered, kwargs["head_lengths"])
        output["last_hidden_state"] = gathered[:, None]
        if "pooler_output" in output:
            # what the pooler made of each pack's first token is of no use, and must not be taken for the sequence's
            slots = kwargs.get("pooler_slots")
            output["pooler_output"] = None if slots is None else _pool(encoder, hidden.index_select(0, slots)[:, None])
        return output


def _pool(encoder: nn.Module, hidden_N1D: Tensor) -> Tensor:
    """The encoder's own pooler, as its forward applies it."""
    if hasattr(encoder, "pooler_activation"):  # ALBERT
        return encoder.pooler_activation(encoder.pooler(hidden_N1D[:, 0]))
    return encoder.pooler(hidden_N1D)


def prepare_head(model: nn.Module) -> nn.Module:
    """Isolate the sequences, and let the model's own head read gathered slots; returns the model.

    Without `sequence_ids` and `head_slots` the model is the stock one. Calling it twice changes nothing.
    Raises ValueError for models whose sequences cannot be isolated, with the reason.
    """
    isolate_sequences(model)
    encoder = _task_model(model).base_model
    if not _has_gather(encoder):
        encoder.register_forward_hook(GatherForHead(), with_kwargs=True)
    return model


def _has_gather(encoder: nn.Module) -> bool:
    return any(isinstance(hook, GatherForHead) for hook in encoder._forward_hooks.values())


def _task_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what DDP, PEFT or torch.compile wrapped around it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers model; a packed task needs one")


# 3. What goes in: one batch, and where its sequences lie.


class _PackedBatch:
    """A batch of the collator, and the slots that heads read."""

    def __init__(self, batch: Mapping[str, Tensor]):
        if "sequence_ids" not in batch:
            raise ValueError(
                f"the batch has no 'sequence_ids', only {sorted(batch)}; make it with DataCollatorWithPacking"
            )
        self.batch = batch
        self.layout = PackLayout(batch["sequence_ids"])

    @property
    def cls_slots(self) -> Tensor:
        """(N,) the slot of each sequence's [CLS]: its first token where the batch has no cls_positions."""
        positions_BS = self.batch.get("cls_positions")
        if positions_BS is None:
            return self.layout.token_index[self.layout.cu_seqlens[:-1].long()]
        packs = torch.arange(len(positions_BS), device=positions_BS.device)[:, None]
        slots = (packs * self.layout.sequence_ids_BL.shape[1] + positions_BS)[positions_BS >= 0]
        if len(slots) != self.layout.num_sequences:
            raise ValueError(
                f"cls_positions names {len(slots)} sequences, but sequence_ids has {self.layout.num_sequences}; "
                "both must come from one collator"
            )
        return slots

    @property
    def _labels_of_nothing(self) -> Tensor | None:
        """What stands for a column that the batch lacks: packs without sequences have no columns, and all labels."""
        return None if self.layout.num_sequences else self.layout.token_index

    def per_sequence(self, column: str) -> Tensor | None:
        """(B, S, …) -> (N, …), in the layout's order; None for a column that the batch lacks."""
        values_BS = self.batch.get(column)
        if values_BS is None:
            return self._labels_of_nothing
        depth_B = self.layout.sequence_ids_BL.amax(1)
        packs, slots = values_BS.shape[0], values_BS.shape[1] if values_BS.dim() > 1 else 0
        expected = self.batch["cls_positions"].shape if "cls_positions" in self.batch else (len(depth_B), slots)
        if (packs, slots) != tuple(expected):
            raise ValueError(
                f"{column!r} has shape {tuple(values_BS.shape)}, but this task needs one per sequence slot, "
                f"{tuple(expected)}; if these are labels of tokens, choose a token task"
            )
        is_sequence_BS = torch.arange(slots, device=depth_B.device) < depth_B[:, None]
        values_N = values_BS[is_sequence_BS]
        if len(values_N) != self.layout.num_sequences:
            raise ValueError(
                f"{column!r} has {slots} slots per pack, fewer than the {int(depth_B.max())} sequences of one; "
                "give the collator more slots"
            )
        return values_N

    def per_token(self, column: str) -> Tensor | None:
        """(B, L) -> (T,); None for a column that the batch lacks."""
        values_BL = self.batch.get(column)
        if values_BL is None:
            return self._labels_of_nothing
        if values_BL.shape != self.layout.sequence_ids_BL.shape:
            raise ValueError(
                f"{column!r} has shape {tuple(values_BL.shape)}, but this task needs one per token slot, "
                f"{tuple(self.layout.sequence_ids_BL.shape)}; if these are labels of sequences, choose a sequence task"
            )
        return self.layout.unpad(values_BL)

    def predicted(self) -> tuple[Tensor, Tensor | None]:
        """(P,) the slots whose labels say that a token is predicted, and these labels; without labels all tokens."""
        labels_T = self.per_token("labels")
        if labels_T is None:
            return self.layout.token_index, None
        predicted = _is_label(labels_T).nonzero().squeeze(1)
        return self.layout.token_index[predicted], labels_T[predicted]

    def sequences_of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) the sequence in which each of these slots lies, and (N,) how many lie in each sequence."""
        sequence_P = self.layout.sequence_of_token[self.layout.token_of_slot[slots]]
        return sequence_P, torch.bincount(sequence_P, minlength=self.layout.num_sequences)

    def stack(self, values: list) -> Tensor:
        """1-D float64: these sums, then the batch's tokens and sequences."""
        device = self.layout.sequence_ids_BL.device
        values = [*values, self.layout.num_tokens, self.layout.num_sequences]
        return torch.stack([torch.as_tensor(value, device=device).detach().double() for value in values])

    def run(
        self,
        model: nn.Module,
        slots: Tensor,
        head_lengths: Tensor | None = None,
        pooler_slots: Tensor | None = None,
    ) -> ModelOutput:
        """The model on this batch, its head on these slots; see GatherForHead."""
        stock = _task_model(model)
        encoder = stock.base_model
        if not (_has_gather(encoder) and is_isolated(model)):
            raise ValueError(
                f"{type(stock).__name__} is not prepared: its head would read the first token of each pack; "
                "call task_for(model) or prepare_head(model) after loading it"
            )
        accepted = inspect.signature(encoder.forward).parameters
        inputs = {name: self.batch[name] for name in MODEL_INPUTS if name in accepted and name in self.batch}
        output = model(
            **inputs,
            sequence_ids=self.batch["sequence_ids"],
            head_slots=slots,
            head_lengths=head_lengths,
            pooler_slots=pooler_slots,
            return_dict=True,
        )
        rows = len(slots) if head_lengths is None else len(head_lengths)
        if len(output[0]) != rows:
            raise ValueError(
                f"the head of {type(stock).__name__} made {len(output[0])} rows of {rows}: it does not read the "
                "encoder's last hidden state alone, so it cannot run packed"
            )
        return output


# 4. Tasks.


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a head is trained for: how its loss is counted, and what its outputs mean.

        task.count(batch)                    (k,) int64: what the loss is divided by; adds up over batches and ranks
        task(model, batch, denominators)     a PackedOutput, its loss over these; None: over this batch alone
        task.metrics(sums)                   numbers for the log, from added-up PackedOutput.sums

    A batch of padding alone, such as that of a process without packs, gives loss 0 and gradients of 0.
    """

    names: ClassVar[tuple[str, ...]]
    """What the sums are, in order, before the last two: tokens and sequences."""

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options) -> "Task":
        """The task of a stock model with this config."""
        return cls(**options)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        raise NotImplementedError

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        """The loss, from sums by name."""
        return _share(sums["loss"], denominators[0])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """What added-up sums mean; a metric without anything to count is left out."""
        *sums, tokens, sequences = sums
        metrics = self._metrics(dict(zip(self.names, sums, strict=True)))
        return {name: float(value) for name, value in metrics.items()} | {
            "tokens": int(tokens),
            "sequences": int(sequences),
        }

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _output(self, packed: _PackedBatch, sums: dict | None, denominators: Tensor | None, **fields) -> PackedOutput:
        """sums: by name; None: the batch has no labels."""
        loss = None
        if sums is not None:
            loss = self.loss(sums, self.count(packed.batch) if denominators is None else denominators)
        elif denominators is not None:
            raise ValueError(
                f"{type(self).__name__} cannot train on a batch without labels, only {sorted(packed.batch)}; "
                "keep the label columns when you pack the dataset"
            )
        values = [0] * len(self.names) if sums is None else [sums[name] for name in self.names]
        return PackedOutput(loss=loss, sums=packed.stack(values), **fields)


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(Task):
    """One label for each sequence, several, or a number: AutoModelForSequenceClassification.

    Batch: labels (B, S) integers, -100 in empty slots; for regression floats, NaN in empty slots; for several labels
    floats (B, S, C). A sequence without a label (-100, NaN) is in no mean. logits and predictions: (N, C).

    num_labels, problem_type: as in the model's config. Where that is silent, stock models' rule holds: num_labels 1 is
        regression, else integers mean one label of many, and floats several.
    pooling: "cls", "mean" (of the sequence's hidden states), or "late" (of its tokens' logits; EuroBERT's default).
    """

    num_labels: int
    problem_type: str | None = None
    pooling: str = "cls"
    names = ("loss", "labels", "correct")

    def __post_init__(self) -> None:
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"unknown problem_type {self.problem_type!r}; choose from {list(PROBLEM_TYPES)} or None")
        _check_pooling(self.pooling, ("cls", "mean", "late"))

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options) -> "SequenceClassification":
        pooling = getattr(config, "classifier_pooling", "cls")  # ModernBERT and EuroBERT have a choice
        pooling = "cls" if pooling == "bos" else pooling
        stock = {"num_labels": config.num_labels, "problem_type": config.problem_type, "pooling": pooling}
        return cls(**stock | options)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(1,) labels; of several labels a sequence, each counts."""
        return _counts(batch, _is_label(batch["labels"]) if "labels" in batch else None)

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = _PackedBatch(batch)
        logits_NC = self._logits(model, packed)
        labels = packed.per_sequence("labels")
        sums = None if labels is None else self._sums(_at_least_float32(logits_NC), labels)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_NC,
            predictions=PerSequence(logits_NC.detach()),
            labels=None if labels is None else PerSequence(labels),
        )

    def _logits(self, model: nn.Module, packed: _PackedBatch) -> Tensor:
        if self.pooling == "cls":
            slots = packed.cls_slots
            return packed.run(model, slots, pooler_slots=slots)["logits"]
        slots, lengths = packed.layout.token_index, packed.layout.lengths
        if self.pooling == "mean":
            return packed.run(model, slots, head_lengths=lengths)["logits"]
        # the stock head takes the mean over the single token that it sees, which leaves the token's logits
        return mean_by_sequence(packed.run(model, slots)["logits"], lengths)

    def _sums(self, logits_NC: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not len(logits_NC):  # the type of no labels says nothing
            return {"loss": logits_NC.sum(), "labels": 0, "correct": 0}
        problem = self._problem(labels)
        if problem == "single_label_classification":
            return _cross_entropy_sums(logits_NC, labels)
        if labels.numel() != logits_NC.numel():
            raise ValueError(
                f"labels {tuple(labels.shape)} do not fit logits {tuple(logits_NC.shape)} of {problem}; give "
                f"{logits_NC.shape[1]} floats per sequence, or if each has one label of many, cast them to integers"
            )
        labels_NC = labels.view_as(logits_NC).to(logits_NC)
        is_label = _is_label(labels_NC)
        labels_NC = labels_NC.nan_to_num()
        if problem == "regression":
            loss_NC, correct = (logits_NC - labels_NC) ** 2, labels_NC.new_zeros(())
        else:
            loss_NC = F.binary_cross_entropy_with_logits(logits_NC, labels_NC, reduction="none")
            correct = (((logits_NC > 0) == (labels_NC > 0.5)) & is_label).sum()
        return {"loss": loss_NC[is_label].sum(), "labels": is_label.sum(), "correct": correct}

    def _problem(self, labels: Tensor) -> str:
        problem = self.problem_type
        if problem is None and self.num_labels == 1:
            problem = "regression"
        elif problem is None:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if labels.is_floating_point() == (problem == "single_label_classification"):
            wanted = "integers" if problem == "single_label_classification" else "floats"
            raise ValueError(f"labels are {labels.dtype}, but {problem} needs {wanted}; cast the column before packing")
        if problem == "single_label_classification" and labels.dim() > 1:
            raise ValueError(
                f"labels {tuple(labels.shape)} are integers, of which {problem} needs one per sequence; if each may "
                "have several labels, cast them to floats before packing"
            )
        return problem

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = {"loss": _share(sums["loss"], sums["labels"])}
        is_regression = self.problem_type == "regression" or (self.problem_type is None and self.num_labels == 1)
        if sums["labels"] > 0 and not is_regression:
            metrics["accuracy"] = sums["correct"] / sums["labels"]
        return metrics


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Task):
    """A label for each token: AutoModelForTokenClassification.

    Batch: labels (B, L), -100 where a token has none. The loss is the mean over labelled tokens, as in the stock model.
    logits: (T, C) of all real tokens; predictions and labels: the same by sequence.
    """

    names = ("loss", "labels", "correct")

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(1,) labelled tokens."""
        return _counts(batch, _labelled_tokens(batch))

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = _PackedBatch(batch)
        logits_TC = packed.run(model, packed.layout.token_index)["logits"].squeeze(1)
        labels_T = packed.per_token("labels")
        sums = None if labels_T is None else _cross_entropy_sums(_at_least_float32(logits_TC), labels_T)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_TC,
            predictions=PerSequence(logits_TC.detach(), packed.layout.lengths),
            labels=None if labels_T is None else PerSequence(labels_T, packed.layout.lengths),
        )

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = {"loss": _share(sums["loss"], sums["labels"])}
        return metrics | ({"accuracy": sums["correct"] / sums["labels"]} if sums["labels"] > 0 else {})


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Where in its own sequence an answer starts and ends: AutoModelForQuestionAnswering.

    Batch: start_positions and end_positions (B, S), counted from the sequence's own first token. The softmax runs over
    the tokens of one sequence: the logits of all others are -inf. The loss is half the mean over sequences for the
    starts plus half that for the ends. A position outside of its sequence, -100 for one, is in no mean. (Stock models
    take a negative one for 0, the [CLS]; datasets that mean that should say 0.)

    logits: (T, 2) start and end of all real tokens; predictions: the same by sequence, and
    `predictions.padded()` is (N, longest, 2), filled with -inf. labels: (N, 2).
    """

    names = ("start_loss", "starts", "start_correct", "end_loss", "ends", "end_correct", "both_correct", "both")

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(2,) starts, and ends, that lie in their sequence."""
        if "start_positions" not in batch:
            return _counts(batch, None, None)
        lengths_BS = _lengths_by_slot(batch["sequence_ids"], batch["start_positions"].shape[1])
        return _counts(batch, *(_is_inside(batch[name], lengths_BS) for name in ("start_positions", "end_positions")))

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        starts, ends = denominators
        return (_share(sums["start_loss"], starts) + _share(sums["end_loss"], ends)) / 2

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = _PackedBatch(batch)
        output = packed.run(model, packed.layout.token_index)
        logits_T2 = torch.cat([output["start_logits"], output["end_logits"]], dim=1)
        targets = [packed.per_sequence(name) for name in ("start_positions", "end_positions")]
        labels_N2 = None if targets[0] is None or targets[1] is None else torch.stack(targets, dim=1)
        sums = None
        if labels_N2 is not None:
            sums = self._sums(PerSequence(_at_least_float32(logits_T2), packed.layout.lengths), labels_N2)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_T2,
            predictions=PerSequence(logits_T2.detach(), packed.layout.lengths),
            labels=None if labels_N2 is None else PerSequence(labels_N2),
        )

    @staticmethod
    def _sums(logits: PerSequence, labels_N2: Tensor) -> dict[str, Tensor]:
        logits_NM2 = logits.padded()
        is_inside = _is_inside(labels_N2, logits.lengths[:, None])
        labels_N2 = labels_N2.where(is_inside, IGNORED)
        loss = F.cross_entropy(logits_NM2, labels_N2, reduction="none", ignore_index=IGNORED).sum(0)
        is_correct = (logits_NM2.argmax(1) == labels_N2) & is_inside
        counts, correct, both = is_inside.sum(0), is_correct.sum(0), is_inside.all(1)
        return {
            "start_loss": loss[0],
            "starts": counts[0],
            "start_correct": correct[0],
            "end_loss": loss[1],
            "ends": counts[1],
            "end_correct": correct[1],
            "both_correct": is_correct.all(1).sum(),
            "both": both.sum(),
        }

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = {"loss": self.loss(sums, torch.stack([sums["starts"], sums["ends"]]))}
        for name, correct, count in (
            ("start_accuracy", "start_correct", "starts"),
            ("end_accuracy", "end_correct", "ends"),
            ("exact_match", "both_correct", "both"),
        ):
            if sums[count] > 0:
                metrics[name] = sums[correct] / sums[count]
        return metrics


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """Masked language modelling: AutoModelForMaskedLM.

    Batch: labels (B, L), -100 where nothing is predicted. The vocabulary projection runs on predicted tokens only;
    without labels, on all real tokens.
    mlm_loss: "token", the mean over predicted tokens, as in the stock model; or "sequence", the mean over sequences of
        the mean over each one's predicted tokens.
    logits: (P, V) of the predicted tokens in order; predictions and labels: their token ids, by sequence.
    """

    mlm_loss: str = "token"
    names = MLM_SUMS

    def __post_init__(self) -> None:
        check_mlm_loss(self.mlm_loss)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(2,) predicted tokens, sequences with predicted tokens.

        labels [[-100, 7, 8, -100]], sequence_ids [[1, 1, 1, 2]]  ->  [2, 1]
        """
        labelled_BL = _labelled_tokens(batch)
        if labelled_BL is None:
            return _counts(batch, None, None)
        return _counts(batch, labelled_BL, _lengths_by_slot(batch["sequence_ids"].where(labelled_BL, PADDING)) > 0)

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        return mlm_loss_of(sums, self.mlm_loss, tokens=denominators[0], sequences=denominators[1])

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = _PackedBatch(batch)
        slots, labels = packed.predicted()
        logits_PV = packed.run(model, slots)["logits"].squeeze(1)
        sequence_P, lengths = packed.sequences_of(slots)
        sums = None if labels is None else mlm_sums(_at_least_float32(logits_PV), labels, sequence_P, lengths)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_PV,
            predictions=PerSequence(logits_PV.detach().argmax(-1), lengths),
            labels=None if labels is None else PerSequence(labels, lengths),
        )

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = {"loss": self.loss(sums, torch.stack([sums["mlm_tokens"], sums["mlm_sequences"]]))}
        return metrics | mlm_metrics(sums)


@dataclass(frozen=True, kw_only=True)
class PreTraining(MaskedLM):
    """Masked language modelling plus a label for each pair of sentences: BertForPreTraining, AlbertForPreTraining.

    Batch: labels (B, L) as in MaskedLM and next_sentence_label (B, S), for ALBERT sentence_order_label; -100 in empty
    slots and for a sequence without one. The loss is the sum of both means.
    logits: (P, V) of predicted tokens; predictions: (N, 2) the pairs' logits; labels: (N,).
    """

    pair_logits: str = "seq_relationship_logits"
    pair_label: str = "next_sentence_label"
    names = (*MaskedLM.names, "pair_loss", "pairs", "pair_correct", "pair_ones")

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options) -> "PreTraining":
        if config.model_type not in PAIR_OUTPUTS:
            raise ValueError(
                f"{config.model_type} is not pretrained by masked language modelling and sentence pairs; "
                f"PreTraining is for {sorted(PAIR_OUTPUTS)}"
            )
        return cls(**dict(zip(("pair_logits", "pair_label"), PAIR_OUTPUTS[config.model_type], strict=True)) | options)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(3,) predicted tokens, sequences with predicted tokens, sequences with a label of their pair."""
        if self.pair_label not in batch and (others := PAIR_LABELS.keys() & batch.keys()):
            raise ValueError(
                f"the batch has {others.pop()!r}, but this model learns {self.pair_label!r}, which means something "
                f"else; prepare the dataset with objective={PAIR_LABELS[self.pair_label]!r}, or remove the column"
            )
        pairs = _counts(batch, _is_label(batch[self.pair_label]) if self.pair_label in batch else None)
        return torch.cat([super().count(batch), pairs])

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        return super().loss(sums, denominators) + _share(sums["pair_loss"], denominators[2])

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = _PackedBatch(batch)
        slots, labels = packed.predicted()
        output = packed.run(model, slots, pooler_slots=packed.cls_slots)
        logits_PV, pair_logits_N2 = output["prediction_logits"].squeeze(1), output[self.pair_logits]
        pair_labels = packed.per_sequence(self.pair_label)
        sums = None
        if labels is not None:
            sums = mlm_sums(_at_least_float32(logits_PV), labels, *packed.sequences_of(slots))
            sums |= self._pair_sums(_at_least_float32(pair_logits_N2), pair_labels)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_PV,
            predictions=PerSequence(pair_logits_N2.detach()),
            labels=None if pair_labels is None else PerSequence(pair_labels),
        )

    @staticmethod
    def _pair_sums(logits_N2: Tensor, labels_N: Tensor | None) -> dict[str, Tensor]:
        if labels_N is None:
            labels_N = torch.full(logits_N2.shape[:1], IGNORED, device=logits_N2.device)
        sums = _cross_entropy_sums(logits_N2, labels_N)
        ones = (labels_N == 1).sum()
        return {"pair_loss": sums["loss"], "pairs": sums["labels"], "pair_correct": sums["correct"], "pair_ones": ones}

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = torch.stack([sums["mlm_tokens"], sums["mlm_sequences"], sums["pairs"]])
        metrics = {"loss": self.loss(sums, counts)} | mlm_metrics(sums)
        if sums["pairs"] > 0:
            ones = sums["pair_ones"] / sums["pairs"]
            name = PAIR_LABELS[self.pair_label]
            metrics |= {
                f"{name}_loss": sums["pair_loss"] / sums["pairs"],
                f"{name}_accuracy": sums["pair_correct"] / sums["pairs"],
                f"{name}_majority": max(ones, 1 - ones),
            }
        return metrics


@dataclass(frozen=True, kw_only=True)
class SequenceEmbedding(Task):
    """A vector for each sequence: encoders without a head, such as AutoModel gives. For inference: there is no loss.

    pooling: "cls", the hidden state of the sequence's [CLS]; or "mean", that of all its tokens.
    logits and predictions: (N, D).
    """

    pooling: str = "cls"
    names = ()

    def __post_init__(self) -> None:
        _check_pooling(self.pooling, ("cls", "mean"))

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return _counts(batch)

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = _PackedBatch(batch)
        if self.pooling == "cls":
            slots, lengths = packed.cls_slots, None
        else:
            slots, lengths = packed.layout.token_index, packed.layout.lengths
        vectors_ND = packed.run(model, slots, head_lengths=lengths)["last_hidden_state"]
        vectors_ND = vectors_ND.squeeze(1)
        return self._output(packed, None, denominators, logits=vectors_ND, predictions=PerSequence(vectors_ND.detach()))

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}


TASKS: dict[str, type[Task]] = {
    "ForSequenceClassification": SequenceClassification,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
    "ForMaskedLM": MaskedLM,
    "ForPreTraining": PreTraining,
    "ForNextSentencePrediction": SequenceClassification,
}
"""How the name of a stock class ends -> its task."""

PAIR_OUTPUTS = {
    "albert": ("sop_logits", "sentence_order_label"),
    "bert": ("seq_relationship_logits", "next_sentence_label"),
    "ernie": ("seq_relationship_logits", "next_sentence_label"),
}
"""What stock models for pretraining call their sentence pairs' logits and labels."""

PAIR_LABELS = {"next_sentence_label": "nsp", "sentence_order_label": "sop"}
"""The labels of sentence pairs, and what metrics call them."""


def task_for(model: nn.Module, **options) -> Task:
    """The task of a stock model, by its class and config; it also prepares the model, see `prepare_head`.

        BertForSequenceClassification, config.num_labels=3  ->  SequenceClassification(num_labels=3)
        RobertaModel, pooling="mean"                        ->  SequenceEmbedding(pooling="mean")

    options: fields of the task, which win over the config.
    Raises ValueError for a model without a packed task, and for one whose sequences cannot be isolated.
    """
    stock = _task_model(model)
    if "denominators" in inspect.signature(stock.forward).parameters:
        raise ValueError(f"{type(stock).__name__} counts its own loss; call it, it needs no task")
    task = _task_class(stock).for_config(stock.config, **options)
    prepare_head(model)
    return task


def _task_class(stock: PreTrainedModel) -> type[Task]:
    if stock.base_model is stock:
        return SequenceEmbedding
    for parent in type(stock).__mro__:  # a subclass of a stock class has the stock class's task
        for ending, task in TASKS.items():
            if parent.__name__.endswith(ending):
                return task
    raise ValueError(
        f"there is no packed task for {type(stock).__name__}; there are tasks for encoders and for classes whose names "
        f"end in {sorted(TASKS)}"
    )


def packed_predictions(model: nn.Module, batch: Mapping[str, Tensor], task: Task | None = None) -> tuple[Tensor, ...]:
    """Inference on one batch: a tensor for each sequence, in the batch's order.

    Classification (C,), token classification (n, C), question answering (n, 2), embeddings (D,); see the tasks.
    task: None: that of `task_for(model)`. The model is in evaluation mode meanwhile.
    """
    task = task_for(model) if task is None else task
    prepare_head(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return task(model, batch).predictions.split()
    finally:
        model.train(was_training)


# 5. Sums and counts.


def _cross_entropy_sums(logits_NC: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    is_label = _is_label(labels_N)
    return {
        "loss": F.cross_entropy(logits_NC, labels_N, reduction="sum", ignore_index=IGNORED),
        "labels": is_label.sum(),
        "correct": ((logits_NC.argmax(-1) == labels_N) & is_label).sum(),
    }


def _counts(batch: Mapping[str, Tensor], *hits: Tensor | None) -> Tensor:
    """(k,) int64: how often each is True; 0 for None, a column that the batch does not have."""
    zero = batch["sequence_ids"].new_zeros((), dtype=torch.int64)
    return torch.stack([zero if hit is None else hit.sum() for hit in hits]) if hits else zero.new_zeros(0)


def _is_label(labels: Tensor) -> Tensor:
    """Bool: NaN, and -100 among integers, are no labels."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def _labelled_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    """(B, L) bool."""
    return _is_label(batch["labels"]) & (batch["sequence_ids"] != PADDING) if "labels" in batch else None


def _lengths_by_slot(sequence_ids_BL: Tensor, depth: int | None = None) -> Tensor:
    """(B, depth) int64: [[1, 1, 2, 0]], depth 3 -> [[2, 1, 0]]. Of fixed shape: a GPU need not be waited for."""
    packs, slots = sequence_ids_BL.shape
    depth = slots if depth is None else depth
    counts = sequence_ids_BL.new_zeros((packs, max(depth, slots) + 1), dtype=torch.int64)
    return counts.scatter_add_(1, sequence_ids_BL.long(), torch.ones_like(sequence_ids_BL, dtype=torch.int64))[
        :, 1 : depth + 1
    ]


def _is_inside(positions: Tensor, lengths: Tensor) -> Tensor:
    return (positions >= 0) & (positions < lengths)


def _share(total: Tensor, count: Tensor) -> Tensor:
    """total / count; a count of 0 goes with a total of 0."""
    return total / count.clamp(min=1).to(total)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize < 4 else values


def _check_pooling(pooling: str, choices: Sequence[str]) -> None:
    if pooling not in choices:
        raise ValueError(f"unknown pooling {pooling!r}; choose from {list(choices)}")
