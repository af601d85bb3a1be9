"""What divides every loss. A loss is a list of terms, each a row: its name, a sum, and the count that divides the sum.

    term                sum                     count
    mlm, "token"        mlm_loss_by_token       mlm_tokens       predicted tokens
    mlm, "sequence"     mlm_loss_by_sequence    mlm_sequences    sequences with predicted tokens
    pair                pair_loss               pairs            sequences with a label of their pair
    label               loss                    labels           sequences or tokens with a label
    start, end          start_loss, end_loss    starts, ends     answers that start, or end, in their sequence

A count spans all micro-batches and all ranks of an optimizer step; the batches give it before the first forward pass.
So a loss depends neither on packing, nor on accumulation, nor on the number of processes.

The MLM loss "sequence" is the mean over sequences of the mean over each one's predicted tokens: every sequence weighs
the same, as in "Packing: Towards 2x NLP BERT Acceleration" (arXiv 2107.02027, section 3.2.3). "token" is the mean over
predicted tokens, as in the original BERT: longer sequences weigh more.

To add a term, write its row in a `Loss`, and its sum beside the other sums of that loss. Modules of a model may add
terms, too: see collate.heads.loss_rows.

Shape letters: N sequences, P predicted tokens, C labels, V vocabulary, M the longest sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.columns import IGNORED, PAIR_LABELS
from collate.layout import PADDING, PackLayout
from collate.views import at_least_float32

Batch = Mapping[str, Tensor]
Sums = Mapping[str, Tensor]
Count = Callable[[Batch], Tensor]
"""Batch -> a scalar: how many it holds of something, or the sum of their weights."""


def _as_it_is(mean: Tensor) -> Tensor:
    return mean


class Mean(NamedTuple):
    """One row: a sum divided by a count. A term of a loss, or a metric for the log.

    total, per: the names of the sum and of the count. weight: a factor of the mean. shown: what the log shows of it.
    """

    name: str
    total: str
    per: str
    weight: float = 1.0
    shown: Callable[[Tensor], Tensor] = _as_it_is

    def of(self, sums: Sums, counts: Sums) -> Tensor:
        """The weighted mean. Where the count is 0, so is the sum, and the mean is 0."""
        total, count = sums[self.total], counts[self.per]
        mean = total / count.where(count != 0, 1).to(total)
        return mean if self.weight == 1 else self.weight * mean


@dataclass(frozen=True)
class Loss:
    """A list of terms, with what divides them and what is logged beside them.

        loss.count(batch)            (k,) the denominators; they add up over batches and ranks
        loss(sums, denominators)     a scalar; None: divided by the counts among the sums themselves
        loss.stacked(sums, layout)   1-D float64; adds up over batches and ranks
        loss.metrics(stacked)        what added-up sums mean
        loss.plus(rows)              the same with more terms

    counts: the name of each denominator, in order, and how it is counted; the counts among the sums have these names.
    others: sums that no row needs. only_whole: the log has a loss only where every term has something to count.
    added: terms that modules of the model add. Without labels they are no loss: the log has none for them alone.
    sums, in the methods: {name: scalar} of one batch.
    """

    terms: tuple[Mean, ...]
    counts: Mapping[str, Count]
    logged: tuple[Mean, ...] = ()
    others: tuple[str, ...] = ()
    only_whole: bool = False
    added: tuple[Mean, ...] = ()

    def plus(self, rows: Sequence[Mean]) -> "Loss":
        """This loss and more terms, per "sequences" or "tokens", whose means the log shows without their weights."""
        if not rows:
            return self
        return replace(
            self,
            counts={**self.counts, **{row.per: COUNTS_OF_ADDED[row.per] for row in rows}},
            logged=(*self.logged, *(row._replace(weight=1.0) for row in rows)),
            added=(*self.added, *rows),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What the sums are, in order, before the last two: tokens and sequences."""
        rows = [name for row in (*self.terms, *self.added, *self.logged) for name in (row.total, row.per)]
        return tuple(dict.fromkeys((*self.counts, *rows, *self.others)))

    def count(self, batch: Batch) -> Tensor:
        """(k,) one number for each of `counts`, in their order; int64 unless there are sums of weights."""
        found = [count(batch) for count in self.counts.values()]
        return torch.stack(found) if found else batch["sequence_ids"].new_zeros(0, dtype=torch.int64)

    def weight(self, batch: Batch) -> Tensor:
        """What the first term is a mean over."""
        return self.counts[self.terms[0].per](batch)

    def __call__(self, sums: Sums, denominators: Tensor | None = None) -> Tensor:
        """The weighted sum of the terms. A denominator of 0 goes with a sum of 0."""
        if denominators is not None and len(denominators) != len(self.counts):
            raise ValueError(
                f"a loss with the denominators {', '.join(self.counts)} got {len(denominators)} of them; count them as "
                "the model or its task does: model.count_denominators(batch), task.count(batch)"
            )
        counts = sums if denominators is None else dict(zip(self.counts, denominators.unbind(), strict=True))
        return reduce(add, (term.of(sums, counts) for term in (*self.terms, *self.added)))

    def stacked(self, sums: Sums | None, layout: PackLayout) -> Tensor:
        """The sums in the order of `names`, then the batch's tokens and sequences. None: there are no labels."""
        found = [layout.is_real_token.sum(), layout.is_real_sequence.sum()]
        values = [found[0] * 0 if sums is None else sums[name] for name in self.names] + found
        return torch.stack([value.detach().double() for value in values])

    def metrics(self, stacked: Tensor) -> dict[str, float]:
        """What added-up sums mean. A mean over nothing is left out: a loss of 0 would pass for the best one."""
        *values, tokens, sequences = stacked
        sums = dict(zip(self.names, values, strict=True))
        has_some = [bool(sums[term.per] > 0) for term in self.terms]
        means = {}
        if all(has_some) if self.only_whole else any(has_some):
            means["loss"] = self(sums)
        means |= {row.name: row.shown(row.of(sums, sums)) for row in self.logged if sums[row.per] > 0}
        numbers = {"tokens": int(tokens), "sequences": int(sequences)}
        return {name: float(mean) for name, mean in means.items()} | numbers


