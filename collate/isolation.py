"""Stock encoders on packed rows: make them honour `sequence_ids`, and prove that they do.

    isolate_sequences(model)                      # once, after loading
    model(input_ids, sequence_ids=...)            # each sequence as if it were alone

Nothing in transformers is patched. One pre-hook on the encoder turns `sequence_ids` (B, L) into what the configured
attention wants, once per step for all layers: a boolean mask (sdpa), an additive one (eager), a BlockMask (flex),
boundaries (flash); one mask per layer type where the encoder has sliding windows. It also fills in the positions that
restart in each sequence. A hook is no part of the weights: `save_pretrained` writes the stock checkpoint, and a model
that is loaded again must be isolated again, since a stock forward swallows `sequence_ids` without a word.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from collate.layout import PADDING, PackLayout

SUPPORTED = (
    *("albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert"),
    *("gte", "jina_embeddings_v3", "modernbert", "nomic_bert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types that are exact on packed rows: tests/test_isolation.py runs each against its sequences alone."""

REFUSED = {
    "big_bird": "it computes attention itself and never calls the attention interface",
    "convbert": "its convolutions mix neighbouring tokens, and it never calls the attention interface",
    "deberta": "its relative positions count slots of the row, and it never calls the attention interface",
    "deberta-v2": "its relative positions count slots of the row, and it never calls the attention interface",
    "longformer": "its windows are cut from the row in chunks, and it never calls the attention interface",
    "megatron-bert": "it computes attention itself and never calls the attention interface",
    "mobilebert": "its trigram embedding mixes each token with its neighbours in the row",
    "mpnet": "its relative positions count slots of the row, and it never calls the attention interface",
    "roformer": "its rotary positions count slots of the row, and it never calls the attention interface",
}
"""Why these cannot be isolated from outside."""

