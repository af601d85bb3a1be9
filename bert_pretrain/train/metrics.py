"""How fast a run is: real tokens and sequences per second, model FLOPs, memory, waiting for data.

Only real tokens count, never padding; and only the time of training steps, not that of evaluations and checkpoints
between them. Counts stay on the device until a log reads them, so no step waits for the device. After a resume the
first figures cover the steps since then.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # accelerate brings it
import torch
from torch import Tensor, nn
from transformers import BertForPreTraining

from bert_pretrain.attention import attention_layers

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PEAK_TFLOPS = {
    **{"A10": 125, "A30": 165, "A40": 150, "A100": 312, "A800": 312, "RTX A6000": 155, "RTX 3090": 71},
    **{"L4": 121, "L40": 181, "L40S": 362, "RTX 4090": 165},
    **{"H100": 989, "H100 NVL": 835, "H100 PCIe": 756, "H200": 989, "H200 NVL": 835, "H800": 989, "GH200": 989},
    **{"B200": 2250},
}
"""TFLOP/s of dense bfloat16 products, by words of torch.cuda.get_device_name(); from NVIDIA's data sheets."""


def peak_flops(device_name: str) -> float | None:
    """ "NVIDIA H100 80GB HBM3" -> 989e12; None for a device that PEAK_TFLOPS does not have."""
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def attends_fully(model: nn.Module) -> bool:
    """Whether every layer compares all tokens of a sequence, so that attention costs the square of its length."""
    return all(bool(getattr(layer.attention_head, "is_full", False)) for layer in attention_layers(model))


class ModelFlops:
    """FLOPs that a BERT needs, forward and backward, for tokens that are there: no padding, nothing computed twice.

        6 · (weights of the encoder's matrices) · tokens
      + 12 · layers · width · Σ length²                    only if attention is full
      + 12 · width · Σ shared keys of each layer · tokens  only if attention is full: learned keys, as `persistent` has
      + 6 · (width² + width · vocabulary) · predicted tokens

    As PaLM counts them (arXiv 2204.02311, appendix B), with the lengths of single sequences, and the vocabulary
    projection where it is computed. A shared layer counts once a pass; of experts count those that a token chooses.
    Pooler and pair classifier, one token in a sequence, are left out.
    """

    def __init__(self, model: BertForPreTraining):
        config = model.config
        self.attention = attends_fully(model)
        encoder: Any = model.bert.encoder
        self.per_token = 6 * sum(map(_weights_of_token, getattr(encoder, "passes", encoder.layer)))
        self.per_square = 12 * config.num_hidden_layers * config.hidden_size if self.attention else 0
        if self.attention:
            heads = [layer.attention_head for layer in attention_layers(model)]
            self.per_token += 12 * config.hidden_size * sum(getattr(head, "shared_keys", 0) for head in heads)
        self.per_prediction = 6 * config.hidden_size * (config.hidden_size + config.vocab_size)

    def __call__(self, tokens: int, squares: int, predicted: int) -> int:
        return self.per_token * tokens + self.per_square * squares + self.per_prediction * predicted


def _weights_of_token(layer: Any) -> int:
    """Of a layer's matrices, how many numbers a token meets; of experts, those that it chooses."""
    own = ("attention_head", "feed_forward")
    shared = sum(
        weight.numel()
        for name, weight in layer.named_parameters()
        if weight.dim() == 2 and not any(part in own for part in name.split("."))
    )
    other = layer._modules.get("feed_forward")  # where it is not stock BERT's, whose parts are counted above
    return shared + (0 if other is None else other.weights_a_token())


class Meter:
    """Time and counts since the last log.

    clock:  training |-------|         |-----|      |---|     a log reads and empties it
            else             evaluate        save

    model: gives the FLOPs; device: whose memory; peak: FLOP/s of one device, None if unknown: then there is no MFU.
    """

    def __init__(self, model: BertForPreTraining, device: torch.device, peak: float | None = None):
        self.flops, self.device, self.peak = ModelFlops(model), device, peak
        self.reset()

    def reset(self) -> None:
        self._counts: Tensor | int = 0
        self._seconds = self._waited = 0.0
        self._running_since: float | None = None

    def add_step(self, packs: Tensor, predicted: Tensor) -> None:
        """The counts of one optimizer step, over all ranks.

        packs: (4,) sequences, tokens, token slots of packs that hold any, sum of squared lengths; predicted: tokens.
        """
        self._counts = self._counts + torch.cat([packs, predicted[None]])

    def run(self) -> None:
        """A training step starts, or continues."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def stop(self) -> None:
        """Something else starts. The device finishes its steps first: they belong to training."""
        if self._running_since is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds += time.perf_counter() - self._running_since
        self._running_since = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        was_running = self._running_since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.run()

    def waiting(self, batches: Iterator) -> Iterator:
        """The same batches; the time that each `next` takes is waiting for data."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def read(self, num_processes: int = 1, gather: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        """The metrics since the last log; the next ones start from here. Empty if there was no step.

        Over several ranks they are the time of the slowest, the memory of the largest, and the mean share of waiting.
        gather: (1, 3) of each rank -> (ranks, 3)
        """
        self.stop()
        if not torch.is_tensor(self._counts):
            return {}
        sequences, tokens, _, squares, predicted = self._counts.tolist()
        own = torch.tensor([[self._seconds, self._waited, self.peak_memory()]], dtype=torch.float64, device=self.device)
        seconds, waited, memory = gather(own).cpu().unbind(1)
        self.reset()
        slowest = float(seconds.max())
        if not slowest > 0:  # a clock so coarse that no step took time
            return {}
        flops = self.flops(tokens, squares, predicted) / slowest / num_processes  # a second, of one device
        name = "model_tflops" if self.flops.attention else "model_tflops_without_attention"
        metrics = {
            "tokens_per_second": tokens / slowest,
            "sequences_per_second": sequences / slowest,
            name: flops / 1e12,
        }
        if self.peak is not None and self.flops.attention:
            metrics["mfu"] = flops / self.peak
        metrics["peak_memory_gib"] = float(memory.max()) / 2**30
        metrics["data_wait_share"] = float((waited / seconds).nanmean())
        return metrics

    def peak_memory(self) -> int:
        """Bytes: of tensors on a CUDA device; elsewhere of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return psutil.Process().memory_info().peak_wset
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def known_peak(device: torch.device, peak_tflops: float | None) -> float | None:
    """FLOP/s of one device: what was given, or what is known of this GPU."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
