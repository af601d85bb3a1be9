"""Training one sequence at a time, in stock transformers; and one step of LAMB."""

import numpy as np
import torch
import torch.nn.functional as F


def packed_rows(sequences, max_sequence_length):
    """First fit, one sequence after the other; rows as pack_dataset makes them."""
    rows = []
    for index, sequence in enumerate(sequences):
        length = len(sequence["input_ids"])
        for row in rows:
            if sum(row["sequence_lengths"]) + length <= max_sequence_length:
                break
        else:
            row = {"input_ids": [], "token_type_ids": [], "next_sentence_label": []}
            row |= {"sequence_lengths": [], "sequence_indices": []}
            rows.append(row)
        row["input_ids"] = row["input_ids"] + sequence["input_ids"]
        row["token_type_ids"] = row["token_type_ids"] + sequence["token_type_ids"]
        row["next_sentence_label"].append(sequence["next_sentence_label"])
        row["sequence_lengths"].append(length)
        row["sequence_indices"].append(index)
    return rows


def unpacked_rows(rows):
    """Every sequence in a row of its own."""
    alone = []
    for row in rows:
        start = 0
        for number, length in enumerate(row["sequence_lengths"]):
            alone.append({name: row[name][start : start + length] for name in ("input_ids", "token_type_ids")})
            for name in ("sequence_lengths", "sequence_indices", "next_sentence_label"):
                alone[-1][name] = [row[name][number]]
            start += length
    return alone


def pretraining_one_by_one(stock, sequences, mlm_loss):
    """Stock BertForPreTraining on each sequence alone, and the mean losses written out.

    sequences: dicts of 1-D tensors input_ids, token_type_ids, labels, and an int next_sentence_label or None.
    Returns the loss and each sequence's last hidden state (n, D).
    """
    token_losses, nsp_losses, hidden = [], [], []
    for sequence in sequences:
        output = stock(
            sequence["input_ids"][None],
            token_type_ids=sequence["token_type_ids"][None],
            output_hidden_states=True,
        )
        predicted = sequence["labels"] != -100
        logits = output.prediction_logits[0][predicted]
        token_losses.append(F.cross_entropy(logits, sequence["labels"][predicted], reduction="none"))
        if sequence["next_sentence_label"] is not None:
            label = torch.tensor([sequence["next_sentence_label"]])
            nsp_losses.append(F.cross_entropy(output.seq_relationship_logits, label))
        hidden.append(output.hidden_states[-1][0])
    if mlm_loss == "sequence":
        mlm = torch.stack([losses.mean() for losses in token_losses if len(losses)]).mean()
    else:
        mlm = torch.cat(token_losses).mean()
    return mlm + (torch.stack(nsp_losses).mean() if nsp_losses else 0), hidden


def lamb_step(x, m, v, gradient, t, lr, betas, eps, weight_decay, adapted):
    """Algorithm 2 of arXiv 1904.00962 on one tensor, its first step t = 1; returns x, m, v."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * x
    ratio = np.linalg.norm(x) / np.linalg.norm(update) if adapted else 1.0
    return x - lr * ratio * update, m, v
