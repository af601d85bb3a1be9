"""Packed task heads: logits, loss and gradients are those of the stock model on each sequence alone.

Float64 and large weights, as in test_equivalence, for every architecture and task. Each negative control makes a
mistake that packing invites, and must fail the same comparison that the right code passes.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from process_group import process_group
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForNextSentencePrediction,
)

from collate import DataCollatorWithPacking, PackLayout, to_device
from collate.heads import (
    MaskedLM,
    PerSequence,
    PreTraining,
    QuestionAnswering,
    SequenceClassification,
    SequenceEmbedding,
    TokenClassification,
    packed_predictions,
    prepare_head,
    task_for,
)
from collate.isolation.positions import position_ids_start
from collate.layout import SlotLayout
from packing import pack_dataset

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SMALL |= {"max_position_embeddings": 48, "initializer_range": 0.3, "pad_token_id": 0}
ROBERTA = SMALL | {"pad_token_id": 1}
ARCHITECTURES = {
    "bert": SMALL,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": SMALL | {"embedding_size": 12},
    "distilbert": {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "pad_token_id": 0}
    | {"max_position_embeddings": 48, "initializer_range": 0.3},
    "albert": SMALL | {"embedding_size": 12},
    # its window reaches 4 tokens to each side: less than the longer sequences here
    "modernbert": SMALL | {"local_attention": 8, "global_attn_every_n_layers": 2},
    "eurobert": SMALL | {"num_key_value_heads": 2},
}
OTHERS = {
    "data2vec-text": ROBERTA,
    "ernie": SMALL,
    "gte": SMALL,
    "jina_embeddings_v3": ROBERTA,
    "nomic_bert": SMALL,
    "roberta-prelayernorm": ROBERTA,
    "roc_bert": SMALL | {"shape_embed_dim": 8, "pronunciation_embed_dim": 8},
    "xlm-roberta-xl": ROBERTA,
    "xmod": ROBERTA | {"languages": ["en_XX"], "default_language": "en_XX"},
}
CLASSES = {
    "single": AutoModelForSequenceClassification,
    "multi": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
    "mlm by sequence": AutoModelForMaskedLM,
    "pretraining": AutoModelForPreTraining,
    "cls embedding": AutoModel,
    "mean embedding": AutoModel,
}
OPTIONS = {
    "mlm by sequence": {"mlm_loss": "sequence"},
    "cls embedding": {"pooling": "cls"},
    "mean embedding": {"pooling": "mean"},
}
CASES = [
    (architecture, task)
    for architecture in ARCHITECTURES
    for task in CLASSES
    if not (task == "pretraining" and architecture not in ("bert", "albert"))  # the others' class is MaskedLM's
    and not (task == "answers" and architecture == "eurobert")  # which has no such class
]

CASES += [(architecture, task) for architecture in OTHERS for task in ("single", "tokens", "mlm")]
CASES += [("ernie", "pretraining")]

PACKS = [[20, 5, 9], [], [3, 12, 1, 7, 2]]  # 34 + 25 of 3 x 40 slots, and a pack without sequences
SLOTS, DEPTH = 40, 6


def make_models(architecture, task, **changes):
    """Two models of the same weights: the stock one, and the one to run packed."""
    labels = {"single": 3, "multi": 3, "regression": 1, "tokens": 4}.get(task, 2)
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES | OTHERS)[architecture], num_labels=labels)
    for name in [name for name in config.to_dict() if "dropout" in name]:
        setattr(config, name, 0.0)
    if task == "multi":
        config.problem_type = "multi_label_classification"
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    stock = CLASSES[task].from_config(config).double()
    for parameter in stock.parameters():  # biases begin at 0, which would hide mistakes with them
        with torch.no_grad():
            parameter += 0.05 * torch.randn_like(parameter)
    return stock, copy.deepcopy(stock)


def make_sequences(task):
    """One dict per sequence: input_ids (n,) and the targets of this task."""
    draw = torch.Generator().manual_seed(3)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=draw)

    sequences = []
    for number, n in enumerate(n for pack in PACKS for n in pack):
        sequence = {"input_ids": 5 + integers(35, n)}
        some = integers(4, n) == 0
        if task == "single":
            sequence["labels"] = integers(3) if number != 1 else torch.tensor(-100)  # one without a label
        elif task == "multi":
            sequence["labels"] = integers(2, 3).float()
        elif task == "regression":
            sequence["labels"] = torch.randn((), generator=draw)
        elif task == "answers":
            sequence |= {"start_positions": integers(n), "end_positions": integers(n)}
            if number == 4:
                sequence["start_positions"] = torch.tensor(n)  # just outside, where its neighbour begins
        elif task == "tokens":
            sequence["labels"] = integers(4, n).where(~some, -100)
        elif task.startswith("mlm") or task == "pretraining":
            sequence["labels"] = integers(40, n).where(some, -100)
            sequence["pair"] = integers(2) if number != 2 else torch.tensor(-100)
        sequences.append(sequence)
    return sequences


def make_batch(sequences, start=0, packs=PACKS):
    """The batch that a collator makes of these sequences, written out."""
    batch = {"input_ids": torch.zeros(len(packs), SLOTS, dtype=torch.int64)}
    batch["sequence_ids"] = torch.zeros(len(packs), SLOTS, dtype=torch.int32)
    batch["position_ids"] = torch.full((len(packs), SLOTS), start)
    batch["cls_positions"] = torch.full((len(packs), DEPTH), -1)
    columns = [name for name in (sequences[0] if sequences else {}) if name != "input_ids"]
    for name in columns:
        value = sequences[0][name]
        per_token = value.dim() == 1 and name == "labels" and not value.is_floating_point()
        shape = (len(packs), SLOTS) if per_token else (len(packs), DEPTH, *value.shape)
        empty = float("nan") if value.is_floating_point() else -100
        batch[name] = torch.full(shape, empty, dtype=value.dtype)
    remaining = iter(sequences)
    for p, pack in enumerate(packs):
        at = 0
        for s, n in enumerate(pack):
            sequence, mine = next(remaining), slice(at, at + n)
            batch["input_ids"][p, mine] = sequence["input_ids"]
            batch["sequence_ids"][p, mine] = s + 1
            batch["position_ids"][p, mine] = start + torch.arange(n)
            batch["cls_positions"][p, s] = at
            for name in columns:
                batch[name][p, mine if batch[name].shape[1] == SLOTS else s] = sequence[name]
            at += n
    if "pair" in batch:
        batch["next_sentence_label"] = batch["sentence_order_label"] = batch.pop("pair")
    return batch


def alone(stock, task, sequences):
    """The stock model on one sequence at a time: the head's output for each, and the loss, written out."""
    results, losses, other_losses = [], [], []
    for sequence in sequences:
        output = stock(input_ids=sequence["input_ids"][None])
        labels = sequence.get("labels")
        if task == "single":
            results.append(output.logits[0])
            losses += [] if labels < 0 else [F.cross_entropy(output.logits, labels[None])]
        elif task == "multi":
            results.append(output.logits[0])
            losses.append(F.binary_cross_entropy_with_logits(output.logits, labels[None].double()))
        elif task == "regression":
            results.append(output.logits[0])
            losses.append((output.logits[0, 0] - labels) ** 2)
        elif task == "tokens":
            results.append(output.logits[0])
            losses += F.cross_entropy(output.logits[0], labels, reduction="none")[labels >= 0]
        elif task == "answers":
            results.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=1))
            for into, name, logits in (
                (losses, "start_positions", output.start_logits),
                (other_losses, "end_positions", output.end_logits),
            ):
                if sequence[name] < len(sequence["input_ids"]):
                    into.append(F.cross_entropy(logits, sequence[name][None]))
        elif "embedding" in task:
            hidden = output.last_hidden_state[0]
            results.append(hidden[0] if task.startswith("cls") else hidden.mean(0))
        else:
            logits = output.prediction_logits if task == "pretraining" else output.logits
            predicted = logits[0][labels >= 0]
            results.append(predicted)
            token_losses = F.cross_entropy(predicted, labels[labels >= 0], reduction="none")
            losses += [token_losses.mean()] * bool(len(predicted)) if "sequence" in task else token_losses
            if task == "pretraining" and sequence["pair"] >= 0:
                pair = (
                    output.seq_relationship_logits if hasattr(output, "seq_relationship_logits") else output.sop_logits
                )
                other_losses.append(F.cross_entropy(pair, sequence["pair"][None]))
    if "embedding" in task:
        return results, sum((vector**2).sum() for vector in results)
    loss = torch.stack(losses).mean()
    if other_losses:
        loss = loss + torch.stack(other_losses).mean()
    return results, loss / 2 if task == "answers" else loss


