"""verify_packed finds and names every fault of packs; unpack_dataset returns the rows that were packed."""

import random

import datasets
import numpy as np
import pyarrow as pa
import pytest
import slow_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from packing import cli, pack_dataset, packed_info, unpack_dataset, verify_packed

TOKEN_COLUMNS = ["input_ids", "token_type_ids", "weights", "words"]
LONGEST, DEPTH = 24, 5

datasets.disable_progress_bars()


def make_source(seed=0, count=60, longest=36, padded=True):
    rows = slow_rows.random_rows(seed, count, longest, padded)
    return datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))


def pack(source, overlong="truncate", **options):
    return pack_dataset(source, LONGEST, DEPTH, overlong=overlong, token_columns=TOKEN_COLUMNS, **options)


def changed(packed, packs):
    """A dataset with the packing facts of another."""
    dataset = datasets.Dataset.from_list(packs, features=packed.features)
    dataset.info.description = packed.info.description
    return dataset


def named(verification):
    """Places of the problems, in the form of slow_rows.faults; totals are left out."""
    assert len(verification.problems) == verification.num_problems, "raise the limit"
    return {
        (p.pack, p.row if p.pack is None else p.sequence, p.column)
        for p in verification.problems
        if p.pack is not None or p.check == "sequences"
    }


# Each takes packs (a list of dicts) and a source of chance, and does one thing to them.


def slots(packs):
    return [(p, i) for p, pack in enumerate(packs) for i in range(len(pack["sequence_lengths"]))]


def span(pack, i):
    end = sum(pack["sequence_lengths"][: i + 1])
    return slice(end - pack["sequence_lengths"][i], end)


def part(pack, i, name):
    return span(pack, i) if name in TOKEN_COLUMNS else slice(i, i + 1)


def flip_a_token(packs, draw):
    pack, name = draw.choice(packs), draw.choice(TOKEN_COLUMNS)
    i = draw.randrange(len(pack[name]))
    pack[name][i] = pack[name][i] + "x" if name == "words" else pack[name][i] + 1


def change_a_value(packs, draw):
    p, i = draw.choice(slots(packs))
    name = draw.choice(["text", "score", "answers"])
    packs[p][name][i] = {"text": "other", "score": float("nan"), "answers": [7, 7, 7]}[name]


def exchange_labels(packs, draw):
    (p, i), (q, j) = draw.sample(slots(packs), 2)
    packs[p]["label"][i], packs[q]["label"][j] = packs[q]["label"][j], packs[p]["label"][i]


def swap_two_sequences(packs, draw):
    """Their tokens change places, everything else stays."""
    p, i = draw.choice(slots(packs))
    length = packs[p]["sequence_lengths"][i]
    q, j = draw.choice([(q, j) for q, j in slots(packs) if packs[q]["sequence_lengths"][j] == length])
    for name in TOKEN_COLUMNS:
        here, there = packs[p][name][span(packs[p], i)], packs[q][name][span(packs[q], j)]
        packs[p][name][span(packs[p], i)], packs[q][name][span(packs[q], j)] = there, here


def swap_two_rows(packs, draw):
    """Their sequence_indices change places."""
    (p, i), (q, j) = draw.sample(slots(packs), 2)
    here, there = packs[p]["sequence_indices"], packs[q]["sequence_indices"]
    here[i], there[j] = there[j], here[i]


def drop_a_sequence(packs, draw):
    p, i = draw.choice(slots(packs))
    cuts = {name: part(packs[p], i, name) for name in packs[p]}
    for name, cut in cuts.items():
        del packs[p][name][cut]
    if not packs[p]["sequence_lengths"]:
        del packs[p]


def double_a_sequence(packs, draw):
    p, i = draw.choice(slots(packs))
    packs.append({name: values[part(packs[p], i, name)] for name, values in packs[p].items()})


def alter_a_length(packs, draw):
    p, i = draw.choice(slots(packs))
    packs[p]["sequence_lengths"][i] += draw.choice([-LONGEST, -1, 1, 1000])


