"""The slow, obvious versions: what the fast ones are compared with."""

from __future__ import annotations

import itertools
import random
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import lsq_linear, nnls

STEP = 0x9E3779B97F4A7C15  # of splitmix64

# Packing: one Python object per sequence.


def worst_fit_decreasing(lengths, max_sequence_length, max_sequences_per_pack=None):
    """Textbook: longest first, each into the open pack with the most space, a new pack if it does not fit there."""
    packs = []
    for length in sorted(lengths, reverse=True):
        roomy = [pack for pack in packs if max_sequences_per_pack is None or len(pack) < max_sequences_per_pack]
        emptiest = min(roomy, key=sum, default=None)
        if emptiest is not None and sum(emptiest) + length <= max_sequence_length:
            emptiest.append(length)
        else:
            packs.append([length])
    return packs


def best_fit_decreasing(lengths, max_sequence_length, max_sequences_per_pack=None):
    """Textbook: longest first, each into the fullest open pack that it fits, a new pack if it fits nowhere."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fits = [pack for pack in packs if sum(pack) + length <= max_sequence_length]
        fits = [pack for pack in fits if max_sequences_per_pack is None or len(pack) < max_sequences_per_pack]
        if fits:
            max(fits, key=sum).append(length)
        else:
            packs.append([length])
    return packs


def pack_histogram(histogram, max_sequence_length, max_sequences_per_pack=None, emptiest=True):
    """The paper's SPFHP (emptiest) and LPFHP in plain Python: alike packs are counted, not listed. Returns the packs.

    Longest first; sequences of one length go into alike packs at once: one each into those with the most space, or as
    many as fit into those with the least that suffices.
    """
    depth = max_sequences_per_pack or max_sequence_length
    open_packs = {}  # space left -> {lengths: packs}
    closed = 0
    for length in range(max_sequence_length, 0, -1):
        left = int(histogram[length])
        while left:
            spaces = [space for space in open_packs if space >= length]
            if spaces:
                space = max(spaces) if emptiest else min(spaces)
                lengths, packs = open_packs[space].popitem()
            else:
                space, lengths, packs = max_sequence_length, (), left
            copies = 1 if emptiest else min(space // length, depth - len(lengths), left)
            placed = min(packs, left // copies)
            if spaces and placed < packs:
                open_packs[space][lengths] = packs - placed
            elif spaces and not open_packs[space]:
                del open_packs[space]
            left, lengths, space = left - copies * placed, (*lengths, *[length] * copies), space - copies * length
            if len(lengths) == depth or not space:
                closed += placed
            else:
                alike = open_packs.setdefault(space, {})
                alike[lengths] = alike.get(lengths, 0) + placed
    return closed + sum(sum(alike.values()) for alike in open_packs.values())


def strategies_that_fill(total, depth, shortest=1):
    """Ascending lengths, at most `depth`, that sum to total exactly: 4, 3 -> (1, 1, 2), (1, 3), (2, 2), (4,)."""
    if depth > 1:
        for length in range(shortest, total // 2 + 1):
            for others in strategies_that_fill(total - length, depth - 1, length):
                yield (length, *others)
    if total >= shortest:
        yield (total,)


def dense_nnls(histogram, depth):
    """Every strategy a column of A: min |w (A x - b)| over x >= 0, w = 0.09 up to length 8. Returns x and the norm."""
    strategies = list(strategies_that_fill(len(histogram) - 1, depth))
    columns = np.zeros((len(histogram), len(strategies)))
    for column, strategy in enumerate(strategies):
        for length in strategy:
            columns[length, column] += 1
    weights = np.array([0.09 if length <= 8 else 1.0 for length in range(len(histogram))])
    matrix, goal = weights[:, None] * columns, weights * histogram
    x, norm = nnls(matrix, goal)
    if not np.isclose(norm, np.linalg.norm(matrix @ x - goal), rtol=1e-6, atol=1e-9 * np.linalg.norm(goal)):
        # SciPy 1.17 returns, now and then, an x that is not the minimum, and a norm that is not that x's.
        x = lsq_linear(matrix, goal, (0, np.inf), method="bvls", tol=1e-15).x
        norm = np.linalg.norm(matrix @ x - goal)
    return x, norm


def best_exact_sum(worth, depth):
    """The greatest worth of at most `depth` lengths with each sum, one length after the other."""
    best = np.array([0, *worth[1:]])
    for _ in range(depth - 1):
        longer = best.copy()
        for length in range(1, len(worth)):
            longer[length:] = np.maximum(longer[length:], worth[length] + best[:-length])
        if np.array_equal(longer, best):
            break
        best = longer
    return best


def fisher_yates(values, key):
    """Swap each value with one at or before it, from the last one on; a 64-bit word of the stream is two draws."""
    state, last = key, len(values) - 1
    while last > 0:
        state += STEP
        word = mix(state % 2**64)
        for draw in (word >> 32, word % 2**32):
            if last > 0:
                while (draw * (last + 1)) % 2**32 < 2**32 % (last + 1):  # the draw would favour some; draw again
                    state += STEP
                    draw = mix(state % 2**64) >> 32
                other = (draw * (last + 1)) >> 32
                values[last], values[other] = values[other], values[last]
                last -= 1
    return values


def deal_and_shuffle(values, key):
    """To 256 buckets at random, then each bucket shuffled."""
    buckets = [[] for _ in range(256)]
    for i, value in enumerate(values):
        buckets[(mix((key + i // 8 * STEP) % 2**64) >> i % 8 * 8) % 256].append(value)
    return [value for b, bucket in enumerate(buckets) for value in fisher_yates(bucket, make_key(key, b + 1))]


def assign_one_by_one(plan, lengths, seed):
    """The packs of an assignment, as lists of sequences; for up to 65536 sequences of one length."""
    strategies = list(zip(plan.strategies, plan.repeats.tolist(), strict=True))
    waiting, lone = {}, {}
    for length in sorted(set(lengths)):
        alike = [i for i, other in enumerate(lengths) if other == length]
        if all(strategy == (length,) for strategy, _ in strategies if length in strategy):
            lone[length] = alike
        else:
            waiting[length] = fisher_yates(alike, make_key(seed, length))
    packs = [[i] for alike in lone.values() for i in alike]
    strategies = [(strategy, repeats) for strategy, repeats in strategies if strategy[0] not in lone]
    shares = {}  # of each slot
    for s, (strategy, repeats) in enumerate(strategies):
        for slot, length in enumerate(strategy):
            shares[s, slot], waiting[length] = waiting[length][:repeats], waiting[length][repeats:]
        packs += [s] * repeats
    packs = deal_and_shuffle(packs, make_key(seed, 0))
    return [
        pack if isinstance(pack, list) else [shares[pack, slot].pop(0) for slot in range(len(strategies[pack][0]))]
        for pack in packs
    ]


def fewest_packs(lengths, max_sequence_length, max_sequences_per_pack=None):
    """The true optimum: try every set of companions for the longest sequence that is left. For ten sequences or so."""

    @cache
    def fewest(left):
        if not left:
            return 0
        longest, rest = left[0], left[1:]
        depth = min(len(rest), (max_sequences_per_pack or len(left)) - 1)
        companions = {chosen for size in range(depth + 1) for chosen in itertools.combinations(rest, size)}
        fitting = [chosen for chosen in companions if longest + sum(chosen) <= max_sequence_length]
        return 1 + min(fewest(without(rest, chosen)) for chosen in fitting)

    return fewest(tuple(sorted(lengths, reverse=True)))


def without(values, taken):
    """(5, 3, 3, 2) without (3, 2) -> (5, 3)"""
    left = list(values)
    for value in taken:
        left.remove(value)
    return tuple(left)


def martello_toth(lengths, limit):
    """L2 as in the book: three classes of lengths for every threshold."""
    best = 0
    for k in range(1, limit // 2 + 1):
        large = [x for x in lengths if x > limit - k]
        middle = [x for x in lengths if limit - k >= x > limit / 2]
        small = [x for x in lengths if limit / 2 >= x >= k]
        beside = len(middle) * limit - sum(middle)
        best = max(best, len(large) + len(middle) + max(0, -(-(sum(small) - beside) // limit)))
    return best


def trim(row, mask):
    """Tokens with mask 1."""
    return [token for token, real in zip(row, mask, strict=True) if real]


def pack_rows(rows, token_columns, sequence_indices):
    """A packed dataset from rows (dicts) and a list of packs, each a list of row numbers: (dicts, one a pack)."""
    packed = []
    for pack in sequence_indices:
        chosen = [rows[index] for index in pack]
        if "attention_mask" in rows[0]:
            chosen = [
                {n: trim(v, row["attention_mask"]) if n in token_columns else v for n, v in row.items()}
                for row in chosen
            ]
        columns = {
            name: [x for row in chosen for x in row[name]] if name in token_columns else [row[name] for row in chosen]
            for name in rows[0]
            if name != "attention_mask"
        }
        columns["sequence_lengths"] = [len(row["input_ids"]) for row in chosen]
        columns["sequence_indices"] = list(pack)
        packed.append(columns)
    return packed


def random_rows(seed, count, longest, padded=False):
    """Rows as a tokenizer makes them, with columns of every kind; padded: a random number of 0 at both ends."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        length = draw.randint(1, longest)
        left, right = (draw.randint(0, 3), draw.randint(0, 3)) if padded else (0, 0)
        row = {
            "input_ids": [0] * left + [draw.randint(5, 9) for _ in range(length)] + [0] * right,
            "token_type_ids": [0] * left + [draw.randint(0, 1) for _ in range(length)] + [0] * right,
            "weights": [0.0] * left + [draw.random() for _ in range(length)] + [0.0] * right,
            "words": [""] * left + [draw.choice("abc") * draw.randint(0, 3) for _ in range(length)] + [""] * right,
            "text": f"text {index}",
            "score": draw.random(),
            "answers": [draw.randint(0, 99) for _ in range(draw.randint(0, 2))],
            "label": draw.randint(0, 2),
        }
        if padded:
            row["attention_mask"] = [0] * left + [1] * length + [0] * right
        rows.append(row)
    return rows