def loss_of(output, task):
    return (output.logits**2).sum() if "embedding" in task else output.loss


def error(got, expected):
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())


def gradient_error(packed, stock):
    """The worst difference over all parameters, relative to the whole gradient's scale."""
    pairs = list(zip(packed.parameters(), stock.parameters(), strict=True))
    assert all((got.grad is None) == (expected.grad is None) for got, expected in pairs)
    pairs = [(got.grad, expected.grad) for got, expected in pairs if got.grad is not None]
    scale = max(float(expected.abs().max()) for _, expected in pairs)
    return max(float((got - expected).abs().max()) for got, expected in pairs) / scale


def compare(architecture, task, **changes):
    stock, packed = make_models(architecture, task, **changes)
    head = task_for(packed, **OPTIONS.get(task, {}))
    sequences = make_sequences(task)
    expected, expected_loss = alone(stock, task, sequences)
    expected_loss.backward()
    output = head(packed, make_batch(sequences, position_ids_start(packed.config)))
    loss_of(output, task).backward()
    is_flat = task in ("tokens", "answers", "pretraining") or task.startswith("mlm")
    expected = torch.cat(expected) if is_flat else torch.stack(expected)
    assert output.logits.shape == expected.shape
    assert error(output.logits, expected) < 1e-10
    assert error(loss_of(output, task), expected_loss) < 1e-10
    assert gradient_error(packed, stock) < 1e-10
    return output


