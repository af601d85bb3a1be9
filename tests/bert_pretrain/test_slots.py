"""The law of slots, for the whole model and every head: padding slots and empty sequence slots change nothing.

The same batch by its real tokens and by all of its slots, in float64 with large weights: losses, sums, gradients,
buffers, metrics and logits. Negative controls count padding as if it were tokens or sequences.
"""

import copy

import pytest
import torch
from pretraining_models import MAX_LENGTH, make_config
from slow_training import packed_rows
from small_heads import HERE, SMALL_OPTIONS

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import use_attention
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from collate import DataCollatorWithPacking, PackLayout, to_device
from collate.layout import SlotLayout

ROUNDING = 1e-12
EMPTY = {"input_ids": [], "sequence_lengths": []}


@pytest.fixture
def collate(tokenizer):
    return DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH, max_sequences_per_pack=8)


@pytest.fixture
def rows(pairs):
    """Packs with padding, of which two are nothing else; one sequence has no label of its pair."""
    pairs[3]["next_sentence_label"] = -100
    first, *others = packed_rows(pairs, MAX_LENGTH)
    return [first, EMPTY, *others, EMPTY]


def make_model(attention, options=None, mlm_loss="sequence"):
    torch.manual_seed(0)
    options = SMALL_OPTIONS.get(attention, {}) if options is None else options
    config = make_config(packed_attention=attention, packed_attention_options=options, mlm_loss=mlm_loss)
    return PackedBertForPreTraining(config).double().train()


def both(model, collate, rows):
    """What two copies of a model compute in training: of the real tokens, and of all slots."""
    exact, by_slots = collate(rows), to_device(collate(rows), "cpu", by_slots=True)
    assert type(PackLayout.of(exact["sequence_ids"])) is PackLayout
    layout = PackLayout.of(by_slots["sequence_ids"])
    assert isinstance(layout, SlotLayout) and not layout.is_real_BL.all() and (layout.lengths == 0).any()
    return [learned(copy.deepcopy(model), batch) for batch in (exact, by_slots)]


def learned(model, batch):
    """{name: tensor} of one pass in training and, after that, one in evaluation."""
    output = model(**batch)
    output.loss.backward()
    for module in model.modules():
        if hasattr(module, "update_centroids"):  # as after a step
            module.update_centroids()
    found = {"loss": output.loss, "sums": output.sums, "pairs": output.seq_relationship_logits}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"buffer {name}": x for name, x in model.named_buffers() if x.is_floating_point()}
    found |= {name: torch.tensor(value).double() for name, value in model.metrics(output.sums).items()}
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "next_sentence_label")}
    with torch.no_grad():
        evaluated = model.eval()(**inputs)
    found |= {name: evaluated[name] for name in ("prediction_logits", "seq_relationship_logits", "last_hidden_state")}
    return {name: x.detach() for name, x in found.items()}


def assert_same(expected, found):
    """Gradients relative to the largest of all parameters, others to their own size if that is above 1."""
    assert found.keys() == expected.keys()
    of_gradients = max(float(x.abs().max()) for name, x in expected.items() if name.startswith("gradient"))
    for name, x in expected.items():
        scale = of_gradients if name.startswith("gradient") else max([1.0, *x.abs().flatten().tolist()])
        torch.testing.assert_close(
            found[name], x, rtol=0, atol=ROUNDING * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("attention", HERE)
def test_padding_slots_change_nothing(collate, rows, attention):
    assert_same(*both(make_model(attention), collate, rows))


@pytest.mark.parametrize("attention", ["sdpa", "routing"])
def test_padding_slots_change_no_mean_over_tokens(collate, rows, attention):
    assert_same(*both(make_model(attention, mlm_loss="token"), collate, rows))


@pytest.mark.parametrize("attention", HERE)
def test_slots_of_padding_alone_teach_nothing(collate, attention):
    """What a rank without packs computes: a loss and gradients of 0, and no buffer moves."""
    model = make_model(attention)
    before = copy.deepcopy(model)
    expected, found = both(model, collate, [EMPTY, EMPTY])
    assert_same(expected, found)
    assert float(found["loss"]) == 0 and not found["sums"].any()
    for name, x in found.items():
        if name.startswith("gradient"):
            assert (x == 0).all(), name
        if name.startswith("buffer"):
            assert torch.equal(x, before.get_buffer(name.removeprefix("buffer "))), name


class CountsTokens(SdpaAttention):
    """It takes padding for tokens."""

    def attend(self, q_THK, k_THK, v_THK, layout, dropout=0.0):
        return super().attend(q_THK, k_THK, v_THK, layout, dropout) * (1 + 1 / layout.num_tokens)


class CountsSequences(SdpaAttention):
    """Its buffer takes empty slots for sequences."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("seen", torch.zeros(()))

    def attend(self, q_THK, k_THK, v_THK, layout, dropout=0.0):
        self.seen += layout.num_sequences
        return super().attend(q_THK, k_THK, v_THK, layout, dropout)


@pytest.mark.parametrize(("mistake", "part"), [(CountsTokens, "loss"), (CountsSequences, "buffer")])
def test_negative_control_counted_padding(collate, rows, mistake, part):
    model = use_attention(make_model("sdpa"), mistake)
    with pytest.raises(AssertionError, match=part):
        assert_same(*both(model, collate, rows))


def test_negative_control_logged_padding(collate, rows, monkeypatch):
    """What the log counts as tokens holds padding."""
    monkeypatch.setattr(SlotLayout, "is_real_token", PackLayout.is_real_token)
    with pytest.raises(AssertionError, match="sums"):
        assert_same(*both(make_model("sdpa"), collate, rows))
