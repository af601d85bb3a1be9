"""Blocks on a simulated GPU: no wait, few launches, no mixed devices; and one graph under torch.compile."""

import copy

import pytest
import torch
from block_models import IDS, block_model
from count_waits import counts
from torch._dynamo.utils import counters

from bert_pretrain.block import FEED_FORWARDS, NORMS, PLACEMENTS, STREAMS

DEFAULT = {"placement": "post", "norm": "layer", "stream": "plain", "feed_forward": "dense"}
BLOCKS: list[dict] = [
    *({"placement": placement, "norm": norm} for placement in PLACEMENTS for norm in NORMS),
    *({"placement": "pre", "stream": stream} for stream in STREAMS),
    *({"placement": "residual", "feed_forward": name} for name in FEED_FORWARDS),
    {"chunk_size": 1024},
    {"feed_forward": "moe", "gated": True, "balance": "bias", "chunk_size": 2048},
    {"placement": "pre", "stream": "reversible", "feed_forward": "moe"},
    {"share_layers": True},
]
BLOCKS = [options for options in BLOCKS if options.items() - DEFAULT.items()]
MOST_LAUNCHES = {
    "rms": 40,
    "residual": 12,
    "pre": 4,
    "checkpoint": 60,
    "reversible": 120,
    "moe": 400,
    "chunk_size": 130,
}
"""How many more a layer may start than stock's, by what is chosen. RMSNorm is one operation on a GPU, several here."""

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # while torch traces


@pytest.fixture(scope="module")
def stock():
    return counts("sdpa")


@pytest.mark.parametrize("options", BLOCKS, ids=lambda options: "-".join(map(str, options.values())))
def test_no_waits_and_few_launches(options, stock):
    found = counts("sdpa", block=options)
    assert (found.waits, found.waits_a_layer) == (0, 0) and not found.mixed, found.lines
    chosen = [*options, *options.values()]
    more = sum(number for name, number in MOST_LAUNCHES.items() if name in chosen)
    assert found.launches_a_layer <= stock.launches_a_layer + more


@pytest.mark.parametrize("head", ["local", "lsh", "routing", "linear"])
@pytest.mark.parametrize("stream", [name for name in STREAMS if name != "plain"])
def test_no_waits_with_other_heads(head, stream):
    """What a layer computes again needs no wait either."""
    found = counts(head, block={"placement": "pre", "norm": "rms", "stream": stream})
    assert (found.waits, found.waits_a_layer) == (0, 0) and not found.mixed, found.lines


QUICK = [{"placement": "residual", "norm": "rms"}, {"placement": "pre", "stream": "checkpoint"}, {"chunk_size": 1024}]
"""Which graphs `make test` compiles, three seconds each."""
COMPILED = [pytest.param(options, marks=[] if options in QUICK else [pytest.mark.long]) for options in BLOCKS]


def without_graph(stream="plain", feed_forward="dense", chunk_size=None, **others) -> str:
    """The names that the log must have, for packs of any size on a CPU; "": one graph holds for all."""
    names = ["MixtureOfExperts"] if feed_forward == "moe" else ["DenseFeedForward"] if chunk_size else []
    return " and ".join(names + ["reversible"] * (stream == "reversible"))


@pytest.mark.parametrize("options", COMPILED, ids=lambda options: "-".join(map(str, options.values())))
def test_one_graph_or_its_name(options, caplog):
    """One graph of the encoder and one of the losses, with eager's numbers; or the encoder says why it has none."""
    torch.compiler.reset()
    counters.clear()
    eager = block_model(**options)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager")
    for ids in (IDS, [[1, 1, 2, 3, 3, 0, 0]] * 3):
        ids = torch.tensor(ids)
        words = torch.arange(ids.numel()).reshape(ids.shape) % 50 + 5
        results = []
        for model in (eager, compiled):
            model.zero_grad()
            with caplog.at_level("INFO"):
                loss = model(words, ids, labels=torch.where(words % 3 == 0, words, -100)).loss
            loss.backward()
            results.append(loss.detach())
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
        for (name, mine), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-11, msg=name)
    assert not counters["graph_break"]
    names = without_graph(**options)
    assert counters["stats"]["unique_graphs"] == (1 if names else 2)
    said = [record.args for record in caplog.records if record.msg.startswith("the encoder runs uncompiled")]
    assert said == ([(names,)] if names else [])