def move_a_boundary(packs, draw):
    pack = draw.choice([pack for pack in packs if len(pack["sequence_lengths"]) > 1])
    i = draw.randrange(len(pack["sequence_lengths"]) - 1)
    pack["sequence_lengths"][i] += 1
    pack["sequence_lengths"][i + 1] -= 1


def lose_a_value(packs, draw):
    pack = draw.choice(packs)
    pack[draw.choice(["label", "input_ids", "weights", "sequence_indices"])].pop()


MUTATIONS = (
    flip_a_token,
    change_a_value,
    exchange_labels,
    swap_two_sequences,
    swap_two_rows,
    drop_a_sequence,
    double_a_sequence,
    alter_a_length,
    move_a_boundary,
    lose_a_value,
)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    overlong=st.sampled_from(["truncate", "split", "drop"]),
    padded=st.booleans(),
    alike=st.booleans(),
)
def test_what_is_changed_is_named(mutate, seed, overlong, padded, alike):
    """Finds exactly what the slow version finds."""
    source = make_source(seed, 25, 36, padded)
    if alike:  # every row ends in one token, which truncation keeps
        rows = [close(row) for row in source.to_list()]
        source = datasets.Dataset.from_list(rows, features=source.features)
    packed, rows = pack(source, overlong), source.to_list()
    assert named(verify_packed(packed, source)) == set()
    packs = packed.to_list()
    mutate(packs, random.Random(seed))
    expected = slow_rows.faults(packs, rows, TOKEN_COLUMNS, LONGEST, DEPTH, overlong)
    verification = verify_packed(changed(packed, packs), source, limit=1000)
    if overlong == "split":  # pieces that are lost or doubled have tests of their own
        assert expected <= named(verification) or mutate is swap_two_rows  # a row may have no piece that starts there
        assert verification.ok == (packs == packed.to_list())
    else:
        assert named(verification) == expected
        assert verification.ok == (not expected)


def close(row):
    mask = row.get("attention_mask", [1] * len(row["input_ids"]))
    last = max(i for i, real in enumerate(mask) if real)
    return row | {"input_ids": [*row["input_ids"][:last], 3, *row["input_ids"][last + 1 :]]}


@pytest.mark.parametrize("mutate", [drop_a_sequence, double_a_sequence, alter_a_length, lose_a_value])
def test_without_the_source(mutate):
    """Lengths, limits, lost and doubled sequences show in the packs alone."""
    packed = pack(make_source())
    assert verify_packed(packed).ok
    for seed in range(5):
        packs = packed.to_list()
        mutate(packs, random.Random(seed))
        assert not verify_packed(changed(packed, packs)).ok


def test_a_problem_says_where():
    source = datasets.Dataset.from_dict({"input_ids": [[7, 8], [5, 6, 4], [9, 9, 9, 8, 9]], "label": ["a", "b", "c"]})
    packed = pack_dataset(source, 5)
    packs = packed.to_list()
    number = [pack["sequence_indices"] for pack in packs].index([0, 1])
    packs[number]["input_ids"][3] = 60
    packs[number]["label"][1] = "c"
    verification = verify_packed(changed(packed, packs), source)
    assert [str(problem) for problem in verification.problems] == [
        f"pack {number}, sequence 1, source row 1, column label: value: 'c' found, 'b' expected",
        f"pack {number}, sequence 1, position 3, source row 1, column input_ids: "
        "first of the sequence's values that differ: 60 found, 6 expected",
    ]
    assert str(verification).endswith("not verified: 2 problems")
    assert str(verify_packed(packed, source)).endswith("verified: nothing is wrong")


def test_all_are_counted_and_the_first_listed():
    source = make_source(padded=False)
    packed = pack(source)
    packs = packed.to_list()
    for p, i in slots(packs):
        packs[p]["text"][i] += "!"
    verification = verify_packed(changed(packed, packs), source, limit=3)
    assert verification.counts["source"] == verification.num_problems == 60
    assert [(p.pack, p.sequence) for p in verification.problems] == slots(packs)[:3]
    assert "source: … and 57 more" in str(verification)