# -- what is counted: in fixed shapes, so that a GPU need not be waited for --------------------------------------------


def has_label(labels: Tensor) -> Tensor:
    """Bool: where there is a label. Among integers -100 is none, among floats NaN."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def count_labels(batch: Batch, columns: Sequence[str]) -> Tensor:
    """Labels in those of the columns that the batch has; of several labels of a sequence, each counts."""
    found = [has_label(batch[column]).sum() for column in columns if column in batch]
    return reduce(add, found, batch["sequence_ids"].new_zeros((), dtype=torch.int64))


def count_labelled_tokens(batch: Batch) -> Tensor:
    """labels [[-100, 7, 8, -100]], sequence_ids [[1, 1, 1, 2]]  ->  2"""
    return _labelled_tokens(batch).sum()


def count_labelled_sequences(batch: Batch) -> Tensor:
    """Sequences with a labelled token: labels [[-100, 7, 8, -100]], sequence_ids [[1, 1, 1, 2]]  ->  1"""
    return (lengths_by_slot(batch["sequence_ids"].where(_labelled_tokens(batch), PADDING)) > 0).sum()


def count_inside(batch: Batch, column: str) -> Tensor:
    """Positions (B, S) that lie in their sequence: 2 in a sequence of 3 tokens does, 3 and -100 do not."""
    if column not in batch:
        return batch["sequence_ids"].new_zeros((), dtype=torch.int64)
    return is_inside(batch[column], lengths_by_slot(batch["sequence_ids"], batch[column].shape[1])).sum()


def is_inside(positions: Tensor, lengths: Tensor) -> Tensor:
    """Bool: whether each position is one of its sequence's."""
    return (positions >= 0) & (positions < lengths)


def lengths_by_slot(sequence_ids_BL: Tensor, depth: int | None = None) -> Tensor:
    """(B, depth) int64: [[1, 1, 2, 0]], depth 3 -> [[2, 1, 0]]. depth: None: L, the most that a pack can hold."""
    packs, slots = sequence_ids_BL.shape
    depth = slots if depth is None else depth
    ones = torch.ones_like(sequence_ids_BL, dtype=torch.int64)
    counts = ones.new_zeros((packs, max(depth, slots) + 1)).scatter_add_(1, sequence_ids_BL.long(), ones)
    return counts[:, 1 : depth + 1]


