"""--full_determinism reaches every kernel: torch's flag is on in training, and nothing that heads do is refused by it.

torch.use_deterministic_algorithms makes CUDA kernels that add in any order take another way, or raise. Which ones raise
is known by name (its documentation lists them), so a CPU can look for them.
"""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from attention_contract import heads_input, layout_of, make, run
from pretraining_models import make_config
from small_heads import HERE, SMALL_OPTIONS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainingArguments

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.pretrain import pretrain
from collate.isolation.varlen import varlen_kernel, varlen_takes_window

RAISE = {"kthvalue", "median", "nanmedian", "histc", "put_", "put", "nll_loss2d_forward", "ctc_loss", "grid_sampler_2d"}
RAISE |= {"adaptive_avg_pool2d_backward", "max_unpool2d", "replication_pad1d_backward", "upsample_linear1d_backward"}
RAISE_FOR_FLOATS = {"cumsum", "cumsum_"}
RAISE_WITH_WEIGHTS = {"bincount"}


class Refused(TorchDispatchMode):
    """Collects what deterministic algorithms would refuse on CUDA."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_float = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        has_weights = (len(args) > 1 and args[1] is not None) or (kwargs or {}).get("weights") is not None
        of_floats, of_weights = name in RAISE_FOR_FLOATS and is_float, name in RAISE_WITH_WEIGHTS and has_weights
        if name in RAISE or of_floats or of_weights:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_what_would_be_refused_is_seen():
    x = torch.randn(4, requires_grad=True)
    with Refused() as refused:
        x.cumsum(0)
        x.long().cumsum(0)
        x.median()
        torch.bincount(x.detach().abs().long(), x.detach())
        torch.bincount(x.detach().abs().long())
    assert refused.found == ["cumsum", "median", "bincount"]


@pytest.mark.parametrize("name", HERE)
def test_no_head_does_what_deterministic_algorithms_refuse(name):
    ids = [[1] * 33 + [2] + [3] * 30, [1] * 5 + [0] * 20 + [2] * 39]
    with Refused() as refused:
        layout = layout_of(ids)
        run(
            make(partial(ATTENTION[name], **SMALL_OPTIONS.get(name, {}))),
            layout,
            heads_input(layout),
            heads_input(layout)[0],
        )
    assert not refused.found


def test_nor_does_the_model_with_its_losses():
    model = PackedBertForPreTraining(make_config(packed_attention="auto", attention_probs_dropout_prob=0.0))
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3])
    batch = {"input_ids": torch.randint(5, 60, ids.shape), "sequence_ids": ids}
    labels = {"labels": batch["input_ids"], "next_sentence_label": torch.tensor([[0, 1]])}
    with Refused() as refused:
        model(**batch, **labels, cls_positions=torch.tensor([[0, 20]])).loss.backward()
    assert not refused.found


def test_the_flag_is_on_while_a_run_trains(folders, tmp_path, monkeypatch):
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(torch.are_deterministic_algorithms_enabled())

    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PretrainConfig(folders["packed"], folders["tokenizer"], sequences_per_step=12, **shape)
    how = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    try:
        pretrain(config, TrainingArguments(str(tmp_path), full_determinism=True, **how), callbacks=[Looks])
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True]


@pytest.mark.parametrize("is_on", [True, False])
def test_flash_attn_is_told(monkeypatch, is_on):
    """Where torch lacks varlen_attn, whose own backward pass asks the flag."""
    told = []
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = lambda q, k, v, window_size=(-1, -1), deterministic=False: told.append(
        (q, k, v, window_size, deterministic)
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # importing it raises ImportError
    varlen_takes_window.cache_clear()
    torch.use_deterministic_algorithms(is_on)
    try:
        varlen_kernel()(1, 2, 3)
        varlen_kernel()(1, 2, 3, window_size=(4, 4))
        assert varlen_takes_window()
    finally:
        torch.use_deterministic_algorithms(False)
        varlen_takes_window.cache_clear()
    assert told == [(1, 2, 3, (-1, -1), is_on), (1, 2, 3, (4, 4), is_on)]
