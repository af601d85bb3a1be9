"""Packed training is unpacked training: hidden states, losses, gradients, and parameters after many steps.

Float64 and large weights, because at BERT's own initialisation contamination hides below the precision of bfloat16.
The twin is stock transformers on each sequence alone. Each negative control makes one mistake that packing invites, and
must fail the same comparison that the right code passes.
"""

import pytest
import torch
from pretraining_models import MAX_LENGTH, alone, make_models
from slow_training import packed_rows, pretraining_one_by_one
from small_heads import RowWideAttention

from bert_pretrain.attention import use_attention
from collate import DataCollatorWithPacking, PackLayout
from collate.losses import count_denominators


@pytest.fixture
def collate(tokenizer):
    return DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH, max_sequences_per_pack=8)


def relative_error(got, expected):
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())


def gradient_error(packed, stock):
    """The worst relative error over all parameters; the scale is the whole gradient's."""
    pairs = list(zip(packed.parameters(), stock.parameters(), strict=True))
    scale = max(float(expected.grad.abs().max()) for _, expected in pairs)
    return max(float((got.grad - expected.grad).abs().max()) for got, expected in pairs) / scale


@pytest.mark.parametrize("mlm_loss", ["sequence", "token"])
def test_a_packed_batch_equals_its_sequences_one_by_one(pairs, collate, mlm_loss):
    pairs[3]["next_sentence_label"] = -100  # a sequence without NSP target is in no NSP mean
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    assert len(batch["input_ids"]) < len(pairs) / 2  # it is packed
    stock, packed = make_models(mlm_loss)
    expected, expected_hidden = pretraining_one_by_one(stock, alone(batch), mlm_loss)
    expected.backward()
    output = packed(**batch)
    output.loss.backward()

    assert relative_error(output.loss, expected) < 1e-12
    assert gradient_error(packed, stock) < 1e-12
    inputs = {name: batch[name] for name in ("input_ids", "sequence_ids", "position_ids", "token_type_ids")}
    hidden_BLD = packed(**inputs).last_hidden_state
    hidden_TD = hidden_BLD[batch["sequence_ids"] > 0]
    torch.testing.assert_close(hidden_TD, torch.cat(expected_hidden), rtol=0, atol=1e-12)
    assert (hidden_BLD[batch["sequence_ids"] == 0] == 0).all()


def test_the_order_of_sentences_is_learned_by_the_same_head(pairs, collate):
    """SOP's labels instead of NSP's: the same loss, gradients and counts, under their own name."""
    pairs[3]["next_sentence_label"] = -100
    nsp = collate(packed_rows(pairs, MAX_LENGTH))
    sop = dict(nsp)
    sop["sentence_order_label"] = sop.pop("next_sentence_label")
    assert (count_denominators(sop) == count_denominators(nsp)).all()
    assert count_denominators(sop)[2] == len(pairs) - 1
    _, packed = make_models()
    outputs = [packed(**batch) for batch in (nsp, sop)]
    assert outputs[0].loss == outputs[1].loss
    metrics = [packed.metrics(output.sums) for output in outputs]
    as_sop = {name.replace("nsp_", "sop_"): value for name, value in metrics[0].items()}
    assert as_sop == metrics[1] and {"sop_loss", "sop_accuracy", "sop_majority"} <= as_sop.keys()
    assert not any("sop" in name for name in metrics[0])
    with pytest.raises(ValueError, match=r"22 of 44 labelled sequences have a sentence_order_label"):
        packed.metrics(outputs[0].sums + outputs[1].sums)
    with pytest.raises(ValueError, match="one head cannot learn both; remove one of the columns"):
        packed(**nsp | sop)


def test_gradient_checkpointing_changes_nothing(pairs, collate):
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    _, packed = make_models()
    _, checkpointed = make_models()
    checkpointed.activation_checkpointing_enable()
    for model in (packed, checkpointed):
        model(**batch).loss.backward()
    assert gradient_error(checkpointed, packed) == 0


def test_a_batch_of_padding_alone_gives_zero_gradients(collate):
    """What a rank without packs computes, while the others wait for its gradients."""
    _, packed = make_models()
    output = packed(**collate([{"input_ids": [], "sequence_lengths": []}]))
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert all((parameter.grad == 0).all() for parameter in packed.parameters())


