"""What do the streams of a deep model cost, in memory and time, and how far does a Reformer reach on this machine?

    python benchmarks/reversible.py                    all of it
    python benchmarks/reversible.py --parts streams    one part: streams, depth, length, rounds or drift

streams      memory and time of forward and backward at 24 layers, plain, checkpoint and reversible: sdpa, and lsh.
depth        a Reformer of 2, 4 and 8 layers on one sequence of 65,536 tokens: lsh with 8 rounds and buckets of 64,
             reversible, feed-forward in chunks of 4,096 tokens.
length       the same Reformer with 2 layers, on one sequence of 4,096 to 65,536 tokens; exact attention up to 16,384.
rounds       how near lsh comes to exact attention over 65,536 tokens, by number of rounds: the share of the softmax
             that the shown tokens have, for 256 of the queries, and the error of their contexts.
drift        how far gradients of 6, 24 and 48 layers are from those in float64.

Memory is the growth of the resident set at the peak of one pass, in a process of its own, after a pass that does not
count; parameters and their gradients are there before. Linux only. One thread, unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from attention import GLIBC, peak_bytes, slope
from packers import machine
from torch import Tensor
from transformers import BertConfig

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import use_attention
from bert_pretrain.attention.heads.lsh import LSHAttention, longest, sort_into_chunks
from bert_pretrain.block import use_block
from bert_pretrain.block.reversible import reversed_layers, steps_of
from collate.layout import PackLayout

STREAMS = ("plain", "checkpoint", "reversible")
REFORMER = {"num_rounds": 8, "bucket_size": 64}
LONGEST, CHUNK = 65_536, 4_096
GAINS = 0.16, 1.1, 1.6


def main() -> None:
    parts = {
        "streams": show_streams,
        "depth": show_depth,
        "length": show_length,
        "rounds": show_rounds,
        "drift": show_drift,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=parts, default=list(parts))
    add("--rounds", type=int, default=3, help="of streams: interleaved, their ratios are the result")
    add("--layers", type=int, default=24, help="of streams")
    add("--width", type=int, default=256, help="of streams; heads have 64")
    add("--packs", type=int, default=8, help="of streams, of 512 tokens each")
    add("--lengths", type=int, nargs="+", default=[4_096, 8_192, 16_384, 32_768, 65_536])
    add("--depths", type=int, nargs="+", default=[2, 4, 8])
    add("--tokens", type=int, default=LONGEST, help="of depth's one sequence")
    add("--threads", type=int, default=1)
    add("--case", help=argparse.SUPPRESS)  # in a process of its own: JSON of a case, prints its figures
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case is not None:
        print(json.dumps(measure_case(**json.loads(options.case))))
        return
    print(f"{machine()}, torch {torch.__version__}, {options.threads} threads, float32")
    for part in options.parts:
        for line in parts[part](options):
            print(line, flush=True)


class Case:
    """The encoder of a model on one batch of random hidden states; dropout is on.

    lengths: of the sequences, each a pack. block: options of use_block.
    """

    def __init__(self, attention: str, lengths: list[int], layers: int, width: int, block: dict, **options: Any):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=max(lengths),
            attention_probs_dropout_prob=0.0,
        )
        model = use_attention(PackedBertForPreTraining(config), attention, **options)
        self.model = use_block(model, placement="pre", **block).train()
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
        for row, length in zip(ids, lengths, strict=True):
            row[:length] = 1
        self.ids, self.input_ids = ids, torch.randint(5, 64, ids.shape)
        self.layout = PackLayout.of(ids)
        self.weights = torch.randn(self.layout.num_tokens, width)

    @torch.no_grad()
    def scale_weights(self, gain: float) -> None:
        """Draws of projections with the deviation gain / sqrt(inputs)."""
        for weight in self.model.bert.encoder.parameters():
            if weight.dim() == 2:
                weight *= gain / (weight.shape[1] ** 0.5 * weight.std())

    def run(self) -> float:
        """One pass forward and backward; its processor seconds."""
        start = time.process_time()
        hidden_TD = self.model.encode(self.layout, self.input_ids)
        (hidden_TD * self.weights).sum().backward()
        return time.process_time() - start


def measure_case(**case: Any) -> dict[str, float]:
    """The seconds and the bytes at the peak of a pass; one before it does not count."""
    made, seconds = Case(**case), []
    made.run()
    peak = peak_bytes(lambda: seconds.append(made.run()), "cpu")
    return {"bytes": peak, "seconds": seconds[0]}


def in_own_process(threads: int, **case: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(threads), "--case", json.dumps(case)]
    done = subprocess.run(command, env=os.environ | GLIBC, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show_streams(options: argparse.Namespace) -> Iterator[str]:
    yield (
        f"\nstreams: {options.layers} layers of width {options.width}, placement pre, dropout 0.1, {options.packs} "
        f"packs of 512 tokens, {options.rounds} interleaved rounds after one that does not count\n"
    )
    yield "| head | stream | memory, MB | ÷ plain | time, s | × plain (least to greatest) |"
    yield "|---|---|--:|--:|--:|--:|"
    for attention, settings in (("sdpa", {}), ("lsh", {"num_rounds": 2})):
        cases = {
            stream: {
                "attention": attention,
                "lengths": [512] * options.packs,
                "layers": options.layers,
                "width": options.width,
                "block": {"stream": stream},
                **settings,
            }
            for stream in STREAMS
        }
        peaks = {stream: in_own_process(options.threads, **case)["bytes"] for stream, case in cases.items()}
        seconds = interleaved({name: Case(**case).run for name, case in cases.items()}, options.rounds)
        for stream in STREAMS:
            ratios = seconds[stream] / seconds["plain"]
            spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            yield (
                f"| {attention} | {stream} | {peaks[stream] / 1e6:,.0f} | {peaks[stream] / peaks['plain']:.3f} | "
                f"{np.median(seconds[stream]):.2f} | {spread} |"
            )


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """(rounds,) seconds of each; all take turns, and the first round does not count."""
    seconds = [[run() for run in runs.values()] for _ in range(rounds + 1)][1:]
    return dict(zip(runs, np.array(seconds).T, strict=True))


def reformer(length: int, layers: int, stream: str = "reversible") -> dict[str, Any]:
    """A case: one sequence, width 64, one head."""
    block = {"stream": stream, "chunk_size": CHUNK}
    return {"attention": "lsh", "lengths": [length], "layers": layers, "width": 64, "block": block, **REFORMER}


def show_depth(options: argparse.Namespace) -> Iterator[str]:
    yield (
        f"\ndepth: a Reformer on one sequence of {options.tokens:,} tokens: lsh with 8 rounds, width 64, one head, "
        f"feed-forward in chunks of {CHUNK:,}\n"
    )
    yield "| layers | memory, MB | of it choices, MB | time of a pass, s |"
    yield "|--:|--:|--:|--:|"
    for layers in options.depths:
        found = in_own_process(options.threads, **reformer(options.tokens, layers))
        choices = layers * REFORMER["num_rounds"] * options.tokens * 2 / 1e6
        yield f"| {layers} | {found['bytes'] / 1e6:,.0f} | {choices:,.0f} | {found['seconds']:.1f} |"


def show_length(options: argparse.Namespace) -> Iterator[str]:
    yield "\nlength: the same Reformer with 2 layers; exact: sdpa in its place, in up to 16,384 tokens\n"
    yield "| tokens | memory, MB | time of a pass, s | µs a token | exact, s | exact, MB |"
    yield "|--:|--:|--:|--:|--:|--:|"
    seconds = []
    for length in options.lengths:
        found = in_own_process(options.threads, **reformer(length, 2))
        seconds.append(found["seconds"])
        cells = ["", ""]
        if length <= 16_384:
            case = {k: v for k, v in reformer(length, 2).items() if k not in REFORMER} | {"attention": "sdpa"}
            exact = in_own_process(options.threads, **case)
            cells = [f"{exact['seconds']:.1f}", f"{exact['bytes'] / 1e6:,.0f}"]
        yield (
            f"| {length:,} | {found['bytes'] / 1e6:,.0f} | {found['seconds']:.2f} | "
            f"{found['seconds'] / length * 1e6:.0f} | {' | '.join(cells)} |"
        )
    yield f"\nslope of time against length, log-log, over the longer half: {slope(options.lengths, seconds):.2f}"


def show_drift(options: argparse.Namespace) -> Iterator[str]:
    yield (
        "\ndrift: |gradients - those in float64| / |those in float64|, over all weights of the encoder: width 64, "
        "4 packs of 256 tokens, dropout 0.1. kept: two streams of float32 under ordinary autograd. bf16: by autocast. "
        "gain: how much a projection enlarges what it reads; 0.16 as in a new model\n"
    )
    yield "| head | gain | layers | kept, float32 | reversible, float32 | kept, bf16 | reversible, bf16 |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    heads: dict[str, dict] = {"sdpa": {}, "lsh": {"num_rounds": 4, "bucket_size": 16}}
    for attention, gain in product(heads, GAINS):
        for layers in (6, 24, 48):
            case = Case(attention, [256] * 4, layers, 64, {"stream": "reversible"}, **heads[attention])
            case.scale_weights(gain)
            exact = weight_gradients(case, kept_stream, torch.float64)
            found = [
                (weight_gradients(case, stream, torch.float32, is_half) - exact).norm() / exact.norm()
                for is_half in (False, True)
                for stream in (kept_stream, reversed_layers)
            ]
            yield f"| {attention} | {gain} | {layers} | {' | '.join(f'{float(error):.1e}' for error in found)} |"


def kept_stream(
    layers: Any, placement: Any, hidden_TD: Tensor, layout: PackLayout
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The two streams of `reversible`, with everything kept; in float32, as far as the hidden states are."""
    first = second = hidden_TD
    for step in steps_of(layers, placement, hidden_TD.dtype):
        first, second = second, first + step.run(second, layout)[0]
    return placement.begin((first + second) / 2), hidden_TD.new_zeros(0)


