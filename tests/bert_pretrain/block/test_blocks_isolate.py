"""Any head in any block: a sequence in a pack is what it is alone, with gradients, whatever its mates hold."""

import itertools

import pytest
import torch
from block_models import IDS, block_model, hidden_of, layout_of, run_encoder
from count_waits import batch_of

from bert_pretrain.block import FEED_FORWARDS, NORMS, PLACEMENTS, STREAMS, BlockOptions
from bert_pretrain.moving import MovesAfterStep
from collate import to_device

HEADS = ["sdpa", "local", "lsh", "routing", "linear"]
ROUNDING = 1e-12


def is_legal(options):
    try:
        BlockOptions(**options)
    except ValueError as error:
        assert "take placement='pre'" in str(error)
        return False
    return True


BLOCKS = [
    dict(zip(("placement", "norm", "stream", "feed_forward"), names, strict=True))
    for names in itertools.product(PLACEMENTS, NORMS, STREAMS, FEED_FORWARDS)
]
LEGAL = [options for options in BLOCKS if is_legal(options)]


def test_one_pair_is_illegal():
    left_out = [options for options in BLOCKS if options not in LEGAL]
    assert all(options["stream"] == "reversible" and options["placement"] != "pre" for options in left_out)


def close(found, expected, scale):
    return float((found - expected).abs().max()) <= ROUNDING * max(1.0, scale)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", LEGAL, ids=lambda options: "-".join(options.values()))
def test_packed_is_alone(options, head):
    # with weights twice as large, rounding alone moves some gradients by 1e-11
    model = block_model(head, **options).eval()
    layout = layout_of(IDS)
    hidden_TD = hidden_of(layout)
    weights_TD = hidden_of(layout, seed=1)
    out_TD, gradient_TD, gradients = run_encoder(model, hidden_TD, layout, weights_TD)
    lengths = layout.lengths.tolist()
    summed = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for x, weights, out, gradient in zip(
        *(each.split(lengths) for each in (hidden_TD, weights_TD, out_TD, gradient_TD)), strict=True
    ):
        alone = run_encoder(model, x, layout_of([[1] * len(x)]), weights)
        assert close(alone[0], out, float(out_TD.abs().max()))
        assert close(alone[1], gradient, float(gradient_TD.abs().max()))
        for name, each in alone[2].items():
            summed[name] += each
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert scale > 1
    for name, gradient in gradients.items():
        assert close(summed[name], gradient, scale), name

    first = lengths[0]
    for value in (1e4, -1e4, float("nan")):
        mates = hidden_TD.clone()
        mates[first:] = value * (1 if value != value else torch.rand_like(mates[first:]))
        found_TD, found_gradient_TD, _ = run_encoder(model, mates, layout, weights_TD)
        pairs = [(found_TD, out_TD), (found_gradient_TD, gradient_TD)]
        for found, expected in pairs:
            if options["feed_forward"] == "dense":
                assert torch.equal(found[:first], expected[:first]), value
            else:  # which experts the mates choose decides the shape of a product
                assert close(found[:first], expected[:first], float(expected.abs().max())), value


@pytest.mark.parametrize("head", HEADS)
def test_sequences_that_are_not_kept_apart_would_be_seen(head):
    model, layout = block_model(head, placement="pre", norm="rms").eval(), layout_of(IDS)
    hidden_TD = hidden_of(layout)
    joined = layout_of([[1] * 8 + [0], [1] * 8 + [0]])
    apart, together = (run_encoder(model, hidden_TD, each)[0] for each in (layout, joined))
    assert float((apart - together).abs().max()) > 0.01


@pytest.mark.parametrize("options", LEGAL, ids=lambda options: "-".join(options.values()))
def test_padding_slots_change_nothing(options):
    """A GPU computes all slots of a pack; losses and gradients are those of the real tokens."""
    model = block_model(config={"vocab_size": 100}, **options).eval()
    batch = batch_of(torch.tensor([[1] * 9 + [2] * 4 + [0] * 11, [1] * 20 + [0] * 4], dtype=torch.int32))
    found = []
    for by_slots in (None, True):
        model.zero_grad()
        loss = model(**to_device(dict(batch), "cpu", by_slots=by_slots)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(close(a, b, float(b.abs().max())) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("options", LEGAL, ids=lambda options: "-".join(options.values()))
def test_a_rank_without_packs_takes_part(options):
    """A gradient of 0 for every parameter, and no wait for what is not there."""
    model = block_model(**options)
    words = torch.ones((1, 4), dtype=torch.long)
    loss = model(words, torch.zeros_like(words), labels=torch.full_like(words, -100)).loss
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(name.startswith(("bert.pooler", "cls.seq_relationship")) for name in missing)
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("head", "options"), [("routing", {}), ("sdpa", {"feed_forward": "moe", "balance": "bias"})])
def test_a_rank_without_packs_moves_no_buffer(head, options):
    model = block_model(head, placement="pre", **options)
    words = torch.ones((1, 4), dtype=torch.long)
    model(words, torch.zeros_like(words), labels=torch.full_like(words, -100)).loss.backward()
    moving = [module for module in model.modules() if isinstance(module, MovesAfterStep)]
    assert moving and all(not any(x.any() for x in module._statistics or ()) for module in moving)
