"""A mixture of experts in plain Python: one token after the other, one sequence after the other."""

import torch


def mixture_one_by_one(moe, hidden_TD):
    """(T, D) and the probabilities (T, E); no loop of the fast code, no sorting."""
    out, scores = [], []
    bias_E = getattr(moe, "bias_E", torch.zeros(len(moe.experts)))
    for x in hidden_TD:
        score_E = torch.softmax(moe.router.weight @ x, -1)
        ranked = sorted(range(len(moe.experts)), key=lambda e, score=score_E: -float(score[e].detach() + bias_E[e]))
        best = ranked[: moe.options.top_k]
        total = sum(score_E[e] for e in best) if len(best) > 1 else 1
        out.append(sum(score_E[e] / total * moe.experts[e](x[None])[0] for e in best))
        scores.append(score_E)
    return torch.stack(out), torch.stack(scores)


def balance_by_hand(scores_nE, top_k):
    """E · sum_e f_e P_e of one sequence."""
    experts = scores_nE.shape[1]
    uses_E = torch.zeros(experts, dtype=scores_nE.dtype)
    for score_E in scores_nE:
        for e in score_E.topk(top_k).indices.tolist():
            uses_E[e] += 1 / len(scores_nE)
    return experts * sum(uses_E[e] * scores_nE[:, e].mean() for e in range(experts))


def z_loss_by_hand(moe, hidden_TD):
    """The mean over tokens of the squared log of the softmax's denominator."""
    return torch.stack([(moe.router.weight @ x).exp().sum().log() ** 2 for x in hidden_TD]).mean()
