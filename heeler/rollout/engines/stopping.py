"""Stop strings: found in the decoded tail of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heeler.types import HeelerError


class StopStrings:
    """Tells which stop string a completion has just completed.

    Args:
        tokenizer: decodes the tail.
        stop: the strings; an empty one would end everything and is refused.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        if any(not text for text in stop):
            raise HeelerError("a stop string is empty: every completion would end at once; remove it")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        # a token adds at least one byte, so the tokens that spell a stop string are at most its bytes; the two more
        # keep the decoder's treatment of a text's beginning (spaces, halves of characters) away from it
        self.window = max((len(text.encode()) for text in stop), default=0) + 2

    def hit(self, tokens: Sequence[int]) -> str | None:
        """The stop string in the last tokens, the earliest one where there are several; None where there is none."""
        if not self.stop:
            return None
        tail = self.tokenizer.decode(list(tokens[-self.window :]), skip_special_tokens=True)
        found = [(tail.find(text), text) for text in self.stop if text in tail]
        return min(found)[1] if found else None
