"""What came of texts that were tokenized. Apart from the rest, since it is light to import: Numba takes a second."""

from __future__ import annotations

from typing import NamedTuple


class Amount(NamedTuple):
    """Bytes of text that an encoder had, and of those that the tokenizer read; reason: why it read all of them."""

    bytes: int = 0
    new_bytes: int = 0
    reason: str = ""

    def plus(self, other: Amount) -> Amount:
        return Amount(self.bytes + other.bytes, self.new_bytes + other.new_bytes, other.reason)

    def since(self, earlier: Amount) -> Amount:
        return Amount(self.bytes - earlier.bytes, self.new_bytes - earlier.new_bytes, self.reason)

    @property
    def known_share(self) -> float:
        """Of the text, what was made of units known before, in 0..1."""
        return 1 - self.new_bytes / self.bytes if self.bytes else 0.0

    def __str__(self) -> str:
        told = f"tokenized {self.bytes / 1e6:,.1f} MB of texts"
        if self.reason:
            return f"{told} one by one: {self.reason}"
        return f"{told}, {self.known_share:.2%} of it by units known before"


class DifferentTokens(ValueError):
    """A text for which the table and the tokenizer disagree."""

    def __init__(self, text: str):
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"the tokenizer gives other tokens than its units for the text {self.text[:200]!r}"