@pytest.mark.parametrize("lost", ["first", "middle", "last", "doubled"])
@pytest.mark.parametrize("padded", [False, True], ids=["bare", "padded"])
def test_pieces_of_a_row(lost, padded):
    """A row of 11 tokens in three pieces of 4, 4 and 3."""
    row, left = list(range(11)), 2 if padded else 0
    columns = {"input_ids": [[0] * left + row, [5, 6]]}
    columns |= {"attention_mask": [[0] * left + [1] * 11, [1, 1]]} if padded else {}
    source = datasets.Dataset.from_dict(columns)
    packed = pack_dataset(source, 4, 1, overlong="split")
    assert verify_packed(packed, source).ok
    assert verify_packed(packed).ok
    packs = packed.to_list()
    begin = {"first": left, "middle": left + 4, "last": left + 8, "doubled": left + 8}[lost]
    (number,) = (i for i, p in enumerate(packs) if p["sequence_indices"] == [0] and p["sequence_starts"] == [begin])
    if lost == "doubled":
        packs.append(packs[number])
    else:
        del packs[number]
    verification = verify_packed(changed(packed, packs), source)
    (problem,) = (p for p in verification.problems if p.check == "sequences")
    said = {"first": "end to end", "middle": "end to end", "last": "last piece is missing", "doubled": "a second time"}
    assert said[lost] in problem.what
    assert problem.row == 0


def test_pieces_that_begin_elsewhere():
    source = datasets.Dataset.from_dict({"input_ids": [list(range(11)), [5, 6]]})
    packed = pack_dataset(source, 4, overlong="split")
    packs = packed.to_list()
    packs[0]["sequence_starts"][0] += 1
    found = verify_packed(changed(packed, packs), source).problems
    assert {(p.check, p.pack, p.column) for p in found} >= {("source", 0, "sequence_starts")}
    assert not verify_packed(changed(packed, packs)).ok


KINDS = {
    "int8": pa.array([1, 2, 3], pa.int8()),
    "int64 with null": pa.array([1, None, 3], pa.int64()),
    "float": pa.array([0.5, float("nan"), -0.0], pa.float32()),
    "half": pa.array(np.array([0.5, 1, 2], np.float16)),
    "bool": pa.array([True, False, None]),
    "text": pa.array(["", "ä", "c"]),
    "large text": pa.array(["", "ä", None], pa.large_string()),
    "bytes": pa.array([b"a", b"", b"c"]),
    "list": pa.array([[1, 2, 3], [], [4]], pa.list_(pa.int16())),
    "large list": pa.array([[1], [], [4]], pa.large_list(pa.float64())),
    "list with null": pa.array([[1, None], None, [4]]),
    "list of text": pa.array([["a", "b"], [], ["c"]]),
    "pairs": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
    "nested": pa.array([[[1], [2, 3]], [], [[]]]),
    "struct": pa.array([{"a": 1, "b": "x"}, {"a": None, "b": "y"}, {"a": 3, "b": None}]),
    "null": pa.array([None, None, None]),
    "date": pa.array([1, 2, 3], pa.timestamp("us")),
}


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_columns_of_every_kind(values):
    """One value per sequence: verified, unpacked as it was, and a value of another row is named. Chunked and sliced."""
    column = pa.chunked_array([pa.concat_arrays([values, values]).slice(2, 2), values.slice(0, 0), values.slice(2)])
    tokens = pa.chunked_array([pa.array([[1, 2], [3], [4, 5, 6]], pa.list_(pa.int32()))])
    source = datasets.Dataset(pa.table({"input_ids": tokens, "value": column}))
    packed = pack_dataset(source, 8, token_columns=["input_ids"])
    assert verify_packed(packed, source).ok
    back = unpack_dataset(packed)
    assert back.data.column("value").combine_chunks().type == column.type
    assert str(back["value"][:]) == str(source["value"][:])  # nan is not itself
    assert back.features == source.features
    order = packed["sequence_indices"][0]
    packs = packed.to_list()
    packs[0]["value"] = packs[0]["value"][1:] + packs[0]["value"][:1]
    expected = {
        i for i, (a, b) in enumerate(zip(packs[0]["value"], packed["value"][0], strict=True)) if str(a) != str(b)
    }
    found = verify_packed(changed(packed, packs), source).problems
    assert {(p.sequence, p.row, p.column) for p in found} == {(i, order[i], "value") for i in expected}


