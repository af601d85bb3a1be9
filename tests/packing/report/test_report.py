"""Packers compared: the table, what it predicts, pages and pictures, and the command that makes them."""

import re
import sys

import datasets
import numpy as np
import pytest
import slow_rows

from packing import PACKERS, PackPlan, cli, compare_packers, published_histogram, write_report
from packing.report.compare import DEPTHS, NOTES, OVERHEAD, expected_longest
from packing.report.page import pictures

datasets.disable_progress_bars()
SQUAD = published_histogram("squad")
PNG = b"\x89PNG\r\n\x1a\n"


def spread_out(histogram, max_sequence_length, max_sequences_per_pack):
    """A packer that does not pack."""
    lengths = np.flatnonzero(histogram)
    strategies = [(int(length),) for length in lengths]
    return PackPlan.from_strategies(strategies, histogram[lengths], max_sequence_length, max_sequences_per_pack, "lazy")


def refusing(histogram, max_sequence_length, max_sequences_per_pack):
    raise ValueError(f"max_sequence_length={max_sequence_length} is <too> long; use another packer")


def picky(histogram, max_sequence_length, max_sequences_per_pack):
    if max_sequences_per_pack == 2:
        raise ValueError("two are a crowd")
    return PACKERS["lpfhp"](histogram, max_sequence_length, max_sequences_per_pack)


# Numbers


def test_the_table_draws_the_comparison():
    """4 sequences of 3 tokens and 2 of 1 in rows of 6: two threes to a pack leave the ones a pack of their own."""
    comparison = compare_packers([0, 2, 0, 4, 0, 0, 0], packers={"spfhp": PACKERS["spfhp"]}, depths=(2, None))
    padded, shallow, deep = (row for _, row in comparison.rows())
    assert padded["packs"] == "6"
    assert padded["efficiency"] == "0.38889"  # 14 tokens / (6 rows x 6 slots)
    assert padded["above bound"] == padded["vs padded"] == ""
    assert (shallow["packer"], shallow["depth"], shallow["packs"]) == ("spfhp", "2", "3")
    assert shallow["above bound"] == "0"  # 14 tokens need 3 packs of 6
    assert shallow["factor"] == "2.0000"
    assert shallow["vs padded"] == f"{(1 - OVERHEAD) * 6 / 3:.2f} x"
    assert deep["depth"] == "no limit"
    assert "6 sequences, 14 tokens, longest 3; one in a row of 6: 61.1% padding" in str(comparison)
    assert str(comparison).endswith("\n".join(NOTES))


def test_every_packer_at_every_depth():
    comparison = compare_packers(SQUAD)
    assert {attempt.packer for attempt in comparison.attempts} == set(PACKERS)
    depths = list(dict.fromkeys(attempt.max_sequences_per_pack for attempt in comparison.attempts))
    assert depths == [2, 3, 4, 8, None]  # the shortest sequence has 29 tokens: 384 // 29 = 13, so 16 is no limit
    for attempt in comparison.plans:
        assert comparison.packs_above_bound(attempt) >= 0
        assert attempt.plan.num_sequences == SQUAD.sum()
        assert attempt.seconds > 0


def test_padded_rows_are_the_plan_of_depth_one():
    comparison = compare_packers(SQUAD, depths=[3])
    assert comparison.padded.num_packs == SQUAD.sum()
    assert [attempt.max_sequences_per_pack for attempt in comparison.attempts] == [3] * len(PACKERS)


def test_the_best_bound_found_counts_for_every_plan():
    def proving(histogram, max_sequence_length, max_sequences_per_pack):
        """A 4 and four 5s in rows of 12 go two by two: ceil(5 / 2) = 3 rows; their tokens say ceil(24 / 12) = 2."""
        plan = spread_out(histogram, max_sequence_length, max_sequences_per_pack)
        arrays = plan.strategy_lengths, plan.strategy_offsets, plan.repeats
        return PackPlan(max_sequence_length, max_sequences_per_pack, *arrays, "proving", proven_bound=3)

    lazy = {"lazy": spread_out}
    histogram = [0, 0, 0, 0, 1, 4, 0, 0, 0, 0, 0, 0, 0]
    assert compare_packers(histogram, packers=lazy).lower_bound(None) == 2
    # proven without a limit, it holds under every limit
    comparison = compare_packers(histogram, packers=lazy | {"proving": proving}, depths=[None, 5])
    assert [comparison.lower_bound(limit) for limit in (5, None)] == [3, 3]
    assert all(row["above bound"].startswith("2 ") for _, row in comparison.rows()[1:])


