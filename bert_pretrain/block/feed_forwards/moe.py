"""The mixture of experts: each token goes to the few of many feed-forwards that a router chooses; none is dropped.

    p_t   = softmax(R x_t), in float32 at least
    out_t = sum over the k experts e with the largest p_te of   w_te expert_e(x_t)
    w_te  = p_te / (sum of the k);    for k = 1 p_te itself, or the router would learn nothing from the loss

as MixtralSparseMoeBlock (2401.04088) has it, and Switch Transformer (2101.03961) for k = 1. There are no places that
could run out, and padding takes none. Each expert computes its tokens in one product.

What keeps experts in equal use:

    balance="sequence"   a term of the loss: the mean over sequences of  E · sum_e f_e P_e
                         f_e: choices of e for each token of the sequence; P_e: its mean p_te. k if use is even
    balance="bias"       no term: b_e is added to p_te for the choice alone, and moves after each step by
                         speed · sign(mean choices of an expert - those of e)       (2408.15664)

    router z-loss        a term of the loss: the mean over tokens of  (log sum_e exp r_te)²,  r = R x    (2202.08906)

Usually f and P are means over a batch. A product of two means does not add up: it changes with accumulation, with the
number of ranks and with padding. A sequence's own does not.

On a GPU in bfloat16 only the device knows how many rows each product has, and the host waits for nothing. In another
type, or where widths are no multiples of 8, the host waits once a layer for these numbers.

Isolation: experts see single tokens, and the terms single sequences. A mate's values decide how many rows an expert's
product has, and so the rounding.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate

from bert_pretrain.attention.head import without_autocast
from bert_pretrain.attention.parts.choices import chosen
from bert_pretrain.block.branches import no_sums
from bert_pretrain.block.feed_forwards.dense import chunk_by_chunk, gated_like
from bert_pretrain.block.feed_forwards.grouped import grouped_outputs, is_grouped
from bert_pretrain.moving import MOST_MICRO_BATCHES, MovesAfterStep
from collate.layout import PackLayout, SlotLayout
from collate.losses import Mean
from collate.views import at_least_float32

if TYPE_CHECKING:
    from bert_pretrain.block.options import BlockOptions

BALANCE = ("sequence", "bias")
"""What keeps experts in equal use."""


class Expert(nn.Module):
    """A feed-forward without dropout: stock BERT's first projection, or a gated one, and its second."""

    def __init__(self, intermediate: nn.Module, dense: nn.Linear):
        super().__init__()
        self.intermediate, self.dense = intermediate, dense

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.dense(self.intermediate(hidden_TD))


