"""Blocks and weights of other libraries; made here, since nothing is downloaded."""

from functools import partial

import pytest
import torch
from block_models import IDS, block_model, hidden_of, layout_of, run_encoder
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.block.published import published_weights

SIZES = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48},
    **{"max_position_embeddings": 18, "initializer_range": 0.3, "attn_implementation": "eager"},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
PROJECTIONS = ("query", "key", "value")
WORDS = torch.tensor([[2, 17, 23, 8, 3, 40, 3, 9, 0], [5, 4, 33, 8, 7, 40, 3, 9, 0]])


def shaken(model):
    """In float64, with norms and biases that are not at their first values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def test_roberta_prelayernorm_is_the_placement_pre():
    torch.manual_seed(0)
    published = shaken(RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**SIZES, type_vocab_size=1)))
    config, weights = published_weights(published)
    model = PackedBertForPreTraining(config).double().eval()
    lacking, unknown = model.load_state_dict(weights, strict=False)
    assert unknown == [] and all(name.startswith(("bert.pooler", "cls.seq_relationship")) for name in lacking)
    sequence_ids = torch.tensor(IDS)
    found = model(WORDS, sequence_ids).prediction_logits
    for pack, row in enumerate(IDS):
        for number in range(1, max(row) + 1):
            mine = sequence_ids[pack] == number
            alone = published(WORDS[pack][mine][None]).logits[0]
            torch.testing.assert_close(found[pack][mine], alone, rtol=0, atol=1e-12)


def test_alberts_layer_is_shared():
    torch.manual_seed(0)
    published = shaken(AlbertModel(AlbertConfig(**SIZES, embedding_size=8)))
    config, weights = published_weights(published)
    assert config.hidden_act == "gelu_new" and len(config.block) == 1
    model = PackedBertForPreTraining(config).double().eval()
    lacking, unknown = model.load_state_dict(weights, strict=False)
    assert unknown == [] and not any("encoder" in name for name in lacking)
    layout = layout_of(IDS)
    x_TE = torch.randn(layout.num_tokens, 8, dtype=torch.float64)
    hidden_TD = published.encoder.embedding_hidden_mapping_in(x_TE)
    found, _, _ = run_encoder(model, hidden_TD, layout)
    alone = [published.encoder(x[None]).last_hidden_state[0] for x in x_TE.split(layout.lengths.tolist())]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-12)


def test_residual_is_resi_dual_of_x_transformers():
    """Whose norms and projections of attention have no bias."""
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    theirs = x_transformers.Encoder(dim=32, depth=3, heads=2, attn_dim_head=16, resi_dual=True).double().eval()
    model = block_model(
        layers=3, placement="residual", config={"intermediate_size": 128, "layer_norm_eps": 1e-5}
    ).eval()
    encoder = model.bert.encoder
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("gamma"))
        for parameter in encoder.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
        for i, (norms, branch, _) in enumerate(theirs.layers):
            layer = encoder.layer[i // 2]
            if i % 2 == 0:
                pairs = [(getattr(layer.attention.self, n), getattr(branch, f"to_{n[0]}")) for n in PROJECTIONS]
                pairs += [(layer.attention.output.dense, branch.to_out)]
                branch.attend.attn_fn = partial(torch.softmax, dim=-1)  # its own is in float32
            else:
                pairs = [(layer.intermediate.dense, branch.ff[0][0]), (layer.output.dense, branch.ff[-1])]
                for mine, given in pairs:
                    mine.bias.copy_(given.bias)
            for mine, given in pairs:
                mine.weight.copy_(given.weight)
            norm = layer.attention.output.LayerNorm if i % 2 == 0 else layer.output.LayerNorm
            norm.weight.copy_(norms[2].gamma + norms[2].unit_offset)
        encoder.LayerNorm.weight.copy_(theirs.final_norm.gamma + theirs.final_norm.unit_offset)
    layout = layout_of(IDS)
    hidden_TD = hidden_of(layout)
    found, _, _ = run_encoder(model, hidden_TD, layout)
    alone = [theirs(x[None])[0] for x in hidden_TD.split(layout.lengths.tolist())]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-12)


def test_others_are_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    with pytest.raises(ValueError, match="unknown type of published weights 'bert'"):
        published_weights(BertModel(BertConfig(**sizes, intermediate_size=8)))
    with pytest.raises(ValueError, match="inner_group_num=2 shares no single layer"):
        published_weights(AlbertModel(AlbertConfig(**sizes, intermediate_size=8, inner_group_num=2)))
