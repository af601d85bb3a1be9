"""Sentence pairs: BERT's and ALBERT's way of building them, sentence by sentence and token by token."""


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
                i -= len(chunk) - a_end  # unused sentences go back
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
