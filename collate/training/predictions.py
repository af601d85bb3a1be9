"""Evaluation and prediction: sums over batches and ranks, and predictions in the order of the dataset."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import trainer_utils

from collate.columns import IGNORED
from collate.heads import PerSequence
from collate.training.dataloaders import names_killed_workers
from collate.training.hooks import overrides_trainer
from collate.training.own_loss import SeenModel, TakesOwnLoss, has_sequences, loss_by
from collate.training.progress import RunningSums, count_sequences, drop_figures_of_rows


class Predictions:
    """Predictions and labels of all sequences, in the order of the dataset that was packed."""

    def __init__(self):
        self.batches: list[tuple[PerSequence, PerSequence | None, np.ndarray | None]] = []

    def add(self, outputs: Any, batch: Mapping[str, Tensor]) -> None:
        """Add one batch; a sequence's key is its row in the source, and where in the row it begins."""
        if getattr(outputs, "predictions", None) is None:
            raise ValueError(
                "a model with a loss of its own has no predictions per sequence; evaluate() gives metrics, and the "
                "model itself logits"
            )
        is_sequence = batch["cls_positions"] >= 0
        if not is_sequence.any():  # empty packs have none of the dataset's columns, labels and indices among them
            return
        names = [name for name in ("sequence_indices", "sequence_starts") if name in batch]
        names = names if "sequence_indices" in names else []  # packs of a stream: their order is that of its packs
        keys = torch.stack([batch[name][is_sequence] for name in names], 1).cpu().numpy() if names else None
        labels = None if outputs.labels is None else _on_cpu(outputs.labels)
        self.batches.append((_on_cpu(outputs.predictions), labels, keys))

    def gathered(self, num_processes: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(N, …) each; it pads ragged values: logits with -inf, labels with -100."""
        batches = self.batches
        if num_processes > 1:  # the ranks take turns: for rows without indices this is their order
            turns = itertools.zip_longest(*gather_object([batches]))
            batches = [batch for turn in turns for batch in turn if batch is not None]
        predictions, labels, keys = zip(*batches, strict=True)
        predictions = PerSequence.concatenate(predictions)
        labels = None if labels[0] is None else PerSequence.concatenate(labels)
        if keys[0] is not None:
            keys = np.concatenate(keys)
            if len(np.unique(keys, axis=0)) < len(keys):
                raise ValueError(
                    "several sequences have the same sequence_indices, so predictions have no order: packed datasets "
                    "were concatenated; predict on each, or concatenate the sources and pack them together"
                )
            order = torch.from_numpy(np.lexsort(keys.T[::-1]))
            predictions = predictions.take(order)
            labels = None if labels is None else labels.take(order)
        ragged = float("-inf") if predictions.values.is_floating_point() else IGNORED
        return predictions.padded(ragged).numpy(), None if labels is None else labels.padded(IGNORED).numpy()


def _on_cpu(values: PerSequence) -> PerSequence:
    return PerSequence(values.values.cpu(), None if values.lengths is None else values.lengths.cpu())


@overrides_trainer
class EvaluatesSequences(TakesOwnLoss):
    """Part of a Trainer that has a task: evaluation counts sequences, and predictions have one row per sequence."""

    _no_objective: set[str]
    """Metrics that hyperparameter search does not minimise."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with names_killed_workers(self.args):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> trainer_utils.PredictionOutput:
        with names_killed_workers(self.args):
            output = super().predict(*args, **kwargs)
        drop_figures_of_rows(output.metrics or {})
        return output

    def num_examples(self, dataloader: DataLoader) -> int:
        """Sequences, as in every figure of samples."""
        counted = count_sequences(getattr(dataloader, "dataset", None))
        return super().num_examples(dataloader) if counted is None else counted

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> trainer_utils.EvalLoopOutput:
        """Sums over the whole evaluation set, then one division: a deep pack weighs what its sequences weigh."""
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models:  # evaluation without training before it
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        sums, losses = RunningSums(), RunningSums()
        collected = None if prediction_loss_only else Predictions()
        for inputs in dataloader:
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs, loss_and_weight = self._evaluated(model, self._prepare_inputs(inputs))
            sums.add(outputs.sums)
            losses.add(loss_and_weight)
            if collected is not None:
                collected.add(outputs, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        if sums.total is None:
            raise ValueError(f"{description}: the dataset has no packs; give an evaluation set with at least one")
        metrics = self.task.metrics(self.accelerator.reduce(sums.take(), "sum").cpu())
        if self._override is not None:
            total, weight = self.accelerator.reduce(losses.take(), "sum").tolist()
            metrics.pop("loss", None)
            metrics = {"loss": total / weight, **metrics} if weight else metrics
        predictions: Any
        predictions, labels = (None, None) if collected is None else collected.gathered(self.args.world_size)
        users = {}
        if self.compute_metrics is not None and labels is not None:
            given = self.compute_metrics(trainer_utils.EvalPrediction(predictions=predictions, label_ids=labels))
            users = _prefixed(trainer_utils.denumpify_detensorize(given), metric_key_prefix)
        own = _prefixed(metrics, metric_key_prefix)
        self._no_objective |= own.keys() - {f"{metric_key_prefix}_loss"}
        self._no_objective -= users.keys()
        return trainer_utils.EvalLoopOutput(
            predictions=predictions, label_ids=labels, metrics=own | users, num_samples=metrics["sequences"]
        )

    def _evaluated(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
        """The task's outputs; (2,) an override's loss times its weight, and the weight: what it is a mean over."""
        nothing = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        if self._override is None or not has_sequences(inputs):
            return self.task(model, inputs), nothing
        counts = self.task.count(inputs)
        if len(counts) and not counts.any():  # no labels, no loss: training does the same
            return self.task(model, inputs), nothing
        seen = SeenModel(self.task, model, inputs, counts, ranks=1)
        loss = loss_by(self._override, seen, type(self).__name__, needs_count=False).detach().double()
        outputs = self.task(model, inputs) if seen.output is None else seen.output
        weight = self.task.weight(inputs).to(nothing)
        return outputs, torch.stack([loss.to(nothing) * weight, weight])

    def hyperparameter_search(
        self, hp_space: Callable | None = None, compute_objective: Callable | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The default objective is Trainer's: the loss, or with metrics of the user's the sum of these."""
        if compute_objective is None:
            compute_objective = self._default_objective
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def _default_objective(self, metrics: dict[str, float]) -> float:
        """The objective of evaluate()'s metrics, without counts and those that only PackedTrainer has."""
        kept = {
            name: value
            for name, value in metrics.items()
            if name not in self._no_objective and not re.search("_mem_[cg]pu", name)  # skip_memory_metrics=False adds
        }
        objective = trainer_utils.default_compute_objective(kept)
        if objective is None:
            raise ValueError(
                f"hyperparameter_search has no objective: evaluation gives no eval_loss, only {sorted(metrics)}; give "
                "the evaluation set labels, or hyperparameter_search a compute_objective"
            )
        return objective


def _prefixed(metrics: Mapping, prefix: str) -> dict:
    """As Trainer names them: {"f1": 1, "eval_f2": 2}, eval -> {"eval_f1": 1, "eval_f2": 2}"""
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}
