"""Batches on their way to a GPU.

host        many tensors in one copy, and what the host still has of them
transfer    to_device: a batch goes to a device with its layout

Others import to_device from collate; collate also takes send, on_host and CollatedBatch.
"""