STARTS_AFTER_PADDING_IDX = (
    *("camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""RoBERTa and its relatives: the first position is padding_idx + 1, and 0-based positions degrade silently."""

TAKES_SEQUENCE_IDS = frozenset({"packed_attention"})
"""Attention implementations that are handed `sequence_ids` instead of a mask: see bert_pretrain.attention."""


def position_ids_start(config: PretrainedConfig) -> int:
    """The position of a sequence's first token: 0, or padding_idx + 1 for RoBERTa and its relatives."""
    return config.pad_token_id + 1 if config.model_type in STARTS_AFTER_PADDING_IDX else 0


def isolate_sequences(model: nn.Module) -> nn.Module:
    """Make a stock encoder honour `sequence_ids=` (B, L), with any task head on it, and return it.

        sequence_ids [[1, 1, 1, 2, 2, 0]]  ->  position_ids [[0, 1, 2, 0, 1, 0]]  and, True = attend,
                                               1 1 1 0 0 0
                                               1 1 1 0 0 0
                                               1 1 1 0 0 0
                                               0 0 0 1 1 0
                                               0 0 0 1 1 0
                                               0 0 0 0 0 1    padding attends to padding: no row without a key

    Without `sequence_ids` the model is the stock one. Given `position_ids` are kept. Calling it twice changes nothing.

    Raises ValueError for a model that cannot be isolated from outside, with the reason; later, in a forward, for
    `sequence_ids` beside an `attention_mask`, ids that no packing produces, or positions that begin below the model's.
    """
    encoder = _encoder(model)
    _check_supported(encoder.config)
    if not is_isolated(model):
        encoder.register_forward_pre_hook(_IsolateSequences(encoder), with_kwargs=True)
    return model


def is_isolated(model: nn.Module) -> bool:
    """Whether `isolate_sequences` was called on this model."""
    return any(isinstance(hook, _IsolateSequences) for hook in _encoder(model)._forward_pre_hooks.values())


class _IsolateSequences:
    """The pre-hook. It holds no tensor and no module, so that copies and pickles of the model just work."""

    def __init__(self, encoder: PreTrainedModel):
        self.arguments = tuple(inspect.signature(encoder.forward).parameters)

    def __call__(self, encoder: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        sequence_ids = kwargs.pop("sequence_ids", None)
        if sequence_ids is None:
            return (), kwargs
        for other in ("attention_mask", "past_key_values", "encoder_hidden_states"):
            if kwargs.get(other) is not None:
                raise ValueError(
                    f"{type(encoder).__name__} got sequence_ids and {other}; give sequence_ids alone (0 on padding): "
                    "they say all that a mask says, and which tokens belong together"
                )
        start = position_ids_start(encoder.config)
        _check_ids(sequence_ids, kwargs.get("position_ids"), start)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _own_positions(sequence_ids) + start
        return (), kwargs | _attention_arguments(encoder, sequence_ids)


def _attention_arguments(encoder: PreTrainedModel, sequence_ids_BL: Tensor) -> dict:
    """What keeps sequences apart under the encoder's attention implementation, as arguments of its forward."""
    implementation = encoder.config._attn_implementation
    if implementation in TAKES_SEQUENCE_IDS:
        return {"sequence_ids": sequence_ids_BL}
    if "flash" in implementation:
        return _flash_arguments(sequence_ids_BL)
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        raise ValueError(
            f"attention implementation {implementation!r} has no mask function, so it cannot be told which tokens "
            f"belong together; choose sdpa, eager, flex_attention or flash_attention_2, or register a mask function"
        )
    dtype = encoder.get_input_embeddings().weight.dtype
    layer_types = set(getattr(encoder.config, "layer_types", None) or ())
    if "sliding_attention" not in layer_types:
        return {"attention_mask": _mask(implementation, sequence_ids_BL, dtype)}
    windows = {"full_attention": None, "sliding_attention": encoder.config.sliding_window}
    return {"attention_mask": {t: _mask(implementation, sequence_ids_BL, dtype, windows[t]) for t in layer_types}}


def _mask(implementation: str, sequence_ids_BL: Tensor, dtype: torch.dtype, window: int | None = None):
    """The implementation's own kind of mask: query and key of one sequence and at most `window` tokens apart."""

    def attends(batch, head, query, key):
        same = sequence_ids_BL[batch, query] == sequence_ids_BL[batch, key]
        # a sequence lies in one piece: slots are as far apart as positions
        return same if window is None else same & ((query - key).abs() <= window)

    packs, slots = sequence_ids_BL.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=packs,
        q_length=slots,
        kv_length=slots,
        mask_function=attends,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=sequence_ids_BL.device,
    )


def _flash_arguments(sequence_ids_BL: Tensor) -> dict:
    """Boundaries among the B * L slots; a stretch of padding is a sequence of its own.

    [[1, 1, 2, 0], [1, 1, 1, 1]] -> cu_seqlens [0, 2, 3, 4, 8]
    """
    starts = _is_start(sequence_ids_BL).flatten().nonzero().squeeze(1)
    boundaries = torch.nn.functional.pad(starts, (0, 1), value=sequence_ids_BL.numel()).int()
    longest = sequence_ids_BL.shape[1]  # an upper bound does, and needs no wait for the device
    return {
        "attention_mask": None,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _own_positions(sequence_ids_BL: Tensor) -> Tensor:
    """(B, L) int64 from 0 in each sequence, 0 on padding; shapes are static, so it can be compiled."""
    slots = torch.arange(sequence_ids_BL.shape[1], device=sequence_ids_BL.device).expand(sequence_ids_BL.shape)
    first = torch.where(_is_start(sequence_ids_BL), slots, 0).cummax(dim=1).values
    return torch.where(sequence_ids_BL == PADDING, 0, slots - first)


def _is_start(sequence_ids_BL: Tensor) -> Tensor:
    """(B, L) bool: True where a sequence, or a stretch of padding, begins."""
    changes = sequence_ids_BL[:, 1:] != sequence_ids_BL[:, :-1]
    return torch.nn.functional.pad(changes, (1, 0), value=True)


def _check_ids(sequence_ids: Tensor, position_ids: Tensor | None, start: int) -> None:
    """Refuse ids that no packing produces and, on the CPU, positions that begin below the model's own start."""
    if sequence_ids.dim() != 2 or torch.compiler.is_compiling():
        if sequence_ids.dim() != 2:
            raise ValueError(f"sequence_ids must be (packs, slots), got {tuple(sequence_ids.shape)}")
        return
    PackLayout(sequence_ids)
    if position_ids is None or position_ids.device.type != "cpu" or not start:
        return
    real = position_ids.expand(sequence_ids.shape)[sequence_ids != PADDING]
    if len(real) and int(real.min()) < start:
        raise ValueError(
            f"position_ids begin at {int(real.min())}, but this model's first position is {start}; build the collator "
            f"with position_ids_start={start}, or leave position_ids out"
        )


def _encoder(model: nn.Module) -> PreTrainedModel:
    """The encoder inside a task model, or inside what PEFT, DDP or torch.compile wrapped around one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.base_model
    raise ValueError(f"{type(model).__name__} holds no transformers model; isolate_sequences needs one")


def _check_supported(config: PretrainedConfig) -> None:
    kind = config.model_type
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is configured as a decoder; packing without contamination is for encoders")
    if kind in REFUSED:
        raise ValueError(f"{kind} cannot keep packed sequences apart: {REFUSED[kind]}; use one of {list(SUPPORTED)}")
    if kind not in SUPPORTED:
        raise ValueError(f"{kind} is not known to keep packed sequences apart; use one of {list(SUPPORTED)}")