def test_a_packer_that_refuses_is_listed_with_its_reason():
    packers = {"refusing": refusing, "picky": picky, "spfhp": PACKERS["spfhp"]}
    comparison = compare_packers(SQUAD, packers=packers, depths=[2, 3])
    rows = [row for _, row in comparison.rows()]
    assert [(row["packer"], row["depth"]) for row in rows] == [
        ("padded", "1"),
        ("refusing", "any"),  # one row, since the reason is one
        ("picky", "2"),
        ("picky", "3"),
        ("spfhp", "2"),
        ("spfhp", "3"),
    ]
    assert rows[1]["refusal"].startswith("max_sequence_length=384 is <too> long")
    assert rows[2]["refusal"] == "two are a crowd"
    assert "refused: max_sequence_length=384" in str(comparison)


def test_nothing_but_refusals_is_a_table_too(tmp_path):
    comparison = compare_packers(SQUAD, packers={"refusing": refusing})
    assert comparison.recommended is None
    write_report(comparison, tmp_path / "report.html")
    assert "Recommended" not in (tmp_path / "report.html").read_text()


def test_recommends_the_shallowest_of_the_good_ones():
    """Sequences of 128 in rows of 512: four fit, and deeper is no better."""
    histogram = np.zeros(513, np.int64)
    histogram[[16, 128]] = 1, 1000
    comparison = compare_packers(histogram, packers={"spfhp": PACKERS["spfhp"]}, depths=DEPTHS)
    assert comparison.recommended.max_sequences_per_pack == 4
    assert comparison.recommended.plan.num_packs == 251


def test_a_bad_histogram_is_no_refusal():
    with pytest.raises(ValueError, match="length 5, more than max_sequence_length=4"):
        compare_packers([0, 0, 0, 0, 0, 1], 4)
    with pytest.raises(ValueError, match="no depth to compare"):
        compare_packers(SQUAD, depths=[])


def test_expected_longest_of_a_batch():
    assert expected_longest(np.array([0, 0, 0, 7]), 32) == pytest.approx(3)
    # half 1, half 3; both 1 with 1/4: 1 x 1/4 + 3 x 3/4
    assert expected_longest(np.array([0, 5, 0, 5]), 2) == pytest.approx(2.5)
    lengths = np.repeat(np.arange(len(SQUAD)), SQUAD)
    drawn = np.random.default_rng(0).choice(lengths, (2000, 32)).max(axis=1)
    assert expected_longest(SQUAD, 32) == pytest.approx(drawn.mean(), rel=0.01)