def sequences_in(batch: Batch) -> Tensor:
    """sequence_ids [[1, 1, 1, 2], [0, 0, 0, 0]]  ->  2"""
    return batch["sequence_ids"].amax(1).sum()


def tokens_in(batch: Batch) -> Tensor:
    """sequence_ids [[1, 1, 2, 0]]  ->  3"""
    return (batch["sequence_ids"] != PADDING).sum()


COUNTS_OF_ADDED: Mapping[str, Count] = {"sequences": sequences_in, "tokens": tokens_in}
"""What terms that modules add may be divided by."""


def _labelled_tokens(batch: Batch) -> Tensor:
    """(B, L) bool."""
    is_token = batch["sequence_ids"] != PADDING
    return has_label(batch["labels"]) & is_token if "labels" in batch else torch.zeros_like(is_token)


# -- one label for each sequence or token ------------------------------------------------------------------------------


def label_sums(logits_NC: Tensor, labels_N: Tensor, by_row: bool = False) -> dict[str, Tensor]:
    """Cross-entropy with one label of many: the sums over what has a label.

    by_row: add up the losses of the rows, as `mlm_sums` does; torch's own sum rounds otherwise in the last bit.
    """
    is_label = has_label(labels_N)
    reduction = "none" if by_row else "sum"
    return {
        "loss": F.cross_entropy(logits_NC, labels_N, reduction=reduction, ignore_index=IGNORED).sum(),
        "labels": is_label.sum(),
        "correct": ((logits_NC.argmax(-1) == labels_N) & is_label).sum(),
    }


def number_sums(logits_NC: Tensor, labels_NC: Tensor, is_regression: bool) -> dict[str, Tensor]:
    """Squared errors, or binary cross-entropies of several labels: the sums over numbers that are not NaN."""
    is_label = has_label(labels_NC)
    labels_NC = labels_NC.nan_to_num()
    if is_regression:
        loss_NC, correct = (logits_NC - labels_NC) ** 2, labels_NC.new_zeros(())
    else:
        loss_NC = F.binary_cross_entropy_with_logits(logits_NC, labels_NC, reduction="none")
        correct = (((logits_NC > 0) == (labels_NC > 0.5)) & is_label).sum()
    return {"loss": loss_NC.where(is_label, 0).sum(), "labels": is_label.sum(), "correct": correct}


LABEL = Mean("label", "loss", "labels")
ACCURACY = Mean("accuracy", "correct", "labels")
SEQUENCE_LABELS = {"labels": partial(count_labels, columns=("labels",))}
SEQUENCE_LABEL_LOSS = Loss((LABEL,), SEQUENCE_LABELS, (ACCURACY,))
NUMBER_LOSS = Loss((LABEL,), SEQUENCE_LABELS)
TOKEN_LABEL_LOSS = Loss((LABEL,), {"labels": count_labelled_tokens}, (ACCURACY,))
NO_LOSS = Loss((), {})


# -- spans of a sequence -----------------------------------------------------------------------------------------------


def span_sums(logits_NM2: Tensor, positions_N2: Tensor, lengths_N: Tensor) -> dict[str, Tensor]:
    """Cross-entropy over the tokens of each sequence, of where a span starts and where it ends.

    logits_NM2: -inf behind a sequence's end. A position outside of its sequence is in no sum.
    """
    inside_N2 = is_inside(positions_N2, lengths_N[:, None])
    labels_N2 = positions_N2.where(inside_N2, IGNORED)
    loss_2 = F.cross_entropy(logits_NM2, labels_N2, reduction="none", ignore_index=IGNORED).sum(0)
    is_correct = (logits_NM2.argmax(1) == labels_N2) & inside_N2
    counts_2, correct_2 = inside_N2.sum(0), is_correct.sum(0)
    return {
        **{"start_loss": loss_2[0], "starts": counts_2[0], "start_correct": correct_2[0]},
        **{"end_loss": loss_2[1], "ends": counts_2[1], "end_correct": correct_2[1]},
        **{"both_correct": is_correct.all(1).sum(), "both": inside_N2.all(1).sum()},
    }


