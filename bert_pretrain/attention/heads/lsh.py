"""`lsh`: attention among tokens that hash alike (Reformer, arXiv 2001.04451, sections 2 and 3).

    k_j = q_j / |q_j|,    hash(q) = argmax [q R; -q R]                   R (K, buckets / 2), other ones in each round
    sorted by (hash, position) and cut into chunks of C: a token sees its own chunk and the one before
    s_ij = q_i . k_j / sqrt(K) - log N_ij,    s_ii = -5e4: a token sees itself only where there is nothing else
    context_i = sum_r exp(z_ir - logsumexp_r z_ir) context_ir,    z_ir = logsumexp_j s_ij in round r

N_ij is how many times i sees j in all rounds together (appendix A). So a context is the softmax over the *union* of
what the rounds show, and exact attention for n <= 2 C with any number of rounds. duplicates="count" leaves N_ij out, as
most public code does: a token that two rounds show then weighs twice.

A config without this option means "union". To continue an older model that was trained with several rounds, set
duplicates="count".

Cost: rounds * N * 2 C * (K + rounds) per head, the hash (n / 2C columns a round) and the sort; memory rounds * N * 2 C.

Queries and keys are one: this head ignores the keys that it gets. The layer's key projection idles with a gradient of
zeros: every parameter has one, and checkpoints keep their form. The attention of a stock checkpoint becomes another
function, which needs further training.

Isolation: the number of buckets follows from the sequence's own length. A sort by (sequence, hash, position) leaves
every sequence in its own place, and chunks are `PackLayout.chunks` of the sorted tokens. The chunk before the first is
the last of the same sequence's previous round. So the chain of (round, chunk) closes within each sequence.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead, draw_normal, longer_than, unit_vectors
from bert_pretrain.attention.options import HeadOptions, choice, seed_option, whole
from bert_pretrain.attention.parts.choices import chosen
from collate.chunks import Chunks
from collate.layout import PackLayout
from collate.length_groups import Gather, Scatter

Length = TypeVar("Length", int, Tensor)

SELF_SCORE = -5e4
"""The score of a token with itself: nothing beside any other, within the range of half precision."""


@dataclass(frozen=True)
class LSHOptions(HeadOptions):
    """What `use_attention(model, "lsh", …)` takes."""

    num_rounds: int = whole(2, 1, "give the number of hash rounds")
    """Hash rounds: a later one may show what another misses. They cost in proportion; the paper has 1 to 8."""
    bucket_size: int = whole(64, 1, "give the number of tokens of a chunk")
    """Tokens of a chunk, and about of a bucket: each token sees twice as many a round. Up to this length the head is
    exact attention (with shared queries and keys)."""
    duplicates: str = choice("union", ("union", "count"))
    """A token that several rounds show counts once in "union", as in the paper. In "count" it counts in each, as in
    reformer-pytorch and transformers."""
    seed: int = seed_option()
    """Draws the rotations, others for each layer."""


class Places(NamedTuple):
    """Where the sorted tokens stand. R rounds, NC chunks of C slots in each; rows are those of (T * H, K).

    token: (R, NC, H, C) the token in each slot. row: (R * NC * H * C,) its row. slot: (R * T * H,) the slot of each row
    in each round, the inverse. previous, next: (R * NC,) the chunk before and after in the sequence's chain.
    number: (R, T * H) the number of each row's chunk in its sequence, from 0. last: (T * H,) the
    last such number. Both in as few bytes as hold them.
    """

    token: Tensor
    row: Tensor
    slot: Tensor
    previous: Tensor
    next: Tensor
    number: Tensor
    last: Tensor


class LSHAttention(AttentionHead):
    """Shared query/key softmax over the tokens of like hash, several rounds combined. No parameters, one buffer."""

    Options = LSHOptions
    rotations: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        columns = num_buckets(self.max_sequence_length, self.options.bucket_size) // 2
        shape = (self.num_heads, self.head_width, self.options.num_rounds, columns)
        self.register_at_least_float32("rotations", shape)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the rotations of this layer."""
        self.rotations.copy_(draw_normal(self.rotations.shape, self.generator()))

    def is_one_graph(self, layout: PackLayout) -> bool:
        return True

    def prepare(self, layout: PackLayout) -> None:
        longer_than(layout, self.max_sequence_length)
        longest(layout)
        layout.chunks(self.options.bucket_size)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        self.refuse_longer(layout)
        q_THK = InsteadOf.apply(q_THK, k_THK)
        chunks = layout.chunks(self.options.bucket_size)
        most_chunks = -(-longest(layout) // self.options.bucket_size)
        buckets = chosen(
            lambda: self.hash(q_THK.detach(), layout), below=num_buckets(longest(layout), self.options.bucket_size)
        )
        places = sort_into_chunks(buckets, layout.sequence_of_token, chunks, most_chunks)
        query, key, value = self._gather(q_THK, v_THK, places)
        scores = query @ key.transpose(-1, -2)
        if self.options.duplicates == "union" and self.options.num_rounds > 1:  # one round shows all equally often
            scores = scores - times_seen(places).to(scores.dtype).log_()
        token_seen = _looked_back(places.token.flatten(0, 1), places)
        scores = scores.masked_fill(places.token.flatten(0, 1)[..., None] == token_seen[..., None, :], SELF_SCORE)
        # last, as padding slots show the last token: to that they would be itself
        scores = scores.masked_fill(~_looked_back(chunks.valid, places)[:, None, None], torch.finfo(scores.dtype).min)
        largest = scores.detach().amax(-1, keepdim=True)
        weights = (scores - largest).exp()  # and not a softmax: the rounds are combined by its denominators
        total = weights.sum(-1, keepdim=True, dtype=torch.promote_types(scores.dtype, torch.float32))
        context = weights @ value / total.type_as(value)
        return self._combine(context, largest + total.log(), places.slot)

    def hash(self, q_THK: Tensor, layout: PackLayout) -> Tensor:
        """(R, H, T) int64: every token's bucket in each round, from 0 to below its sequence's num_buckets(n)."""
        columns_T = num_buckets(layout.lengths, self.options.bucket_size)[layout.sequence_of_token] // 2
        columns = num_buckets(longest(layout), self.options.bucket_size) // 2
        rotations = self.rotations[..., :columns]  # a stretch of padding may ask for more than there are: any will do
        rotated = torch.einsum("thk,hkrc->rhtc", q_THK, rotations.to(q_THK.dtype))
        # column c stands for two buckets, c where it is positive and (columns of the sequence) + c where negative
        unused = torch.arange(rotations.shape[-1], device=q_THK.device) >= columns_T[:, None]
        best = rotated.abs().masked_fill(unused, -1).argmax(-1, keepdim=True)
        return (best + columns_T[:, None] * (rotated.gather(-1, best) < 0)).squeeze(-1)

    def _gather(self, q_THK: Tensor, v_THK: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (R * NC, H, C, K), keys and values (R * NC, H, 2 C, K)."""
        shape = places.token.flatten(0, 1).shape
        query, value = (
            GatherRounds.apply(x.flatten(0, 1), places.row, places.slot).unflatten(0, shape) for x in (q_THK, v_THK)
        )
        key = unit_vectors(query).type_as(query)
        return query * self.head_width**-0.5, _looked_back(key, places), _looked_back(value, places)

    def _combine(self, context: Tensor, normaliser: Tensor, slot: Tensor) -> Tensor:
        """(R * NC, H, C, K) and (…, 1) in sorted order -> (T, H, K)."""
        shape = (self.options.num_rounds, -1, self.num_heads)
        context, normaliser = (Scatter.apply(x.flatten(0, 2), slot).unflatten(0, shape) for x in (context, normaliser))
        # torch's softmax over the first dimension rounds differently at the end of a tensor: not the same everywhere
        weights = (normaliser - normaliser.detach().amax(0)).exp()
        return (context * (weights / weights.sum(0)).type_as(context)).sum(0)


def longest(layout: PackLayout) -> int:
    """Tokens of the longest sequence, or stretch of padding: the host knows, and nobody waits.

    Within a graph of torch.compile the slots of a pack, of which none has more: that holds for all batches.
    """
    if torch.compiler.is_compiling():
        return layout.sequence_ids_BL.shape[1]
    return layout.table("longest", lambda on_host: int(on_host.lengths.max()))


def num_buckets(length: Length, bucket_size: int) -> Length:
    """How many buckets a sequence of `length` tokens has: an even number, at least 2, about length / bucket_size."""
    return (length + 2 * bucket_size - 1) // (2 * bucket_size) * 2


def sort_into_chunks(buckets: Tensor, sequence_of_token: Tensor, chunks: Chunks, most_chunks: int = 2**30) -> Places:
    """Sort each sequence's tokens by (bucket, position), in each round and head, and cut them into its own chunks.

    buckets: (R, H, T) int64. most_chunks: more than no sequence has.
    """
    num_rounds, num_heads, num_tokens = buckets.shape
    # tokens come by sequence and position, so a stable sort by (sequence, bucket) leaves every sequence where it is
    sorted_tokens = torch.argsort(sequence_of_token * (num_tokens + 2) + buckets, dim=-1, stable=True)
    rank = torch.empty_like(sorted_tokens).scatter_(
        -1, sorted_tokens, torch.arange(num_tokens, device=buckets.device).expand_as(sorted_tokens)
    )
    token = sorted_tokens[:, :, chunks.index].transpose(1, 2)
    heads = torch.arange(num_heads, device=buckets.device)
    rounds = torch.arange(num_rounds, device=buckets.device)
    slot_in_round = chunks.slot_of_token[rank]
    chunk, place = slot_in_round // chunks.size, slot_in_round % chunks.size
    slot = ((rounds[:, None, None] * chunks.num_chunks + chunk) * num_heads + heads[:, None]) * chunks.size + place
    previous, following = _chain(num_rounds, chunks)
    largest = max(2 * num_rounds, most_chunks)
    small = next(d for d in (torch.int8, torch.int16, torch.int32) if torch.iinfo(d).max > largest)
    return Places(
        token=token,
        row=(token * num_heads + heads[:, None]).flatten(),
        slot=slot.transpose(1, 2).flatten(),
        previous=previous,
        next=following,
        number=chunks.number[chunk].transpose(1, 2).flatten(1).to(small),
        last=(chunks.chunks_per_sequence - 1)[sequence_of_token].repeat_interleave(num_heads).to(small),
    )


@torch.no_grad()
def times_seen(places: Places) -> Tensor:
    """N_ij (R * NC, H, C, 2 C) integers: in how many windows of all rounds a slot's query meets the key of another.

    A query in chunk c of a round sees chunks c and c - 1 of that round; in chunk 0 the last one of the round before.
    """
    shape = places.token.flatten(0, 1).shape

    def of_slots(x: Tensor) -> Tensor:
        return x.index_select(0, places.row).view(shape)

    times = places.number.new_zeros(*shape, 2 * shape[-1])
    for number, before in zip(places.number, places.number.roll(1, 0), strict=True):
        query = of_slots(number)
        key, key_before = _looked_back(query, places), _looked_back(of_slots(before), places)
        last_from_first = torch.where(query == 0, of_slots(places.last), -1)
        # work in place and in one byte: this runs for every score
        distance = query[..., None] - key[..., None, :]
        seen = distance.bitwise_and_(-2).eq(0).view(torch.int8)  # 0 and 1 have no other bit
        times.add_(seen)
        times.add_(last_from_first[..., None].eq(key_before[..., None, :]).view(torch.int8))
    return times


def _chain(num_rounds: int, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """(R * NC,) each: the chunk before and after, through all rounds of one sequence, the last before the first.

    two rounds, sequences of 2 and 1 chunks: [[0 1] [2]] [[3 4] [5]] -> before: 4 0 5 1 3 2
    """
    rounds = torch.arange(num_rounds, device=chunks.number.device)[:, None] * chunks.num_chunks
    own = torch.arange(chunks.num_chunks, device=chunks.number.device)
    last = (chunks.first + chunks.chunks_per_sequence - 1)[chunks.sequence]
    first = chunks.first[chunks.sequence]
    previous = torch.where(own == first, rounds.roll(1, 0) + last, rounds + own - 1)
    following = torch.where(own == last, rounds.roll(-1, 0) + first, rounds + own + 1)
    return previous.flatten(), following.flatten()


def _looked_back(x: Tensor, places: Places) -> Tensor:
    """(R * NC, …, C) or (R * NC, …, C, K) -> twice C: each chunk followed by the one before it in the chain."""
    if x.dim() == 2:  # chunks.valid, the same in every round
        x = x.repeat(len(places.previous) // len(x), 1)
    back = Gather.apply(x, places.previous, places.next) if x.is_floating_point() else x[places.previous]
    return torch.cat([x, back], dim=2 if x.dim() == 4 else -1)


# Written out for the same reason as in collate.length_groups: the gradient of an index, as torch has it, is a slow
# scatter-add, but here every row has exactly one slot that counts in each round.


class GatherRounds(torch.autograd.Function):
    """(rows, …), source (P,), slot (R * rows,) -> (P, …)"""

    @staticmethod
    def forward(ctx, rows, source, slot):
        ctx.save_for_backward(slot)
        ctx.num_rows = len(rows)
        return rows.index_select(0, source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slot,) = ctx.saved_tensors
        return grad.index_select(0, slot).unflatten(0, (-1, ctx.num_rows)).sum(0), None, None


class InsteadOf(torch.autograd.Function):
    """query, key -> query. The key, which nothing reads, has a gradient of 0 and not none, so that a layer that has
    not tied its projections does not hang a data-parallel run."""

    @staticmethod
    def forward(ctx, query, key):
        return query.view_as(query)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad, torch.zeros_like(grad)