@pytest.mark.parametrize(("architecture", "task"), CASES, ids=lambda name: name)
def test_a_packed_batch_equals_its_sequences_one_by_one(architecture, task):
    compare(architecture, task)


@pytest.mark.parametrize(("architecture", "task"), [c for c in CASES if c[0] in ("bert", "modernbert")])
def test_padding_slots_change_nothing(architecture, task):
    """A batch by all of its slots, and one of padding alone: see collate.layout."""
    _, model = make_models(architecture, task)
    head = task_for(model, **OPTIONS.get(task, {}))
    full = make_batch(make_sequences(task), position_ids_start(model.config))
    nothing = full | {"sequence_ids": full["sequence_ids"] * 0, "cls_positions": full["cls_positions"] * 0 - 1}
    for batch in (full, nothing):
        results = []
        for by_slots in (False, True):
            sent = to_device({name: x.clone() for name, x in batch.items()}, "cpu", by_slots)
            assert isinstance(PackLayout.of(sent["sequence_ids"]), SlotLayout) == by_slots
            twin = copy.deepcopy(model)
            output = head(twin, sent)
            loss_of(output, task).backward()
            gradients = torch.cat([x.grad.flatten() for x in twin.parameters() if x.grad is not None])
            results.append([loss_of(output, task), output.sums, head.count(sent), output.logits, gradients])
        for found, expected in zip(*results, strict=True):
            scale = max([1.0, *expected.detach().abs().flatten().tolist()])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [("modernbert", "cls"), ("modernbert", "mean"), ("eurobert", "bos"), ("eurobert", "mean"), ("eurobert", "late")],
)
def test_every_pooling_of_a_classifier(architecture, pooling):
    compare(architecture, "single", classifier_pooling=pooling)


@pytest.mark.parametrize("task", ["single", "tokens", "answers", "mlm", "pretraining"])
def test_with_gradient_checkpointing_and_eager_attention(task):
    compare("bert", task, _attn_implementation="eager")
    stock, packed = make_models("bert", task)
    packed.activation_checkpointing_enable()
    packed.train()
    sequences = make_sequences(task)
    alone(stock, task, sequences)[1].backward()
    task_for(packed)(packed, make_batch(sequences)).loss.backward()
    assert gradient_error(packed, stock) < 1e-10


@pytest.mark.parametrize("task", ["single", "multi", "regression", "tokens", "answers"])
def test_the_loss_is_the_stock_one(task):
    """The loss of sequences that all have a label, one at a time; half of them lie in each of two packs."""
    stock, packed = make_models("bert", task)
    sequences = make_sequences(task)[3:5] if task != "answers" else make_sequences(task)[2:4]
    sequences = [
        {name: value[:3] if value.dim() and len(value) > 3 else value for name, value in s.items()} for s in sequences
    ]
    sequences = [s | {name: torch.tensor(1) for name in s if "positions" in name} for s in sequences]
    if task == "tokens":
        sequences = [s | {"labels": torch.tensor([1, -100, 2])} for s in sequences]
    losses = [
        stock(
            **{name: value[None].double() if value.is_floating_point() else value[None] for name, value in s.items()}
        ).loss
        for s in sequences
    ]
    output = task_for(packed)(packed, make_batch(sequences, packs=[[3], [3]]))
    assert error(output.loss, torch.stack(losses).mean()) < 1e-12