SPAN_LOSS = Loss(
    terms=(Mean("start", "start_loss", "starts", weight=0.5), Mean("end", "end_loss", "ends", weight=0.5)),
    counts={
        "starts": partial(count_inside, column="start_positions"),
        "ends": partial(count_inside, column="end_positions"),
    },
    logged=(
        Mean("start_accuracy", "start_correct", "starts"),
        Mean("end_accuracy", "end_correct", "ends"),
        Mean("exact_match", "both_correct", "both"),
    ),
    only_whole=True,
)


# -- masked tokens, and pairs of sentences -----------------------------------------------------------------------------


WIDENED = 1 << 22, 1 << 28
"""Bytes of logits in float32 at a time: what a CPU's cache holds; and what costs a GPU few launches."""


class TokenLosses(torch.autograd.Function):
    """logits (P, V), labels (P,) -> cross-entropies (P,) in float32 at least; and (P,) bool, whether the label wins.

        loss_p = log(sum_v exp(logit_pv)) - logit_p,label

    torch's own keeps log-probabilities (P, V) for the backward pass, under autocast in float32: 300 MB for 2,458 tokens
    and a vocabulary of 30,522. Here some rows at a time are widened, and of each row one number is kept.

    torch.compile gets all rows at once: it merges the steps and keeps no table either. Parts would tie its graph to
    their number, which differs between batches.
    """

    @staticmethod
    def forward(ctx, logits_PV, labels_P):
        parts = [_losses_of_rows(*part) for part in _some_rows(logits_PV, labels_P)]
        log_sums_P, picked_P, is_correct_P = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(logits_PV, labels_P, log_sums_P)
        ctx.mark_non_differentiable(is_correct_P)
        return log_sums_P - picked_P, is_correct_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_P, _):
        logits_PV, labels_P, log_sums_P = ctx.saved_tensors
        if torch.compiler.is_compiling():
            is_label_PV = torch.arange(logits_PV.shape[1], device=logits_PV.device) == labels_P[:, None]
            apart_PV = (at_least_float32(logits_PV) - log_sums_P[:, None]).exp() - is_label_PV.float()
            return (apart_PV * grad_P[:, None]).to(logits_PV.dtype), None
        grad_PV = torch.empty_like(logits_PV)
        for logits, labels, log_sums, grad, place in _some_rows(logits_PV, labels_P, log_sums_P, grad_P, grad_PV):
            wide = place if place.itemsize >= 4 else torch.empty_like(place, dtype=torch.float32)
            torch.sub(logits, log_sums[:, None], out=wide).exp_()
            wide.scatter_add_(1, labels[:, None], wide.new_full((len(labels), 1), -1.0))
            torch.mul(wide, grad[:, None], out=place)
        return grad_PV, None


