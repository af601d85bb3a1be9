"""Terms of a loss: sums, what they are divided by, and that neither packing nor accumulation changes a mean."""

from dataclasses import replace

import pytest
import torch

from collate.columns import IGNORED, PAIR_LABELS
from collate.heads import TASKS, MaskedLM, PreTraining, QuestionAnswering, SequenceClassification
from collate.layout import PackLayout, SlotLayout
from collate.losses import (
    MLM_TERMS,
    Loss,
    Mean,
    Predicted,
    TokenLosses,
    count_denominators,
    count_labels,
    label_sums,
    mlm_loss_of,
    mlm_sums,
    pretraining_loss,
    span_sums,
)

BATCH = {
    "sequence_ids": torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]),
    "labels": torch.tensor([[7, IGNORED, 8, 9, IGNORED, IGNORED], [IGNORED] * 6]),
    "next_sentence_label": torch.tensor([[0, 1], [1, IGNORED]]),
}
LAYOUT = PackLayout(BATCH["sequence_ids"])  # sequences of 3, 2 and 2 tokens, of which 2, 1 and 0 are predicted


def test_a_term_is_a_sum_divided_by_a_count():
    sums = {"loss": torch.tensor(6.0), "labels": torch.tensor(4)}
    assert Mean("label", "loss", "labels").of(sums, sums) == 1.5
    assert Mean("label", "loss", "labels", weight=0.5).of(sums, {"labels": torch.tensor(3)}) == 1.0
    assert Mean("label", "loss", "labels").of(sums, {"labels": torch.tensor(0.5)}) == 12.0  # a sum of weights
    nothing = {"loss": torch.tensor(0.0), "labels": torch.tensor(0)}
    assert Mean("label", "loss", "labels").of(nothing, nothing) == 0


def test_counts_of_a_batch():
    assert count_denominators(BATCH).tolist() == [3, 2, 3]
    assert PreTraining().count(BATCH).tolist() == [3, 2, 3]
    assert MaskedLM().count(BATCH).tolist() == [3, 2]
    without = {"sequence_ids": BATCH["sequence_ids"]}
    assert count_denominators(without).tolist() == [0, 0, 0] and count_denominators(without).dtype == torch.int64


def predicted(labels_P, sequence_P):
    """All tokens of three sequences."""
    per_sequence = torch.bincount(sequence_P, minlength=3)
    return Predicted(torch.arange(len(labels_P)), labels_P, per_sequence[sequence_P], per_sequence)


def test_which_tokens_are_predicted():
    ids = torch.tensor([[1, 1, 2, 3, 0], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, 7, -100, 8, -100], [9, -100, 6, 5, -100]])  # 5 stands on padding
    exact = Predicted.of(PackLayout(ids), labels)
    assert exact.tokens.tolist() == [1, 3, 4, 6] and exact.labels.tolist() == [7, 8, 9, 6]
    assert exact.mates.tolist() == [1, 1, 2, 2] and exact.per_sequence.tolist() == [1, 0, 1, 2]
    slots = Predicted.of(SlotLayout(ids, sequence_slots=3), labels)
    assert slots.tokens.tolist() == [1, 3, 5, 7] and slots.labels.tolist() == [7, 8, 9, 6]
    assert slots.mates.tolist() == [1, 1, 2, 2] and slots.per_sequence.tolist() == [1, 0, 1, 0, 2, 0, 0, 0]
    assert not len(Predicted.of(PackLayout(ids), None).tokens)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("most_bytes", [1, 8 * 11 * 4, 1 << 20])
def test_losses_of_tokens_are_those_of_torch(rows, most_bytes, monkeypatch):
    """A column of -inf, such as fills up a vocabulary, has no share and no gradient."""
    monkeypatch.setattr("collate.losses.WIDENED", (most_bytes, most_bytes))
    logits = (torch.randn(rows, 11, dtype=torch.float64) * 30).requires_grad_()
    filled = torch.cat([logits, logits.new_full((rows, 2), -torch.inf)], 1)
    labels, weights = torch.randint(0, 11, (rows,)), torch.randn(rows, dtype=torch.float64)
    losses, is_correct = TokenLosses.apply(filled, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-12)
    assert torch.equal(is_correct, logits.argmax(1) == labels)
    (grad,) = torch.autograd.grad((losses * weights).sum(), logits)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-12)


def test_losses_of_tokens_keep_no_wide_table():
    """Of 16-bit logits, all that is saved has 16 bits, except for vectors; torch's own saves float32."""

    def wide_tables(loss):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            result = loss(torch.randn(6, 9).bfloat16().requires_grad_(), torch.randint(0, 9, (6,)))
        assert result.dtype == torch.float32
        return [x for x in saved if x.dim() == 2 and x.dtype == torch.float32]

    assert not wide_tables(lambda logits, labels: TokenLosses.apply(logits, labels)[0])
    assert wide_tables(lambda logits, labels: torch.nn.functional.cross_entropy(logits.float(), labels))