@pytest.mark.parametrize("task", ["single", "multi", "regression", "tokens", "answers", "pretraining"])
def test_batches_of_the_collator(task, tokenizer):
    """From a dataset with one sequence per row, packed, to the loss."""
    stock, packed = make_models("bert", task)
    sequences = make_sequences(task)
    rows = [
        {name.replace("pair", "next_sentence_label"): value.tolist() for name, value in s.items()} for s in sequences
    ]
    packs = pack_dataset(Dataset.from_list(rows), max_sequence_length=SLOTS)
    batch = DataCollatorWithPacking(tokenizer, mlm_probability=None).for_dataset(packs)(list(packs))
    assert len(batch["input_ids"]) < len(rows) / 2
    expected = alone(stock, task, sequences)[1]
    expected.backward()
    loss = task_for(packed)(packed, batch).loss
    loss.backward()
    assert error(loss, expected) < 1e-10
    assert gradient_error(packed, stock) < 1e-10


# Denominators: what the loss is divided by.

TRAINED = ["single", "multi", "regression", "tokens", "answers", "mlm", "mlm by sequence", "pretraining"]


def micro_batches(batch):
    """Its packs, one at a time: the second is empty."""
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(PACKS))]


@pytest.mark.parametrize("task", TRAINED)
def test_accumulation_changes_nothing(task):
    stock, packed = make_models("bert", task)
    head = task_for(packed, **OPTIONS.get(task, {}))
    sequences = make_sequences(task)
    parts = micro_batches(make_batch(sequences))
    denominators = sum(head.count(part) for part in parts)
    assert denominators.dtype == torch.int64
    assert (denominators == head.count(make_batch(sequences))).all()
    outputs = [head(packed, part, denominators) for part in parts]
    sum(output.loss for output in outputs).backward()
    alone_loss = alone(stock, task, sequences)[1]
    alone_loss.backward()
    assert error(sum(output.loss for output in outputs), alone_loss) < 1e-10
    assert gradient_error(packed, stock) < 1e-10
    metrics = head.metrics(sum(output.sums for output in outputs))
    assert metrics["loss"] == pytest.approx(float(alone_loss.detach()), rel=1e-10)
    assert (metrics["tokens"], metrics["sequences"]) == (59, 8)
    assert all(type(value) in (int, float) for value in metrics.values())


@pytest.mark.parametrize("has_columns", [True, False], ids=["columns", "no columns"])
@pytest.mark.parametrize("task", TRAINED)
def test_a_batch_of_padding_alone_gives_zero_gradients(task, has_columns):
    """What a process without packs computes; its collator may not know the labels."""
    _, packed = make_models("bert", task)
    head = task_for(packed, **OPTIONS.get(task, {}))
    batch = micro_batches(make_batch(make_sequences(task)))[1]
    if not has_columns:
        batch = {name: batch[name] for name in ("input_ids", "sequence_ids", "position_ids", "cls_positions")}
    assert (head.count(batch) == 0).all()
    for denominators in (None, head.count(batch) + 7):
        output = head(packed, batch, denominators)
        output.loss.backward()
        assert float(output.loss.detach()) == 0 and (output.sums == 0).all()
        assert all((parameter.grad == 0).all() for parameter in packed.parameters())
    assert head.metrics(output.sums) == {"tokens": 0, "sequences": 0}
    assert output.predictions.split() == ()


def test_embeddings_of_a_batch_of_padding_alone():
    _, packed = make_models("bert", "mean embedding")
    for pooling in ("cls", "mean"):
        assert packed_predictions(packed, make_batch([], packs=[[]]), SequenceEmbedding(pooling=pooling)) == ()


