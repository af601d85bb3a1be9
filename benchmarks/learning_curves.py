"""Does packing change what is learned? Held-out loss against sequences seen, four ways to train, three seeds.

    python benchmarks/learning_curves.py --output curves-output

    padded               a row for each sequence, stock transformers' encoder with a padding mask; 16 sequences a step
    packed               packs; each step holds the same 16 sequences with the same masks
    packed, 16 packs     as many packs in a step as there were padded rows, so packing factor p times as many sequences
    ... beta ** p        the same, with Adam's betas to the power p (arXiv 2107.02027, on adjusting hyperparameters)

A small BERT (MLM + NSP, no dropout) learns the State of the Union messages, prepared and packed at 256 as by demo.py;
--demo takes a folder that demo.py made. The seed decides weights, order and masks. The learning rate rises over the
first tenth of the sequences and falls linearly to 0; nothing else differs between the ways. The first two must agree up
to rounding (float32): the largest difference is printed, and the status is 1 if it is above 1e-3.
"""

import argparse
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from demo import MAX_LENGTH, MODEL, factor, one_by_one, prepare
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, get_scheduler

from bert_pretrain import PackedBertForPreTraining
from collate import DataCollatorWithPacking
from collate.training.order import lay_out_steps, plan_steps
from collate.vocabulary import vocabulary_size

PER_STEP = 16
"""Sequences, or packs, in a step."""

LEARNING_RATE = 1e-3
BETAS = 0.9, 0.999
POINTS = 6
"""Evaluations of a run."""

TEST_PACKS = 60
BOUND = 1e-3
COLORS = {"padded": "#999999", "packed": "#0072b2", "packed, 16 packs": "#e69f00", "... beta ** p": "#009e73"}