class MixtureOfExperts(MovesAfterStep):
    """`options.experts` feed-forwards of the config's intermediate_size; a token goes to `options.top_k` of them.

    A new one draws all experts apart. `from_dense` makes them copies of one feed-forward ("sparse upcycling",
    2212.05055): for top_k > 1 the mixture then computes what that did, until the router lets them part.
    """

    bias_E: Tensor

    def __init__(self, config: Any, options: "BlockOptions", layer_index: int):
        super().__init__()
        self.options, self.initializer_range = options, config.initializer_range
        width, inner = config.hidden_size, config.intermediate_size
        self.router = nn.Linear(width, options.experts, bias=False)
        first = [
            gated_like(BertIntermediate(config), options.gated, self.initializer_range) for _ in range(options.experts)
        ]
        self.experts = nn.ModuleList(Expert(intermediate, nn.Linear(inner, width)) for intermediate in first)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if options.balance == "bias":
            self.register_at_least_float32("bias_E", (options.experts,))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the router and all experts; no expert has an advantage."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, self.initializer_range)
                if module.bias is not None:
                    module.bias.zero_()
        if self.options.balance == "bias":
            self.bias_E.zero_()
        self.forget()

    @torch.no_grad()
    def from_dense(self, intermediate: nn.Module, output: nn.Module) -> None:
        """Make each expert a copy of stock BERT's modules; draw the router."""
        given: Any = output
        first = gated_like(intermediate, self.options.gated, self.initializer_range)
        self.experts = nn.ModuleList(Expert(*copy.deepcopy((first, given.dense))) for _ in self.experts)
        self.to(given.dense.weight)
        self.router.weight.normal_(0, self.initializer_range)
        self.dropout = given.dropout

    def from_own(self, before: "MixtureOfExperts") -> None:
        """Take over the experts and the router of a mixture with other options."""
        if len(before.experts) != len(self.experts):
            raise ValueError(
                f"experts={len(self.experts)} cannot be made of a model with {len(before.experts)} trained experts; "
                "make the model anew"
            )
        expert: Any
        for expert in before.experts:
            expert.intermediate = gated_like(expert.intermediate, self.options.gated, self.initializer_range)
        self.experts, self.router, self.dropout = before.experts, before.router, before.dropout
        self.to(self.router.weight)
        if self.options.balance == before.options.balance == "bias":
            self.bias_E = before.bias_E

    # -- what it adds to the loss --------------------------------------------------------------------------------

    @property
    def loss_rows(self) -> tuple[Mean, ...]:
        """Terms of the loss; the log has their sum over layers."""
        options = self.options
        rows: tuple[Mean, ...] = (Mean("router_z_loss", "router_z", "tokens", options.z_loss),)
        if options.balance == "sequence":
            rows = (Mean("balance_loss", "expert_balance", "sequences", options.balance_weight), *rows)
        return tuple(row for row in rows if row.weight)

    @property
    def loss_names(self) -> tuple[str, ...]:
        return tuple(row.total for row in self.loss_rows)

    # -- the branch ----------------------------------------------------------------------------------------------

    def forward(self, hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        with without_autocast(hidden_TD):
            logits_TE = F.linear(at_least_float32(hidden_TD), at_least_float32(self.router.weight))
            scores_TE = logits_TE.softmax(-1)
            choice_Tk, weight_Tk = self._choose(scores_TE)
            uses_TE = torch.zeros_like(scores_TE).scatter(1, choice_Tk, 1.0)
            sums = self._sums(logits_TE, scores_TE, uses_TE, layout)
        out_TD = chunk_by_chunk(self._outputs, self.options.chunk_size, hidden_TD, choice_Tk, weight_Tk)
        if self.options.balance == "bias" and self.training and torch.is_grad_enabled():
            self._refuse_forgotten()
            out_TD = self.collected(out_TD, (uses_TE.bool() & layout.is_real_token[:, None]).sum(0))
        return self.dropout(out_TD), sums

    def _choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(T, k) which experts, and how much each counts."""

        def choose() -> Tensor:
            biased_TE = scores_TE + self.bias_E if self.options.balance == "bias" else scores_TE
            return biased_TE.detach().topk(self.options.top_k, dim=-1).indices

        choice_Tk = chosen(choose, below=self.options.experts)
        weight_Tk = scores_TE.gather(1, choice_Tk)
        return choice_Tk, weight_Tk if self.options.top_k == 1 else weight_Tk / weight_Tk.sum(-1, keepdim=True)

    def _outputs(self, hidden_TD: Tensor, choice_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """(T, D): what the chosen experts make of each token, weighted."""
        order_P = choice_Tk.flatten().argsort(stable=True)  # the P = T · k choices, expert by expert
        token_P, weight_P = order_P // self.options.top_k, weight_Tk.flatten().index_select(0, order_P)
        counts_E = token_P.new_zeros(self.options.experts).scatter_add(0, choice_Tk.flatten(), torch.ones_like(token_P))
        if is_grouped(hidden_TD, self.experts):
            out_PD = grouped_outputs(self.experts, hidden_TD, token_P, counts_E)
        else:
            parts = hidden_TD.index_select(0, token_P).split(counts_E.tolist())
            # an expert without tokens computes none: its gradient is 0, and not None
            out_PD = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        weighted_PD = out_PD * weight_P[:, None]
        summed_TD = weighted_PD.new_zeros(len(hidden_TD), out_PD.shape[1]).index_add(0, token_P, weighted_PD)
        return summed_TD.to(out_PD.dtype)

    def _sums(self, logits_TE: Tensor, scores_TE: Tensor, uses_TE: Tensor, layout: PackLayout) -> Tensor:
        """(k,) the totals of `loss_rows`."""
        found = [
            self._balance(scores_TE, uses_TE, layout) if name == "expert_balance" else _z_loss(logits_TE, layout)
            for name in self.loss_names
        ]
        return torch.stack(found) if found else no_sums(scores_TE)

    def _balance(self, scores_TE: Tensor, uses_TE: Tensor, layout: PackLayout) -> Tensor:
        """The sum over sequences of E · sum_e f_e P_e."""
        both_T2E = torch.stack([uses_TE, scores_TE], 1)
        sums_N2E = both_T2E.new_zeros(layout.num_sequences, *both_T2E.shape[1:])
        sums_N2E = sums_N2E.index_add(0, layout.sequence_of_token, both_T2E)
        uses_NE, shares_NE = (sums_N2E / layout.lengths.clamp(min=1)[:, None, None]).unbind(1)
        loss_N = self.options.experts * (uses_NE * shares_NE).sum(1)
        return torch.where(layout.is_real_sequence, loss_N, 0).sum()

    # -- the bias ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the bias by what all ranks chose since the last step; every rank must call it."""
        if self.options.balance != "bias":
            return
        nothing = torch.zeros(self.options.experts, dtype=torch.int64, device=self.bias_E.device)
        counts_E = self.over_ranks(nothing if self._statistics is None else self._statistics[0]).double()
        self.bias_E += self.options.bias_speed * (counts_E.mean() - counts_E).sign().to(self.bias_E)
        self.forget()

    def _refuse_forgotten(self) -> None:
        if self._micro_batches >= MOST_MICRO_BATCHES:
            raise RuntimeError(
                f"the experts' bias was not moved in {MOST_MICRO_BATCHES} micro-batches; add AfterStepCallback() to "
                'the Trainer, call bert_pretrain.moving.update_after_step(optimizer, model), or set balance="sequence"'
            )

    # -- what others ask -----------------------------------------------------------------------------------------

    def is_one_graph(self, layout: PackLayout) -> bool:
        """Whether one graph of torch.compile holds for all batches: Python must not loop over numbers of tokens."""
        weight = self.router.weight
        probe = weight.new_empty(0, weight.shape[1])
        return isinstance(layout, SlotLayout) and is_grouped(probe, self.experts)

    def output_weights(self) -> list[nn.Parameter]:
        """The projections that write to the residual sum."""
        experts: Any = self.experts
        return [expert.dense.weight for expert in experts]

    def weights_a_token(self) -> int:
        """Weights of matrices that one token meets: those of the router and of `top_k` experts."""
        matrices = sum(weight.numel() for weight in self.experts[0].parameters() if weight.dim() == 2)
        return self.router.weight.numel() + self.options.top_k * matrices

    def extra_repr(self) -> str:
        return f"experts={self.options.experts}, top_k={self.options.top_k}, balance={self.options.balance!r}"


def _z_loss(logits_TE: Tensor, layout: PackLayout) -> Tensor:
    """The sum over tokens of the squared logarithm of what the softmax divides by."""
    return torch.where(layout.is_real_token, logits_TE.logsumexp(-1).square(), 0).sum()