@pytest.mark.parametrize("mlm_loss", ["sequence", "token"])
def test_parameters_agree_after_20_adamw_steps(pairs, collate, mlm_loss):
    stock, packed = make_models(mlm_loss)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01) for model in (stock, packed)]
    rows = packed_rows(pairs, MAX_LENGTH)
    for step in range(20):
        collate.set_epoch(step)
        batch = collate(rows[step % 3 :: 2])
        for optimizer in optimizers:
            optimizer.zero_grad()
        pretraining_one_by_one(stock, alone(batch), mlm_loss)[0].backward()
        packed(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    # A softmax ignores a constant added to all scores: the gradient of a key's bias is rounding, which Adam enlarges.
    for (name, ours), theirs in zip(packed.named_parameters(), stock.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) < (1e-8 if name.endswith("key.bias") else 1e-12), name


def no_mask(model, batch):
    return use_attention(model, RowWideAttention)(**batch).loss


def positions_not_reset(model, batch):
    positions = torch.arange(MAX_LENGTH).expand(batch["input_ids"].shape)
    return model(**batch | {"position_ids": positions}).loss


def token_types_not_reset(model, batch):
    """Sentence A of every further sequence takes the type of the B before it."""
    return model(**batch | {"token_type_ids": batch["token_type_ids"].cummax(dim=1).values}).loss


def nsp_from_the_first_cls_only(model, batch):
    first = torch.where(batch["cls_positions"] >= 0, 0, -1)
    return model(**batch | {"cls_positions": first}).loss


def mean_per_micro_batch(model, batch):
    half = len(batch["input_ids"]) // 3
    parts = [{k: v[:half] for k, v in batch.items()}, {k: v[half:] for k, v in batch.items()}]
    return torch.stack([model(**part).loss for part in parts]).mean()


def nsp_averaged_per_pack(model, batch):
    """Every pack weighs the same, however many sequences it holds."""
    packs = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["input_ids"]))]
    return torch.stack([model(**pack).loss for pack in packs]).mean()


MISTAKES = [
    no_mask,
    positions_not_reset,
    token_types_not_reset,
    nsp_from_the_first_cls_only,
    mean_per_micro_batch,
    nsp_averaged_per_pack,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_negative_control(pairs, collate, mistake):
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    stock, packed = make_models()
    expected, _ = pretraining_one_by_one(stock, alone(batch), "sequence")
    expected.backward()
    loss = mistake(packed, batch)
    loss.backward()
    # right code keeps twelve digits; each mistake loses all but four
    assert relative_error(loss, expected) > 1e-4
    assert gradient_error(packed, stock) > 1e-4


def test_a_pack_mate_changes_nothing(pairs, collate):
    """Bit for bit: other words, types and positions in one sequence leave the others as they are."""
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    _, packed = make_models()
    inputs = {name: batch[name] for name in ("input_ids", "sequence_ids", "position_ids", "token_type_ids")}
    before = packed(**inputs).last_hidden_state
    mate = batch["sequence_ids"] == 2
    assert mate.any()
    changed = inputs | {"input_ids": torch.where(mate, 64 - batch["input_ids"].clamp(5, 59), batch["input_ids"])}
    after = packed(**changed).last_hidden_state
    assert (after[~mate] == before[~mate]).all()
    assert not (after[mate] == before[mate]).all()


def test_a_huge_pack_mate_changes_nothing(pairs, collate):
    """A mate's hidden states at 1e4 times their size, in values and gradients."""
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    _, packed = make_models()
    layer = packed.bert.encoder.layer[0]
    layout = PackLayout(batch["sequence_ids"])
    torch.manual_seed(1)
    hidden = torch.randn(1, layout.num_tokens, 32, dtype=torch.float64)
    mate = layout.unpad(batch["sequence_ids"]) == 2
    results = []
    for scale in (1.0, 1e4, -1e4):
        scaled = torch.where(mate[None, :, None], hidden * scale, hidden).requires_grad_()
        output = layer(scaled, layout=layout)
        (output[0][~mate] ** 2).sum().backward()
        results.append((output[0][~mate], scaled.grad[0][~mate], scaled.grad[0][mate]))
    for other in results[1:]:
        assert (other[0] == results[0][0]).all() and (other[1] == results[0][1]).all()
        assert (other[2] == 0).all()  # and the mate gets no gradient from the others' outputs