@pytest.mark.parametrize("task", ["tokens", "mlm", "mlm by sequence"])
def test_labels_on_padding_count_for_nothing(task):
    _, packed = make_models("bert", task)
    head = task_for(packed, **OPTIONS.get(task, {}))
    batch = make_batch(make_sequences(task))
    littered = batch | {"labels": batch["labels"].where(batch["sequence_ids"] > 0, 3)}
    assert torch.equal(head.count(littered), head.count(batch))
    assert torch.equal(head(packed, littered).loss, head(packed, batch).loss)


def test_the_pooler_of_a_packed_encoder_has_no_say():
    """It would read the first token of each pack."""
    _, packed = make_models("bert", "cls embedding")
    prepare_head(packed)
    batch = make_batch(make_sequences("cls embedding"))
    output = packed(batch["input_ids"], sequence_ids=batch["sequence_ids"], head_slots=torch.tensor([0, 20, 80]))
    assert output.last_hidden_state.shape == (3, 1, 16) and output.pooler_output is None


# Negative controls: one mistake each.


class RowWide(nn.Module):
    """Every real token of the row attends to every other: what a plain attention mask does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sequence_ids, **inputs):
        return self.model(**inputs, attention_mask=(sequence_ids > 0).long())


def no_isolation(head, model, batch):
    return head(RowWide(model), batch).loss


def positions_not_reset(head, model, batch):
    positions = torch.arange(SLOTS).expand(batch["input_ids"].shape)
    return head(model, batch | {"position_ids": positions}).loss


def only_the_first_cls(head, model, batch):
    return head(model, batch | {"cls_positions": batch["cls_positions"].clamp(max=0)}).loss


def mean_per_pack(head, model, batch):
    parts = micro_batches(batch)
    return (head(model, parts[0]).loss + head(model, parts[2]).loss) / 2


def zeros_instead_of_minus_infinity(head, model, batch):
    """Softmax over the row, in which the other sequences' logits were multiplied by 0."""
    logits = head(model, batch).logits.split([34, 25])
    losses = []
    for pack, logits_T2 in zip((0, 2), logits, strict=True):
        for slot, first in enumerate(batch["cls_positions"][pack].tolist()):
            mine = (batch["sequence_ids"][pack] == slot + 1)[: len(logits_T2), None]
            for k, name in enumerate(("start_positions", "end_positions")):
                target = batch[name][pack, slot]
                if first >= 0 and target < mine.sum():
                    losses.append((k, F.cross_entropy((logits_T2 * mine)[:, k], target + first)))
    return sum(torch.stack([loss for k, loss in losses if k == which]).mean() for which in (0, 1)) / 2


MISTAKES = [
    *((mistake, task) for task in TRAINED for mistake in (no_isolation, positions_not_reset)),
    *((mean_per_pack, task) for task in TRAINED),
    *((only_the_first_cls, task) for task in ("single", "multi", "regression", "pretraining")),
    (zeros_instead_of_minus_infinity, "answers"),
]