def weight_gradients(case: Case, stream: Any, dtype: torch.dtype, is_half: bool = False) -> Tensor:
    """All of the encoder's, in float64; the same masks of dropout each time."""
    case.model.to(dtype).zero_grad()
    case.model.bert.encoder.stream = stream
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        hidden_TD = case.model.encode(case.layout, case.input_ids)
    (hidden_TD * case.weights).sum().backward()
    return torch.cat([p.grad.double().flatten() for p in case.model.bert.encoder.parameters() if p.grad is not None])


def show_rounds(options: argparse.Namespace) -> Iterator[str]:
    numbers = [1, 2, 4, 8]
    yield (
        f"\nrounds: shared queries and keys of width 64 in one sequence of {LONGEST:,} tokens; a round shows 128 "
        "tokens of buckets of 64. The share of exact attention's weight on tokens that are shown, and in parentheses "
        "the error of the context, |lsh - exact| / |exact|; 256 queries\n"
    )
    yield f"| tokens | entropy, nats | {' | '.join(f'{number} rounds' for number in numbers)} |"
    yield f"|---|--:|{'--:|' * len(numbers)}"
    for name, (query, value) in sources().items():
        cells = [share_and_error(query, value, number) for number in numbers]
        found = " | ".join(f"{share:.0%} ({error:.2f})" for share, error, _ in cells)
        yield f"| {name} | {cells[0][2]:.1f} | {found} |"


