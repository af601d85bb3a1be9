"""How a stock encoder keeps packed sequences apart; collate.isolate_sequences and collate.check_isolation use it.

encoders           which types of encoders can be isolated, which cannot, and why: the tables SUPPORTED and REFUSED
handover           where the encoder is inside a task model or a wrapper, and whether sequence_ids get there
hook               the pre-hook on the encoder: sequence_ids -> positions, and what its attention wants
positions          which position_ids each model type wants
masks              what keeps sequences apart under sdpa, eager, flex and flash attention
lazy_mask          the mask for sdpa: it attends by sequences, and is built only if somebody reads it
exact_attention    full attention within each sequence, without a mask, by torch's kernels
varlen             the same on CUDA in 16 bits, by FlashAttention's kernels

Others import hook.is_isolated, encoders.REFUSED, positions.position_ids_start, handover.pretrained_model, and the
attention in exact_attention and varlen.
"""