@pytest.mark.parametrize(("mistake", "task"), MISTAKES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_negative_control(mistake, task):
    stock, packed = make_models("bert", task)
    head = task_for(packed, **OPTIONS.get(task, {}))
    sequences = make_sequences(task)
    expected = alone(stock, task, sequences)[1]
    expected.backward()
    loss = mistake(head, packed, make_batch(sequences))
    loss.backward()
    # right code keeps ten digits; each mistake loses all but four
    assert error(loss, expected) > 1e-4
    assert gradient_error(packed, stock) > 1e-4


# Checkpoints, copies and wrappers.


@pytest.mark.parametrize("architecture", ["bert", "albert", "modernbert"])
def test_checkpoints_stay_stock(architecture, tmp_path):
    stock, packed = make_models(architecture, "single")
    task_for(packed)
    stock.save_pretrained(tmp_path / "stock")
    packed.save_pretrained(tmp_path / "packed")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    loaded = CLASSES["single"].from_pretrained(tmp_path / "packed", dtype=torch.float64)
    assert type(loaded) is type(stock)
    batch = make_batch(make_sequences("single"))
    expected = task_for(packed)(packed, batch)
    assert torch.equal(task_for(loaded)(loaded, batch).logits, expected.logits)


def test_a_prepared_model_is_the_stock_one_for_all_else():
    """A model is prepared once; its copies and pickles stay prepared, and ordinary batches run as before."""
    stock, packed = make_models("bert", "single")
    task = task_for(packed)
    assert prepare_head(packed) is packed and task_for(packed) == task
    assert len(packed.bert._forward_hooks) == len(packed.bert._forward_pre_hooks) == 1
    tokens = torch.arange(5, 15).view(2, 5)
    assert torch.equal(packed(tokens).logits, stock(tokens).logits)
    batch = make_batch(make_sequences("single"))
    expected = task(packed, batch).logits
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(task(again, batch).logits, expected)


def test_under_distributed_data_parallel(tmp_path):
    stock, packed = make_models("bert", "pretraining")
    head = task_for(packed)
    sequences = make_sequences("pretraining")
    alone(stock, "pretraining", sequences)[1].backward()
    with process_group(tmp_path):
        head(nn.parallel.DistributedDataParallel(packed), make_batch(sequences)).loss.backward()
    assert gradient_error(packed, stock) < 1e-10


# Predictions and metrics.


@pytest.mark.parametrize("task", [*CLASSES])
def test_predictions_without_labels(task):
    """In the order of the sequences; dropout is off during prediction, and on again afterwards."""
    stock, packed = make_models("bert", task, hidden_dropout_prob=0.5)
    packed.train()
    stock.eval()
    sequences = make_sequences(task)
    inputs = [{"input_ids": sequence["input_ids"]} for sequence in sequences]
    head = task_for(packed, **OPTIONS.get(task, {}))
    predictions = packed_predictions(packed, make_batch(inputs), head)
    assert packed.training and len(predictions) == len(sequences)
    for prediction, sequence in zip(predictions, sequences, strict=True):
        assert not prediction.requires_grad
        output = stock(sequence["input_ids"][None])
        if task.startswith("mlm"):  # no labels: every token is predicted
            assert torch.equal(prediction, output.logits[0].argmax(-1))
        elif task == "pretraining":
            assert error(prediction, output.seq_relationship_logits[0]) < 1e-10
        elif task == "answers":
            assert error(prediction[:, 0], output.start_logits[0]) < 1e-10
            assert error(prediction[:, 1], output.end_logits[0]) < 1e-10
        elif "embedding" in task:
            hidden = output.last_hidden_state[0]
            assert error(prediction, hidden[0] if task.startswith("cls") else hidden.mean(0)) < 1e-10
        else:
            assert error(prediction, output.logits[0]) < 1e-10
    output = head(packed, make_batch(inputs))
    assert output.loss is None and output.labels is None
    metrics = head.metrics(output.sums)
    assert (metrics.pop("tokens"), metrics.pop("sequences")) == (59, 8) and set(metrics) <= {"loss"}


def test_values_by_sequence():
    ragged = PerSequence(torch.tensor([3.0, 4, 5, 6, 7]), torch.tensor([3, 2]))
    assert [part.tolist() for part in ragged.split()] == [[3, 4, 5], [6, 7]]
    assert ragged.padded().tolist() == [[3, 4, 5], [6, 7, float("-inf")]]
    assert ragged.padded(0).tolist() == [[3, 4, 5], [6, 7, 0]]
    swapped = ragged.take(torch.tensor([1, 0]))
    assert [part.tolist() for part in swapped.split()] == [[6, 7], [3, 4, 5]]
    both = PerSequence.concatenate([ragged, swapped])
    assert [part.tolist() for part in both.split()] == [[3, 4, 5], [6, 7], [6, 7], [3, 4, 5]]
    rows = PerSequence(torch.tensor([[0.1, 0.9], [0.7, 0.3]]))
    assert torch.equal(rows.take(torch.tensor([1, 0])).values, rows.values.flip(0))
    assert PerSequence.concatenate([rows, rows]).lengths is None and len(rows.split()) == 2


def test_logits_of_other_sequences_are_minus_infinity():
    _, packed = make_models("bert", "answers")
    sequences = make_sequences("answers")
    padded = task_for(packed)(packed, make_batch(sequences)).predictions.padded()
    assert padded.shape == (8, 20, 2)
    for logits, sequence in zip(padded, sequences, strict=True):
        n = len(sequence["input_ids"])
        assert logits[:n].isfinite().all() and (logits[n:] == float("-inf")).all()


@pytest.mark.parametrize("task", ["single", "multi", "tokens", "answers", "mlm", "pretraining"])
def test_metrics_equal_those_counted_by_hand(task):
    """Half of the labels are the model's own predictions, so that accuracies are far from 0 and 1."""
    _, packed = make_models("bert", task)
    head = task_for(packed)
    batch = make_batch(make_sequences(task))
    output = head(packed, batch)
    if task == "answers":
        starts, ends = output.predictions.padded().argmax(1).unbind(1)
        slots = batch["cls_positions"] >= 0
        batch["start_positions"][slots] = torch.tensor([*starts[:5], 0, 0, 99])
        batch["end_positions"][slots] = torch.tensor([*ends[:4], 0, 0, 0, 0])
        hits = [int(starts[5] == 0) + int(starts[6] == 0), sum(int(end == 0) for end in ends[4:])]
        metrics = head.metrics(head(packed, batch).sums)
        assert metrics["start_accuracy"] == (5 + hits[0]) / 7
        assert metrics["end_accuracy"] == (4 + hits[1]) / 8
        assert 4 / 7 <= metrics["exact_match"] < 1
        return
    logits = output.logits.detach()
    labels = output.labels.values if task != "pretraining" else batch["labels"][batch["labels"] >= 0]
    if task == "multi":
        expected = ((logits > 0) == (labels > 0)).double().mean()
    else:
        expected = (logits.argmax(-1) == labels)[labels >= 0].double().mean()
    metrics = head.metrics(output.sums)
    name = "mlm_accuracy_per_token" if task in ("mlm", "pretraining") else "accuracy"
    assert metrics[name] == pytest.approx(float(expected))
    if task == "pretraining":
        pairs = batch["next_sentence_label"][batch["next_sentence_label"] >= 0]
        hits = (output.predictions.values.argmax(-1) == output.labels.values)[output.labels.values >= 0]
        assert metrics["nsp_accuracy"] == pytest.approx(float(hits.double().mean()))
        assert metrics["nsp_majority"] == pytest.approx(
            max(float(pairs.double().mean()), 1 - float(pairs.double().mean()))
        )


def test_half_precision_losses_are_added_in_float32():
    _, packed = make_models("bert", "mlm")
    head = task_for(packed)
    output = head(packed.bfloat16(), make_batch(make_sequences("mlm")))
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32


# Which task, and what is refused.


def test_the_task_follows_from_class_and_config():
    tasks = {name: task_for(make_models("bert", name)[1]) for name in CLASSES}
    assert tasks["single"] == SequenceClassification(num_labels=3)
    assert tasks["multi"] == SequenceClassification(num_labels=3, problem_type="multi_label_classification")
    assert tasks["regression"] == SequenceClassification(num_labels=1)
    assert tasks["tokens"] == TokenClassification() and tasks["answers"] == QuestionAnswering()
    assert tasks["mlm"] == MaskedLM(mlm_loss="token") and tasks["pretraining"] == PreTraining()
    assert tasks["cls embedding"] == SequenceEmbedding(pooling="cls")
    assert task_for(make_models("albert", "pretraining")[1]).pair_label == "sentence_order_label"
    assert task_for(make_models("eurobert", "single")[1]).pooling == "late"
    assert task_for(make_models("bert", "mlm")[1], mlm_loss="sequence") == MaskedLM(mlm_loss="sequence")


def test_without_a_problem_type_floats_mean_several_labels():
    stock, packed = make_models("bert", "multi", problem_type=None)
    sequences = make_sequences("multi")
    expected = alone(stock, "multi", sequences)[1]
    assert error(task_for(packed)(packed, make_batch(sequences)).loss, expected) < 1e-10


def test_a_label_that_is_missing_among_several_is_in_no_mean():
    _, packed = make_models("bert", "multi")
    head = task_for(packed)
    batch = make_batch(make_sequences("multi"))
    assert head.count(batch).tolist() == [8 * 3]
    loss = head(packed, batch).loss * 24
    batch["labels"][0, 1, 2] = float("nan")
    missing = packed_predictions(packed, batch)[1][2]
    left_out = F.binary_cross_entropy_with_logits(missing, make_sequences("multi")[1]["labels"][2].double())
    assert head.count(batch).tolist() == [23]
    assert error(head(packed, batch).loss * 23 + left_out, loss) < 1e-10


def test_next_sentence_prediction_and_subclasses():
    class Mine(BertForNextSentencePrediction):
        pass

    stock, _ = make_models("bert", "pretraining")
    torch.manual_seed(0)
    packed = Mine(stock.config).double()
    packed.load_state_dict(stock.state_dict(), strict=False)
    sequences = [{"input_ids": s["input_ids"], "labels": s["pair"]} for s in make_sequences("pretraining")]
    output = task_for(packed)(packed, make_batch(sequences))
    expected = [stock(s["input_ids"][None]).seq_relationship_logits[0] for s in sequences]
    # the pretraining model and this one call the pair's head cls.seq_relationship both
    assert error(output.logits, torch.stack(expected)) < 1e-10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AutoModelForMultipleChoice.from_config(make_config("bert")),
            "no packed task for BertForMultipleChoice",
        ),
        (lambda: AutoModelForPreTraining.from_config(make_config("electra")), "electra is not pretrained by masked"),
        (lambda: nn.Linear(2, 2), "Linear holds no transformers model"),
        (
            lambda: AutoModel.from_config(AutoConfig.for_model("deberta", **SMALL)),
            "deberta leaks between packed sequences",
        ),
    ],
    ids=["multiple choice", "electra's discriminator", "not transformers", "deberta"],
)
def test_models_without_a_task_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        task_for(make())


