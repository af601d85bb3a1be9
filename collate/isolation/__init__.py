"""How a stock encoder keeps packed sequences apart; collate.isolate_sequences and collate.check_isolation use it.

encoders           which types of encoders can be isolated, which cannot, and why: the tables SUPPORTED and REFUSED
handover           where the encoder is inside a task model or a wrapper, and whether sequence_ids get there
hook               the pre-hook on the encoder: sequence_ids -> positions, and what its attention wants
positions          which position_ids each model type wants
masks              what keeps sequences apart under sdpa, eager, flex and flash attention
lazy_mask          the mask for sdpa: it attends by sequences, and is built only if somebody reads it
exact_attention    full attention within each sequence, by torch's kernels
pieces             one sequence at a time, by torch's CPU kernel
in_graph           the same as one operator, for torch.compile
other_keys         keys that are not the queries, with a layout of their own
varlen             on CUDA in 16 bits, by FlashAttention's kernels

Others import hook.is_isolated, encoders.REFUSED, positions.position_ids_start, handover.pretrained_model, and the
attention in exact_attention, other_keys and varlen.
"""