def what_a_row_becomes(row, column, start, longest, overlong, keeps_closing):
    """The values of one token-level column in the sequence that begins with the row's token `start`."""
    mask = row.get("attention_mask", [1] * len(row["input_ids"]))
    values = trim(row[column], mask)
    if overlong == "split":
        first = start - mask.index(1)
        return values[first : first + longest]
    if overlong == "truncate" and len(values) > longest:
        return values[: longest - 1] + values[-1:] if keeps_closing else values[:longest]
    return values


def faults(packs, rows, token_columns, longest, depth, overlong):
    """Where packs (dicts) are not made of rows (dicts), by the rule for rows that are too long.

    A set of (pack, sequence, column); a column of another length than its pack: (pack, None, column); a row that is
    in no pack, or in none that adds up: (None, row, None)."""
    said, seen = set(), []
    last_tokens = {trim(r["input_ids"], r.get("attention_mask", [1] * len(r["input_ids"])))[-1] for r in rows}
    whole = [len(what_a_row_becomes(row, "input_ids", 0, longest, "error", True)) for row in rows]
    for number, pack in enumerate(packs):
        lengths, broken = pack["sequence_lengths"], set()
        broken |= {(number, i, "sequence_lengths") for i, n in enumerate(lengths) if not 1 <= n <= longest}
        for column, values in pack.items():
            if len(values) != (sum(lengths) if column in token_columns else len(lengths)):
                broken.add((number, None, column))
        said |= broken
        if sum(lengths) > longest or not lengths or len(lengths) > (depth or len(lengths)):
            said.add((number, None, "sequence_lengths"))
        if broken:
            continue
        end = 0
        for i, (row, length) in enumerate(zip(pack["sequence_indices"], lengths, strict=True)):
            first, end = end, end + length
            if (row in seen and overlong != "split") or (overlong == "drop" and whole[row] > longest):
                said.add((number, i, "sequence_indices"))
            seen.append(row)
            start = pack["sequence_starts"][i] if overlong == "split" else 0
            rule = start, longest, overlong, len(last_tokens) == 1
            if len(what_a_row_becomes(rows[row], "input_ids", *rule)) != length:
                said.add((number, i, "sequence_lengths"))
            else:
                for column in token_columns:
                    if pack[column][first:end] != what_a_row_becomes(rows[row], column, *rule):
                        said.add((number, i, column))
            for column in set(rows[row]) - set(token_columns) - {"attention_mask"}:
                if pack[column][i] != rows[row][column]:
                    said.add((number, i, column))
    dropped = {row for row in range(len(rows)) if overlong == "drop" and whole[row] > longest}
    return said | {(None, row, None) for row in set(range(len(rows))) - set(seen) - dropped}