def make_config(architecture):
    return AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("single", lambda b: b | {"labels": b["labels"].float()}, "cast them to integers"),
        ("regression", lambda b: b | {"labels": b["labels"].nan_to_num().long()}, "regression needs floats"),
        ("multi", lambda b: b | {"labels": b["labels"][:, :, :2]}, "give 3 floats per sequence"),
        ("single", lambda b: b | {"labels": b["input_ids"]}, "choose a token task"),
        ("tokens", lambda b: b | {"labels": b["cls_positions"]}, "choose a sequence task"),
        ("single", lambda b: b | {"cls_positions": b["cls_positions"].clamp(min=0)}, "names 18 sequences"),
        ("single", lambda b: {"input_ids": b["input_ids"]}, "no 'sequence_ids', only"),
    ],
)
def test_batches_that_do_not_fit_are_refused(task, change, message):
    _, packed = make_models("bert", task)
    with pytest.raises(ValueError, match=message):
        task_for(packed)(packed, change(make_batch(make_sequences(task))))


def test_integers_for_several_labels_are_refused():
    _, model = make_models("bert", "single")
    batch = make_batch(make_sequences("single"))
    batch["labels"] = batch["labels"][..., None].expand(-1, -1, 3)
    with pytest.raises(ValueError, match=r"labels \(\d+, 3\) are integers.*cast them to floats"):
        task_for(model)(model, batch)


