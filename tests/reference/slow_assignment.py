"""Random draws in Python integers, and an assignment, sequence by sequence."""

STEP = 0x9E3779B97F4A7C15  # of splitmix64


def mix(state):
    """splitmix64's output function in Python integers."""
    full = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
    return state ^ (state >> 31)


def make_key(seed, stream):
    step, full = 0x9E3779B97F4A7C15, 2**64 - 1
    return mix(mix((seed + step) & full) ^ ((stream * step) & full))


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
