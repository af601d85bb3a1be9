"""Cohorts in plain Python: documents one by one, cells as lists, and what it means that pieces are in order."""

from slow_assignment import fisher_yates, make_key

DOCUMENTS, SEQUENCES, PACKS = (2**64 - i for i in (5, 6, 7))


def cut_slowly(pieces, cohort, lanes, seed):
    """{(cohort, round, lane): its pieces, as numbers of all pieces, document after document}; for up to 65536."""
    order = fisher_yates(list(range(len(pieces))), make_key(seed, DOCUMENTS))
    cells = {}
    for number in range(0, len(order), cohort):
        members = sorted(order[number : number + cohort], key=lambda document: -pieces[document])
        for place, document in enumerate(members):
            for piece in range(pieces[document]):
                cell = number // cohort, piece, place % lanes
                cells.setdefault(cell, []).append(sum(pieces[:document]) + piece)
    return {cell: sorted(sequences) for cell, sequences in sorted(cells.items())}


def assign_slowly(cells, plans, lengths, seed):
    """[(cell, pack)] in order. cells: as above. plans: {cell: its PackPlan}."""
    of_sequence = {sequence: cell for cell, sequences in cells.items() for sequence in sequences}
    shuffled = fisher_yates(list(range(len(lengths))), make_key(seed, SEQUENCES))
    waiting = {}
    for sequence in shuffled:
        waiting.setdefault((of_sequence[sequence], lengths[sequence]), []).append(sequence)
    packs = []
    for cell in cells:
        for strategy, repeats in zip(plans[cell].strategies, plans[cell].repeats.tolist(), strict=True):
            for _ in range(repeats):
                packs.append((cell, [waiting[cell, length].pop(0) for length in strategy]))
    order = fisher_yates(list(range(len(packs))), make_key(seed, PACKS))
    return sorted((packs[number] for number in order), key=lambda pack: pack[0])


def disorders(packs, cohort, lanes):
    """What is wrong with the order of packs (dicts), as a set of words; a document is a source row."""
    said, documents, before, cohorts = set(), {}, (0, 0, 0), {}
    for pack in packs:
        found = set(zip(pack["sequence_cohorts"], pack["sequence_rounds"], pack["sequence_lanes"], strict=True))
        said |= {"a pack in several cells"} if len(found) > 1 else set()
        place = min(found)
        said |= {"an earlier cell"} if place < before else set()
        said |= {"no such lane"} if not 0 <= place[2] < lanes else set()
        before = place
        for row, start in zip(pack["sequence_indices"], pack["sequence_starts"], strict=True):
            documents.setdefault(row, []).append((place, start))
            cohorts.setdefault(place[0], set()).add(row)
    for pieces in documents.values():
        places, starts = zip(*pieces, strict=True)
        said |= {"pieces out of order"} if list(starts) != sorted(set(starts)) else set()
        said |= {"several lanes or cohorts"} if len({(place[0], place[2]) for place in places}) > 1 else set()
        said |= {"a round is not the piece"} if [place[1] for place in places] != list(range(len(places))) else set()
    said |= {"a cohort is too large"} if any(len(rows) > cohort for rows in cohorts.values()) else set()
    return said
