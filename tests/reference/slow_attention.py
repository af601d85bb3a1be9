"""The slow twins of the heads that sum a sequence up: the papers' equations for one sequence, token by token.

Each takes query, key, value (n, H, K) of one sequence and gives the context (n, H, K). And public implementations,
worked from the same queries, keys and values: their projections are set to pick these out of their one input.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

NOT_INSTALLED = "a public implementation to compare with, of the `reference` extra, is not installed"


def each_head(one_head):
    """A twin of one head, given (n, K) x 3 and the head's number, for all heads: (n, H, K) x 3 -> (n, H, K)."""

    def all_heads(*inputs_nHK: Tensor) -> Tensor:
        heads = range(inputs_nHK[0].shape[1])
        return torch.stack([one_head(*(x[:, h] for x in inputs_nHK), h) for h in heads], dim=1)

    return all_heads


def softmax_attention(query, key, value):
    return (query @ key.T / key.shape[1] ** 0.5).softmax(1) @ value


def inducing(points_HMK):
    def one_head(query, key, value, h):
        summary_keys, summary_values = [], []
        for point in points_HMK[h]:
            weights = torch.stack([(point @ k / len(k) ** 0.5).exp() for k in key])
            weights = weights / weights.sum()
            summary_keys.append(sum(w * k for w, k in zip(weights, key, strict=True)))
            summary_values.append(sum(w * v for w, v in zip(weights, value, strict=True)))
        return softmax_attention(query, torch.stack(summary_keys), torch.stack(summary_values))

    return each_head(one_head)


def linformer(key_projection_LR, value_projection_LR):
    def one_head(query, key, value, h):
        projected = (
            sum(torch.outer(row, token) for row, token in zip(projection_LR, x, strict=False))
            for x, projection_LR in ((key, key_projection_LR), (value, value_projection_LR))
        )
        return softmax_attention(query, *projected)

    return each_head(one_head)


