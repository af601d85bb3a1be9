"""`bigbird`: neighbouring blocks, global tokens, and random blocks of the same sequence.

    context_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt(K)) v_j,    blocks of b tokens: B(i) = floor(i / b)
    A_i = {j : |B(i) - B(j)| <= w  or  B(j) in R(h, B(i), n)  or  i or j is global}       i, j positions in one sequence

R are r blocks of the sequence outside the window, drawn without repetition, every subset equally likely: the same for
all tokens of a block, others for each layer, head h, block and length n. Blocks of global tokens alone are not drawn,
as every token sees them already. The first tokens of a sequence, such as [CLS], are global: they see all of it, and all
of it sees them.

Cost: N ((2 w + 1 + r) b + g) K, and g n K for the global tokens of each sequence; memory grows alike.
Source: BigBird (Zaheer et al. 2020, arXiv 2007.14062, section 2 and appendix D), the ITC form: global tokens are tokens
of the sequence. The published code makes the first and last block global: global_tokens = last_global_tokens = block.

Isolation: blocks are cut from the sequence's own start. The draws are a stateless hash of (seed, layer, head, block,
n): no batch, pack mate or training step changes them.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretrain.attention.options import seed_option, whole
from bert_pretrain.attention.parts.blocks import BLOCK_SLOTS, MaskMod, hold, spans_of, within
from bert_pretrain.attention.parts.global_tokens import (
    GlobalTokens,
    attend_from_global,
    global_tokens,
    prepare_global,
)
from bert_pretrain.attention.parts.pattern import PatternAttention, PatternOptions, Sees
from bert_pretrain.attention.parts.windows import Windows, attend, windows
from collate.chunks import NO_CHUNK
from collate.layout import PackLayout


@dataclass(frozen=True)
class BigBirdOptions(PatternOptions):
    """What `use_attention(model, "bigbird", …)` takes."""

    block: int = whole(64, 1, "64 is the paper's")
    """Tokens of a block: larger ones make better use of the hardware, smaller ones a finer pattern."""
    window: int = whole(1, 0, "0 is the least")
    """Neighbouring blocks seen to each side, whole."""
    random_blocks: int = whole(3, 0, "0 is the least")
    """Random blocks that each block also sees; more shorten the way between distant tokens."""
    global_tokens: int = whole(1, 0, "0 is the least")
    """How many tokens at the start of each sequence are global; 1 is [CLS]."""
    last_global_tokens: int = whole(0, 0, "0 is the least")
    """How many at the end are global too; 1 is [SEP]."""
    seed: int = seed_option()
    """Another seed draws other random blocks."""


class BigBirdAttention(PatternAttention):
    """Softmax attention over a window of blocks, global tokens and random blocks; no parameters."""

    Options = BigBirdOptions
    per_head = True
    per_layer = True

    def sees(self, device: torch.device) -> Sees:
        size, window, number, first, last = self.numbers()
        seed = self.layer_seed(device)

        def sees(head, query, key, length):
            block, key_block = query // size, key // size
            seen = (block - key_block).abs() <= window
            seen = seen | (query < first) | (key < first) | (query >= length - last) | (key >= length - last)
            for drawn in random_blocks(seed, head, block, length, size, window, number, first, last):
                seen = seen | (key_block == drawn)
            return seen

        return sees

    def numbers(self) -> tuple[int, int, int, int, int]:
        """What `random_blocks` takes, besides the place."""
        o = self.options
        return o.block, o.window, o.random_blocks, o.global_tokens, o.last_global_tokens

    def draws(self, layout: PackLayout) -> Tensor:
        """(NC, H, r) int32: the numbers of the random blocks that each block sees; NO_CHUNK where there is none."""
        return layout.table((*self.cache_key(), "draws"), self._draws)

    def _draws(self, layout: PackLayout) -> Tensor:
        chunks = layout.chunks(self.options.block)
        head = torch.arange(self.num_heads)
        number, length = chunks.number[:, None], layout.lengths[chunks.sequence][:, None]
        drawn = random_blocks(self.layer_seed(head.device), head, number, length, *self.numbers())
        return (
            torch.stack(drawn, -1).int()
            if drawn
            else torch.empty(chunks.num_chunks, self.num_heads, 0, dtype=torch.int32)
        )

    def mask_mod(self, layout: PackLayout) -> MaskMod:
        """As `sees` has it, but the draws come from a table: a hash for each pair would take longer than all else."""
        chunks, spans, drawn = layout.chunks(self.options.block), spans_of(layout), self.draws(layout)
        chunk = layout.derived(
            ("chunk in packs", chunks.size), lambda: layout.in_rows(chunks.slot_of_token // chunks.size).int()
        )
        starts, stops = spans.start, spans.stop
        numbers = self.numbers()

        def mask_mod(pack, head, query, key, numbers=numbers):
            size, window, count, first, last = numbers
            start, stop = starts[pack, query], stops[pack, query]
            block, key_block = (query - start) // size, (key - start) // size
            seen = (block - key_block).abs() <= window
            seen = (
                seen | (query < start + first) | (key < start + first) | (query >= stop - last) | (key >= stop - last)
            )
            for k in range(count):
                seen = seen | (key_block == drawn[chunk[pack, query], head, k])
            return seen & (key >= start) & (key < stop)

        return mask_mod

    def seen_blocks(self, layout: PackLayout) -> Tensor:
        ids, (size, window, _, first, last) = layout.sequence_ids_BL, self.numbers()
        spans, position, slots = spans_of(layout), layout.positions, ids.shape[1]
        is_global = layout.is_real_BL & ((position < first) | (position >= spans.stop - spans.start - last))
        near = within((window + 1) * size - 1, slots, slots, ids.device) | hold(is_global)
        return near[:, None] | self.drawn_blocks(layout)

    def drawn_blocks(self, layout: PackLayout) -> Tensor:
        """(B, H, R, R) bool: where a pack's random blocks lie among its blocks of 128 slots."""
        return layout.table((*self.cache_key(), "drawn blocks"), self._drawn_blocks)

    def _drawn_blocks(self, layout: PackLayout) -> Tensor:
        chunks, draws, (packs, slots) = (
            layout.chunks(self.options.block),
            self.draws(layout),
            layout.sequence_ids_BL.shape,
        )
        own = torch.arange(chunks.num_chunks)[:, None, None]
        drawn = torch.where(draws != NO_CHUNK, chunks.first[chunks.sequence][:, None, None] + draws, own)
        slot = layout.token_index[chunks.index[:, 0]]
        pack, start = slot // slots, slot % slots
        first, last = start // BLOCK_SLOTS, (start + chunks.valid.sum(1) - 1) // BLOCK_SLOTS
        seen = torch.zeros(packs, self.num_heads, *[-(-slots // BLOCK_SLOTS)] * 2, dtype=torch.bool)
        place = pack[:, None, None], torch.arange(self.num_heads)[:, None]
        for row, column in itertools.product(range((chunks.size - 2 + BLOCK_SLOTS) // BLOCK_SLOTS + 1), repeat=2):
            query, key = (torch.minimum(first + more, last) for more in (row, column))
            seen[*place, query[:, None, None], key[drawn]] = True
        return seen

    def prepare(self, layout: PackLayout) -> None:
        super().prepare(layout)
        if layout.runs_on.type != "cpu":
            self.drawn_blocks(layout)

    def prepare_chunks(self, layout: PackLayout) -> None:
        windows(layout, self.options.block, self.options.window)
        prepare_global(layout, self.options.global_tokens, self.options.last_global_tokens)
        self.draws(layout)

    def layer_seed(self, device: torch.device) -> Tensor:
        return hashed(hashed(torch.tensor(self.options.seed, device=device)) ^ (self.layer_index + 1))

    def longest_whole(self) -> int:
        keys_per_query = (2 * self.options.window + 1 + self.options.random_blocks) * self.options.block
        return 2 * keys_per_query  # here the two cost about the same

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        options = self.options
        view = windows(layout, options.block, options.window)
        tokens = global_tokens(layout, options.global_tokens, options.last_global_tokens)
        source, mask = layout.derived((*self.cache_key(), "chunks"), lambda: self.random_chunks(view, tokens, layout))
        key, value = (self.keys(x, view, tokens, source) for x in (k_THK, v_THK))
        context_THK = view.to_tokens(attend(view.queries(q_THK), key, value, mask, dropout))
        return attend_from_global(context_THK, tokens, tokens.gather(q_THK), k_THK, v_THK, layout, dropout)

    def keys(self, x_THK: Tensor, view: Windows, tokens: GlobalTokens, source: Tensor) -> Tensor:
        """(T, H, K) -> (NC, H, M + G + r C, K): of the window, the global tokens and the random blocks."""
        chunks = view.chunks.gather(x_THK)
        near = view.neighbours(chunks).transpose(1, 2)
        of_heads = chunks.transpose(1, 2).flatten(0, 1)  # (NC * H, C, K)
        drawn = of_heads.index_select(0, source.flatten()).unflatten(0, source.shape).flatten(2, 3)
        return torch.cat([near, tokens.of_chunks(x_THK, view.chunks.sequence), drawn], 2)

    def random_chunks(self, view: Windows, tokens: GlobalTokens, layout: PackLayout) -> tuple[Tensor, Tensor]:
        """Each chunk's random chunks (NC, H, r), as chunk * H + head; and the mask (NC, H, 1, M + G + r C)."""
        chunks = view.chunks
        head = torch.arange(self.num_heads, device=view.length.device)
        length, drawn = view.length[:, None], self.draws(layout)
        exists = drawn != NO_CHUNK
        own = torch.arange(chunks.num_chunks, device=head.device)
        chunk = torch.where(exists, chunks.first[chunks.sequence][:, None, None] + drawn, own[:, None, None])

        not_global = ~tokens.is_global(chunks.positions, length) & chunks.valid
        near = view.key_valid & ~tokens.is_global(view.key_position, length)
        near = torch.cat([near, tokens.valid[chunks.sequence]], 1)[:, None].expand(-1, self.num_heads, -1)
        far = (not_global[chunk] & exists[..., None]).flatten(2, 3)
        return chunk * self.num_heads + head[:, None], torch.cat([near, far], -1)[:, :, None]


def random_blocks(
    seed: Tensor, head: Tensor, block: Tensor, length: Tensor, size: int, window: int, count: int, first: int, last: int
) -> list[Tensor]:
    """`count` blocks outside the window of `block` in a sequence of `length` tokens; -1 where they are fewer.

    Integer tensors that broadcast. first, last: how many tokens at either end are global; only blocks with another
    token are drawn. Floyd's sampling: the k-th of r draws is uniform over the first m - r + k + 1 candidates; where it
    hits an earlier draw, it takes the last candidate.
    """
    # blocks begin..end have a token that is not global; of these the window takes low..high
    begin, end = first // size, (length - last - 1).clamp(min=-1) // size
    low = torch.minimum((block - window).clamp(min=begin), end + 1)
    high = torch.minimum(block + window, end)
    in_window = (high - low + 1).clamp(min=0)
    candidates = (end - begin + 1).clamp(min=0) - in_window
    candidates = torch.where(length - last > first, candidates, 0)
    state = hashed(hashed(hashed(seed ^ head) ^ block) ^ length)
    drawn: list[Tensor] = []
    for k in range(count):
        limit = candidates - count + k
        candidate = hashed(state ^ (k + 1)) % (limit + 1).clamp(min=1)
        for other in drawn:
            candidate = torch.where(candidate == other, limit, candidate)
        drawn.append(torch.where(limit >= 0, candidate, NO_CHUNK))
    places = [(c, c + begin) for c in drawn]
    return [torch.where(c < 0, NO_CHUNK, torch.where(p < low, p, p + in_window)) for c, p in places]


def hashed(x: Tensor) -> Tensor:
    """A hash of 32 bits, in int64 without overflow. x: 0 to 2^32 - 1."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x
