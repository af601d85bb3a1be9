"""Packed task heads: fine-tuning and inference of stock transformers models on packs.

    model = AutoModelForSequenceClassification.from_pretrained(...)      # stays the stock model, and so its checkpoints
    task = task_for(model)                                               # decides the task, prepares the model
    output = task(model, batch, denominators=task.count(batch))          # loss, logits per sequence

One trick serves all heads of all architectures. A stock head reads the encoder's last hidden state (B, L, D): token 0
of each row, or all tokens. A hook on the encoder gathers what the head should read, as P sequences of one token,
(P, 1, D): the [CLS] of every sequence, the predicted tokens, or the real tokens. So the stock head sees no padding, and
projects to the vocabulary for predicted tokens only.

The stock loss is a mean over the micro-batch. Here the same formula has denominators of a whole optimizer step, which
`collate.losses` decides.

table                TASKS: the task of each stock class; task_for and packed_predictions
task                 what a task is
classification       labels of sequences, and of tokens
question_answering   spans
pretraining          masked tokens, alone and with sentence pairs
embedding            vectors of sequences
gather               the hook that gathers what a head reads, and the models that it is for
batch                what goes in: a batch, and the slots that heads read
values               what comes out: values by sequence
check                labels and ids out of range, for which a model has no place
loss_rows            terms that modules of a model add to its loss

Others import what is named below, batch, check and loss_rows.

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