# Sentence pairs: BERT's and ALBERT's way of building them, sentence by sentence and token by token.


def nsp_one_by_one(documents, own, target, room, draw):
    """The pairs of documents[own], a list of sentences that are lists of tokens: [(a, b, label), …]"""
    pairs, chunk, i = [], [], 0
    sentences = documents[own]
    while i < len(sentences):
        chunk.append(sentences[i])
        if i == len(sentences) - 1 or sum(len(sentence) for sentence in chunk) >= target:
            a_end = int(draw.integers(1, len(chunk))) if len(chunk) >= 2 else 1
            a = [token for sentence in chunk[:a_end] for token in sentence]
            b, label = [token for sentence in chunk[a_end:] for token in sentence], 0
            if len(chunk) == 1 or draw.random() < 0.5:
                others = [document for number, document in enumerate(documents) if number != own]
                other = others[int(draw.integers(0, len(others)))]
                place = int(draw.integers(0, len(other)))
                b, label = list(other[place]), 1
                for sentence in other[place + 1 :]:
                    if len(b) >= target - len(a):
                        break
                    b += sentence
                i -= len(chunk) - a_end  # unused sentences are put back
            pairs.append((*cut_to_room(a, b, room, draw), label))
            chunk = []
        i += 1
    return pairs


def sop_one_by_one(sentences, target, room, draw):
    """As above, and [(a, None, -100)] for a sentence that is left alone."""
    pairs, left = [], list(sentences)
    while len(left) >= 2:
        chunk = [left.pop(0), left.pop(0)]
        while left and sum(len(sentence) for sentence in chunk) < target:
            chunk.append(left.pop(0))
        middle = int(draw.integers(1, len(chunk)))
        a = [token for sentence in chunk[:middle] for token in sentence]
        b = [token for sentence in chunk[middle:] for token in sentence]
        label = 0
        if draw.random() < 0.5:
            a, b, label = b, a, 1
        pairs.append((*cut_to_room(a, b, room, draw), label))
    for sentence in left:
        pairs.append((cut_to_room(sentence, [], room + 1, draw)[0], None, -100))
    return pairs


