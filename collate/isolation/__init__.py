"""How a stock encoder keeps packed sequences apart; collate.isolate_sequences and collate.check_isolation use it.

encoders           which encoders can be isolated, which cannot, and why
handover           the way of sequence_ids to the encoder inside a task model, or inside a wrapper
hook               the pre-hook on the encoder
arguments          positions, and which other arguments contradict sequence_ids, by model type
masks              what keeps sequences apart under each attention implementation
lazy_mask          a block-diagonal mask that is built only if somebody reads it
exact_attention    full attention within each sequence, without a mask
varlen             FlashAttention's kernels on CUDA

Others import hook.is_isolated, encoders.REFUSED, arguments.position_ids_start, handover.pretrained_model, and the
attention in exact_attention and varlen.
"""
