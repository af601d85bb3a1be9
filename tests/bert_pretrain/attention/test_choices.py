"""Choices that a head makes going forward, handed to a pass that computes it again."""

from functools import partial

import pytest
import torch
from attention_contract import heads_input, layout_of, make
from small_heads import SMALL_OPTIONS

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.parts.choices import chosen, narrowest, recording, replaying

IDS = [[1] * 20 + [2] * 9 + [0] * 4 + [3] * 15]
CHOOSE = ("lsh", "routing", "sinkhorn", "clustered")


def of(values: list[int], below: int | None = 300) -> list[int]:
    return chosen(lambda: torch.tensor(values), below).tolist()


def test_a_pass_that_is_computed_again_gets_what_was_chosen():
    assert of([1, 2]) == [1, 2]
    with recording() as choices:
        assert of([299, 0]) == [299, 0] and of([4], None) == [4]
    assert [x.dtype for x in choices] == [torch.int16, torch.int64]
    with replaying(choices):
        assert of([7, 7]) == [299, 0] and of([7], None) == [4]
    assert of([7]) == [7]


def test_a_pass_that_takes_other_steps_is_refused():
    with recording() as choices:
        of([1])
    with pytest.raises(RuntimeError, match="more often than the 1 times"), replaying(choices):
        of([1])
        of([1])
    with pytest.raises(RuntimeError, match="left 1 of 1"), replaying(choices):
        pass
    assert of([7]) == [7], "an error leaves no context behind"


def test_a_recording_within_another_context_records_what_that_one_answers():
    """A part of a branch that is itself computed again, in the second run of the branch."""
    with recording() as outer, recording() as inner:
        of([1])
    assert [x.tolist() for x in outer] == [x.tolist() for x in inner] == [[1]]
    with replaying(outer), recording() as inner:
        assert of([7]) == [1]
    with replaying(inner):
        assert of([7]) == [1]


@pytest.mark.parametrize(("below", "dtype"), [(256, torch.uint8), (257, torch.int16), (32769, torch.int32)])
def test_the_narrowest_type_holds_all_numbers_below(below, dtype):
    assert narrowest(below) == dtype
    assert torch.tensor(below - 1).to(dtype).long() == below - 1


@pytest.mark.parametrize("name", CHOOSE)
def test_a_head_takes_the_choices_of_other_inputs(name):
    """With them its context follows from its own inputs; without, tokens choose anew."""
    head, layout = make(partial(ATTENTION[name], **SMALL_OPTIONS[name])), layout_of(IDS)
    first, second = heads_input(layout, 0), heads_input(layout, 5)
    with torch.no_grad():
        with recording() as choices:
            context = head(*first, layout)
        with recording() as others:
            head(*second, layout)
        with replaying(choices):
            assert torch.equal(head(*first, layout), context)
        with replaying(choices):
            mixed = head(*second, layout)
    assert any(not torch.equal(*pair) for pair in zip(choices, others, strict=True))
    assert not torch.equal(mixed, head(*second, layout))