def cut_to_room(a, b, room, draw):
    """While the pair is too long, the longer side loses a token; how many of them at the front is one binomial draw."""
    lost = [0, 0]
    while len(a) - lost[0] + len(b) - lost[1] > room:
        lost[0 if len(a) - lost[0] > len(b) - lost[1] else 1] += 1
    kept = []
    for side, count in zip((list(a), list(b)), lost, strict=True):
        front = int(draw.binomial(count, 0.5)) if count else 0
        kept.append(side[front : len(side) - (count - front)])
    return kept


# Training: one sequence at a time, in stock transformers.


def packed_rows(sequences, max_sequence_length):
    """First fit, one sequence after the other; rows as pack_dataset makes them."""
    rows = []
    for index, sequence in enumerate(sequences):
        length = len(sequence["input_ids"])
        for row in rows:
            if sum(row["sequence_lengths"]) + length <= max_sequence_length:
                break
        else:
            row = {"input_ids": [], "token_type_ids": [], "next_sentence_label": []}
            row |= {"sequence_lengths": [], "sequence_indices": []}
            rows.append(row)
        row["input_ids"] = row["input_ids"] + sequence["input_ids"]
        row["token_type_ids"] = row["token_type_ids"] + sequence["token_type_ids"]
        row["next_sentence_label"].append(sequence["next_sentence_label"])
        row["sequence_lengths"].append(length)
        row["sequence_indices"].append(index)
    return rows


