"""Which execution of exact attention is fastest on a CPU? One by one, in groups of similar lengths, or a dense mask.

    python benchmarks/exact_attention.py                  4 heads of 64, one thread
    python benchmarks/exact_attention.py --heads 12 --threads 2

one by one    each sequence is a slice of the batch: what `sdpa` does without dropout
grouped       sequences of similar lengths side by side, rounded up to a multiple of 16: what it does elsewhere
dense mask    rows of --row slots, block-diagonal mask

Forward and backward, from tokens (T, H, K) to gradients; processor time per token, the median of --rounds; the three
take turns. Sequences of one length, less one token for the last of a row; and lengths drawn from Wikipedia's, packed.

    python benchmarks/exact_attention.py --encoder        an isolated stock BERT of two layers, with a mask and without

with a mask   isolate_sequences(model, dense_mask=True)
isolated      isolate_sequences(model): each sequence by itself
one by one    the stock model on one sequence after the other
own head      use_attention(model, "sdpa")

One row of 8,192 tokens in 28 sequences, and short rows; processor seconds, the median of --rounds in turns.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from training import best_fit_decreasing, machine, wikipedia_lengths
from transformers import BertConfig, BertModel

from bert_pretrain.attention import use_attention
from collate import isolate_sequences
from collate.isolation.exact_attention import attend_grouped
from collate.isolation.pieces import OneByOne, pieces_of_tokens
from collate.layout import PackLayout

HEAD_WIDTH = 64


def one_by_one(query, key, value, layout: PackLayout) -> Tensor:
    rows = (x.transpose(0, 1)[None] for x in (query, key, value))
    return OneByOne.apply(*rows, pieces_of_tokens(layout)).squeeze(0).transpose(0, 1)


def dense_mask(query, key, value, layout: PackLayout) -> Tensor:
    query, key, value = (layout.pad(x).transpose(1, 2) for x in (query, key, value))
    mask = layout.derived("dense mask", lambda: layout.attention_mask)
    return layout.unpad(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2))


EXECUTIONS: dict[str, Callable[..., Tensor]] = {
    "one by one": one_by_one,
    "grouped": attend_grouped,
    "dense mask": dense_mask,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="of sequences")
    add("--row", type=int, default=512, help="slots of a row")
    add("--rows", type=int, default=8)
    add("--heads", type=int, default=4)
    add("--rounds", type=int, default=7)
    add("--threads", type=int, default=1)
    add("--encoder", action="store_true", help="time a stock encoder instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.device, options.dtype, options.attention = "cpu", "float32", "sdpa"
    print(f"{machine(options)}, {options.heads} heads of {HEAD_WIDTH}, {options.rows} rows of {options.row}")
    if options.encoder:
        return print_encoders(options)
    print(f"\nµs per token      sequences  {'  '.join(f'{name:>10}' for name in EXECUTIONS)}")
    cases = {f"of {length}": one_length(length, options) for length in options.lengths} | {"Wikipedia": packed(options)}
    for name, sequence_ids in cases.items():
        layout = PackLayout(sequence_ids)
        times = measure(layout, options)
        print(f"{name:<16}{layout.num_sequences:>11}  {'  '.join(f'{t:>10.1f}' for t in times.values())}", flush=True)


def one_length(length: int, options) -> Tensor:
    row = np.repeat(np.arange(1, options.row // length + 1), length)
    row = np.pad(row, (0, options.row - len(row)))
    row[np.flatnonzero(row)[-1]] = 0  # so that groups have padding, as they mostly do
    return torch.tensor(np.tile(row, (options.rows, 1)), dtype=torch.int32)


def packed(options) -> Tensor:
    lengths = wikipedia_lengths(50 * options.rows, options.row, np.random.default_rng(0))
    packs = best_fit_decreasing(lengths, options.row)
    rows = [packs[i] for i in np.random.default_rng(1).permutation(len(packs))[: options.rows]]
    ids = [np.repeat(np.arange(1, len(row) + 1), lengths[row]) for row in rows]
    return torch.tensor(np.stack([np.pad(row, (0, options.row - len(row))) for row in ids]), dtype=torch.int32)


def measure(layout: PackLayout, options) -> dict[str, float]:
    """Microseconds of processor time per token."""
    shape = (layout.num_tokens, options.heads, HEAD_WIDTH)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    grad, times, first = torch.randn(shape), {name: [] for name in EXECUTIONS}, None
    for _ in range(options.rounds + 1):
        for name, attend in EXECUTIONS.items():
            start = time.process_time()
            context = attend(*inputs, layout)
            gradients = torch.autograd.grad(context, inputs, grad)
            times[name].append((time.process_time() - start) / layout.num_tokens * 1e6)
            if len(times[name]) == 1:  # the first round warms up, and checks that all do the same work
                first = first or (context, *gradients)
                for found, expected in zip((context, *gradients), first, strict=True):
                    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def print_encoders(options) -> None:
    cases = {"1 x 8,192": cut_at_random(1, 8192, 28), "8 x 512": cut_at_random(8, 512, 4)}
    cases |= {"32 x 128": cut_at_random(32, 128, 2), "64 x 64": cut_at_random(64, 64, 1)}
    for mode, gradients in (("forward", False), ("forward and backward", True)):
        print(f"\nprocessor s, {mode:<22}sequences  {'  '.join(f'{name:>11}' for name in ENCODERS)}  mask / isolated")
        for name, sequence_ids in cases.items():
            times = encoder_times(sequence_ids, options, gradients)
            ratio = times["with a mask"] / times["isolated"]
            row = "  ".join(f"{t:>11.3f}" for t in times.values())
            print(f"{name:<31}{PackLayout(sequence_ids).num_sequences:>9}  {row}  {ratio:>15.2f}", flush=True)


def cut_at_random(rows: int, slots: int, sequences: int) -> Tensor:
    """Rows (B, L) of so many sequences each, cut at random places."""
    random = np.random.default_rng(0)
    cuts = np.zeros((rows, slots), np.int32)
    for row in cuts:
        row[random.choice(np.arange(1, slots), sequences - 1, replace=False)] = 1
    return torch.from_numpy(1 + cuts.cumsum(1, dtype=np.int32))


def stock_encoder(options) -> BertModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 8000, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    sizes |= {"num_attention_heads": options.heads, "hidden_size": options.heads * HEAD_WIDTH}
    sizes |= {"intermediate_size": 4 * options.heads * HEAD_WIDTH, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0))


def one_after_the_other(model: BertModel):
    def run(input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        numbers = [(row, ids == number) for row, ids in enumerate(sequence_ids) for number in ids.unique()]
        return torch.cat([model(input_ids[row, mine][None])[0][0] for row, mine in numbers])

    return run


ENCODERS = {
    "with a mask": lambda model: isolate_sequences(model, dense_mask=True),
    "isolated": isolate_sequences,
    "one by one": one_after_the_other,
    "own head": lambda model: use_attention(model, "sdpa"),
}


def encoder_times(sequence_ids: Tensor, options, gradients: bool) -> dict[str, float]:
    """The median seconds of each; checks that all do the same work."""
    input_ids = torch.randint(8000, sequence_ids.shape)
    runs, times, first = {}, {name: [] for name in ENCODERS}, None
    for name, prepare in ENCODERS.items():
        model = prepare(stock_encoder(options))
        runs[name] = partial(call, model) if isinstance(model, BertModel) else model
    for _ in range(options.rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            with torch.set_grad_enabled(gradients):
                hidden = run(input_ids, sequence_ids).flatten(0, -2)
            if gradients:
                hidden.square().mean().backward()
            times[name].append(time.process_time() - start)
            first = hidden.detach() if first is None else first
            torch.testing.assert_close(hidden.detach(), first, rtol=0, atol=1e-4)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def call(model: BertModel, input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
    return model(input_ids, sequence_ids=sequence_ids)[0]


if __name__ == "__main__":
    main()
