"""Models with modules that add terms to the loss: a penalty on a parameter, and what an encoder returns.

loss = the model's own + 0.5 · scale² + 0.3 · mean over tokens of |h|² + 0.2 · mean over sequences of |mean h|²
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEncoder

from bert_pretrain.attention import use_attention
from collate import PackLayout
from collate.losses import Mean

LOGGED = ("scale_penalty", "activity", "drift")


class Scale(nn.Module):
    """A parameter that scales the output of the layer that it follows, and its penalty."""

    loss_rows = (Mean("scale_penalty", "scale_squared", "sequences", weight=0.5),)

    def __init__(self, value):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, layer, inputs, output):
        return output * self.scale

    def penalties(self):
        return {"scale_squared": self.scale.square()}


@dataclass
class AddingOutput(BaseModelOutputWithPastAndCrossAttentions):
    loss_sums: dict | None = None


class AddingEncoder(BertEncoder):
    gives_loss_sums = True
    loss_rows = (
        Mean("activity", "squares", "tokens", weight=0.3),
        Mean("drift", "squared_means", "sequences", weight=0.2),
    )

    def forward(self, hidden_states, *args, layout=None, sequence_ids=None, **options):
        of_layers = {"layout": layout} if layout is not None else {"sequence_ids": sequence_ids}
        hidden = super().forward(hidden_states, *args, **of_layers, **options).last_hidden_state
        own = PackLayout.of(sequence_ids) if layout is None else layout
        hidden_TD = own.unpad(hidden) if layout is None else hidden[0]
        squares_T = hidden_TD.square().sum(1) * own.is_real_token
        sums_ND = hidden_TD.new_zeros(own.num_sequences, hidden_TD.shape[1])
        sums_ND = sums_ND.index_add(0, own.sequence_of_token, hidden_TD)
        squared_N = (sums_ND / own.lengths.clamp(min=1)[:, None]).square().sum(1) * own.is_real_sequence
        sums = {"squares": squares_T.sum(), "squared_means": squared_N.sum()}
        return AddingOutput(last_hidden_state=hidden, loss_sums=sums)


def with_terms(model):
    """The model, with modules that add the terms above; its last layer is scaled twice, by modules of one term."""
    if getattr(model.config, "packed_attention", None) is None:
        use_attention(model, "sdpa")
    encoder = model.bert.encoder
    encoder.__class__ = AddingEncoder
    encoder.scales = nn.ModuleList([Scale(0.8), Scale(1.5)])
    for scale in encoder.scales:
        encoder.layer[-1].register_forward_hook(scale)
    return model


def terms_by_hand(model, hidden):
    """{name: value} from the last hidden states of single sequences, (n, D) each, without the weights."""
    return {
        "scale_penalty": sum(scale.scale**2 for scale in model.bert.encoder.scales),
        "activity": torch.cat(hidden).square().sum(1).mean(),
        "drift": torch.stack([x.mean(0).square().sum() for x in hidden]).mean(),
    }


def weighted(terms):
    return 0.5 * terms["scale_penalty"] + 0.3 * terms["activity"] + 0.2 * terms["drift"]
