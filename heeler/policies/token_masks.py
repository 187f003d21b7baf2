"""Keeping a policy to a set of tokens: the same mask in sampling, log-probabilities and reference.

A masked logit is `MASKED`, far enough below every other that its probability is exactly 0, and finite, so that
`p * logit` stays 0 in the entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heeler.types import HeelerError

MASKED = -1e9


@dataclass(frozen=True, kw_only=True)
class AllTokens:
    """Every token may be sampled."""


@dataclass(frozen=True, kw_only=True)
class OnlyTokens:
    """Only these may be sampled, and the ends of sequence.

    Attributes:
        texts: each must be one token, for instance " yes" (a space counts).
    """

    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WithoutTokens:
    """These may not be sampled.

    Attributes:
        texts: each must be one token.
    """

    texts: tuple[str, ...]


TokenMask = AllTokens | OnlyTokens | WithoutTokens


def token_bias(mask: TokenMask, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]) -> Tensor | None:
    """`[V]` float32 to be added to the logits: 0 where a token may be sampled, else `MASKED`; None where all may.

    Raises:
        HeelerError: a text is not one token, or no token is left.
    """
    if isinstance(mask, AllTokens):
        return None
    ids = [_token_id(text, tokenizer, vocab_size) for text in mask.texts]
    if isinstance(mask, OnlyTokens):
        bias = torch.full((vocab_size,), MASKED)
        bias[[*ids, *eos_ids]] = 0.0
    else:
        bias = torch.zeros(vocab_size)
        bias[ids] = MASKED
    if not set((bias == 0).nonzero()[:, 0].tolist()) - set(eos_ids):
        raise HeelerError(
            "the token mask forbids every token but the end of sequence: no completion could say anything; allow at"
            " least one"
        )
    return bias


def _token_id(text: str, tokenizer: Any, vocab_size: int) -> int:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] >= vocab_size:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
        raise HeelerError(
            f"the token mask names {text!r}, which this tokenizer splits into {pieces}: each text must be exactly one"
            " token (a leading space often makes the difference)"
        )
    return ids[0]
