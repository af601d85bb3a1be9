"""BERT for pretraining as small as it can be: stock, and ours with the same weights."""

import torch
from transformers import BertConfig, BertForPreTraining

from bert_pretrain import PackedBertForPreTraining

MAX_LENGTH = 48


def make_config(**changes):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": MAX_LENGTH, "initializer_range": 0.3}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**sizes | changes)


def make_models(mlm_loss="sequence"):
    torch.manual_seed(0)
    stock = BertForPreTraining(make_config()).double()
    packed = PackedBertForPreTraining(make_config(mlm_loss=mlm_loss)).double()
    packed.load_state_dict(stock.state_dict())
    return stock.train(), packed.train()


def alone(batch):
    """The sequences of a packed batch, cut out with the collator's own lengths."""
    sequences = []
    for pack in range(len(batch["input_ids"])):
        for number in range(1, int(batch["sequence_ids"][pack].max()) + 1):
            mine = batch["sequence_ids"][pack] == number
            sequence = {name: batch[name][pack][mine] for name in ("input_ids", "token_type_ids", "labels")}
            label = int(batch["next_sentence_label"][pack, number - 1])
            sequences.append(sequence | {"next_sentence_label": None if label == -100 else label})
    return sequences