TOKEN_KINDS = {
    "uint8": pa.list_(pa.uint8()),
    "float16": pa.list_(pa.float16()),
    "double": pa.large_list(pa.float64()),
    "text": pa.list_(pa.string()),
    "bool": pa.list_(pa.bool_()),
    "boxes": pa.list_(pa.list_(pa.int32())),
}


@pytest.mark.parametrize("type_", TOKEN_KINDS.values(), ids=TOKEN_KINDS)
def test_token_columns_of_every_kind(type_):
    make = {
        "bool": bool,
        "string": str,
        "halffloat": np.float16,
        "list<item: int32>": lambda i: [i] * i,
    }.get(str(type_.value_type), int)
    lists = [[make(i) for i in row] for row in ([0, 1], [1], [3, 0, 5])]
    tokens = {"input_ids": pa.array([[1, 2], [3], [4, 5, 6]]), "value": pa.array(lists, type_)}
    source = datasets.Dataset(pa.table(tokens))
    packed = pack_dataset(source, 8)
    assert packed_info(packed).token_columns == ("input_ids", "value")
    assert verify_packed(packed, source).ok
    assert unpack_dataset(packed).to_list() == source.to_list()
    packs, order = packed.to_list(), packed["sequence_indices"][0]
    i = order.index(2)
    place = sum(packed["sequence_lengths"][0][:i]) + 1
    packs[0]["value"][place] = make(1)  # 0 in row 2
    (problem,) = verify_packed(changed(packed, packs), source).problems
    where = problem.pack, problem.sequence, problem.position, problem.row, problem.column
    assert where == (0, i, place, 2, "value")
    assert (problem.found, problem.expected) == (make(1), make(0))


def test_packs_over_their_limits_are_named():
    """Packs that are longer or deeper than the facts allow."""
    packed = pack(make_source(padded=False))
    for name, value, column in (("max_sequence_length", 20, "input_ids"), ("max_sequences_per_pack", 2, "label")):
        other = changed(packed, packed.to_list())
        said = f'"{name}": {getattr(packed_info(packed), name)}'
        other.info.description = other.info.description.replace(said, f'"{name}": {value}')
        over = {i for i, values in enumerate(packed[column]) if len(values) > value}
        assert over
        found = verify_packed(other, limit=1000).problems
        assert {p.pack for p in found if p.what.endswith(f"more than {name}={value}")} == over


def test_a_row_that_does_not_exist():
    packed = pack(make_source(padded=False))
    packs = packed.to_list()
    packs[0]["sequence_indices"][0] = 60
    problem = verify_packed(changed(packed, packs)).problems[0]
    assert (problem.pack, problem.sequence, problem.found) == (0, 0, 60)
    assert "the source has rows 0 to 59" in problem.what


def test_another_source_is_no_source():
    packed = pack(make_source(0))
    assert not verify_packed(packed, make_source(1)).ok
    fewer = make_source(0).select(range(59))
    assert any(p.found == 59 and p.expected == 60 for p in verify_packed(packed, fewer).problems)
    for other in (
        make_source(0).remove_columns("text"),
        make_source(0).cast_column("score", datasets.Value("float32")),
    ):
        assert {p.column for p in verify_packed(packed, other).problems} in ({"text"}, {"score"})
    names = datasets.ClassLabel(names=["c", "b", "a"])
    assert [p.column for p in verify_packed(packed, make_source(0).cast_column("label", names)).problems] == ["label"]
    (problem,) = verify_packed(packed, make_source(0).rename_column("input_ids", "ids")).problems
    assert "packing would refuse this source: no column 'input_ids'" in problem.what


