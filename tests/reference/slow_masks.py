"""Masking in Python integers, one sequence at a time."""

from slow_assignment import STEP, make_key, mix


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
