"""`bert-pretrain train` in two processes, in float64: by DDP, then the same by FSDP. test_cli.py runs it:

torchrun --nproc-per-node 2 two_ranks.py DATASET TOKENIZER OUTPUT

torch can do FSDP on CPUs, but accelerate does not offer it: so accelerate is told that these are GPUs.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from process_group import end_process_group
from tiny_runs import train
from transformers import Trainer

from bert_pretrain.train import pretrain

build_model = pretrain.build_model
create_accelerator = Trainer.create_accelerator_and_postprocess


def with_fsdp(trainer):
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    create_accelerator(trainer)


if __name__ == "__main__":
    dataset, tokenizer, output = sys.argv[1:]
    folders = {"dataset": dataset, "tokenizer": tokenizer}
    printed = Path(output, f"printed-by-rank-{os.environ['RANK']}.txt")
    pretrain.build_model = lambda *arguments: build_model(*arguments).double()
    options: dict[str, object] = {
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_steps": 4,
    }
    options |= {"learning_rate": 0.01, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 2}
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        assert train(folders, f"{output}/ddp", **options) == 0
        Trainer.create_accelerator_and_postprocess = with_fsdp  # type: ignore[method-assign]
        assert train(folders, f"{output}/fsdp", **options, fsdp=True, fsdp_config='{"version": 2}') == 0
    torch.distributed.barrier()
    end_process_group()
