"""What goes into a packed head: one batch, and the slots that the head reads."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn
from transformers.utils import ModelOutput

from collate.heads.gather import has_gather, task_model
from collate.isolation.hook import is_isolated
from collate.layout import PackLayout, holds_sequence
from collate.losses import Batch, Predicted

NOT_PASSED = ("attention_mask", "sequence_ids")
"""What an encoder takes, but sequence_ids say better. It gets all else that it takes and a batch has."""


class PackedBatch:
    """A batch of the collator, and the slots that heads read."""

    def __init__(self, batch: Batch):
        if "sequence_ids" not in batch:
            raise ValueError(
                f"the batch has no 'sequence_ids', only {sorted(batch)}; make it with DataCollatorWithPacking"
            )
        self.batch = batch
        self.layout = PackLayout.of(batch["sequence_ids"]).exact

    @property
    def cls_slots(self) -> Tensor:
        """(N,) the slot of each sequence's [CLS]: its first token where the batch has no cls_positions."""
        positions_BS = self.batch.get("cls_positions")
        if positions_BS is None:
            return self.layout.token_index[self.layout.cu_seqlens[:-1].long()]
        slots = self.layout.from_host(_cls_slots, positions_BS)
        if len(slots) != self.layout.num_sequences:
            raise ValueError(
                f"cls_positions names {len(slots)} sequences, but sequence_ids has {self.layout.num_sequences}; "
                "both must come from one collator"
            )
        return slots

    @property
    def _labels_of_nothing(self) -> Tensor | None:
        """Labels in place of a column that the batch lacks: none in number, where it has no sequence; else None."""
        return None if self.layout.num_sequences else self.layout.token_index

    def per_sequence(self, column: str) -> Tensor | None:
        """(B, S, …) -> (N, …), in the layout's order; None for a column that the batch lacks."""
        values_BS = self.batch.get(column)
        if values_BS is None:
            return self._labels_of_nothing
        packs, slots = values_BS.shape[0], values_BS.shape[1] if values_BS.dim() > 1 else 0
        sequence_ids_BL = self.layout.sequence_ids_BL
        expected = self.batch["cls_positions"].shape if "cls_positions" in self.batch else (len(sequence_ids_BL), slots)
        if (packs, slots) != tuple(expected):
            raise ValueError(
                f"{column!r} has shape {tuple(values_BS.shape)}, but this task needs one per sequence slot, "
                f"{tuple(expected)}; if these are labels of tokens, choose a token task, or else pack the dataset "
                "again with token_columns that do not name them"
            )
        index_N = self.layout.table(("sequence slots", slots), lambda layout: _sequence_slots(layout, slots))
        if len(index_N) != self.layout.num_sequences:
            raise ValueError(
                f"{column!r} has {slots} slots per pack, fewer than the {int(sequence_ids_BL.max())} sequences of one; "
                "give the collator more slots"
            )
        return values_BS.flatten(0, 1).index_select(0, index_N)

    def per_token(self, column: str) -> Tensor | None:
        """(B, L) -> (T,); None for a column that the batch lacks."""
        values_BL = self.batch.get(column)
        if values_BL is None:
            return self._labels_of_nothing
        if values_BL.shape != self.layout.sequence_ids_BL.shape:
            raise ValueError(
                f"{column!r} has shape {tuple(values_BL.shape)}, but this task needs one per token slot, "
                f"{tuple(self.layout.sequence_ids_BL.shape)}; if these are labels of sequences, choose a sequence task"
            )
        return self.layout.unpad(values_BL)

    def labels_by(self, read: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """{"labels": what `read` makes of them}, such as per_token; empty for a batch without labels."""
        labels = read("labels") if "labels" in self.batch else None
        return {} if labels is None else {"labels": labels}

    def predicted(self) -> tuple[Tensor, Predicted | None]:
        """(P,) the slots with a label, and these labels; without labels the slots of all tokens, and None."""
        labels_BL = self.batch.get("labels")
        if labels_BL is None and self.layout.num_sequences:
            return self.layout.token_index, None
        if labels_BL is not None:
            self.per_token("labels")  # refuses another shape
        found = self.layout.from_host(Predicted.of, labels_BL)
        return self.layout.token_index.index_select(0, found.tokens), found

    def run(
        self,
        model: nn.Module,
        slots: Tensor,
        head_lengths: Tensor | None = None,
        pooler_slots: Tensor | None = None,
    ) -> ModelOutput:
        """The model on this batch, its head on these slots; see GatherForHead."""
        stock = task_model(model)
        encoder = stock.base_model
        if not (has_gather(encoder) and is_isolated(model)):
            raise ValueError(
                f"{type(stock).__name__} is not prepared: its head would read the first token of each pack; "
                "call task_for(model) or prepare_head(model) after loading it"
            )
        accepted = inspect.signature(encoder.forward).parameters
        inputs = {name: self.batch[name] for name in accepted if name in self.batch and name not in NOT_PASSED}
        output = model(
            **inputs,
            sequence_ids=self.batch["sequence_ids"],
            head_slots=slots,
            head_lengths=head_lengths,
            pooler_slots=pooler_slots,
            return_dict=True,
        )
        rows = len(slots) if head_lengths is None else len(head_lengths)
        if len(output[0]) != rows:
            raise ValueError(
                f"the head of {type(stock).__name__} made {len(output[0])} rows of {rows}: it reads more than the "
                "encoder's last hidden state, so it cannot run packed; use a stock head"
            )
        return output


def _cls_slots(layout: PackLayout, positions_BS: Tensor) -> Tensor:
    """(N,) the slots of the [CLS]."""
    pack, place = (positions_BS >= 0).nonzero(as_tuple=True)
    return pack * layout.sequence_ids_BL.shape[1] + positions_BS[pack, place]


def _sequence_slots(layout: PackLayout, slots: int) -> Tensor:
    """(N,) which of the B * slots sequence slots hold one."""
    return holds_sequence(layout.sequence_ids_BL, slots).flatten().nonzero().squeeze(1)