def test_padding_by_its_token():
    source = datasets.Dataset.from_dict({"input_ids": [[0, 5, 6, 0], [7, 0, 0, 0], [5, 6, 7, 8]]})
    packed = pack_dataset(source, 4, pad_token_id=0)
    assert verify_packed(packed, source, pad_token_id=0).ok
    assert not verify_packed(packed, source, pad_token_id=8).ok


def test_what_is_no_packed_dataset(tmp_path):
    with pytest.raises(ValueError, match="was not packed"):
        verify_packed(make_source())
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        verify_packed(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no dataset"):
        verify_packed(tmp_path)
    with pytest.raises(TypeError, match="not list"):
        verify_packed([])


# Files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Several shards of several batches each."""
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 6000)
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 3 * LONGEST)
    pack(make_source(), output=tmp_path / "packed")
    shards = sorted((tmp_path / "packed").glob("data-*.arrow"))
    assert len(shards) >= 3
    assert len(batches_of(shards[0].read_bytes())) >= 3
    return tmp_path / "packed"


def batches_of(content):
    """Where the messages of a shard start after its schema, with the end mark."""
    return [i for i in range(8, len(content), 8) if content[i : i + 4] == b"\xff\xff\xff\xff"]


def files_named(verification):
    return {problem.file for problem in verification.problems} - {None}


def test_an_untouched_folder(folder):
    verification = verify_packed(folder, make_source())
    assert verification.ok
    assert "60 sequences of 60 source rows" in str(verification)
    assert list(datasets.load_from_disk(str(folder)).filter(lambda row: True)) and list(folder.glob("cache-*"))
    assert verify_packed(folder).ok  # datasets keeps its caches there


def test_padding_token_of_the_manifest(tmp_path):
    source = datasets.Dataset.from_dict({"input_ids": [[0, 5, 6, 0], [7, 0, 0, 0], [5, 6, 7, 8]]})
    pack_dataset(source, 4, pad_token_id=0, output=tmp_path / "packed")
    assert verify_packed(tmp_path / "packed", source).ok


def test_missing_and_extra_files(folder):
    shards = sorted(folder.glob("data-*.arrow"))
    (folder / "data-00009.arrow").write_bytes(shards[0].read_bytes())
    shards[1].unlink()
    (folder / "state.json").unlink()
    verification = verify_packed(folder, make_source())
    assert {
        (p.file, p.what.split(";")[0]) for p in verification.problems if p.check == "files" and p.found is None
    } == {
        (shards[1].name, "is missing"),
        ("state.json", "is missing"),
        ("data-00009.arrow", "does not belong here: the manifest has no such file"),
    }
    lost = {p.row for p in verification.problems if p.check == "sequences"}
    there = {int(i) for i in np.concatenate([stored_rows(shard) for shard in (shards[0], *shards[2:])])}
    assert lost == set(range(60)) - there


def stored_rows(shard):
    with pa.memory_map(str(shard)) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all().column("sequence_indices").combine_chunks().values.to_numpy()


