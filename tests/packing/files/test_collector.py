"""A command of its own collects garbage seldom; main(arguments), as others call it, changes nothing."""

import gc
import sys

import bert_pretrain.cli
import packing.cli
from packing.files.collector import YOUNG, few_collections


def test_seldom_until_it_ends(monkeypatch):
    frozen, before = [], gc.get_threshold()
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.get_threshold()))
    with few_collections():
        assert gc.get_threshold() == (YOUNG, *before[1:]) and not frozen
    assert gc.get_threshold() == before and frozen == [before]


def test_only_as_a_process(monkeypatch, capsys):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    for main, arguments in ((packing.cli.main, ["plam"]), (bert_pretrain.cli.main, ["prepare", "--text"])):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        results = []
        for given in ([arguments], []):
            try:
                results.append(main(*given))
            except SystemExit as end:
                results.append(end.code)
        assert results == [2, 2] and frozen.pop() and not frozen
    capsys.readouterr()
