"""Datasets of rows with columns of every kind, and the ways in which `datasets` selects rows."""

import datasets

TOKEN_COLUMNS = {"input_ids", "token_type_ids", "weights", "words"}
SELECTIONS = {
    "all": lambda d: d,
    "slice": lambda d: d.select(range(50, 150)),
    "select": lambda d: d.select([5, 3, 3 + 100, 17]),
    "shuffle": lambda d: d.shuffle(seed=0),
    "filter": lambda d: d.filter(lambda row: row["label"] == 1),
    "shard of a shuffle": lambda d: d.shuffle(seed=0).shard(3, 1),
    "joined": lambda d: datasets.concatenate_datasets([d.select(range(100, 200)), d.select(range(7))]),
    "joined and shuffled": lambda d: datasets.concatenate_datasets([d, d.select([1, 9])]).shuffle(seed=1),
    "torch format": lambda d: d.with_format("numpy"),
}


def make_dataset(rows):
    return datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
