"""Options of attention heads: a wrong value is refused with name, value, limit and cure, for all heads."""

import json
import re
from dataclasses import asdict, fields

import pytest

from bert_pretrain.attention import ATTENTION


def build(name: str, **options):
    return ATTENTION[name](num_heads=2, head_width=8, max_sequence_length=64, **options)


OPTIONS = [
    pytest.param(name, field, id=f"{name}-{field.name}") for name in ATTENTION for field in fields(build(name).options)
]
NONSENSE = [True, "nonsense", float("nan"), float("inf"), -1, -0.5, [1], {}]
"""What no option can be."""


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_nonsense_is_refused(name, option):
    for value in (*NONSENSE, *([] if "None" in str(option.type) else [None])):
        said = rf"Options: {option.name}={re.escape(repr(value))} (must be an? \w+ .+|is unknown); \w+"
        with pytest.raises(ValueError, match=said):
            build(name, **{option.name: value})


@pytest.mark.parametrize("name", ATTENTION)
def test_defaults_are_options_and_come_back_from_a_config(name):
    options = json.loads(json.dumps(asdict(build(name).options)))
    assert asdict(build(name, **options).options) == options


@pytest.mark.parametrize("name", [name for name in ATTENTION if hasattr(build(name).options, "seed")])
def test_the_largest_seed(name):
    """Seeds are multiplied, and a generator takes 64 bits."""
    build(name, seed=2**32 - 1, layer_index=1000)
    with pytest.raises(ValueError, match=r"seed=4294967296 must be a whole number, 0 to 2\*\*32 - 1"):
        build(name, seed=2**32)