def test_progress_goes_to_stderr(capsys):
    compare_packers(SQUAD, packers={"spfhp": PACKERS["spfhp"]}, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "planning: 100%" in captured.err
    compare_packers(SQUAD, packers={"spfhp": PACKERS["spfhp"]})
    assert capsys.readouterr().err == ""


# Pages and pictures


@pytest.fixture(scope="module")
def comparison():
    return compare_packers(SQUAD, packers={"spfhp": PACKERS["spfhp"], "refusing": refusing})


def test_html_is_one_file(tmp_path, comparison):
    write_report({"a & b": comparison, "c": comparison}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    assert "<h2>a &amp; b</h2>" in page
    assert "is &lt;too&gt; long" in page
    assert page.count('<tr class="chosen">') == 2
    assert "<td>40,631</td>" in page


def test_png_by_its_ending(tmp_path, comparison):
    write_report(comparison, tmp_path / "report.PNG")
    assert (tmp_path / "report.PNG").read_bytes().startswith(PNG)
    write_report({"a": comparison, "b": comparison}, tmp_path / "both.png")
    assert len((tmp_path / "both.png").read_bytes()) > len((tmp_path / "report.PNG").read_bytes())


@pytest.mark.parametrize(
    ("histogram", "limit"), [([0, 1], None), ([0, 0, 5, 0, 0, 1], None), (np.r_[0, np.ones(3000, np.int64)], 4096)]
)
def test_pictures_of_small_and_long_rows(histogram, limit):
    comparison = compare_packers(histogram, limit, packers={"lpfhp": PACKERS["lpfhp"]})
    lengths, padding, efficiency, packs = pictures(comparison).axes
    assert "%" in padding.get_title()
    assert packs.get_ylim() == (0, comparison.max_sequence_length)
    # the bars of the first picture hold every sequence
    (stairs,) = lengths.patches
    assert stairs.get_data().values.sum() == comparison.histogram.sum()
    assert efficiency.get_xticklabels()[-1].get_text() == "no limit"


def test_refused_before_any_work(tmp_path, monkeypatch, comparison):
    with pytest.raises(ValueError, match=r"written as \.html or \.png.*report\.pdf"):
        write_report(comparison, tmp_path / "report.pdf")
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_report(comparison, tmp_path / "nowhere" / "report.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dataset-packing\[report\]'"):
        write_report(comparison, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


# The command


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The same lengths as a dataset, a file and a histogram, and a dataset with splits."""
    monkeypatch.chdir(tmp_path)
    rows = slow_rows.random_rows(0, 80, 30)
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk("tokenized")
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(9))}).save_to_disk("splits")
    lengths = [len(row["input_ids"]) for row in rows]
    np.save("lengths.npy", lengths)
    counted = "".join(f"{length},{lengths.count(length)}\n" for length in set(lengths))
    (tmp_path / "histogram.csv").write_text("length,count\n" + counted)
    return tmp_path


def output(capsys, *arguments):
    assert cli.main([*arguments, "--max-sequence-length", "40"]) == 0
    return capsys.readouterr().out


def without_times(text):
    """The columns are as wide as the times, so the spaces go, too."""
    return re.sub(r" +", " ", re.sub(r" +[\d,.]+ m?s ", " ", text))


def test_dataset_file_and_histogram_give_one_plan(sources, capsys):
    plan = output(capsys, "tokenized", "--plan-only").removeprefix("80 rows\n")
    assert "packing efficiency" in plan
    for source in ("lengths.npy", "histogram.csv"):
        assert output(capsys, source, "--plan-only").removeprefix("80 sequences\n") == plan


def test_dataset_file_and_histogram_give_one_comparison(sources, capsys):
    before = sorted(sources.rglob("*"))
    table = without_times(output(capsys, "tokenized", "--compare"))
    assert all(f"\n{name} " in table for name in ("padded", *PACKERS))
    for source in ("lengths.npy", "histogram.csv"):
        assert without_times(output(capsys, source, "--compare")) == table
    assert sorted(sources.rglob("*")) == before


def test_one_depth_on_request(sources, capsys):
    table = output(capsys, "lengths.npy", "--compare", "--max-sequences-per-pack", "3")
    assert len(re.findall(r"^\w+ +3 ", table, re.MULTILINE)) == len(PACKERS)


def test_a_table_per_split_and_one_report(sources, capsys):
    printed = output(capsys, "splits", "--report", "report.html")
    assert "train: 80 sequences" in printed
    assert "test: 9 sequences" in printed
    assert printed.endswith("written to report.html\n")
    assert (sources / "report.html").read_text().count("<h2>") == 2


def test_overlong_lengths_are_cut_as_rows_are(sources, capsys):
    for choice in ("truncate", "split", "drop"):
        arguments = ["--plan-only", "--max-sequence-length", "20", "--overlong", choice]
        plans = []
        for source in ("tokenized", "lengths.npy"):
            assert cli.main([source, *arguments]) == 0
            plans.append(capsys.readouterr().out.partition("\n")[2])
        assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["lengths.npy", "packed"],
            "SOURCE 'lengths.npy' is a file of lengths, which only pack-dataset plan and compare",
        ),
        (["missing.npy", "--compare"], "there is no SOURCE 'missing.npy'"),
        (
            ["lengths.npy", "--compare", "--max-sequence-length", "8"],
            "sequences are longer than --max-sequence-length 8",
        ),
        (["splits", "--compare", "--max-sequence-length", "8"], "split 'train': row "),
        (["lengths.npy", "--report", "report.pdf"], "a report is written as .html or .png"),
        (["histogram.csv", "--plan-only", "--max-sequence-length", "0"], "--max-sequence-length 0 must be"),
    ],
)
def test_refused_in_one_line(sources, capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"pack-dataset: {message}") or message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
