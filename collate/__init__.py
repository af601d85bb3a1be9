"""Packed rows -> batches, layouts and packed training of stock models."""