def unpacked_rows(rows):
    """Every sequence in a row of its own."""
    alone = []
    for row in rows:
        start = 0
        for number, length in enumerate(row["sequence_lengths"]):
            alone.append({name: row[name][start : start + length] for name in ("input_ids", "token_type_ids")})
            for name in ("sequence_lengths", "sequence_indices", "next_sentence_label"):
                alone[-1][name] = [row[name][number]]
            start += length
    return alone


def pretraining_one_by_one(stock, sequences, mlm_loss):
    """Stock BertForPreTraining on each sequence alone, and the mean losses written out.

    sequences: dicts of 1-D tensors input_ids, token_type_ids, labels, and an int next_sentence_label or None.
    Returns the loss and each sequence's last hidden state (n, D).
    """
    token_losses, nsp_losses, hidden = [], [], []
    for sequence in sequences:
        output = stock(
            sequence["input_ids"][None],
            token_type_ids=sequence["token_type_ids"][None],
            output_hidden_states=True,
        )
        predicted = sequence["labels"] != -100
        logits = output.prediction_logits[0][predicted]
        token_losses.append(F.cross_entropy(logits, sequence["labels"][predicted], reduction="none"))
        if sequence["next_sentence_label"] is not None:
            label = torch.tensor([sequence["next_sentence_label"]])
            nsp_losses.append(F.cross_entropy(output.seq_relationship_logits, label))
        hidden.append(output.hidden_states[-1][0])
    if mlm_loss == "sequence":
        mlm = torch.stack([losses.mean() for losses in token_losses if len(losses)]).mean()
    else:
        mlm = torch.cat(token_losses).mean()
    return mlm + (torch.stack(nsp_losses).mean() if nsp_losses else 0), hidden


# Masking: Python integers.


def mix(state):
    """splitmix64's output function in Python integers."""
    full = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
    return state ^ (state >> 31)


def make_key(seed, stream):
    step, full = 0x9E3779B97F4A7C15, 2**64 - 1
    return mix(mix((seed + step) & full) ^ ((stream * step) & full))


def sequence_key(seed, epoch, index, start=0):
    return make_key(make_key(make_key(seed, epoch % 2**64), index), start)


def uniform(key, counter):
    return (mix((key + counter * STEP) % 2**64) >> 11) / 2**53


def words_of(sequence, is_special, continues=None, word_ids=None):
    """The words of a sequence, each a list of positions: [CLS] em ##bed it [SEP] -> [[1, 2], [3]]"""
    words = []
    for t, token in enumerate(sequence):
        if is_special[token] or (word_ids is not None and word_ids[t] < 0):
            continue
        if word_ids is not None:
            joined = t > 0 and word_ids[t] == word_ids[t - 1]
        else:
            joined = continues is not None and continues[token]
        if joined and words and words[-1][-1] == t - 1:
            words[-1].append(t)
        else:
            words.append([t])
    return words


def budget_of(rule, length):
    budget = max(1, round(rule.mlm_probability * length))
    return min(budget, rule.max_predictions_per_sequence or budget)


