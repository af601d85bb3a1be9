"""What attention heads do on a GPU: the kernels that CPUs have not, against exact attention per sequence."""

import pytest
import torch
from attention_contract import heads_input, layout_of

from bert_pretrain.attention import ATTENTION
from collate import PackLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IDS = [[1] * 100 + [2] * 28 + [3] * 60 + [0] * 68, [1] * 250 + [0] * 6, [0] * 5 + [1] * 17 + [2] * 200 + [3] * 34]


def run(attention, layout, inputs, dtype):
    inputs = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    context = attention(*inputs, layout)
    (context.float() * torch.linspace(-1, 1, context.numel(), device="cuda").view_as(context)).sum().backward()
    return [context.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs)]


@pytest.mark.parametrize("name", ATTENTION)
def test_a_gpu_computes_what_a_cpu_does(name):
    """bfloat16 on the GPU beside float32 on the CPU, values and gradients; full attention beside sdpa."""
    layout, on_gpu = layout_of(IDS), PackLayout(torch.tensor(IDS, device="cuda"))
    inputs = [x / 3 for x in heads_input(layout, heads=2, width=64)]
    sizes = {"num_heads": 2, "head_width": 64, "max_sequence_length": 256}
    torch.manual_seed(0)
    twin = ATTENTION["sdpa" if name in ("varlen", "flex") else name](**sizes).float()
    torch.manual_seed(0)
    attention = ATTENTION[name](**sizes).to("cuda", torch.bfloat16 if name == "varlen" else torch.float32)
    dtype = torch.bfloat16 if name == "varlen" else torch.float32
    expected_inputs = [x.float().requires_grad_() for x in inputs]
    context = twin(*expected_inputs, layout)
    (context * torch.linspace(-1, 1, context.numel()).view_as(context)).sum().backward()
    expected = [context.detach(), *(x.grad for x in expected_inputs)]
    tolerance = 3e-2 if name == "varlen" else 2e-3
    for found, wanted in zip(run(attention, on_gpu, inputs, dtype), expected, strict=True):
        assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("name", ATTENTION)
def test_a_mate_changes_nothing_on_a_gpu(name):
    layout = PackLayout(torch.tensor([[1] * 100 + [2] * 28 + [3] * 60 + [0] * 68], device="cuda"))
    dtype = torch.bfloat16 if name == "varlen" else torch.float32
    attention = ATTENTION[name](num_heads=2, head_width=64, max_sequence_length=256).to("cuda", dtype)
    inputs = [x.to("cuda", dtype) for x in heads_input(layout_of(layout.sequence_ids_BL.cpu()), heads=2, width=64)]
    mate = (layout.sequence_of_token == 1)[:, None, None]
    before = attention(*inputs, layout)
    after = attention(*(torch.where(mate, x.flip(0) * 100, x) for x in inputs), layout)
    assert (after == before)[~mate.flatten()].all()
