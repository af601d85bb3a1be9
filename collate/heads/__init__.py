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

table                TASKS: the task of each stock class; task_for and packed_predictions
task                 what a task is
classification       labels of sequences, and of tokens
question_answering   spans
pretraining          masked tokens, alone and with sentence pairs
embedding            vectors of sequences
gather               the hook, and the models that it is for
batch                what goes in: where the sequences of a batch lie
values               what comes out: values by sequence
check                what has no place in a model: labels and ids out of range

How the losses are summed and divided is in collate.losses. Others import what is named below, batch and check.

Shape letters as in collate.layout; P slots that a head reads, S sequence slots per pack, C labels, V vocabulary.
"""

from collate.heads.classification import SequenceClassification, TokenClassification
from collate.heads.embedding import SequenceEmbedding
from collate.heads.gather import GatherForHead, prepare_head
from collate.heads.pretraining import MaskedLM, PreTraining
from collate.heads.question_answering import QuestionAnswering
from collate.heads.table import TASKS, packed_predictions, task_for
from collate.heads.task import PackedOutput, Task
from collate.heads.values import PerSequence

__all__ = [
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
