"""Stock encoders that keep packed sequences apart.

hook               isolate_sequences and check_isolation
encoders           which encoders can be isolated, which cannot, and why
lazy_mask          a block-diagonal mask that is built only if somebody reads it
exact_attention    full attention within each sequence, without a mask
varlen             FlashAttention's kernels on CUDA
"""
