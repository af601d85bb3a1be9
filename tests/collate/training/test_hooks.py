"""What we override of Trainer: a Trainer without it is refused, and so is an override that the list lacks."""

import ast
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import Trainer, TrainerCallback

from collate.training.hooks import (
    CALLBACK_METHODS,
    FIRST,
    NEXT,
    TESTED,
    TRAINER_ATTRIBUTES,
    TRAINER_METHODS,
    checked,
    overrides_callback,
    overrides_trainer,
)

ROOT = Path(__file__).parents[3]
METHODS = {"_run_epoch": "model epoch", "log": "logs start_time"}


class Fitting:
    """A Trainer of another version that has everything in METHODS."""

    def _run_epoch(self, model, epoch, trial):
        self._tr_loss = 0.0

    def log(self, logs, start_time=None):
        return [self._sum for _ in logs]

    def save(self):
        """Not in the list."""


class Renamed(Fitting):
    _run_epoch = None  # type: ignore[assignment]
    run_epoch = Fitting._run_epoch


class OtherParameters(Fitting):
    def log(self, metrics, start_time=None):
        return metrics


class Ours:
    def _run_epoch(self, *args):
        return args


def test_a_trainer_that_fits_is_taken():
    assert checked(Ours, Fitting, METHODS, ("_tr_loss", "_sum")) is Ours


def test_a_renamed_method_is_refused():
    with pytest.raises(ImportError, match=r"expected Renamed\._run_epoch\(model, epoch\), found no such method"):
        checked(Ours, Renamed, METHODS)


def test_other_parameters_are_refused_with_the_versions_that_fit():
    said = r"transformers \S+ does not fit: expected OtherParameters\.log\(logs, start_time\), found parameters "
    said += rf"\(metrics, start_time\)\. .* supports transformers {FIRST} to {TESTED}; pip install"
    with pytest.raises(ImportError, match=said) as refused:
        checked(Ours, OtherParameters, METHODS)
    cure = Requirement(str(refused.value).split("'")[1])
    fits = [f"{FIRST}.0", f"{TESTED}.0", f"{TESTED}.9"]
    assert cure.name == "transformers" and list(cure.specifier.filter([*fits, "5.16.9", f"{NEXT}.0"])) == fits


def test_a_renamed_attribute_is_refused():
    with pytest.raises(ImportError, match=r"expected Fitting\._loss, found no method of Fitting that uses it"):
        checked(Ours, Fitting, METHODS, ("_tr_loss", "_loss"))


def test_an_override_that_is_not_listed_is_refused():
    with pytest.raises(TypeError, match=r"Saves\.save overrides a method of Fitting that collate/training/hooks\.py"):
        checked(type("Saves", (), {"save": lambda self: None}), Fitting, METHODS)
    with pytest.raises(TypeError, match=r"Part\.create_optimizer overrides"):
        overrides_trainer(type("Part", (), {"create_optimizer": lambda self: None}))
    with pytest.raises(TypeError, match=r"Listens\.on_step_start overrides"):
        overrides_callback(type("Listens", (TrainerCallback,), {"on_step_start": lambda self, *args, **kwargs: None}))


def test_the_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={FIRST}" in project["optional-dependencies"]["train"]
    assert f"\ntransformers=={TESTED}." in (ROOT / "constraints.txt").read_text(encoding="utf-8")


CLASSES = {
    node: file
    for package in ("collate", "bert_pretrain")
    for file in sorted((ROOT / package).rglob("*.py"))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef)
}
PARTS = {node for node in CLASSES if {"overrides_trainer"} & {ast.unparse(name) for name in node.decorator_list}}


def test_every_class_that_overrides_trainers_methods_is_checked():
    """Found in the source: a class that calls super(), and has methods with names of Trainer's."""
    unchecked = [
        f"{CLASSES[node].relative_to(ROOT)}: {node.name}"
        for node in CLASSES.keys() - PARTS
        if any(name.name in TRAINER_METHODS for name in node.body if isinstance(name, ast.FunctionDef))
        and any(part.endswith("Trainer") or part in {p.name for p in PARTS} for part in map(ast.unparse, node.bases))
    ]
    assert unchecked == [] and len(PARTS) >= 7


def test_private_methods_and_attributes_that_are_used_are_listed():
    known = {*TRAINER_METHODS, *TRAINER_ATTRIBUTES}
    used = {
        node.attr
        for part in PARTS
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(Trainer, name)} <= known
    assert {name for name in TRAINER_METHODS if name.startswith("_")} <= used | {
        method.name for part in PARTS for method in part.body if isinstance(method, ast.FunctionDef)
    }


def test_every_event_that_a_callback_listens_to_exists():
    listening = [
        method.name
        for node in CLASSES
        if any(base.endswith(("Callback", "SetEpoch")) for base in map(ast.unparse, node.bases))
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name.startswith("on_")
    ]
    assert len(listening) > 10 and set(listening) <= CALLBACK_METHODS.keys()
