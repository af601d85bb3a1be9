"""BERTs with a block, as small as they can be, and packs to run them on."""

import torch
from pretraining_models import make_config

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import AttentionHead
from bert_pretrain.attention.head import prepare_heads
from collate import PackLayout

HEAD_OPTIONS = {
    "local": {"window": 2},
    "lsh": {"bucket_size": 2, "num_rounds": 2},
    "routing": {"num_clusters": 2},
}
"""So small that short sequences meet more than one window, bucket or cluster."""
IDS = [[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2, 3, 0]]


def block_model(head="sdpa", layers=2, seed=0, scale=1.0, config=None, **block):
    """In float64, in training; the weights have a standard deviation of 0.3, and a scale."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": layers, "packed_attention": head, "packed_attention_options": HEAD_OPTIONS.get(head)}
    model = (
        PackedBertForPreTraining(make_config(**({"block": block} if block else {}), **sizes | (config or {})))
        .double()
        .train()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or "bias" in name:  # else they start at one value, and hide a mistake
                parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.mul_(scale)
    return model


def layout_of(ids) -> PackLayout:
    return PackLayout(torch.as_tensor(ids, dtype=torch.int32))


def run_encoder(model, hidden_TD, layout, weights_TD=None):
    """-> the output (T, D), and the gradients of sum(output · weights): of the input, and of the parameters by name."""
    encoder = model.bert.encoder
    model.zero_grad()
    hidden_TD = hidden_TD.detach().clone().requires_grad_()
    prepare_heads([module for module in encoder.modules() if isinstance(module, AttentionHead)], layout)
    out_TD = encoder(hidden_TD[None], layout=layout).last_hidden_state[0]
    (out_TD * (out_TD.detach().cos() if weights_TD is None else weights_TD)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return out_TD.detach(), hidden_TD.grad, gradients


def hidden_of(layout, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn((layout.num_tokens, width), generator=generator, dtype=torch.float64)
