"""`sinkhorn`: each block sees itself and one sorted to it (Sparse Sinkhorn Attention, arXiv 2002.11296, section 3).

    s_u    = [sum of the queries of block u; sum of its keys]
    R      = sinkhorn((log(relu(s W) + 1e-6) + noise) / temperature)       (n/C, n/C), rows and columns sum to 1
    K'_u, V'_u = sum_v R_uv K_v, sum_v R_uv V_v                            near a permutation: one block, softly chosen,
                                                                           over the blocks that have a token in the slot
    context_i = softmax over the 2 C keys of [K'_u; K_u], u the block of i, applied to [V'_u; V_u]

Cost: N 2 C K + (n/C)^2 C K per head; memory N 2 C + (n/C)^2.

The sorting network is the paper's "simple" one: W (2 K, blocks) is a parameter of each head, with column v for the v-th
block of a sequence. The mask hides a slot of K'_u where the block with the largest R_uv has padding.

A context is a mean of values: rows of R are normalised last, and a slot is divided by the share of R_uv of the blocks
that have a token there. normalized_last="columns" is the published form: rows sum to 1 only nearly, and the padding of
the last block comes in as zeros. A config without the option means "rows".

Isolation: blocks are cut from each sequence's own start, and its R is (its blocks x its blocks). Sequences of like many
blocks lie side by side, each in a product of its own. Up to C tokens it is full attention.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretrain.attention.head import AttentionHead, draw_normal, longer_than, prefers_few_launches, without_autocast
from bert_pretrain.attention.options import HeadOptions, choice, number, seed_option, whole
from bert_pretrain.attention.parts.choices import chosen
from collate.chunks import Chunks
from collate.layout import PackLayout
from collate.length_groups import Gather, Scatter
from collate.views import at_least_float32

EPSILON = 1e-6


@dataclass(frozen=True)
class SinkhornOptions(HeadOptions):
    """What `use_attention(model, "sinkhorn", …)` takes."""

    block_size: int = whole(64, 1, "give the number of tokens of a block")
    """Tokens of a block: each token sees twice as many. Up to this length the head is exact attention."""
    num_iterations: int = whole(7, 1, "give the number of normalisations in turn")
    """How often rows and columns are normalised in turn; more bring both sums of R nearer to 1."""
    temperature: float = number(0.75, "above 0", "0.75 is the default")
    """Less makes R sharper, nearer to a permutation of blocks."""
    noise: float = number(0.0, "of at least 0", "0 is none")
    """Scale of Gumbel noise on the scores, 1 in the paper. Drawn once for each layer, head and pair of blocks: heads
    that score blocks alike then sort them differently, in training and evaluation the same."""
    normalized_last: str = choice("rows", ("rows", "columns"))
    """"rows" makes a context a mean of values. "columns" is the published form: there a constant value moves by a few
    per cent, and by more near a padded block."""
    seed: int = seed_option()
    """Draws the first W and the noise, others for each layer."""


class SinkhornAttention(AttentionHead):
    """Softmax over the own block and the block that a Sinkhorn-normalised matrix sorts to it. Parameter: W."""

    Options = SinkhornOptions
    noise: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_blocks = -(-self.max_sequence_length // self.options.block_size)
        self.sort_weight = nn.Parameter(torch.empty(self.num_heads, 2 * self.head_width, self.max_blocks))
        if self.options.noise:
            self.register_at_least_float32("noise", (self.num_heads, self.max_blocks, self.max_blocks))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw this layer's W and noise."""
        generator = self.generator()
        drawn = draw_normal(self.sort_weight.shape, generator)
        # a W of 0 would be a dead relu; the scale does not matter, as sinkhorn takes it out
        self.sort_weight.copy_(drawn * (2 * self.head_width) ** -0.5)
        if self.options.noise:
            uniform = torch.rand(self.noise.shape, generator=generator, dtype=torch.float32, device="cpu")
            self.noise.copy_(-(-(uniform + EPSILON).log() + EPSILON).log() * self.options.noise)

    def is_one_graph(self, layout: PackLayout) -> bool:
        return False

    def prepare(self, layout: PackLayout) -> None:
        longer_than(layout, self.max_blocks * self.options.block_size)
        blocks_of(layout, self.options.block_size)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        self.refuse_more_blocks(layout)
        chunks = layout.chunks(self.options.block_size)
        query, key, value = (chunks.gather(x).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
        # (NC, H, C, K); padding must not enter sums or other blocks
        query, key, value = (torch.where(chunks.valid[:, None, :, None], x, 0) for x in (query, key, value))
        with without_autocast(query):  # sums of a block and the gradient of R overflow in float16
            wide_query, wide_key, wide_value = map(at_least_float32, (query, key, value))
            sums = torch.cat([wide_query.sum(2), wide_key.sum(2)], dim=-1)
            blocks = blocks_of(layout, self.options.block_size)
            matrices = self.sorting_matrix(blocks.side_by_side(sums).transpose(1, 2), blocks.exists)
            sorted_key, sorted_value, sorted_valid = self._sort(matrices, wide_key, wide_value, chunks.valid, blocks)
        valid = torch.cat([sorted_valid, chunks.valid[:, None].expand_as(sorted_valid)], dim=-1)
        context = F.scaled_dot_product_attention(
            query,
            torch.cat([sorted_key.type_as(key), key], dim=2),
            torch.cat([sorted_value.type_as(value), value], dim=2),
            attn_mask=valid[:, :, None].expand(-1, -1, chunks.size, -1),
        )
        return chunks.scatter(context.transpose(1, 2))

    def refuse_more_blocks(self, layout: PackLayout) -> None:
        longer = longer_than(layout, self.max_blocks * self.options.block_size)
        if longer:
            raise ValueError(
                f"a sequence has {-(-longer // self.options.block_size)} blocks of {self.options.block_size} tokens, "
                f"but max_sequence_length={self.max_sequence_length} has {self.max_blocks}; build the head with a "
                "larger max_sequence_length"
            )

    def sorting_matrix(self, sums: Tensor, exists: Tensor) -> Tensor:
        """Block sums (S, H, U, 2 K) of sequences of at most U blocks, exists (S, U) bool -> R (S, H, U, U).

        Blocks that do not exist are sorted to themselves.
        """
        num_blocks = sums.shape[-2]
        missing = max(0, num_blocks - self.max_blocks)  # a stretch of padding may have more
        weight = self.sort_weight[..., :num_blocks]
        if missing:
            weight = F.pad(weight, (0, missing))
        scores = F.relu(sums @ weight.type_as(sums))
        logits = (scores.to(torch.promote_types(scores.dtype, torch.float32)) + EPSILON).log()
        if self.options.noise:
            noise = F.pad(self.noise[:, :num_blocks, :num_blocks], (0, missing, 0, missing))
            logits = logits + noise.type_as(logits)
        logits = logits / self.options.temperature
        both = exists[:, None, :, None] & exists[:, None, None, :]
        itself = torch.eye(num_blocks, dtype=torch.bool, device=exists.device)
        logits = torch.where(both, logits, torch.where(itself, 0.0, -torch.inf).type_as(logits))
        return sinkhorn(logits, self.options.num_iterations, self.options.normalized_last).type_as(sums)

    def _sort(
        self, matrices: Tensor, key: Tensor, value: Tensor, valid: Tensor, blocks: "Blocks"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sorted keys and values (NC, H, C, K), and which of their slots count (NC, H, C)."""
        both = torch.cat([key, value], dim=-1)
        mixed, found = [], []
        for of_group, own, own_valid in zip(
            matrices.split(blocks.sizes), blocks.gather(both), blocks.gather(valid), strict=True
        ):
            # (S, U, H, …) -> (S, H, U, …)
            num_blocks = own.shape[1]
            matrix = of_group[:, :, :num_blocks, :num_blocks]
            rows = matrix @ own.transpose(1, 2).flatten(3)
            block = chosen(partial(torch.argmax, matrix, dim=-1), below=num_blocks)
            block = block.transpose(1, 2).contiguous()  # torch.compile expects its index to be
            sequence = torch.arange(len(block), device=block.device)[:, None, None]
            found.append(own_valid[sequence, block])
            rows = rows.unflatten(3, own.shape[3:]).transpose(1, 2)
            if self.options.normalized_last == "rows":
                share = (matrix @ own_valid.type_as(matrix)[:, None]).transpose(1, 2)
                # if the chosen block has a token, it alone is 1/U or more; other values are not read
                rows = rows / torch.where(found[-1], share, 1)[..., None]
            mixed.append(rows)
        sorted_key, sorted_value = blocks.scatter(mixed).chunk(2, dim=-1)
        return sorted_key, sorted_value, blocks.scatter(found)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of S sequences that have any, sequences in groups of like number of blocks.

    index: (S, U) int64, the chunks of each sequence; its last one again where it has no more. exists: (S, U) bool.
    place: (NC,) int64, where each chunk stands in index. sizes, widths: sequences of each group, and blocks of each.
    group_index, group_place: the same of the groups, one after the other: (slots,) and (NC,) int64.
    """

    index: Tensor
    exists: Tensor
    place: Tensor
    sizes: list[int]
    widths: list[int]
    group_index: Tensor
    group_place: Tensor

    def side_by_side(self, x: Tensor) -> Tensor:
        """(NC, …) -> (S, U, …); blocks that do not exist repeat a sequence's last, without a gradient."""
        return Gather.apply(x, self.index.flatten(), self.place).unflatten(0, self.index.shape)

    def gather(self, x: Tensor) -> list[Tensor]:
        """(NC, …) -> of each group (sequences, blocks, …)."""
        if x.is_floating_point():
            slots = Gather.apply(x, self.group_index, self.group_place)
        else:
            slots = x.index_select(0, self.group_index)
        shapes = list(zip(self.sizes, self.widths, strict=True))
        parts = slots.split([size * width for size, width in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def scatter(self, parts: list[Tensor]) -> Tensor:
        """Of each group (sequences, blocks, …) -> (NC, …): the inverse of `gather`."""
        slots = torch.cat([part.flatten(0, 1) for part in parts])
        if slots.is_floating_point():
            return Scatter.apply(slots, self.group_place)
        return slots.index_select(0, self.group_place)


def blocks_of(layout: PackLayout, size: int) -> Blocks:
    """The blocks of a batch. On accelerators groups have up to 1, 2, 4, 8 … blocks, so that there are few of them."""
    by_doubling = prefers_few_launches(layout)
    return layout.table(("blocks", size, by_doubling), lambda on_host: _blocks(on_host.chunks(size), by_doubling))


def _blocks(chunks: Chunks, by_doubling: bool) -> Blocks:
    counts, sequence = chunks.chunks_per_sequence.sort(stable=True)
    num_empty = int((counts == 0).sum())
    counts, sequence = counts[num_empty:], sequence[num_empty:]
    widths_of = counts
    if by_doubling:
        widths_of = torch.tensor([1 << (count - 1).bit_length() for count in counts.tolist()])
        widths_of = widths_of.clamp(max=int(counts.max()))
    widths, sizes = (values.tolist() for values in widths_of.unique_consecutive(return_counts=True))
    number = torch.arange(int(counts.max()))
    index = chunks.first[sequence, None] + torch.minimum(number, counts[:, None] - 1)
    row_of_sequence = torch.empty_like(chunks.chunks_per_sequence)
    row_of_sequence[sequence] = torch.arange(len(sequence))
    row = row_of_sequence[chunks.sequence]
    first_slot = widths_of.cumsum(0) - widths_of
    parts = zip(index.split(sizes), widths, strict=True)
    return Blocks(
        index=index,
        exists=number < counts[:, None],
        place=row * len(number) + chunks.number,
        sizes=sizes,
        widths=widths,
        group_index=torch.cat([own[:, :width].flatten() for own, width in parts]),
        group_place=first_slot[row] + chunks.number,
    )


def sinkhorn(logits: Tensor, num_iterations: int, last: str = "columns") -> Tensor:
    """(…, U, U) -> nearly doubly stochastic: rows and columns normalised in turn, in logarithms."""
    for _ in range(num_iterations):
        for dimension in (-1, -2) if last == "columns" else (-2, -1):
            logits = logits.log_softmax(dimension)
    return logits.exp()