def _losses_of_rows(logits_PV: Tensor, labels_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide_PV = at_least_float32(logits_PV)
    picked_P = wide_PV.gather(1, labels_P[:, None]).squeeze(1)
    return wide_PV.logsumexp(1), picked_P, logits_PV.argmax(1) == labels_P


def _some_rows(logits_PV: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    if torch.compiler.is_compiling():
        return [(logits_PV, *others)]
    rows = max(1, WIDENED[logits_PV.device.type != "cpu"] // (4 * max(1, logits_PV.shape[1])))
    return list(zip(*(x.split(rows) for x in (logits_PV, *others)), strict=True))


class Predicted(NamedTuple):
    """Which P tokens of a layout are predicted, in order.

    tokens: (P,) among its T tokens. labels: (P,). mates: (P,) how many are predicted in the same sequence.
    per_sequence: (N,) how many are predicted.
    """

    tokens: Tensor
    labels: Tensor
    mates: Tensor
    per_sequence: Tensor

    @classmethod
    def of(cls, layout: PackLayout, labels_BL: Tensor | None) -> "Predicted":
        """For `layout.from_host`, since sizes depend on the labels. None: no token is predicted."""
        labels_T = torch.full_like(layout.token_index, IGNORED) if labels_BL is None else layout.unpad(labels_BL)
        tokens = (has_label(labels_T) & layout.is_real_token).nonzero().squeeze(1)
        sequence_P = layout.sequence_of_token[tokens]
        per_sequence = torch.bincount(sequence_P, minlength=layout.num_sequences)
        return cls(tokens, labels_T[tokens], per_sequence[sequence_P], per_sequence)


def mlm_sums(logits_PV: Tensor, predicted: Predicted) -> dict[str, Tensor]:
    """The sums over predicted tokens; and the sums over sequences, each with the mean over its predicted tokens."""
    losses_P, is_correct_P = TokenLosses.apply(logits_PV, predicted.labels)
    correct_P = is_correct_P.to(losses_P.dtype)
    share_P = 1 / predicted.mates.to(losses_P.dtype)
    return {
        "mlm_tokens": predicted.per_sequence.sum(),
        "mlm_sequences": (predicted.per_sequence > 0).sum(),
        "mlm_loss_by_token": losses_P.sum(),
        "mlm_loss_by_sequence": (losses_P * share_P).sum(),
        "mlm_correct_by_token": correct_P.sum(),
        "mlm_correct_by_sequence": (correct_P * share_P).sum(),
    }


def pair_sums(logits_N2: Tensor, labels_N: Tensor, by_row: bool = False) -> dict[str, Tensor]:
    """The sums over sequences with a label of their pair. by_row: see `label_sums`."""
    sums = label_sums(logits_N2, labels_N, by_row)
    ones = (labels_N == 1).sum()
    return {"pair_loss": sums["loss"], "pairs": sums["labels"], "pair_correct": sums["correct"], "pair_ones": ones}


MLM_TERMS = {
    "sequence": Mean("mlm", "mlm_loss_by_sequence", "mlm_sequences"),
    "token": Mean("mlm", "mlm_loss_by_token", "mlm_tokens"),
}


def mlm_loss_of(mlm_loss: str) -> Loss:
    """Masked tokens alone."""
    return Loss(
        terms=(MLM_TERMS[mlm_loss],),
        counts={"mlm_tokens": count_labelled_tokens, "mlm_sequences": count_labelled_sequences},
        logged=(
            Mean("mlm_loss_per_sequence", "mlm_loss_by_sequence", "mlm_sequences"),
            Mean("mlm_loss_per_token", "mlm_loss_by_token", "mlm_tokens"),
            Mean("mlm_accuracy_per_sequence", "mlm_correct_by_sequence", "mlm_sequences"),
            Mean("mlm_accuracy_per_token", "mlm_correct_by_token", "mlm_tokens"),
        ),
    )


def pretraining_loss(mlm_loss: str, pair: str, columns: Sequence[str] = tuple(PAIR_LABELS.values())) -> Loss:
    """Masked tokens, plus pairs of sentences.

    pair: the name of the pairs' objective in the log, a key of PAIR_LABELS. Beside their accuracy the log has that of
        the more frequent label. columns: those that may hold the labels; a model takes one of them.
    """
    masked = mlm_loss_of(mlm_loss)
    return Loss(
        terms=(*masked.terms, Mean("pair", "pair_loss", "pairs")),
        counts={**masked.counts, "pairs": partial(count_labels, columns=columns)},
        logged=(
            *masked.logged,
            Mean(f"{pair}_loss", "pair_loss", "pairs"),
            Mean(f"{pair}_accuracy", "pair_correct", "pairs"),
            Mean(f"{pair}_majority", "pair_ones", "pairs", shown=lambda share: max(share, 1 - share)),
        ),
    )


def count_denominators(batch: Batch) -> Tensor:
    """(3,) int64: predicted tokens, sequences with predicted tokens, and sequences with a label of their sentence pair.

    labels [[-100, 7, 8, -100]], sequence_ids [[1, 1, 1, 2]], next_sentence_label [[0, 1]]  ->  [2, 1, 2]
    """
    return pretraining_loss("token", "nsp").count(batch)