def test_the_two_means_of_masked_tokens():
    """Token losses 1, 3 in one sequence and 5 in another: (1 + 3 + 5) / 3 tokens, ((1 + 3) / 2 + 5) / 2 sequences."""
    loss_P = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    logits_PV = torch.stack([torch.zeros(3, dtype=torch.float64), (loss_P.exp() - 1).log()], 1)  # -log softmax_0 = loss
    sums = mlm_sums(logits_PV, predicted(torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1])))
    assert float(mlm_loss_of("token")(sums)) == pytest.approx(3)
    assert float(mlm_loss_of("sequence")(sums)) == pytest.approx(3.5)
    assert float(mlm_loss_of("token")(sums, torch.tensor([9, 1]))) == pytest.approx(1)  # over a step of 9 tokens


def test_a_position_outside_of_its_sequence_is_in_no_mean():
    logits_NM2 = torch.zeros(3, 4, 2, dtype=torch.float64)
    logits_NM2[1, 2:] = float("-inf")  # a sequence of 2
    positions_N2 = torch.tensor([[0, 3], [1, 2], [IGNORED, 1]])
    sums = span_sums(logits_NM2, positions_N2, torch.tensor([4, 2, 4]))
    assert sums["starts"] == 2 and sums["ends"] == 2 and sums["both"] == 1
    assert float(sums["start_loss"]) == pytest.approx(float(torch.tensor(8.0).log()))  # log 4 + log 2
    assert float(QuestionAnswering().formula(sums, torch.tensor([2, 4]))) == pytest.approx(
        float((sums["start_loss"] / 2 + sums["end_loss"] / 4) / 2)
    )


def test_sums_by_row_are_the_same_sums():
    logits_NC, labels_N = torch.randn(50, 2, dtype=torch.float64), torch.randint(0, 2, (50,))
    labels_N[::7] = IGNORED
    one, other = label_sums(logits_NC, labels_N), label_sums(logits_NC, labels_N, by_row=True)
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def squares(logits_PV):
    return logits_PV.logsumexp(-1).square().sum()


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_new_term_is_one_row_and_its_sum(ranks):
    """The row brings its sum, its denominator and its metric; micro-batches and ranks change nothing."""
    row = Mean("z_loss", "z", "mlm_tokens", weight=0.1)
    known = mlm_loss_of("token")
    loss = replace(known, terms=(*known.terms, row), logged=(*known.logged, row._replace(weight=1.0)))
    logits_PV = torch.randn(6, 5, dtype=torch.float64)
    labels_P, sequence_P = torch.randint(0, 5, (6,)), torch.tensor([0, 0, 1, 1, 1, 2])

    def sums(part):
        found = predicted(labels_P[part], sequence_P[part])
        return mlm_sums(logits_PV[part], found) | {"z": squares(logits_PV[part])}

    parts = torch.arange(6).tensor_split(ranks)
    whole = loss(sums(slice(None)))
    assert float(sum(loss(sums(part), torch.tensor([6, 3])) for part in parts)) == pytest.approx(float(whole))
    assert float(whole - known(sums(slice(None)))) == pytest.approx(0.1 * float(squares(logits_PV)) / 6)
    metrics = loss.metrics(sum(loss.stacked(sums(part), LAYOUT) for part in parts))
    assert metrics["z_loss"] == pytest.approx(float(squares(logits_PV)) / 6)
    assert metrics["loss"] == pytest.approx(float(whole))


def test_a_denominator_may_be_a_sum_of_weights():
    """Weights 0.5 and 0.25: the first sequence has two thirds of the loss."""

    def count_weights(batch):
        return batch["weights"].sum()

    loss = Loss((Mean("label", "loss", "weights"),), {"weights": count_weights})
    batch = BATCH | {"weights": torch.tensor([[0.5, 0.25]], dtype=torch.float64)}
    assert loss.count(batch).tolist() == [0.75]
    weighted = torch.tensor([[0.5, 0.25]], dtype=torch.float64) * torch.tensor([3.0, 6.0])
    assert loss({"loss": weighted.sum(), "weights": 0}, loss.count(batch)) == 4.0


@pytest.mark.parametrize("task", [*(task for task in TASKS.values() if task is not SequenceClassification)], ids=repr)
def test_every_denominator_is_counted(task):
    formula = task().formula
    assert {term.per for term in formula.terms} <= formula.counts.keys() <= set(formula.names)
    assert len(set(formula.names)) == len(formula.names)


def test_labels_of_pairs_are_told_apart_in_the_log():
    for pair, column in PAIR_LABELS.items():
        loss = pretraining_loss("token", pair, (column,))
        sums = dict.fromkeys(loss.names, torch.tensor(0)) | {"pairs": torch.tensor(4), "pair_ones": torch.tensor(1)}
        assert loss.metrics(loss.stacked(sums, LAYOUT))[f"{pair}_majority"] == 0.75
        assert count_labels(BATCH | {column: torch.tensor([[1, IGNORED]])}, (column,)) == 1
    assert pretraining_loss("token", "nsp").terms[0] is MLM_TERMS["token"]