def cut_words(words, longest):
    """Words of more tokens become words of one each: [[1, 2, 3], [4]], 2 -> [[1], [2], [3], [4]]"""
    return [part for word in words for part in ([word] if len(word) <= longest else [[t] for t in word])]


def shuffled_words(words, key):
    order = list(words)
    for i in range(len(order)):
        other = i + int(uniform(key, i) * (len(order) - i))
        order[i], order[other] = order[other], order[i]
    return order


def choose_independent(words, key, probability):
    """{token: the token whose draw decides how it is corrupted}: itself."""
    draws = [uniform(key, 3 * word[0]) for word in words]
    chosen = [word for word, draw in zip(words, draws, strict=True) if draw < probability]
    if not chosen:  # each of the rest with probability 1 / left, by the same draw
        for left, word, draw in zip(range(len(words), 0, -1), words, draws, strict=True):
            if not chosen and (draw - probability) / (1 - probability) * left < 1:
                chosen.append(word)
    return {t: t for word in chosen for t in word}


def choose_exact(words, key, budget):
    """As above: each token with probability missing / left."""
    chosen, missing = {}, min(budget, len(words))
    for left, (t,) in zip(range(len(words), 0, -1), words, strict=True):
        if uniform(key, 3 * t) * left < missing:
            missing -= 1
            chosen[t] = t
    return chosen


def choose_whole_words(words, key, budget):
    """As above: the loop of BERT's create_masked_lm_predictions."""
    chosen = {}
    order = shuffled_words(words, make_key(key, 1))
    for word in order:
        if len(chosen) + len(word) <= budget:
            chosen |= {t: t for t in word}
    return chosen


def choose_spans(words, key, budget, p, longest):
    """As above: SpanBERT's loop; the first token of each span decides for all of it."""
    chosen = {}
    order = shuffled_words(words, make_key(key, 1))
    for drawn, start in enumerate(order):
        draw = uniform(make_key(key, 2), drawn)
        up_to = [(1 - (1 - p) ** n) / (1 - (1 - p) ** longest) for n in range(1, longest)]
        length = 1 + sum(draw >= share for share in up_to)
        first, position = words.index(start), start[0]
        for word in words[first : first + length]:
            if word[0] != position or word[0] in chosen or len(chosen) + len(word) > budget:
                break
            chosen |= dict.fromkeys(word, start[0])
            position = word[-1] + 1
    return chosen


def mask_one_by_one(sequence, key, rule, word_ids=None):
    """One sequence under a MaskingRule: corrupted input_ids and labels."""
    words = words_of(sequence, rule.is_special_V, rule.continues_word_V, word_ids)
    budget = budget_of(rule, len(sequence))
    words = cut_words(words, budget)
    if rule.masking == "independent":
        chosen = choose_independent(words, key, rule.mlm_probability)
    elif rule.masking == "span":
        chosen = choose_spans(words, key, budget, rule.geometric_p, rule.max_span_length)
    elif rule.whole_word_mask:
        chosen = choose_whole_words(words, key, budget)
    else:
        chosen = choose_exact(words, key, budget)
    ordinary = [word for word in range(len(rule.is_special_V)) if not rule.is_special_V[word]]
    corrupted, labels = list(sequence), [-100] * len(sequence)
    for t, decider in chosen.items():
        labels[t] = sequence[t]
        kind = uniform(key, 3 * decider + 1)
        if kind < rule.mask_replace_prob:
            corrupted[t] = rule.mask_token_id
        elif kind < rule.mask_replace_prob + rule.random_replace_prob:
            corrupted[t] = ordinary[int(uniform(key, 3 * t + 2) * len(ordinary))]
    return corrupted, labels


# Optimizers.


def lamb_step(x, m, v, gradient, t, lr, betas, eps, weight_decay, adapted):
    """Algorithm 2 of arXiv 1904.00962 on one tensor, its first step t = 1; returns x, m, v."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * x
    ratio = np.linalg.norm(x) / np.linalg.norm(update) if adapted else 1.0
    return x - lr * ratio * update, m, v
