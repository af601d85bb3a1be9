"""TASKS: which task a stock model has, by the name of its class; one row a kind of head."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collate.heads.classification import SequenceClassification, TokenClassification
from collate.heads.embedding import SequenceEmbedding
from collate.heads.gather import prepare_head, task_model
from collate.heads.loss_rows import rows_of
from collate.heads.pretraining import MaskedLM, PreTraining
from collate.heads.question_answering import QuestionAnswering
from collate.heads.task import Task
from collate.losses import Batch

TASKS: dict[str, type[Task]] = {
    "ForSequenceClassification": SequenceClassification,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
    "ForMaskedLM": MaskedLM,
    "ForPreTraining": PreTraining,
    "ForNextSentencePrediction": SequenceClassification,
}
"""How the name of a stock class ends -> its task."""


def task_for(model: nn.Module, **options: Any) -> Task:
    """The task of a stock model, by its class and config; it also prepares the model, see `prepare_head`.

        BertForSequenceClassification, config.num_labels=3  ->  SequenceClassification(num_labels=3)
        RobertaModel, pooling="mean"                        ->  SequenceEmbedding(pooling="mean")

    options: fields of the task, which win over the config.
    Raises ValueError for a model without a packed task, and for one whose sequences cannot be isolated.
    """
    stock = task_model(model)
    if "denominators" in inspect.signature(stock.forward).parameters:
        raise ValueError(f"{type(stock).__name__} counts its own loss; call it, it needs no task")
    task = _task_class(stock).for_config(stock.config, **options)
    prepare_head(model)
    return with_rows_of(model, task)


def with_rows_of(model: nn.Module, task: Task) -> Task:
    """The task, with the terms that modules of the model add to the loss; see collate.heads.loss_rows."""
    rows = rows_of(model)
    if rows and not isinstance(task, Task):
        raise ValueError(
            f"modules of the model add {', '.join(row.name for row in rows)} to its loss, which the task "
            f"{type(task).__name__} would leave out; derive it from collate.heads.Task"
        )
    return replace(task, added=rows) if rows else task


def _task_class(stock: PreTrainedModel) -> type[Task]:
    if stock.base_model is stock:
        return SequenceEmbedding
    for parent in type(stock).__mro__:  # a subclass of a stock class has the stock class's task
        for ending, task in TASKS.items():
            if parent.__name__.endswith(ending):
                return task
    raise ValueError(
        f"there is no packed task for {type(stock).__name__}; there are tasks for encoders and for classes whose names "
        f"end in {sorted(TASKS)}"
    )


def packed_predictions(model: nn.Module, batch: Batch, task: Task | None = None) -> tuple[Tensor, ...]:
    """Inference on one batch: a tensor for each sequence, in the batch's order.

    Classification (C,), token classification (n, C), question answering (n, 2), embeddings (D,); see the tasks.
    task: None: that of `task_for(model)`. The model is in evaluation mode meanwhile.
    """
    task = task_for(model) if task is None else task
    prepare_head(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return task(model, batch).predictions.split()
    finally:
        model.train(was_training)
