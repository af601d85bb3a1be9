"""Does a trained model profit from its pack mates? Twins in one pack, and the loss of each.

    python benchmarks/leak_probe.py

A sequence is masked once, and its masked words are predicted three times: alone in its row, beside an unrelated
sequence, and beside its twin: the same words with other masks, which hold the answers. The predictions must be equal up
to rounding (float64). Three models are probed, each with isolation and with broken isolation, which is one sequence_id
for the whole row; positions still restart:

    pretrained             on ordinary packs
    pretrained on twins    on packs of twins, isolated: duplicates in a pack teach it nothing about copying
    trained to leak        on packs of twins, without isolation: it learns to read the answers; so the probe finds a
                           leak where there is one, and isolation removes the leak even from this model

A row of the table has the mean loss per masked word in the three places, the advantage of a twin over an unrelated mate
(± standard error over sequences), and the largest change of any sequence's loss. The status is 1 if a change in
isolation is above 1e-10, or if a broken isolation does not show.
"""

import argparse
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from equivalence import MAX_LENGTH, VOCABULARY, make_pair, make_tokenizer
from transformers import BertConfig

from bert_pretrain import PackedBertForPreTraining
from collate import DataCollatorWithPacking, PackLayout

BOUND = 1e-10
SHORTEST, LONGEST = 16, MAX_LENGTH // 2
TWIN = 10**6
"""Added to a sequence's index, it is that of its twin: masks are drawn by it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="training steps of each model")
    parser.add_argument("--packs", type=int, default=32, help="packs in a step, of 2 sequences each")
    parser.add_argument("--sequences", type=int, default=200, help="sequences to probe")
    options = parser.parse_args()
    lines, passed = report(options.steps, options.packs, options.sequences)
    print("\n".join(lines))
    print("\nOK" if passed else "\nFAILED")
    sys.exit(0 if passed else 1)


def report(steps: int, packs: int, sequences: int) -> tuple[list[str], bool]:
    lines = [
        f"{steps} steps of {packs} packs; {sequences} held-out sequences",
        "",
        "| model | isolation | alone | unrelated mate | twin | advantage of the twin | largest change |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    passed, advantages = True, {}
    for name, (twins, leak) in MODELS.items():
        model = train(steps, packs, twins, leak)
        for isolated in (True, False):
            alone, unrelated, twin = probe(model, sequences, isolated)
            change = float(np.abs(np.stack([unrelated, twin]) - alone).max())
            gain = unrelated - twin
            advantages[name, isolated] = gain.mean()
            error = gain.std(ddof=1) / len(gain) ** 0.5
            passed &= change <= BOUND if isolated else change >= 1e6 * BOUND
            lines.append(
                f"| {name} | {'kept' if isolated else 'broken'} | {alone.mean():.4f} | {unrelated.mean():.4f} | "
                f"{twin.mean():.4f} | {number(gain.mean())} ± {number(error)} | {change:.1e} |"
            )
    passed &= advantages["trained to leak", False] > 1  # nats per masked word
    return lines, bool(passed)


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) > 1e-4 or value == 0 else f"{value:.0e}"


MODELS = {"pretrained": (False, False), "pretrained on twins": (True, False), "trained to leak": (True, True)}
"""Whether it is trained on packs of twins, and without isolation."""


def train(steps: int, packs: int, twins: bool, leak: bool) -> PackedBertForPreTraining:
    """A small BERT that learned MLM, in float64 for the probe."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"intermediate_size": 128, "max_position_embeddings": MAX_LENGTH, "initializer_range": 0.1}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "mlm_loss": "token"}
    config = BertConfig(**sizes)
    model = PackedBertForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50))
    collate, rng = make_collator(), np.random.default_rng(1)
    for step in range(steps):
        rows = []
        for i in range(packs):
            first = draw(rng, index=2 * (step * packs + i))
            rows.append([first, twin_of(first) if twins else draw(rng, index=first["index"] + 1)])
        batch = collate([pack(sequences) for sequences in rows])
        if leak:
            batch["sequence_ids"] = (batch["sequence_ids"] > 0).int()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.double().eval()


def probe(model: PackedBertForPreTraining, sequences: int, isolated: bool) -> np.ndarray:
    """(3, sequences) the loss of each alone, beside an unrelated one, and beside its twin."""
    rng, collate = np.random.default_rng(2), make_collator()
    firsts = [draw(rng, index=2 * TWIN + i) for i in range(sequences)]
    others = [draw(rng, index=3 * TWIN + i, length=first["length"]) for i, first in enumerate(firsts)]
    places = (
        [[first] for first in firsts],
        [[first, other] for first, other in zip(firsts, others, strict=True)],
        [[first, twin_of(first)] for first in firsts],
    )
    return np.stack([first_losses(model, collate([pack(row) for row in rows]), isolated) for rows in places])


def first_losses(model: PackedBertForPreTraining, batch: dict, isolated: bool) -> np.ndarray:
    """(B,) mean loss over the masked words of each row's first sequence."""
    ids_BL = batch["sequence_ids"]
    layout = PackLayout(ids_BL if isolated else (ids_BL > 0).int())
    with torch.no_grad():
        hidden_TD = model.encode(layout, batch["input_ids"], batch["position_ids"], batch["token_type_ids"])
        is_asked_T = layout.unpad((ids_BL == 1) & (batch["labels"] != -100))
        row_T = layout.unpad(torch.arange(len(ids_BL))[:, None].expand_as(ids_BL))
        logits_PV = model.cls.predictions(hidden_TD[is_asked_T])
        loss_P = F.cross_entropy(logits_PV, layout.unpad(batch["labels"])[is_asked_T], reduction="none")
    rows_P = row_T[is_asked_T].numpy()
    return np.bincount(rows_P, loss_P.numpy(), len(ids_BL)) / np.bincount(rows_P, minlength=len(ids_BL))


def make_collator() -> DataCollatorWithPacking:
    return DataCollatorWithPacking(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=2)


def draw(rng: np.random.Generator, index: int, length: int | None = None) -> dict:
    """A sequence of words of which most, but not all, follow from their neighbours."""
    length = int(rng.integers(SHORTEST, LONGEST + 1)) if length is None else length
    return make_pair(rng, length) | {"index": index, "length": length}


def twin_of(sequence: dict) -> dict:
    """The same words under another index, and so with other masks."""
    return sequence | {"index": sequence["index"] + TWIN}


def pack(sequences: list[dict]) -> dict:
    row = {name: [value for s in sequences for value in s[name]] for name in ("input_ids", "token_type_ids")}
    lengths, indices = [s["length"] for s in sequences], [s["index"] for s in sequences]
    return row | {"sequence_lengths": lengths, "sequence_indices": indices}


if __name__ == "__main__":
    main()
