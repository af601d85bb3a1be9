"""PackedBertForPreTraining: stock BERT's parts and weights, run on packs without their padding.

The padding is taken out once, before the embeddings. The encoder sees (1, T, D), one long row of real tokens; its
attention heads keep the sequences apart by the layout. Nothing is padded back: the losses gather what they need. So the
vocabulary projection, the largest product of a small BERT, runs on predicted positions only.
"""

import logging
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForPreTraining, BertConfig, BertForPreTraining, PreTrainedConfig
from transformers.utils import ModelOutput

from bert_pretrain.attention import AttentionHead, use_attention
from bert_pretrain.attention.head import prepare_heads
from bert_pretrain.block import BlockBertConfig, BlockEncoder, BlockOptions, place_block
from bert_pretrain.block.use import DEFAULT_ATTENTION, initialize_block
from collate.columns import IGNORED, PAIR_LABELS
from collate.device.host import tensors_in
from collate.heads.loss_rows import added_sums, rows_of
from collate.layout import PackLayout, SlotLayout, one_slot
from collate.losses import MLM_TERMS, Batch, Loss, Predicted, mlm_sums, pair_sums, pretraining_loss
from collate.views import at_least_float32
from packing.files.errors import check_known

logger = logging.getLogger(__name__)

OURS = ("packed_attention", "packed_attention_options", "mlm_loss")
"""Entries of the config that stock BERT lacks."""
PAIR_SUMS = {name: f"{name}_pairs" for name in PAIR_LABELS}
"""Objective -> the name of the sum that counts its pairs."""
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""Keywords that say where a config lies."""
VOCABULARY_STEP = 64
"""GPUs multiply matrices of such multiples several times faster."""


@dataclass
class PackedBertOutput(ModelOutput):
    """
    loss: scalar, where labels of tokens or of sentence pairs are given.
    sums: 1-D, additive over batches and ranks; `model.metrics(sums)` says what they mean.
    prediction_logits: (P, V) at the P predicted positions in order; without labels (B, L, V), as stock BERT has it.
        None in training, where nobody reads them.
    seq_relationship_logits: (N, 2), one row per [CLS] in order, those with the label -100 included.
    last_hidden_state: (B, L, D) without labels, else None: training never pads back.
    """

    loss: Tensor | None = None
    sums: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


class PackedBertForPreTraining(BertForPreTraining):
    """BERT with MLM and NSP heads for batches of `DataCollatorWithPacking`; the NSP head can learn SOP instead.

    Checkpoints are those of `BertForPreTraining`, tensor for tensor, in both directions. Three additions to the config:
    `packed_attention` (a name or one per layer, default "sdpa"), `mlm_loss` ("sequence": every sequence weighs the
    same; "token": every predicted token does) and `block`, the options of `bert_pretrain.block`. With a block that
    stock BERT does not compute, a checkpoint is that of `BlockBertForPreTraining`, which stock's Auto classes refuse.
    """

    pair_columns = tuple(PAIR_LABELS.values())
    """Labels of sentence pairs that `forward` takes, one of them at a time."""

    def __init__(self, config: BertConfig, **ours: Any):
        """ours: entries for a config that lacks them, as from_pretrained hands them on with a stock checkpoint."""
        for name, value in ours.items():
            if name not in OURS:
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}")
            setattr(config, name, value)
        mlm_loss = getattr(config, "mlm_loss", None) or "sequence"
        check_known("mlm_loss", mlm_loss, MLM_TERMS)
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("packed pretraining is for encoders; set is_decoder=False and add_cross_attention=False")
        super().__init__(config)
        config.mlm_loss = mlm_loss
        self._has_said = False
        place_block(self, _block_of(config), is_new=True)
        use_attention(
            self,
            getattr(config, "packed_attention", None) or DEFAULT_ATTENTION,
            **(getattr(config, "packed_attention_options", None) or {}),
        )

    def forward(
        self,
        input_ids: Tensor,
        sequence_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cls_positions: Tensor | None = None,
        denominators: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **pair_labels: Tensor | None,
    ) -> PackedBertOutput:
        """Run the packs of one batch.

        input_ids, sequence_ids, position_ids, token_type_ids, labels: (B, L). position_ids defaults to counting from 0
            in each sequence, token_type_ids to 0.
        cls_positions: (B, S), -1 in empty slots; defaults to each sequence's first token.
        denominators: (k,) what the loss is divided by, counted over an optimizer step by `count_denominators`; None:
            over this batch.
        attention_mask: refused, as sequence_ids says more.
        pair_labels: one of next_sentence_label (0: B is the next sentence, 1: a random one) and sentence_order_label
            (0: A and B in order, 1: switched, as AlbertForPreTraining has it), (B, S), -100 in empty slots. One head
            learns either; the metrics are called nsp_… or sop_… accordingly.
        """
        if attention_mask is not None or sequence_ids is None:
            raise ValueError(
                "PackedBertForPreTraining needs sequence_ids (1, 2, 3… within each row, 0 on padding) and takes no "
                "attention_mask, which cannot tell sequences apart; with one per row pass the mask as sequence_ids"
            )
        objective, pair_label = _pair_label(pair_labels)
        layout = PackLayout.of(sequence_ids)
        assert self.bert.pooler is not None
        hidden_TD, given = self._encode(layout, input_ids, position_ids, token_type_ids)
        targets = layout.from_host(_Targets.of, labels, cls_positions, pair_label)
        pair_logits_N2 = self.cls.seq_relationship(self.bert.pooler(hidden_TD.index_select(0, targets.cls)[:, None]))
        if labels is None and pair_label is None:
            return PackedBertOutput(
                prediction_logits=layout.pad(self.cls.predictions(hidden_TD)),
                seq_relationship_logits=pair_logits_N2,
                last_hidden_state=layout.pad(hidden_TD),
            )

        predicted_PD = hidden_TD.index_select(0, targets.predicted.tokens)
        labelled_N2 = pair_logits_N2.index_select(0, targets.labelled)
        to_sum = predicted_PD, targets.predicted, labelled_N2, targets.pair_labels
        if "_sums" in self.__dict__:
            _let_sizes_change(to_sum)
        logits_PV, sums = self._sums(*to_sum)
        sums |= {total: sums["pairs"] * (name == objective) for name, total in PAIR_SUMS.items()}
        loss = self._loss(objective)
        sums |= added_sums(self, loss.added, layout, given)
        return PackedBertOutput(
            loss=loss(sums, denominators),
            sums=loss.stacked(sums, layout),
            prediction_logits=None if self.training else logits_PV[:, : self.config.vocab_size],
            seq_relationship_logits=pair_logits_N2,
        )

    def _sums(
        self, hidden_PD: Tensor, predicted: Predicted, pair_logits_N2: Tensor, pair_labels_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits of predicted tokens, and the sums of both losses."""
        logits_PV = self._predict(hidden_PD)
        sums = mlm_sums(logits_PV, predicted)
        return logits_PV, sums | pair_sums(at_least_float32(pair_logits_N2), pair_labels_N, by_row=True)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the encoder as one graph, and the losses as another; args and options: of torch.compile.

        Where one graph does not hold for all batches, by a head's `is_one_graph` or by the block, the encoder runs as
        it is. Each graph is compiled once for all sizes of batches, since what has such sizes is made before.
        PackedTrainer calls this for --torch_compile. `torch.compile(model)` would end a graph wherever a size is read.

        On a CPU dropout draws as it does uncompiled: inductor's own generator is so slow there that compiling costs.
        """
        options = {"fullgraph": True} | options
        is_plain = options.get("backend", "inductor") == "inductor" and options.get("mode") in (None, "default")
        if self.device.type == "cpu" and is_plain and not args and not options.get("options"):
            options |= {"mode": None, "options": {"fallback_random": True}}
        self.bert.encoder.compile(*args, **options)
        self.__dict__["_sums"] = torch.compile(self._sums, *args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not compiled, as in torch."""
        return {name: value for name, value in super().__getstate__().items() if name != "_sums"}

    def encode(
        self,
        layout: PackLayout,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(T, D): the last hidden state of every real token."""
        return self._encode(layout, input_ids, position_ids, token_type_ids)[0]

    def _encode(
        self, layout: PackLayout, input_ids: Tensor, position_ids: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(T, D), and the sums for terms that its layers add to the loss; see collate.heads.loss_rows."""
        if layout.num_tokens == 0:
            # A rank that ran out of packs must still take part in the step, with a gradient of 0 for every parameter.
            # BERT's layers cannot run on no token: run on a slot of padding, and keep nothing of it.
            hidden_TD, given = self._encode(one_slot(layout), torch.zeros_like(input_ids[:1, :1]), None, None)
            return hidden_TD[:0], {total: value[None][:0].sum() for total, value in given.items()}
        heads = [module for module in self.modules() if isinstance(module, AttentionHead)]
        prepare_heads(heads, layout)
        position_ids = layout.positions if position_ids is None else position_ids
        token_type_ids = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        embedded_1TD = self.bert.embeddings(
            input_ids=layout.unpad(input_ids)[None],
            position_ids=layout.unpad(position_ids)[None],
            token_type_ids=layout.unpad(token_type_ids)[None],
        )
        encoder: Any = self.bert.encoder
        if encoder._compiled_call_impl is not None:
            left_out = {type(head).__name__ for head in heads if not head.is_one_graph(layout)}
            if left_out := left_out | (encoder.not_one_graph(layout) if isinstance(encoder, BlockEncoder) else set()):
                self._say_left_out(left_out)
                encoder = encoder._call_impl
            elif not isinstance(layout, SlotLayout):
                torch._dynamo.maybe_mark_dynamic(embedded_1TD, 1)
            for head in heads:
                head.before_graph(layout)
            views = {} if isinstance(layout, SlotLayout) else vars(layout)
            _let_sizes_change([layout.tables, [x for x in views.values() if isinstance(x, Tensor)]])
        encoded = encoder(embedded_1TD, layout=layout)
        return encoded.last_hidden_state[0], getattr(encoded, "loss_sums", {})

    def _say_left_out(self, heads: set[str]) -> None:
        """Once a model."""
        if not self._has_said:
            self._has_said = True
            names = " and ".join(sorted(heads))
            logger.info("the encoder runs uncompiled where no graph holds for the steps of %s", names)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Losses and accuracies from summed `PackedBertOutput.sums`.

        Raises ValueError for sums over several kinds of pairs: no accuracy among them has a meaning.
        """
        names = self._loss().names
        counts = {name: int(sums[names.index(total)]) for name, total in PAIR_SUMS.items()}
        first, *others = [name for name, count in counts.items() if count] or ["nsp"]
        if others:
            raise ValueError(
                f"{counts[others[0]]} of {sum(counts.values())} labelled sequences have a {PAIR_LABELS[others[0]]}, "
                f"the others a {PAIR_LABELS[first]}; evaluate them apart"
            )
        return self._loss(first).metrics(sums)

    def count_denominators(self, batch: Batch) -> Tensor:
        """(k,) what the loss is divided by, of one batch; these add up over the batches and ranks of a step.

        Predicted tokens, sequences with predicted tokens, sequences with a label of their pair. Where modules add terms
        to the loss, sequences or tokens follow.
        """
        return self._loss().count(batch)

    def _loss(self, objective: str = "nsp") -> Loss:
        loss = replace(pretraining_loss(self.config.mlm_loss, objective), others=tuple(PAIR_SUMS.values()))
        return loss.plus(rows_of(self))

    def _predict(self, hidden_PD: Tensor) -> Tensor:
        """(P, V) logits; on a GPU V is rounded up, since its products want a multiple, and these logits are -inf."""
        decoder = self.cls.predictions.decoder
        missing = -decoder.out_features % VOCABULARY_STEP if hidden_PD.device.type == "cuda" else 0
        if not missing or type(decoder) is not nn.Linear:
            return self.cls.predictions(hidden_PD)
        weight_VD = F.pad(decoder.weight, (0, 0, 0, missing))
        bias_V = F.pad(decoder.bias, (0, missing), value=-torch.inf)
        return F.linear(self.cls.predictions.transform(hidden_PD), weight_VD, bias_V)

    def initialize_weights(self) -> None:
        """Draw the weights of a new model, or those that a checkpoint lacks; attention heads draw their own."""
        super().initialize_weights()
        initialize_block(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint with a block becomes a BlockBertForPreTraining."""
        if cls is PackedBertForPreTraining and not isinstance(kwargs.get("config"), PreTrainedConfig):
            place = kwargs.get("config") or pretrained_model_name_or_path
            found, _ = PreTrainedConfig.get_config_dict(place, **{k: kwargs[k] for k in OF_THE_HUB if k in kwargs})
            if found.get("model_type") == BlockBertConfig.model_type:
                return BlockBertForPreTraining.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, but the config names the stock class, which reads the same tensors."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        self.config.architectures = [BertForPreTraining.__name__]
        if is_main_process:
            self.config.save_pretrained(save_directory)


class BlockBertForPreTraining(PackedBertForPreTraining):
    """PackedBertForPreTraining with a block of its own; `AutoModelForPreTraining` finds it."""

    config: BlockBertConfig


AutoModelForPreTraining.register(BlockBertConfig, BlockBertForPreTraining, exist_ok=True)


def _block_of(config: BertConfig) -> BlockOptions:
    """The options of the block that a config names.

    chunk_size_feed_forward, which stock BERT has, cuts padded rows into equal chunks; a block cuts tokens.
    """
    options = BlockOptions.of(getattr(config, "block", None))
    if options.chunk_size is None and config.chunk_size_feed_forward:
        return options.with_changes({"chunk_size": config.chunk_size_feed_forward})
    return options


def _pair_label(pair_labels: dict[str, Tensor | None]) -> tuple[str, Tensor | None]:
    """The objective of the sentence pairs, and their labels (B, S); there is one head for them."""
    names = {column: name for name, column in PAIR_LABELS.items()}
    for name in pair_labels:
        if name not in names:
            raise TypeError(f"PackedBertForPreTraining.forward() got an unexpected keyword argument {name!r}")
    given = {name: labels for name, labels in pair_labels.items() if labels is not None}
    if len(given) > 1:
        raise ValueError(
            f"the batch has {' and '.join(given)}, and one head cannot learn both; remove one of the columns from the "
            "dataset"
        )
    return next(((names[column], labels) for column, labels in given.items()), ("nsp", None))


def _let_sizes_change(tree: Any) -> None:
    """Tell torch.compile that the first dimension of these tensors is a size of the batch.

    Else it compiles for the sizes of the first batch, and again for the second.
    """
    for tensor in tensors_in(tree):
        if tensor.dim():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


class _Targets(NamedTuple):
    """Where the heads look, all integers: for `layout.from_host`.

    cls: (N,) which of the T tokens are [CLS]. predicted: tokens. labelled: which of the N have a label, and pair_labels
    these.
    """

    cls: Tensor
    predicted: Predicted
    labelled: Tensor
    pair_labels: Tensor

    @classmethod
    def of(
        cls, layout: PackLayout, labels: Tensor | None, cls_positions: Tensor | None, pair_label: Tensor | None
    ) -> "_Targets":
        predicted = Predicted.of(layout, labels)
        if cls_positions is None:
            if pair_label is not None:
                raise ValueError(
                    "labels of sentence pairs (packs, sequence slots) need cls_positions of the same shape"
                )
            first = layout.cu_seqlens[:-1].long()[layout.is_real_sequence]
            return cls(first, predicted, first[:0], first[:0])
        pack, slot = (cls_positions >= 0).nonzero(as_tuple=True)
        first = layout.token_of_slot[pack * layout.sequence_ids_BL.shape[1] + cls_positions[pack, slot]]
        if pair_label is None:
            return cls(first, predicted, first[:0], first[:0])
        pair_labels_N = pair_label[pack, slot]
        labelled = (pair_labels_N != IGNORED).nonzero().squeeze(1)
        return cls(first, predicted, labelled, pair_labels_N[labelled])
