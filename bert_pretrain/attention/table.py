"""ATTENTION: the name of every attention head, one row a head; `ls heads/` shows the same names."""

from collections.abc import Callable

from torch import nn

from bert_pretrain.attention.heads.adaptive_span import AdaptiveSpanAttention
from bert_pretrain.attention.heads.axial import AxialAttention
from bert_pretrain.attention.heads.bigbird import BigBirdAttention
from bert_pretrain.attention.heads.clustered import ClusteredAttention
from bert_pretrain.attention.heads.delta import DeltaAttention
from bert_pretrain.attention.heads.entmax import EntmaxAttention
from bert_pretrain.attention.heads.etc import EtcAttention
from bert_pretrain.attention.heads.etc_stream import EtcStreamAttention
from bert_pretrain.attention.heads.fixed import FixedAttention
from bert_pretrain.attention.heads.flex import FlexAttention
from bert_pretrain.attention.heads.inducing import InducingAttention
from bert_pretrain.attention.heads.linear import LinearAttention
from bert_pretrain.attention.heads.linformer import LinformerAttention
from bert_pretrain.attention.heads.local import LocalAttention
from bert_pretrain.attention.heads.longformer import LongformerAttention
from bert_pretrain.attention.heads.lsh import LSHAttention
from bert_pretrain.attention.heads.nystrom import NystromAttention
from bert_pretrain.attention.heads.performer import PerformerAttention
from bert_pretrain.attention.heads.persistent import PersistentAttention
from bert_pretrain.attention.heads.routing import RoutingAttention
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from bert_pretrain.attention.heads.sinkhorn import SinkhornAttention
from bert_pretrain.attention.heads.strided import StridedAttention
from bert_pretrain.attention.heads.varlen import VarlenAttention

ATTENTION: dict[str, Callable[..., nn.Module]] = {
    "sdpa": SdpaAttention,
    "varlen": VarlenAttention,
    "flex": FlexAttention,
    "persistent": PersistentAttention,
    "local": LocalAttention,
    "strided": StridedAttention,
    "fixed": FixedAttention,
    "axial": AxialAttention,
    "longformer": LongformerAttention,
    "etc": EtcAttention,
    "etc_stream": EtcStreamAttention,
    "bigbird": BigBirdAttention,
    "adaptive_span": AdaptiveSpanAttention,
    "entmax": EntmaxAttention,
    "lsh": LSHAttention,
    "routing": RoutingAttention,
    "sinkhorn": SinkhornAttention,
    "clustered": ClusteredAttention,
    "inducing": InducingAttention,
    "linformer": LinformerAttention,
    "nystrom": NystromAttention,
    "linear": LinearAttention,
    "performer": PerformerAttention,
    "delta": DeltaAttention,
}
"""Name -> head. A row can be anything that builds a module from the same arguments; it also works without a row."""
