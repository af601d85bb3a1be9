"""What adaptive_span and entmax cost beside exact attention, and what their options span and top_k save.

    python benchmarks/learned_weights.py

Forward and backward of one layer, each case in turn in each round. A cell is the processor time as a multiple of that
of sdpa in the same round: the median, and the least and the greatest.
"""

import argparse
from functools import partial

import numpy as np
import torch
from attention import NUM_HEADS, clear_gradients, make_tensors, timed
from packers import machine

from bert_pretrain.attention import ATTENTION
from collate.layout import PackLayout

EXACT = "sdpa"
CASES: dict[str, tuple[str, dict]] = {
    EXACT: (EXACT, {}),
    "adaptive_span": ("adaptive_span", {}),
    "adaptive_span, span 64": ("adaptive_span", {"span": 64}),
    "entmax": ("entmax", {}),
    "entmax, top_k 64": ("entmax", {"top_k": 64}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tensors = make_tensors(options.tokens, "cpu", "float32")
    print(
        f"{machine()}, torch {torch.__version__}, 1 thread, float32, {options.tokens:,} tokens, {options.rounds} rounds"
    )
    print(f"\n| head | {' | '.join(f'n = {n:,}' for n in options.lengths)} |\n|---|{'--:|' * len(options.lengths)}")
    columns = [ratios(n, tensors, options) for n in options.lengths]
    for case in CASES:
        cells = (
            f"{np.median(column[case]):.1f} ({min(column[case]):.1f}-{max(column[case]):.1f})" for column in columns
        )
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


def ratios(length: int, tensors: list, options: argparse.Namespace) -> dict[str, list[float]]:
    """Of each case and round, the processor time as a multiple of exact attention's; sequences of `length` tokens."""
    layout = PackLayout((torch.arange(options.tokens) // length + 1)[None])
    heads = {}
    for case, (name, own) in CASES.items():
        heads[case] = ATTENTION[name](
            num_heads=NUM_HEADS, head_width=tensors[0].shape[2], max_sequence_length=max(options.lengths), **own
        )
    found: dict[str, list[float]] = {case: [] for case in CASES}
    for turn in range(options.rounds + 1):
        seconds = {}
        for case, head in heads.items():
            clear_gradients(head, tensors)
            seconds[case] = timed(partial(run, head, tensors, layout), "cpu")[1]
        for case in CASES if turn else ():  # the first makes the tables of the layout
            found[case].append(seconds[case] / seconds[EXACT])
    return found


def run(head: torch.nn.Module, tensors: list, layout: PackLayout) -> None:
    *inputs, gradient = tensors
    head(*inputs, layout).backward(gradient)


if __name__ == "__main__":
    main()
