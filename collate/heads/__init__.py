"""Packed task heads: fine-tuning and inference of stock transformers models on packed rows.

    model = AutoModelForSequenceClassification.from_pretrained(...)      # stays the stock model, and so its checkpoints
    task = task_for(model)                                               # decides the task, prepares the model
    output = task(model, batch, denominators=task.count(batch))          # loss, logits per sequence

One trick serves all heads of all architectures. A stock head reads the encoder's last hidden state (B, L, D): token 0
of each row, or all tokens. So a hook on the encoder gathers what the head should read and hands it on as P sequences
of one token, (P, 1, D): the [CLS] of every sequence, the predicted tokens, the real tokens. The head is the stock one,
and it runs on nothing else: no padding, and no vocabulary projection but for predicted tokens.

The loss is not the stock one, which is a mean over the micro-batch and so depends on accumulation and on the number of
processes; it is the same formula with denominators that may be counted over a whole optimizer step.

gather               the hook, and the models that it is for
batch                what goes in: where the sequences of a batch lie, and what of them has a label
check                what has no place in a model: labels and ids out of range
task                 what a task is; classification, question_answering, pretraining, embedding: the tasks
values               what comes out: values by sequence

Shape letters as in collate.layout; P slots that a head reads, S sequence slots per pack, C labels, V vocabulary.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collate.heads.classification import SequenceClassification, TokenClassification
from collate.heads.embedding import SequenceEmbedding
from collate.heads.gather import GatherForHead, prepare_head, task_model
from collate.heads.pretraining import PAIR_LABELS, MaskedLM, PreTraining
from collate.heads.question_answering import QuestionAnswering
from collate.heads.task import PackedOutput, Task
from collate.heads.values import PerSequence

__all__ = [
    "PAIR_LABELS",
    "TASKS",
    "GatherForHead",
    "MaskedLM",
    "PackedOutput",
    "PerSequence",
    "PreTraining",
    "QuestionAnswering",
    "SequenceClassification",
    "SequenceEmbedding",
    "Task",
    "TokenClassification",
    "packed_predictions",
    "prepare_head",
    "task_for",
]

TASKS: dict[str, type[Task]] = {
    "ForSequenceClassification": SequenceClassification,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
    "ForMaskedLM": MaskedLM,
    "ForPreTraining": PreTraining,
    "ForNextSentencePrediction": SequenceClassification,
}
"""How the name of a stock class ends -> its task."""


def task_for(model: nn.Module, **options) -> Task:
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
    return task


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


def packed_predictions(model: nn.Module, batch: Mapping[str, Tensor], task: Task | None = None) -> tuple[Tensor, ...]:
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
