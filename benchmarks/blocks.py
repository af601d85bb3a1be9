"""What do a block's choices do to a deep model? Gradients at its two ends, training without warm-up, and memory.

    python benchmarks/blocks.py --output blocks-output
    python benchmarks/blocks.py --output blocks-output --parts memory       one part

gradients    norm of the loss's gradient in the first and in the last layer of a new model, 6 and 24 layers:
             placement post, pre and residual, and pre with initial="deep"
training     24 layers, with a learning rate that rises over the first steps and with one that does not; three seeds
memory       what a pass of 6 to 48 layers holds at its peak: stream plain, checkpoint and reversible

The models are small (64 wide) and learn a made-up language: each sequence has a topic of six words, which masked words
are to be told from. Weights are drawn so that a projection of them gains what one of BERT-base gains. Memory
is as in reversible.py: of a process of its own, Linux only.
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packers import machine
from reversible import STREAMS, in_own_process
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig

from bert_pretrain import PackedBertForPreTraining

WIDTH = 64
DEPTHS = 6, 24
WORDS, FIRST_WORD, MASK = 60, 5, 4
OF_TOPIC = 6
"""Words of a topic."""

PACKS, SLOTS = 8, 64
SHORTEST, LONGEST = 12, 32
STEPS, WARM_UP, LEARNING_RATE = 240, 60, 1e-3
POINT = 20
"""Steps whose mean loss is a point of a curve; no batch comes twice."""

BLOCKS: dict[str, dict[str, Any]] = {
    "post": {"placement": "post"},
    "pre": {"placement": "pre"},
    "residual": {"placement": "residual"},
    "pre, deep": {"placement": "pre", "initial": "deep"},
}
COLORS = {"post": "#d55e00", "pre": "#0072b2", "residual": "#009e73", "pre, deep": "#56b4e9"}
COLORS |= {"plain": "#999999", "checkpoint": "#e69f00", "reversible": "#0072b2"}
TRAINED = ("post", "pre", "residual")
MEMORY_DEPTHS = 6, 12, 24, 48
BYTES = "bytes"


def main() -> None:
    parts = {"gradients": show_gradients, "training": show_training, "memory": show_memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("blocks-output"), help="folder for figures and plots")
    add("--parts", nargs="+", choices=parts, default=list(parts))
    add("--steps", type=int, default=STEPS, help="of training")
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, torch {torch.__version__}, {options.threads} threads, float32")
    for part in options.parts:
        results, lines = parts[part](options)
        (options.output / f"{part}.json").write_text(json.dumps(results, indent=1))
        PLOTS[part](results, options.output / f"{part}.png")
        print("\n".join(lines), flush=True)


def small_bert(layers: int, seed: int, **block: Any) -> PackedBertForPreTraining:
    """A new model, in training; without dropout, so that only the block decides."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=FIRST_WORD + WORDS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=SLOTS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02 * (768 / WIDTH) ** 0.5,
        **{"block": block},  # type: ignore[arg-type]
    )
    return PackedBertForPreTraining(config).train()


class Language:
    """Each sequence has a topic, and its words are drawn from the topic's own; all words are equally frequent."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def batch(self) -> dict[str, Tensor]:
        """Packs of sequences; 15 % of the words are masked."""
        words, ids = np.zeros((PACKS, SLOTS), np.int64), np.zeros((PACKS, SLOTS), np.int32)
        for pack in range(PACKS):
            start, number = 0, 0
            while SLOTS - start >= SHORTEST:
                length, number = min(int(self.rng.integers(SHORTEST, LONGEST + 1)), SLOTS - start), number + 1
                topic, own = self.rng.integers(WORDS // OF_TOPIC), slice(start, start + length)
                words[pack, own] = topic * OF_TOPIC + self.rng.integers(OF_TOPIC, size=length)
                ids[pack, own] = number
                start += length
        masked = (self.rng.random(words.shape) < 0.15) & (ids > 0)
        tokens = np.where(ids > 0, words + FIRST_WORD, 0)
        batch = {
            "input_ids": np.where(masked, MASK, tokens),
            "sequence_ids": ids,
            "labels": np.where(masked, tokens, -100),
        }
        return {name: torch.from_numpy(x) for name, x in batch.items()}


# Gradients


def gradient_norms(layers: int, seed: int, batches: int = 4, **block: Any) -> list[float]:
    """The norm of the loss's gradient over all weights of each layer of a new model, mean over some batches."""
    model, language = small_bert(layers, seed, **block), Language()
    norms = []
    for _ in range(batches):
        model.zero_grad()
        model(**language.batch()).loss.backward()
        norms.append([norm_of(layer) for layer in model.bert.encoder.layer])
    return np.mean(norms, 0).tolist()


