"""Small rewards that shape a completion's form; they are meant as terms beside a reward for its content.

Lengths are in tokens and count the end-of-sequence token where one was sampled.
"""

from __future__ import annotations

import torch

from heeler.types import HeelerError, RewardOutput, Samples


class EOSPenalty:
    """`-penalty` where the completion was cut at the length cap, else 0: text shall end.

    Args:
        penalty: what a completion without an end costs.
    """

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def __call__(self, samples: Samples) -> RewardOutput:
        return _output(-self.penalty * torch.tensor(list(samples.truncated), dtype=torch.float32))


class LengthReward:
    """`-per_token * max(length - free, 0)`: tokens beyond the free ones cost the same each.

    Args:
        free: tokens that cost nothing.
        per_token: what each further token costs; below 0 it pays, so that long completions are preferred.
    """

    def __init__(self, free: int = 0, per_token: float = 0.01) -> None:
        if free < 0:
            raise HeelerError(f"the free tokens of length must be 0 or more, not {free}")
        self.free, self.per_token = free, per_token

    def __call__(self, samples: Samples) -> RewardOutput:
        return _output(-self.per_token * (_lengths(samples) - self.free).clamp(min=0))


class Repetition:
    """Minus the share of the completion's n-grams that repeat an earlier one: 0 to, nearly, -1.

    `distinct n-grams / n-grams - 1` over words between spaces (distinct-n, Li et al., 1510.03055); 0 where there are
    fewer than n words.

    Args:
        n: words in an n-gram.
    """

    def __init__(self, n: int = 3) -> None:
        if n < 1:
            raise HeelerError(f"the n-grams of repetition need at least 1 word, not {n}")
        self.n = n

    def __call__(self, samples: Samples) -> RewardOutput:
        scores: list[float] = []
        for text in samples.completions:
            words = text.split()
            grams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
            scores.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
        return _output(torch.tensor(scores, dtype=torch.float32))


class Overlong:
    """The soft overlong punishment of DAPO (2503.14476, eq. 13), with L_max = `limit` and L_cache = `buffer`.

    0 up to `limit - buffer` tokens, `((limit - buffer) - length) / buffer` from there to `limit`, -1 beyond. The length
    cap of sampling must lie above `limit - buffer` for it to act.

    Args:
        limit: tokens from which the punishment is whole.
        buffer: tokens before the limit in which it grows.
    """

    def __init__(self, limit: int, buffer: int) -> None:
        if not 1 <= buffer <= limit:
            raise HeelerError(f"the buffer of overlong must be from 1 to its limit of {limit} tokens, not {buffer}")
        self.limit, self.buffer = limit, buffer

    def __call__(self, samples: Samples) -> RewardOutput:
        return _output((((self.limit - self.buffer) - _lengths(samples)) / self.buffer).clamp(-1, 0))


def _lengths(samples: Samples) -> torch.Tensor:
    """`[S]` float32, in tokens."""
    return torch.tensor([len(ids) for ids in samples.completion_ids], dtype=torch.float32)


def _output(scores: torch.Tensor) -> RewardOutput:
    return RewardOutput(scores=scores + 0.0, token_rewards=None, components={})  # + 0.0: no -0 in the logs
