"""What does a mixture of experts cost beside a dense feed-forward of equal FLOPs?

    python benchmarks/moe.py                          the feed-forward alone, at the widths of BERT mini and base
    python benchmarks/moe.py --model --width 256      a whole model, forward and backward
    python benchmarks/moe.py --parts                  where the time of the mixture goes

Each token meets --top-k of --experts experts, each with 1 / top-k of the dense inner width: the same products in number
and size. Forward and backward in training, on --tokens tokens of packed sequences; processor time on CPUs, both in
turns. speed: tokens a second of the mixture / of the dense one, the median of --rounds and their spread.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from exact_attention import packed
from torch import Tensor
from training import machine
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.block import BlockOptions
from bert_pretrain.block.feed_forwards.dense import DenseFeedForward
from bert_pretrain.block.feed_forwards.moe import MixtureOfExperts
from collate.layout import PackLayout

ROW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--width", type=int, nargs="+", default=[256, 768], help="of the model; the inner one is 4 times as wide")
    add("--tokens", type=int, nargs="+", default=[1024, 4096])
    add("--experts", type=int, default=8)
    add("--top-k", type=int, default=2)
    add("--layers", type=int, default=4, help="of the whole model")
    add("--rounds", type=int, default=9)
    add("--threads", type=int, default=1)
    add("--model", action="store_true", help="time a whole model")
    add("--parts", action="store_true", help="time the parts of a mixture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.device, options.dtype, options.attention = "cpu", "float32", "sdpa"
    print(f"{machine(options)}, {options.experts} experts, top {options.top_k}\n")
    measure = print_parts if options.parts else print_models if options.model else print_layers
    for width in options.width:
        for tokens in options.tokens:
            options.rows = tokens // ROW
            options.row = ROW
            measure(width, PackLayout(packed(options)), options)


def block_options(options, **others: Any) -> BlockOptions:
    return BlockOptions(feed_forward="moe", experts=options.experts, top_k=options.top_k, **others)


def config_of(width: int, inner: int, options) -> BertConfig:
    return BertConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=options.layers,
        num_attention_heads=width // 64,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
    )


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each, the first round left out."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: found[1:] for name, found in times.items()}


def print_speed(what: str, times: dict[str, list[float]], tokens: int) -> None:
    speed = np.array(times["dense"]) / np.array(times["moe"])
    each = ", ".join(f"{name} {tokens / np.median(found):,.0f} tokens/s" for name, found in times.items())
    print(f"{what}: {each}; speed {np.median(speed):.2f} ({speed.min():.2f} to {speed.max():.2f})", flush=True)


def print_layers(width: int, layout: PackLayout, options) -> None:
    inner = 4 * width
    torch.manual_seed(0)
    wide = config_of(width, inner, options)
    dense = DenseFeedForward(wide, BlockOptions(), 0)
    dense.from_dense(BertIntermediate(wide), BertOutput(wide))
    moe = MixtureOfExperts(config_of(width, inner // options.top_k, options), block_options(options), 0)
    hidden = torch.randn(layout.num_tokens, width)

    def run(branch: Any) -> None:
        x = hidden.clone().requires_grad_()
        out, sums = branch(x, layout)
        (out.sum() + sums.sum()).backward()

    times = in_turns({"dense": lambda: run(dense), "moe": lambda: run(moe)}, options.rounds)
    print_speed(f"feed-forward, width {width}, {layout.num_tokens} tokens", times, layout.num_tokens)


def print_models(width: int, layout: PackLayout, options) -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, layout.sequence_ids_BL.shape)
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
    batch = {"input_ids": ids, "labels": labels, "sequence_ids": layout.sequence_ids_BL}
    runs: dict[str, Callable[[], Any]] = {}
    for name, inner, block in (
        ("dense", 4 * width, None),
        ("moe", 4 * width // options.top_k, block_options(options).changed),
    ):
        config = config_of(width, inner, options)
        config.vocab_size, config.block = 1000, block
        model = PackedBertForPreTraining(config).train()
        runs[name] = partial(one_pass, model, batch)
    times = in_turns(runs, options.rounds)
    print_speed(
        f"model of {options.layers} layers, width {width}, {layout.num_tokens} tokens", times, layout.num_tokens
    )


def one_pass(model: PackedBertForPreTraining, batch: dict[str, Tensor]) -> None:
    loss = model(**batch).loss
    assert loss is not None
    loss.backward()


def print_parts(width: int, layout: PackLayout, options) -> None:
    """Forward and backward of what a mixture is made of, each with its own graph."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(config_of(width, 4 * width // options.top_k, options), block_options(options), 0)
    hidden = torch.randn(layout.num_tokens, width)
    tokens, k = layout.num_tokens, options.top_k
    scores = moe.router(hidden).softmax(-1).detach()
    choice, weight = (x.detach() for x in moe._choose(scores))
    order = choice.flatten().argsort(stable=True)
    counts = torch.bincount(choice.flatten(), minlength=options.experts).tolist()
    rows = hidden.index_select(0, order // k)

    def router(x: Tensor) -> Tensor:
        scores = moe.router(x).softmax(-1)
        return moe._choose(scores)[1].sum() + moe._balance(scores, torch.ones_like(scores), layout)

    def gather(x: Tensor) -> Tensor:
        return x.index_select(0, choice.flatten().argsort(stable=True) // k).sum()

    def products(x: Tensor) -> Tensor:
        parts = zip(moe.experts, x.split(counts), strict=True)
        return torch.cat([expert(part) for expert, part in parts]).sum()

    def add_up(x: Tensor) -> Tensor:
        weighted = x * weight.flatten().index_select(0, order)[:, None]
        return weighted.new_zeros(tokens, width).index_add(0, order // k, weighted).sum()

    def even_products(x: Tensor) -> Tensor:
        parts = zip(moe.experts, x.chunk(options.experts), strict=True)
        return torch.cat([expert(part) for expert, part in parts]).sum()

    def run(part: Callable[[Tensor], Tensor], x: Tensor) -> None:
        part(x.clone().requires_grad_()).backward()

    times = in_turns(
        {
            "all": lambda: run(lambda x: moe(x, layout)[0].sum(), hidden),
            "router and terms": lambda: run(router, hidden),
            "sort and gather": lambda: run(gather, hidden),
            "products": lambda: run(products, rows),
            "products of even parts": lambda: run(even_products, rows),
            "weigh and add up": lambda: run(add_up, rows),
        },
        options.rounds,
    )
    whole = np.median(times["all"])
    shares = ", ".join(f"{name} {np.median(found) / whole:.0%}" for name, found in times.items())
    print(f"width {width}, {tokens} tokens, {min(counts)} to {max(counts)} an expert: {shares}", flush=True)


if __name__ == "__main__":
    main()
