"""What a GPU would wait for, and how many kernels it would start: for each attention head.

    python tests/runs/count_waits.py                   a table of all heads
    python tests/runs/count_waits.py local routing     these heads, with the lines that wait

Nothing here needs a GPU: see pretend_cuda.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pretend_cuda import PretendCuda, per_line
from torch import Tensor
from transformers import BertConfig

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION
from collate import to_device

LENGTH, PACKS, VOCABULARY, STEP = 256, 18, 100, 8
LAYERS = 12
"""Of the passes that the table speaks of; counted with 1 and with 2 layers."""


@dataclass(frozen=True)
class Count:
    """Of one pass, forward and backward, in bfloat16.

    waits, launches: of the pass. mixed: operations between tensors of the device and of the host. lines: what waited.
    """

    waits: int
    launches: int
    mixed: Counter[str]
    lines: Counter[str]


@dataclass(frozen=True)
class Counts:
    """Of passes with any number of layers: outside of layers, and of each layer."""

    waits: int
    waits_a_layer: int
    launches: int
    launches_a_layer: int
    mixed: Counter[str]
    lines: Counter[str]

    def launches_with(self, layers: int) -> int:
        return self.launches + layers * self.launches_a_layer


def packs(distinct: int) -> Tensor:
    """(18, 256) sequence_ids of packs whose sequences have so many distinct lengths, from 8 to 256 tokens.

    Heads that put sequences of like length side by side see as many groups. What is left of a pack is padding.
    """
    widths = [round(width) for width in np.linspace(LENGTH // STEP, 1, distinct)]
    ids = torch.zeros(PACKS, LENGTH, dtype=torch.int32)
    filled, number = [0] * PACKS, [0] * PACKS
    turn = 0
    while True:  # each length in turn, into the first pack with room
        placed = False
        for width in widths:
            length = width * STEP
            pack = next((p for p in range(PACKS) if filled[p] + length <= LENGTH), None)
            if pack is not None:
                number[pack] += 1
                ids[pack, filled[pack] : filled[pack] + length] = number[pack]
                filled[pack] += length
                placed = True
        if not placed:
            return ids
        turn += 1


def batch_of(sequence_ids: Tensor) -> dict[str, Tensor]:
    """A batch as DataCollatorWithPacking makes it."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, VOCABULARY, sequence_ids.shape, generator=generator)
    predicted = (torch.rand(sequence_ids.shape, generator=generator) < 0.15) & (sequence_ids > 0)
    slots = int(sequence_ids.max())
    cls_positions = torch.full((len(sequence_ids), slots), -1)
    position_ids = torch.zeros_like(input_ids)
    for pack, row in enumerate(sequence_ids.tolist()):
        for slot, number in enumerate(row):
            if number and (slot == 0 or row[slot - 1] != number):
                cls_positions[pack, number - 1] = slot
            if number:
                position_ids[pack, slot] = slot - int(cls_positions[pack, number - 1])
    return {
        "input_ids": input_ids,
        "sequence_ids": sequence_ids,
        "position_ids": position_ids,
        "token_type_ids": torch.zeros_like(input_ids),
        "labels": torch.where(predicted, input_ids, -100),
        "cls_positions": cls_positions,
        "next_sentence_label": torch.where(cls_positions >= 0, 1, -100),
    }


def count(
    head: str,
    layers: int = 1,
    batch: dict[str, Tensor] | None = None,
    block: dict[str, Any] | None = None,
    **options: Any,
) -> Count:
    """One pass of PackedBertForPreTraining with this attention head, from the batch's arrival to the gradients.

    block: options of bert_pretrain.block. options: of the head.
    """
    batch = batch_of(packs(10)) if batch is None else batch
    torch.manual_seed(0)
    sizes: dict = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": layers}
    ours: dict = {"packed_attention": head, "packed_attention_options": options, "block": block}
    ours |= {"attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes, **ours)
    model = PackedBertForPreTraining(config).train()
    with PretendCuda() as gpu:
        model.to("cuda")
        gpu.waits.clear()
        gpu.launches.clear()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**to_device(batch, "cuda")).loss
        loss.backward()
    assert all(x.grad is not None and x.grad.is_cuda for x in model.parameters() if x.requires_grad)
    return Count(len(gpu.waits), gpu.launches.total(), gpu.mixed, per_line(gpu.waits))


def counts(head: str, distinct: int = 10, block: dict[str, Any] | None = None, **options: Any) -> Counts:
    """Passes over a batch with so many distinct lengths."""
    batch = batch_of(packs(distinct))
    one, two = (count(head, layers, batch, block, **options) for layers in (1, 2))
    waits, launches = two.waits - one.waits, two.launches - one.launches
    return Counts(one.waits - waits, waits, one.launches - launches, launches, two.mixed, two.lines)


def table(heads: list[str]) -> None:
    print(f"{'':12}{'10 distinct lengths':^36}{'32 distinct lengths':^36}")
    columns = f"{'waits':>7}{'a layer':>8}{'launches':>10}{'a layer':>8}   "
    print(f"{'':12}{columns}{columns}mixed     ({LAYERS} layers, forward and backward)")
    for head in heads:
        try:
            found = [counts(head, distinct) for distinct in (10, 32)]
        except Exception as error:  # one head must not hide the others
            print(f"{head:12}fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        cells = [
            f"{each.waits + LAYERS * each.waits_a_layer:7}{each.waits_a_layer:8}{each.launches_with(LAYERS):10,}"
            f"{each.launches_a_layer:8}   "
            for each in found
        ]
        print(f"{head:12}{''.join(cells)}{found[1].mixed.total()}", flush=True)


def lines(head: str) -> None:
    found = counts(head)
    for line, times in found.lines.most_common():
        print(f"{times:5} {line}")
    for line, times in found.mixed.most_common():
        print(f"{times:5} mixed devices: {line}")


def main(arguments: list[str]) -> None:
    table([name for name in ATTENTION if name in arguments or not arguments])
    for head in arguments:
        print(f"\n{head}: waits of a pass of 2 layers")
        lines(head)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
