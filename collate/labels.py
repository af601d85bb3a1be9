"""What labels have in common, whoever makes them or reads them."""

IGNORED = -100
"""The label of a position where nothing is predicted (the value that torch's cross-entropy ignores)."""
