"""Progress: a bar in a terminal, lines in a log."""

import io
import sys

import pytest

from packing.files import progress
from packing.files.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stderr, steps=3, **options):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar(desc="packing", unit="pack", **options) as bar:
        for step in range(steps):
            bar.set_postfix_str(f"step {step}")
            bar.update()
    return stderr.getvalue()


def test_a_terminal_has_a_bar(monkeypatch):
    text = shown(monkeypatch, Terminal(), total=3)
    assert text.count("\r") > 1 and "|" in text and "packing: 100%" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"total": 3}, ["packing: 100% 3/3"]),
        ({"total": None}, ["packing: 3pack"]),
        ({"total": 3, "disable": True}, []),
        ({"total": 0, "steps": 0}, []),
        ({"total": 3, "delay": 60}, []),
    ],
)
def test_a_log_has_a_line_at_the_end(monkeypatch, options, expected):
    lines = shown(monkeypatch, io.StringIO(), **options).splitlines()
    assert [line.partition(" [")[0] for line in lines] == expected


def test_a_log_has_lines_on_the_way(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    text = shown(monkeypatch, io.StringIO(), total=3)
    assert [line[:12] for line in text.splitlines()] == ["packing:  33", "packing:  67", "packing: 100"]