def norm_of(layer: torch.nn.Module) -> float:
    squares = [parameter.grad.square().sum() for parameter in layer.parameters() if parameter.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def show_gradients(options: argparse.Namespace) -> tuple[dict, list[str]]:
    found: dict[str, dict[int, list]] = {name: {} for name in BLOCKS}
    for name, depth in tqdm(list(itertools.product(BLOCKS, DEPTHS)), desc="gradients"):
        found[name][depth] = [gradient_norms(depth, seed, **BLOCKS[name]) for seed in range(options.seeds)]
    return found, list(gradient_table(found))


def gradient_table(found: dict) -> Iterator[str]:
    yield "\ngradients: norm in the first and in the last layer of a new model, and their ratio (all seeds)\n"
    heads = [f"{depth} layers: {what}" for depth in DEPTHS for what in ("first", "last", "first / last")]
    yield f"| block | {' | '.join(heads)} |"
    yield f"|---|{'--:|' * len(heads)}"
    for name, depths in found.items():
        cells = []
        for norms in map(np.array, depths.values()):
            ratios = norms[:, 0] / norms[:, -1]
            cells += [f"{norms[:, 0].mean():.3f}", f"{norms[:, -1].mean():.3f}"]
            cells.append(f"{ratios.mean():.2f} ({ratios.min():.2f} to {ratios.max():.2f})")
        yield f"| {name} | {' | '.join(cells)} |"


# Training


def curve(layers: int, warm_up: int, seed: int, steps: int, rate: float = LEARNING_RATE, **block: Any) -> list[float]:
    """The mean loss of each POINT steps of training; no batch comes twice, so it is the loss on what is new."""
    model, language = small_bert(layers, seed, **block), Language(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up) if warm_up else rate
        optimizer.zero_grad()
        loss = model(**language.batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.mean(np.reshape(losses[: steps // POINT * POINT], (-1, POINT)), 1).tolist()


def show_training(options: argparse.Namespace) -> tuple[dict, list[str]]:
    found: dict[str, dict[str, list]] = {name: defaultdict(list) for name in TRAINED}
    runs = list(itertools.product(range(options.seeds), TRAINED, (WARM_UP, 0)))
    for seed, name, warm_up in tqdm(runs, desc="training"):
        how = "with warm-up" if warm_up else "without"
        found[name][how].append(curve(max(DEPTHS), warm_up, seed, options.steps, **BLOCKS[name]))
    return found, list(training_table(found))


def training_table(found: dict) -> Iterator[str]:
    nothing, everything = (f"ln {count} = {np.log(count):.2f}" for count in (WORDS, OF_TOPIC))
    yield (
        f"\ntraining: {max(DEPTHS)} layers, learning rate {LEARNING_RATE}, rising over {WARM_UP} steps or not; loss of "
        f"masked words in the last {POINT} steps, each seed ({nothing}: nothing learned; {everything}: all)\n"
    )
    yield "| placement | with warm-up | without |"
    yield "|---|--:|--:|"
    for name, ways in found.items():
        cells = [
            ", ".join(f"{losses[-1]:.2f}" for losses in sorted(curves, key=lambda x: x[-1])) for curves in ways.values()
        ]
        yield f"| {name} | {' | '.join(cells)} |"


# Memory


def show_memory(options: argparse.Namespace) -> tuple[dict, list[str]]:
    shape = {"attention": "sdpa", "lengths": [256] * 8, "width": 128}
    found: dict[str, dict[int, dict]] = {stream: {} for stream in STREAMS}
    for stream, depth in tqdm(list(itertools.product(STREAMS, MEMORY_DEPTHS)), desc="memory"):
        found[stream][depth] = in_own_process(options.threads, layers=depth, block={"stream": stream}, **shape)
    return found, list(memory_table(found))


def memory_table(found: dict) -> Iterator[str]:
    yield "\nmemory: MB at the peak of a pass over 2,048 tokens, 128 wide, beside parameters and their gradients\n"
    yield f"| stream | {' | '.join(f'{depth} layers' for depth in MEMORY_DEPTHS)} |"
    yield f"|---|{'--:|' * len(MEMORY_DEPTHS)}"
    for stream, depths in found.items():
        yield f"| {stream} | {' | '.join(f'{case[BYTES] / 1e6:.1f}' for case in depths.values())} |"


# Plots


def axes_of(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(5.5 * count, 3.8), layout="constrained", squeeze=False)
    return figure, axes[0]


def plot_gradients(found: dict, path: Path) -> None:
    figure, axes = axes_of(len(DEPTHS))
    for depth, each in zip(DEPTHS, axes, strict=True):
        for name, depths in found.items():
            norms = np.array(depths[depth])
            layers = np.arange(1, depth + 1)
            each.plot(layers, norms.mean(0), color=COLORS[name], label=name)
            each.fill_between(layers, norms.min(0), norms.max(0), color=COLORS[name], alpha=0.15)
        each.set(title=f"{depth} layers", xlabel="layer", ylabel="norm of the gradient", yscale="log")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def plot_training(found: dict, path: Path) -> None:
    figure, axes = axes_of(2)
    for name, ways in found.items():
        for each, (how, curves) in zip(axes, ways.items(), strict=True):
            losses = np.array(curves)
            steps = (np.arange(losses.shape[1]) + 1) * POINT
            each.plot(steps, losses.mean(0), color=COLORS[name], label=name)
            each.fill_between(steps, losses.min(0), losses.max(0), color=COLORS[name], alpha=0.15)
            for bound in (WORDS, OF_TOPIC):
                each.axhline(np.log(bound), color="black", lw=0.6, ls=":")
            each.set(title=how, xlabel="steps", ylabel="loss of masked words")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def plot_memory(found: dict, path: Path) -> None:
    figure, (axes,) = axes_of(1)
    for stream, depths in found.items():
        axes.plot(
            list(map(int, depths)),
            [x[BYTES] / 1e6 for x in depths.values()],
            "o-",
            color=COLORS[stream],
            label=stream,
        )
    axes.set(xlabel="layers", ylabel="MB at the peak", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


PLOTS: dict[str, Callable[[dict, Path], None]] = {
    "gradients": plot_gradients,
    "training": plot_training,
    "memory": plot_memory,
}


if __name__ == "__main__":
    main()