def test_other_refusals():
    stock, packed = make_models("bert", "single")
    batch = make_batch(make_sequences("single"))
    with pytest.raises(ValueError, match=r"is not prepared.*call task_for\(model\)"):
        SequenceClassification(num_labels=3)(stock, batch)
    _, tuples = make_models("modernbert", "single", return_dict=False)
    with pytest.raises(ValueError, match=r"returned a tuple; set model\.config.return_dict=True"):
        task_for(tuples)(tuples, batch)
    with pytest.raises(ValueError, match="cannot train on a batch without labels"):
        del batch["labels"]
        task_for(packed)(packed, batch, torch.tensor([7]))
    with pytest.raises(ValueError, match="unknown pooling 'max'; choose from"):
        SequenceEmbedding(pooling="max")
    with pytest.raises(ValueError, match="unknown pooling 'max'; choose from"):
        SequenceClassification(num_labels=2, pooling="max")
    with pytest.raises(ValueError, match="unknown problem_type 'ranking'; choose from"):
        SequenceClassification(num_labels=2, problem_type="ranking")
    with pytest.raises(ValueError, match="unknown mlm_loss 'sum'; choose from"):
        MaskedLM(mlm_loss="sum")


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_packed_head_needs_no_mask(architecture, monkeypatch):
    """No mask is built: it would be L x L for each row, and slow where rows are long."""
    monkeypatch.setattr("collate.isolation.masks.built_mask", lambda *_, **__: pytest.fail("a mask was built"))
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    model = AutoModelForSequenceClassification.from_config(config)
    ids = torch.tensor([[1] * 9 + [2] * 20 + [0] * 3], dtype=torch.int32)
    batch = {"input_ids": torch.randint(5, 40, ids.shape), "sequence_ids": ids}
    found = packed_predictions(model, batch)
    model.eval()
    expected = [model(batch["input_ids"][ids == number][None]).logits[0].detach() for number in (1, 2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
