"""Packed task heads on stock models with a block: packed or one sequence a row, the loss and gradients are the same."""

import pytest
import torch
import transformers
from pretraining_models import make_config

from bert_pretrain.block import use_block
from collate import task_for

LENGTHS = [5, 3, 7, 1]
TASKS = {"ForMaskedLM": "tokens", "ForTokenClassification": "tokens", "ForSequenceClassification": "sequences"}


def batch_of(packs, kind, slots=12):
    """packs: [[0, 1], [2, 3]] which sequences lie together."""
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(5, 60, (length,), generator=generator) for length in LENGTHS]
    batch = {name: torch.zeros(len(packs), slots, dtype=torch.long) for name in ("input_ids", "sequence_ids")}
    depth = max(map(len, packs))
    batch["cls_positions"] = torch.full((len(packs), depth), -1)
    batch["labels"] = torch.full((len(packs), slots if kind == "tokens" else depth), -100)
    for row, pack in enumerate(packs):
        start = 0
        for slot, index in enumerate(pack):
            place = slice(start, start := start + LENGTHS[index])
            batch["input_ids"][row, place], batch["sequence_ids"][row, place] = words[index], slot + 1
            batch["cls_positions"][row, slot] = place.start
            if kind == "tokens":
                batch["labels"][row, place] = words[index] % 3
            else:
                batch["labels"][row, slot] = index % 3
    return batch


@pytest.mark.parametrize("task", TASKS)
def test_packed_is_alone(task):
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{task}")(make_config(num_labels=3)).double()
    use_block(model, placement="residual", norm="rms", stream="checkpoint")
    found = []
    for packs in ([[0, 1, 3], [2]], [[0], [1], [2], [3]]):
        model.zero_grad()
        loss = task_for(model)(model, batch_of(packs, TASKS[task])).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=0, atol=1e-11, msg=name)