def nystrom(landmarks, iterations):
    def one_head(query, key, value, h):
        n, scale = len(query), key.shape[1] ** -0.5
        if -(-n // 16) <= -(-landmarks // 16):
            return softmax_attention(query, key, value)
        bounds = [i * n // landmarks for i in range(landmarks + 1)]
        segments = [slice(bounds[i], bounds[i + 1]) for i in range(landmarks)]
        query_means = torch.stack([query[s].mean(0) for s in segments])
        key_means = torch.stack([key[s].mean(0) for s in segments])
        a = (query_means @ key_means.T * scale).softmax(1)
        z = a.T / (a.abs().sum(0).max() * a.abs().sum(1).max())
        one = torch.eye(landmarks, dtype=a.dtype)
        for _ in range(iterations):
            z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
        return (query @ key_means.T * scale).softmax(1) @ z @ (query_means @ key.T * scale).softmax(1) @ value

    return each_head(one_head)


def linear(query, key, value):
    def phi(x):
        return nn.functional.elu(x) + 1

    def one_head(query, key, value, h):
        context = []
        for q in phi(query):
            weights = torch.stack([q @ k for k in phi(key)])
            context.append((weights / weights.sum()) @ value)
        return torch.stack(context)

    return each_head(one_head)(query, key, value)


def performer(projection_FK, epsilon, stabiliser):
    def one_head(query, key, value, h):
        def exponents(x):
            y = x / x.shape[1] ** 0.25
            return y @ projection_FK.T, (y @ y.T).diagonal()[:, None] / 2

        def features(product, half, largest):
            return ((product - half - largest).exp() + epsilon) / len(projection_FK) ** 0.5

        (query_product, query_half), (key_product, key_half) = exponents(query), exponents(key)
        query_c, key_c = query_product, key_product
        if stabiliser == "exponent":
            query_c, key_c = query_product - query_half, key_product - key_half
        query_f = features(query_product, query_half, query_c.detach().max(1, keepdim=True).values)
        key_f = features(key_product, key_half, key_c.detach().max())
        weights = query_f @ key_f.T
        return weights / weights.sum(1, keepdim=True) @ value

    return each_head(one_head)


def delta_one_way(query, key, value, beta):
    """One head: S_t = S_(t-1) + beta_t (v_t - S_(t-1) k_t) k_t^T, o_t = S_t q_t. beta (n,)."""
    state = torch.zeros(value.shape[1], key.shape[1], dtype=key.dtype)
    read = []
    for q, k, v, b in zip(query, key, value, beta, strict=True):
        state = state + b * torch.outer(v - state @ k, k)
        read.append(state @ q)
    return torch.stack(read)


def delta(weight_HK, bias_H, features="norm"):
    def phi(x):
        if features == "norm":
            return x / x.norm(dim=1, keepdim=True)
        positive = nn.functional.elu(x) + 1
        return positive / positive.sum(1, keepdim=True)

    def one_head(query, key, value, h):
        inputs = phi(query), phi(key), value, (key @ weight_HK[h] + bias_H[h]).sigmoid()
        there, back = delta_one_way(*inputs), delta_one_way(*(x.flip(0) for x in inputs)).flip(0)
        return (there + back) / 2

    return each_head(one_head)


def adaptive_span(spans_H, ramp):
    """The closed form of the paper, equation 3, with distances to both sides."""

    def one_head(query, key, value, h):
        position = torch.arange(len(query))
        distance = (position[:, None] - position).abs()
        window = ((ramp + spans_H[h] - distance) / ramp).clamp(0, 1)
        weights = window * (query @ key.T / key.shape[1] ** 0.5).exp()
        return weights / weights.sum(1, keepdim=True) @ value

    return each_head(one_head)


def entmax(alpha_H, top_k=None):
    """The package's own weights; with top_k of the largest scores of each query, one query after the other."""
    from entmax import entmax_bisect

    def one_head(query, key, value, h):
        scores = query @ key.T / key.shape[1] ** 0.5
        if top_k is None:
            return entmax_bisect(scores, alpha_H[h]) @ value
        context = []
        for row in scores:
            kept = row.argsort(descending=True)[:top_k]
            context.append(entmax_bisect(row[kept], alpha_H[h]) @ value[kept])
        return torch.stack(context)

    return each_head(one_head)


# Public implementations, as (T, H, K) x 3 -> (T, H, K); none of them knows of packed sequences.


def to_heads(x_THK: Tensor) -> Tensor:
    return x_THK.transpose(0, 1)[None]


def from_heads(x_1HTK: Tensor) -> Tensor:
    return x_1HTK[0].transpose(0, 1)


def set_weights(layer: nn.Linear, weight: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()


def from_one_input(module: nn.Module, size: int, out: nn.Linear):
    """A module of one input (1, T, 3 H K), which holds queries, keys and values; its output is the first H K of it."""
    set_weights(out, torch.eye(3 * size, size))

    def attend(query_THK, key_THK, value_THK, *_):
        x = torch.cat([x.flatten(1) for x in (query_THK, key_THK, value_THK)], dim=1)[None]
        return module(x)[0, :, :size].unflatten(1, query_THK.shape[1:])

    return attend


def public_linformer(heads, width, length, rank, key_projection_LR=None, value_projection_LR=None):
    package = pytest.importorskip("linformer", reason=NOT_INSTALLED)
    size = heads * width
    module = package.LinformerSelfAttention(3 * size, length, k=rank, heads=heads, dim_head=width).double().eval()
    pick = torch.eye(3 * size).split(size)
    for layer, weight in zip((module.to_q, module.to_k, module.to_v), pick, strict=True):
        set_weights(layer, weight)
    with torch.no_grad():
        if key_projection_LR is not None:
            module.proj_k.copy_(key_projection_LR)
            module.proj_v.copy_(value_projection_LR)
    return from_one_input(module, size, module.to_out)


def public_nystrom(heads, width, landmarks, iterations):
    package = pytest.importorskip("nystrom_attention", reason=NOT_INSTALLED)
    size = heads * width
    module = package.NystromAttention(
        3 * size, width, heads, num_landmarks=landmarks, pinv_iterations=iterations, residual=False
    )
    module = module.double().eval()
    set_weights(module.to_qkv, torch.eye(3 * size))
    return from_one_input(module, size, module.to_out[0])


def public_performer(projection_FK):
    package = pytest.importorskip("performer_pytorch", reason=NOT_INSTALLED)
    module = package.FastAttention(projection_FK.shape[1], nb_features=len(projection_FK)).to(projection_FK)
    module.projection_matrix.copy_(projection_FK)
    return lambda query, key, value, *_: from_heads(module(*map(to_heads, (query, key, value))))


def public_kernel_attention():
    """The quotient of sums, for features that are given."""
    package = pytest.importorskip("performer_pytorch.performer_pytorch", reason=NOT_INSTALLED)
    return lambda query, key, value, *_: from_heads(package.linear_attention(*map(to_heads, (query, key, value))))


def public_efficient_attention():
    """Linear attention with softmax for both features: over the width for queries, over the tokens for keys."""
    name = "linear_attention_transformer.linear_attention_transformer"
    package = pytest.importorskip(name, reason=NOT_INSTALLED)

    def attend(query_THK, key_THK, value_THK, *_):
        return from_heads(package.linear_attn(*(to_heads(x).contiguous() for x in (query_THK, key_THK, value_THK))))

    return attend


def public_set_transformer(points_MK, query_weight_KK, key_weight_KK, value_weight_KK):
    """An induced set attention block of one head, as a function of the layer's input (n, K), not of its projections."""
    package = pytest.importorskip("isab_pytorch", reason=NOT_INSTALLED)
    width = points_MK.shape[1]
    module = package.ISAB(dim=width, heads=1, num_latents=len(points_MK)).double().eval()
    for attention in (module.attn1, module.attn2):
        for name, layer in attention.named_children():
            set_weights(layer, torch.eye(width) if name != "to_kv" else torch.eye(width).repeat(2, 1))
        attention.scale = width**-0.5
    with torch.no_grad():
        module.latents.copy_(points_MK)
        module.attn1.to_kv.weight[:width] = key_weight_KK  # its values are the input itself: summaries of the input
        module.attn2.to_q.weight.copy_(query_weight_KK)
        module.attn2.to_kv.weight.copy_(torch.cat([key_weight_KK, value_weight_KK]))
    return lambda x_nK: module(x_nK[None])[0][0]


def public_delta_rule():
    """(query, key, value (T, H, K), beta (T, H)) -> (T, H, K); in float32, its queries scaled by 1/sqrt(K)."""
    found = importlib.util.find_spec("fla")
    path = Path(next(iter(found.submodule_search_locations)), "ops/delta_rule/naive.py") if found else None
    if path is None or not path.exists():
        pytest.skip(NOT_INSTALLED)
    spec = importlib.util.spec_from_file_location("fla_naive_delta_rule", path)  # the package itself wants a GPU
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def attend(query_THK, key_THK, value_THK, beta_TH):
        inputs = *map(to_heads, (query_THK, key_THK, value_THK)), beta_TH.T[None]
        return from_heads(module.delta_rule_recurrence(*inputs)[0])

    return attend
