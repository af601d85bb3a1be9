"""Attention heads: pluggable attention mechanisms, every one of which keeps packed sequences apart.

The contract. An attention head is a module

    head = ATTENTION[name](num_heads=, head_width=, max_sequence_length=, layer_index=, **options)
    context_THK = head(query_THK, key_THK, value_THK, layout, dropout=0.0)

over the T real tokens of a batch: there is no padding that could leak or cost. A head scales its scores by 1/sqrt(K)
itself. If it cannot drop attention weights, `supports_dropout` is False, and a model with attention dropout refuses it.

What the context and gradients of a sequence show of its pack mates:

* their values: nothing. Other values in a pack mate change no bit, on every processor; nor does NaN, where
  `survives_nan` is True. (A GPU adds up the clusters of `routing` in any order, and the gradients of keys in
  `clustered`: there it is rounding.)
* their presence: rounding (in float64 1e-12 of the largest value). Alone, or beside others, a sequence takes part in
  products of other shapes, for which a processor may choose another kernel.
* A head whose products take their shape from values (none here does) promises rounding in both.

`use_attention` attaches heads to the layers of a transformers encoder, each a submodule of the layer that owns it. The
encoder's attention implementation becomes "packed_attention", which passes the layer's queries, keys and values on.

table      ATTENTION: one row a head
head       AttentionHead, which all heads share
use        use_attention and load_attention: heads in a transformers model
choice     `auto`: which exact attention is the fast one here
options    checks of the heads' options
parts/     what several heads are made of
heads/     one mechanism a file: `ls heads/` is the catalogue

Others import what is named below, single heads from heads/, and choice.
"""

from bert_pretrain.attention.head import AttentionHead
from bert_pretrain.attention.table import ATTENTION
from bert_pretrain.attention.use import attention_layers, load_attention, use_attention

__all__ = ["ATTENTION", "AttentionHead", "attention_layers", "load_attention", "use_attention"]
