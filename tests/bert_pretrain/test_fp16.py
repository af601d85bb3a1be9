"""fp16: what a GPU would do, by the CPU's own autocast and gradient scaler, beside float32. The command refuses it."""

import pytest
import torch
from pretraining_models import make_config
from small_heads import HERE, SMALL_OPTIONS

from bert_pretrain import PackedBertForPreTraining

IDS = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3, [1] * 5 + [2] * 27])


def model_of(name):
    torch.manual_seed(0)
    config = make_config(packed_attention=name, packed_attention_options=SMALL_OPTIONS.get(name, {}))
    config.attention_probs_dropout_prob = config.hidden_dropout_prob = 0.0
    return PackedBertForPreTraining(config)


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 60, IDS.shape, generator=generator)
    labels = torch.where(torch.rand(IDS.shape, generator=generator) < 0.3, tokens, -100)
    cls = torch.tensor([[0, 20], [0, 5]])
    pairs = torch.tensor([[0, 1], [1, -100]])
    return {
        "input_ids": tokens,
        "sequence_ids": IDS,
        "labels": torch.where(IDS > 0, labels, -100),
        "cls_positions": cls,
        "next_sentence_label": pairs,
    }


@pytest.mark.parametrize("name", ["auto", *HERE])
def test_a_scaled_step_in_float16_is_near_that_of_float32(name):
    """Loss and gradients. The scale is where a scaler ends that begins too high for a batch of so few tokens."""
    exact, half = model_of(name), model_of(name)
    loss = exact(**batch()).loss
    loss.backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", torch.float16):
        outputs = half(**batch())
    assert outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, loss, rtol=1e-2, atol=0)
    optimizer = torch.optim.SGD(half.parameters(), lr=0.0)
    scaler.scale(outputs.loss).backward()
    scaler.unscale_(optimizer)
    of_exact, of_half = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in (exact, half)
    )
    assert of_half.isfinite().all()
    off = float((of_half - of_exact).norm() / of_exact.norm())
    chooses = name in ("lsh", "routing", "clustered")  # their choices may fall otherwise when rounded
    assert off < (1 if chooses else 0.05)


def test_a_step_that_overflows_is_skipped_and_the_parameters_stay():
    """As under Trainer: the scaler halves its scale."""
    model = model_of("auto")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch()).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39 and all(map(torch.equal, model.parameters(), before))
