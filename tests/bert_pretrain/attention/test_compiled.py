"""torch.compile of the attention heads: the same values and gradients as without.

The layout of a batch is made outside, as a model makes it once for all layers: its sizes follow from the numbers in
sequence_ids, which no compiler knows. Where a compiled function makes it, the graph breaks there; results are right.
"""

from functools import partial

import pytest
import torch
from attention_contract import assert_equal, heads_input, layout_of, make, run
from small_heads import NEEDS_CUDA, SMALL_OPTIONS

from bert_pretrain.attention import ATTENTION

QUICK = ("local", "lsh")
LAYOUTS = [[[1] * 20 + [2] * 9 + [0] * 4 + [3] * 15], [[1] * 7 + [2] * 5 + [3] * 33]]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
        for name in ATTENTION
        if name not in NEEDS_CUDA
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")  # a graph ends there
def test_a_compiled_head_computes_the_same(name):
    """Two batches of different lengths: torch compiles the second for shapes that change."""
    torch.compiler.reset()
    attention = make(partial(ATTENTION[name], **SMALL_OPTIONS.get(name, {})))
    compiled = torch.compile(attention, backend="aot_eager")
    for ids in LAYOUTS:
        layout = layout_of(ids)
        inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
        expected = run(attention, layout, inputs, weights)
        found = run(compiled, layout, inputs, weights)
        assert_equal({name.replace("_orig_mod.", ""): value for name, value in found.items()}, expected)