def sources() -> dict[str, tuple[Tensor, Tensor]]:
    """Queries and values (T, 1, K): without any structure, and in groups of 16 that lie anywhere in the sequence."""
    torch.manual_seed(0)
    value, noise = (torch.randn(LONGEST, 1, 64) for _ in range(2))
    group = torch.randperm(LONGEST) // 16
    centre = torch.randn(LONGEST // 16, 1, 64)[group]
    made = {"without structure": (noise * 16, value)}
    for cosine in (0.7, 0.8, 0.9, 0.95):
        query = cosine**0.5 * centre + (1 - cosine) ** 0.5 * noise
        made[f"groups of 16, cosine {cosine}"] = query * 16, cosine**0.5 * centre + value / 4
    return made


@torch.no_grad()
def share_and_error(query: Tensor, value: Tensor, num_rounds: int, samples: int = 256) -> tuple[float, float, float]:
    """The share of weight, the error of contexts, and the entropy of exact attention, over some queries."""
    layout = PackLayout(torch.ones(1, LONGEST, dtype=torch.int32))
    head = LSHAttention(1, 64, LONGEST, num_rounds=num_rounds, bucket_size=REFORMER["bucket_size"])
    sample = torch.randperm(LONGEST, generator=torch.Generator().manual_seed(1))[:samples]
    key = torch.nn.functional.normalize(query[:, 0], dim=-1)
    scores = query[sample, 0] @ key.T / 8
    scores[torch.arange(samples), sample] = -5e4
    weights = scores.double().softmax(-1)
    chunks = layout.chunks(head.options.bucket_size)
    places = sort_into_chunks(head.hash(query, layout), layout.sequence_of_token, chunks, longest(layout))
    shown = torch.zeros(samples, LONGEST, dtype=torch.bool)
    token = places.token.flatten(0, 1).squeeze(1)  # (R * NC, C)
    for slots in places.slot.view(num_rounds, LONGEST):
        chunk = slots[sample] // chunks.size
        for seen in (chunk, places.previous[chunk]):
            shown.scatter_(1, token[seen], True)
    exact = weights.float() @ value[:, 0]
    found = head(query, query, value, layout)[sample, 0]
    error = (found - exact).norm() / exact.norm()
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1).mean()
    return float((weights * shown).sum(-1).mean()), float(error), float(entropy)


if __name__ == "__main__":
    main()