def test_exchanged_shards(folder):
    """Every sequence is there, but not where the manifest has it."""
    first, second, *_ = sorted(folder.glob("data-*.arrow"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    verification = verify_packed(folder, make_source())
    assert files_named(verification) == {first.name, second.name}
    assert not verification.counts["sequences"]


def test_without_a_manifest(folder):
    (folder / "manifest.json").unlink()
    verification = verify_packed(folder, make_source())
    assert files_named(verification) == {"manifest.json"}
    assert verification.num_problems == 1
    shard = sorted(folder.glob("data-*.arrow"))[0]
    shard.unlink()
    assert shard.name in files_named(verify_packed(folder))


def test_a_flipped_token_on_disk_is_named(tmp_path):
    """For one byte of a file: the file, the pack, the position, the row, and both tokens."""
    source = datasets.Dataset.from_dict({"input_ids": [[100_000 + 10 * r + i for i in range(r + 1)] for r in range(9)]})
    packed = pack_dataset(source, 12, output=tmp_path / "packed")
    (shard,) = (tmp_path / "packed").glob("data-*.arrow")
    content = bytearray(shard.read_bytes())
    content[content.index(np.int32(100_073).tobytes())] ^= 1
    shard.write_bytes(content)
    verification = verify_packed(tmp_path / "packed", source)
    (pack,) = (i for i, rows in enumerate(packed["sequence_indices"]) if 7 in rows)
    slot = packed["sequence_indices"][pack].index(7)
    by_checksum, by_value = verification.problems
    assert (by_checksum.file, by_checksum.check) == (shard.name, "files")
    assert (by_value.pack, by_value.sequence, by_value.row, by_value.column) == (pack, slot, 7, "input_ids")
    assert by_value.position == sum(packed["sequence_lengths"][pack][:slot]) + 3
    assert (by_value.found, by_value.expected) == (100_073 ^ 1, 100_073)


def parts_of(content):
    """Byte positions of a shard by what they are: schema, batches, and what follows the last batch."""
    first, end = batches_of(content)[0], len(content) - 64
    return {"header": range(first), "body": range(first, end), "footer": range(end, len(content))}


def flip_bytes(folder, count, seed):
    draw, source = random.Random(seed), make_source()
    for number in range(count):
        shard = draw.choice(sorted(folder.glob("data-*.arrow")))
        whole = shard.read_bytes()
        parts = parts_of(whole)
        content = bytearray(whole)
        content[draw.choice(parts[list(parts)[number % 3]])] ^= 1 << draw.randrange(8)
        shard.write_bytes(content)
        verification = verify_packed(folder, source if number % 2 else None)
        assert shard.name in files_named(verification)
        shard.write_bytes(whole)
    assert verify_packed(folder, source).ok


def test_flipped_bytes(folder):
    flip_bytes(folder, 21, 0)


@pytest.mark.long
def test_many_flipped_bytes(folder):
    flip_bytes(folder, 210, 1)


@pytest.mark.parametrize("damage", ["empty", "cut in a batch", "cut between batches", "garbage", "text", "other type"])
def test_a_damaged_shard_does_not_end_it(folder, damage):
    """The damaged shard is named; the packs of the others are checked, under their own numbers."""
    source, shards = make_source(), sorted(folder.glob("data-*.arrow"))
    whole = shards[0].read_bytes()
    content = {
        "empty": b"",
        "cut in a batch": whole[: batches_of(whole)[0] + 500],
        "cut between batches": whole[: batches_of(whole)[1]],
        "garbage": random.Random(0).randbytes(len(whole)),
        "text": b"no Arrow at all",
        "other type": None,
    }[damage]
    if content is None:
        with pa.ipc.new_stream(str(shards[0]), pa.schema({"input_ids": pa.string()})) as writer:
            writer.write_table(pa.table({"input_ids": ["a"]}))
    else:
        shards[0].write_bytes(content)
    verification = verify_packed(folder, source, limit=100)
    assert files_named(verification) == {shards[0].name}
    assert not verification.counts["source"]
    lost = {p.row for p in verification.problems if p.check == "sequences"}
    assert lost <= set(stored_rows_of(whole)) and lost


def stored_rows_of(content):
    with pa.ipc.open_stream(content) as reader:
        return reader.read_all().column("sequence_indices").combine_chunks().values.to_pylist()


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "manifest.json"])
def test_damaged_json(folder, name):
    whole, draw = (folder / name).read_bytes(), random.Random(0)
    for number in range(6):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(7)
        (folder / name).write_bytes(content if number else b"")
        assert any(name in f"{p.file} {p.what}" for p in verify_packed(folder).problems)


# The command