class PaddedBert(PackedBertForPreTraining):
    """The same weights and losses; the encoder runs on padded rows, as stock transformers runs it."""

    def _encode(self, layout, input_ids, position_ids=None, token_type_ids=None):
        mask = layout.is_real_BL.long()
        hidden_BLD = self.bert(input_ids, attention_mask=mask, token_type_ids=token_type_ids).last_hidden_state
        return layout.unpad(hidden_BLD), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("curves-output"), help="folder for data, table and plot")
    parser.add_argument("--demo", type=Path, help="folder with prepared/ and packed/, as demo.py leaves it")
    parser.add_argument("--sequences", type=int, default=2400, help="sequences that each run sees")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.demo is None:
        prepare(options.output)
    results = run(options.demo or options.output, options.sequences, options.seeds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "curves.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    plot(results, options.output / "curves.png")
    print(f"\nplot: {options.output / 'curves.png'}")
    sys.exit(0 if gap(results) <= BOUND else 1)


def run(folder: Path, sequences: int, seeds: int) -> dict:
    """The curves of each way, one per seed: [sequences seen, held-out MLM loss, NSP loss] at each point."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "prepared/tokenizer")
    rows = load_from_disk(folder / "prepared")
    packs = load_from_disk(folder / "packed")
    data = {split: (rows[split].with_format("numpy"), packs[split].with_format("numpy")) for split in ("train", "test")}
    p = factor(data["train"][1])
    curves, seconds = defaultdict(list), defaultdict(float)
    for seed, name in tqdm(list(itertools.product(range(seeds), COLORS))):
        start = time.perf_counter()
        curves[name].append(curve(name, seed, tokenizer, data, sequences, p))
        seconds[name] += time.perf_counter() - start
    return {"packing_factor": p, "sequences": sequences, "curves": curves, "seconds": seconds}


def curve(name: str, seed: int, tokenizer, data: dict, sequences: int, p: float) -> list[list[float]]:
    """Train once."""
    train_rows, train_packs = data["train"]
    padded = name == "padded"
    torch.manual_seed(seed)
    model = (PaddedBert if padded else PackedBertForPreTraining)(make_config(vocabulary_size(tokenizer))).train()
    if padded:
        model.set_attn_implementation("sdpa")
    collator = DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH, seed=seed)
    held_out = evaluation_batches(collator, data["test"], padded)

    same_sequences = name in ("padded", "packed")
    steps = steps_of(train_packs, same_sequences, seed)
    num_steps = round(sequences / (PER_STEP if same_sequences else PER_STEP * p))
    betas = tuple(beta**p for beta in BETAS) if name == "... beta ** p" else BETAS
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=betas, eps=1e-6, weight_decay=0.01)
    schedule = get_scheduler("linear", optimizer, num_steps // 10, num_steps)

    points, seen = [[0, *evaluate(model, held_out)]], 0
    for step, chosen in enumerate(itertools.islice(steps, num_steps), 1):
        step_packs = [train_packs[i] for i in chosen]
        batch = collator(one_by_one(step_packs, train_rows) if padded else step_packs)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += int((batch["cls_positions"] >= 0).sum())
        if step * POINTS // num_steps > (step - 1) * POINTS // num_steps:
            points.append([seen, *evaluate(model, held_out)])
    return points


def make_config(vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=MAX_LENGTH,
        intermediate_size=4 * MODEL["hidden_size"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **MODEL,
    )


def steps_of(packs, same_sequences: bool, seed: int) -> Iterator[list[int]]:
    """The packs of one step after the other: those with PER_STEP sequences together, or PER_STEP packs."""
    depths = np.diff(packs.data.column("sequence_lengths").combine_chunks().offsets.to_numpy())
    if same_sequences:
        for slots in lay_out_steps(plan_steps(depths, PER_STEP), depths, seed, epoch=0):
            yield slots[slots < len(depths)].tolist()
    else:
        order = np.random.default_rng(seed).permutation(len(depths))
        yield from order[: len(order) // PER_STEP * PER_STEP].reshape(-1, PER_STEP).tolist()


def evaluation_batches(collator, test: tuple, padded: bool) -> list[dict]:
    """The same held-out sequences for all: in packs, or each in a row of its own."""
    test_rows, test_packs = test
    fixed = collator.for_evaluation()
    parts = [[test_packs[i] for i in range(k, min(k + 20, TEST_PACKS))] for k in range(0, TEST_PACKS, 20)]
    return [fixed(one_by_one(part, test_rows) if padded else part) for part in parts]


def evaluate(model, batches: list[dict]) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        metrics = model.metrics(sum(model(**batch).sums for batch in batches))
    model.train()
    return metrics["mlm_loss_per_sequence"], metrics["nsp_loss"]


def gap(results: dict) -> float:
    """The largest difference of held-out loss between padded and packed."""
    padded, packed = (np.array(results["curves"][name]) for name in ("padded", "packed"))
    return float(np.abs(padded - packed).max())


def table(results: dict) -> str:
    curves = {name: np.array(seeds) for name, seeds in results["curves"].items()}
    lines = [
        f"{MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}, max_sequence_length {MAX_LENGTH}, packing "
        f"factor {results['packing_factor']:.3f}, {len(curves['padded'])} seeds",
        "held-out MLM loss per sequence, mean ± standard deviation over seeds",
        "",
        "| " + " | ".join(["sequences seen", *curves]) + " |",
        "|--:" * (1 + len(curves)) + "|",
    ]
    for point, seen in enumerate(curves["padded"][0, :, 0]):
        cells = [
            f"{c[:, point, 1].mean():.4f} ± {c[:, point, 1].std(ddof=min(1, len(c) - 1)):.4f}" for c in curves.values()
        ]
        lines.append(f"| {seen:,.0f} | {' | '.join(cells)} |")
    steps = {
        name: round(
            results["sequences"] / (PER_STEP if name in ("padded", "packed") else PER_STEP * results["packing_factor"])
        )
        for name in curves
    }
    lines.append("| steps | " + " | ".join(str(steps[name]) for name in curves) + " |")
    lines.append(
        "| seconds for all seeds | " + " | ".join(f"{results['seconds'][name]:,.0f}" for name in curves) + " |"
    )
    lines += ["", f"largest difference of a held-out loss, padded and packed, any seed and point: {gap(results):.1e}"]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (whole, end) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, seeds in results["curves"].items():
        values = np.array(seeds)
        seen, losses = values[0, :, 0], values[:, :, 1]
        style = {"color": COLORS[name], "lw": 5 if name == "padded" else 1.5, "label": name}
        for axes, first in ((whole, 0), (end, POINTS // 2)):
            axes.plot(seen[first:], losses.mean(0)[first:], **style)
            axes.fill_between(
                seen[first:], losses.min(0)[first:], losses.max(0)[first:], color=COLORS[name], alpha=0.15
            )
    whole.set(title="held-out MLM loss per sequence", xlabel="sequences seen")
    end.set(title="the second half (bands: all seeds)", xlabel="sequences seen")
    whole.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
