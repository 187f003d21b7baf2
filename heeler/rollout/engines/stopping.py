"""Stop strings: found in the decoded tail of what was sampled; those that are special tokens by their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heeler.types import HeelerError


def special_stops(tokenizer: Any, stop: Sequence[str]) -> dict[int, str]:
    """The stop strings that are special tokens, by id: texts are decoded without such tokens.

    Raises:
        HeelerError: a stop string has a special token and other text, and so would never be found.
    """
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for text in stop:
        inside = next((token for token in special if token in text and token != text), None)
        if inside is not None:
            raise HeelerError(
                f"the stop string {text!r} holds the special token {inside!r} and more: texts are decoded without"
                f" special tokens, so it would never be found; give {inside!r} alone"
            )
    return {special[text]: text for text in stop if text in special}


class StopStrings:
    """Tells which stop string a completion has just completed.

    Args:
        tokenizer: decodes the tail.
        stop: the strings; an empty one would end everything and is refused.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        if any(not text for text in stop):
            raise HeelerError("a stop string is empty: every completion would end at once; remove it")
        self.special = special_stops(tokenizer, stop) if stop else {}
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stop if text not in self.special.values())
        # a token adds at least one byte, so the tokens that spell a stop string are at most its bytes; the two more
        # keep the decoder's treatment of a text's beginning (spaces, halves of characters) away from it
        self.window = max((len(text.encode()) for text in self.stop), default=0) + 2

    def hit(self, tokens: Sequence[int]) -> str | None:
        """The stop string in the last tokens, the earliest one where there are several; None where there is none."""
        if tokens and tokens[-1] in self.special:
            return self.special[tokens[-1]]
        if not self.stop:
            return None
        tail = self.tokenizer.decode(list(tokens[-self.window :]), skip_special_tokens=True)
        found = [(tail.find(text), text) for text in self.stop if text in tail]
        return min(found)[1] if found else None
