"""Reading how long sequences are: every kind of file, and what is wrong with it."""

import json

import numpy as np
import pytest

from packing import published_histogram, read_histogram
from packing.source.lengths import READERS, cut_histogram


def write(path, content):
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".json" and not isinstance(content, str):
        path.write_text(json.dumps(content))
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "3\n1\n\n3\n"),
        ("a.csv", "3\n1\n3\n"),
        ("b.csv", "id,Length\nx,3\ny,1\nz,3\n"),
        ("c.csv", "length,count\n1,1\n3,2\n"),
        ("d.csv", "count,length\n1,1\n2,3\n"),
        ("e.csv", "3,1\n1,1\n3,1\n"),  # a length listed twice adds up
        ("f.csv", '"text","length"\n"no, 2 ,1",3\n"C# is 2",1\n"a ""b""\nc, 2",3\n'),
        ("g.csv", "\ufeff3,2\n1,1\n"),  # with a byte order mark, as spreadsheets write it
        ("b.txt", "\ufeff3\n1\n3\n"),
        ("a.json", [3, 1, 3]),
        ("b.json", {"3": 2, "1": 1}),
        ("a.npy", np.array([3, 1, 3], np.uint16)),
        ("b.npy", [[3, 2], [1, 1]]),
        ("a.npz", {"lengths": [3, 1, 3]}),
        ("b.npz", {"histogram": [0, 1, 0, 2]}),
    ],
)
def test_reads(tmp_path, name, content):
    histogram = read_histogram(write(tmp_path / name, content))
    assert histogram.tolist() == [0, 1, 0, 2]
    assert histogram.dtype == np.int64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no lengths to count"),
        ("b.txt", "3\n2.5\n", "could not convert string '2.5'"),
        ("c.txt", "3 4\n", "it has 2 numbers in a line"),
        ("d.txt", "3\n0\n", "sequence 1 has length 0"),
        ("a.csv", "", "it is empty"),
        ("b.csv", "tokens,rows\n1,2\n", "its header tokens, rows names no column `length`"),
        ("c.csv", "1,2,3\n", "3 columns and no header"),
        ("d.csv", "length,count\n", "it counts no sequence"),
        ("e.csv", "length,count\n3,0\n", "it counts no sequence"),
        ("f.csv", "length,count\n0,2\n", "it lists length 0"),
        ("g.csv", "length,count\n7,-2\n", "it counts -2 sequences of length 7"),
        ("h.csv", "length,count\n7\n", "row 1"),
        ("a.json", "{", "Expecting property name"),
        ("b.json", 3, "neither a list of lengths nor an object"),
        ("c.json", {"3": 2.5}, "two columns of whole numbers, not float64"),
        ("d.json", [2, 2.5], "index 1 holds 2.5"),
        ("e.json", [2, None], "index 1 holds None"),
        ("i.csv", "length,count\n1000000000000000,1\n", "Unable to allocate"),
        ("c.npz", {"histogram": [[3, 2], [1, 1]]}, r"has shape \(2, 2\); it must be flat"),
        ("a.npy", [[1, 2, 3]], r"two columns of whole numbers, not int64 \(1, 3\)"),
        ("a.npz", {"counts": [1]}, "it holds counts; name one array `lengths` or `histogram`"),
        ("b.npz", {"histogram": [4, 1]}, "it lists length 0"),
        ("a.parquet", "", "ends in none of .txt, .csv"),
    ],
)
def test_refuses_and_names_the_file(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_histogram(write(tmp_path / name, content))
    assert name in str(error.value)


def test_published_histograms():
    for name, longest, sequences, tokens in (
        ("wikipedia", 512, 16_279_552, 4_164_796_173),
        ("squad", 384, 88_641, 15_249_479),
    ):
        histogram = published_histogram(name)
        assert len(histogram) - 1 == longest
        assert histogram.sum() == sequences
        assert histogram @ np.arange(longest + 1) == tokens
    with pytest.raises(ValueError, match="unknown histogram 'bookcorpus'; choose from wikipedia, squad"):
        published_histogram("bookcorpus")


def test_cut_draws_what_overlong_does():
    histogram = np.array([0, 0, 1, 0, 0, 3])  # one sequence of 2 tokens, three of 5
    assert cut_histogram(histogram, 3, "truncate").tolist() == [0, 0, 1, 3]
    assert cut_histogram(histogram, 3, "split").tolist() == [0, 0, 1 + 3, 3]  # 5 = 3 + 2
    assert cut_histogram(histogram, 3, "drop").tolist() == [0, 0, 1, 0]
    assert cut_histogram(histogram, 5).tolist() == [0, 0, 1, 0, 0, 3]
    assert cut_histogram(histogram, 6).tolist() == [0, 0, 1, 0, 0, 3, 0]
    assert cut_histogram(np.array([0, 0, 0, 0, 1]), 2, "split").tolist() == [0, 0, 2]  # 4 = 2 + 2, no rest
    with pytest.raises(ValueError, match="3 sequences are longer than max_sequence_length=3, up to 5 tokens; choose"):
        cut_histogram(histogram, 3)
    with pytest.raises(ValueError, match="nothing is left"):
        cut_histogram(histogram, 1, "drop")


def test_every_ending_is_documented():
    import packing.source.lengths

    assert all(ending in packing.source.lengths.__doc__ for ending in READERS)
