"""From scores to the reward of each decision.

    r_t = token_reward_t - beta * KL_t              and  r_last += score

What happens to a segment that was cut (a length cap) is a choice with three names:

| truncation | the score | value after the last decision | weight in the losses |
|---|---|---|---|
| `terminal` | stands | 0 | 1 |
| `bootstrap` | withheld: V predicts it | V | 1 |
| `drop` | stands | 0 | 0 |

Whatever the choice, no reward may get lost between the scores and the decisions: `check_reward_mass`.
Source: arXiv 1909.08593, section 2.2, for the KL term. Derivation: docs/algorithm.md#kl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from heeler.types import CheckFailed

Truncation = Literal["terminal", "bootstrap", "drop"]


@dataclass(frozen=True, kw_only=True)
class ScoreShaping:
    """What happens to scores before they become rewards; logs show the raw ones.

    Attributes:
        scale: divide by the running standard deviation of all scores so far [Zheng et al., 2307.04964, section 5]; as
            long as all of them were equal, they stay as they are.
        clip: then cut off beyond +-clip; None cuts nothing.
        whiten: divide the rewards of all decisions, KL penalty included, by their standard deviation over the batch;
            the mean stays [Ziegler et al., 1909.08593].
    """

    scale: bool = False
    clip: float | None = None
    whiten: bool = False

    def apply(self, x: Tensor, std: float) -> Tensor:
        """Scores, or rewards of single tokens, scaled by `std` and clipped."""
        if self.scale:
            x = x / std
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


def segment_of_decision(offsets: Tensor) -> Tensor:
    """`[N]` the segment that each decision belongs to."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())


def segment_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """`[S]` sum of `x [N]` over each segment."""
    sums = torch.zeros(len(offsets) - 1, dtype=x.dtype, device=x.device)
    return sums.scatter_add_(0, segment_of_decision(offsets), x)


def shape_rewards(
    scores: Tensor, token_rewards: Tensor | None, kl: Tensor, kl_coef: float, offsets: Tensor, withheld: Tensor
) -> Tensor:
    """Reward of each decision, `[N]`.

    Args:
        scores: `[S]`, one a segment.
        token_rewards: `[N]` where the reward speaks of single decisions; then `scores` are their sums and are not
            added again.
        kl: `[N]` KL estimate toward the reference, nats.
        kl_coef: beta.
        offsets: `[S+1]` segment edges. A segment without decisions cannot carry its score.
        withheld: `[S]` bool, segments whose score is not paid out.

    Raises:
        CheckFailed: the rewards do not add up to the scores.
    """
    paid = torch.where(withheld, torch.zeros_like(scores), scores)
    if token_rewards is None:
        rewards = torch.zeros_like(kl)
        nonempty = offsets.diff() > 0
        rewards[offsets[1:][nonempty] - 1] = paid[nonempty]
    else:
        rewards = torch.where(withheld[segment_of_decision(offsets)], torch.zeros_like(token_rewards), token_rewards)
    rewards = rewards - kl_coef * kl
    check_reward_mass(rewards, paid, kl, kl_coef, offsets)
    return rewards


def check_reward_mass(rewards: Tensor, paid: Tensor, kl: Tensor, kl_coef: float, offsets: Tensor) -> None:
    """Each segment's rewards plus its KL penalty must be its score."""
    mass = segment_sums((rewards + kl_coef * kl).double(), offsets)
    error = (mass - paid.double()).abs()
    bad = error > 1e-3 * (1 + paid.double().abs())
    if bool(bad.any()):
        worst = int(error.argmax())
        raise CheckFailed(
            f"reward was lost between scores and decisions: segment {worst} was scored {float(paid[worst]):.4g}, its"
            f" decisions carry {float(mass[worst]):.4g}; look at empty completions and at per-token rewards that do not"
            " fit the completion's tokens"
        )


def segment_weights(offsets: Tensor, dropped: Tensor, weighting: Literal["token", "sequence"]) -> Tensor:
    """Weights of the decisions, `[N]`: every token the same, or every segment the same; 0 for dropped segments."""
    lengths = offsets.diff()
    per_segment = torch.ones(len(lengths), device=offsets.device)
    if weighting == "sequence":
        per_segment = per_segment / lengths.clamp(min=1)
    return torch.where(dropped, torch.zeros_like(per_segment), per_segment)[segment_of_decision(offsets)]