def test_the_command(folder, tmp_path, capsys):
    make_source().save_to_disk(tmp_path / "source")
    assert cli.main(["verify", str(folder), "--source", str(tmp_path / "source")]) == 0
    assert capsys.readouterr().out.endswith("verified: nothing is wrong\n")
    shard = sorted(folder.glob("data-*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert cli.main(["verify", str(folder)]) == 1
    assert f"files: file {shard.name}: is not what was written: " in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_the_command_takes_splits(tmp_path, capsys):
    splits = datasets.DatasetDict({name: make_source(seed, 20, 20) for seed, name in enumerate("ab")})
    splits.save_to_disk(tmp_path / "source")
    packed, source = tmp_path / "packed", str(tmp_path / "source")
    assert cli.main([source, str(packed)]) == 0
    assert cli.main(["verify", str(packed), "--source", source]) == 0
    assert capsys.readouterr().out.count("verified: nothing is wrong") == 2
    with pytest.raises(ValueError, match="holds several splits"):
        verify_packed(packed)
    splits["a"].save_to_disk(tmp_path / "single")
    assert cli.main(["verify", str(packed), "--source", str(tmp_path / "single")]) == 1
    assert "a: not verified: the source has no such split" in capsys.readouterr().out
    for file in (packed / "b").iterdir():
        file.unlink()
    (packed / "b").rmdir()
    assert cli.main(["verify", str(packed)]) == 1
    assert "b: not verified: the folder of this split is missing" in capsys.readouterr().out


# Unpacking


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
@pytest.mark.parametrize("padded", [False, True], ids=["bare", "padded"])
def test_unpacking_gives_back_what_was_packed(overlong, padded):
    source = make_source(3, 80, 36, padded)
    packed = pack(source, overlong)
    rows, expected = source.to_list(), []
    for row in rows:
        values = {
            name: slow_rows.what_a_row_becomes(
                row, name, 0, LONGEST, "error" if overlong == "split" else overlong, False
            )
            for name in TOKEN_COLUMNS
        }
        if overlong != "drop" or len(values["input_ids"]) <= LONGEST:
            expected.append({name: value for name, value in (row | values).items() if name != "attention_mask"})
    back = unpack_dataset(packed)
    assert back.to_list() == expected
    assert back.features == datasets.Features({n: f for n, f in source.features.items() if n != "attention_mask"})
    assert str(packed_info(packed).overlong_rows[0]) in back.info.description
    assert f"{len(expected)} of 80 source rows" in back.info.description
    again = pack(back, overlong)
    if overlong == "drop":  # rows have other numbers
        again, packed = again.remove_columns("sequence_indices"), packed.remove_columns("sequence_indices")
    if overlong == "split" and padded:  # and start with their first token
        again, packed = again.remove_columns("sequence_starts"), packed.remove_columns("sequence_starts")
    assert again.to_list() == packed.to_list()


def test_unpacking_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.unpack.BATCH_TOKENS", 100)
    source = make_source(padded=False)
    packed = pack(source, "split", output=tmp_path / "packed")
    back = unpack_dataset(packed, tmp_path / "back")
    assert len(back.cache_files) == 1
    assert back.to_list() == source.to_list() == unpack_dataset(packed.shuffle(seed=1)).to_list()
    with pytest.raises(FileExistsError):
        unpack_dataset(packed, tmp_path / "back")


def test_what_cannot_be_unpacked():
    packed = pack(make_source(padded=False))
    with pytest.raises(
        ValueError, match=r"source rows are not where they were packed, row \d+ first; unpack the whole"
    ):
        unpack_dataset(packed.select(range(len(packed) - 1)))
    with pytest.raises(ValueError, match=r"source row \d+ is there twice"):
        unpack_dataset(packed.select([0, *range(len(packed))]))
    with pytest.raises(ValueError, match="was not packed"):
        unpack_dataset(make_source())
    split = pack_dataset(datasets.Dataset.from_dict({"input_ids": [list(range(8)), [1]]}), 4, 1, overlong="split")
    last = [i for i, (start,) in enumerate(split["sequence_starts"]) if start == 4]
    with pytest.raises(ValueError, match="3 sequences were packed, and 2 are there"):
        unpack_dataset(split.select([i for i in range(len(split)) if i not in last]))
