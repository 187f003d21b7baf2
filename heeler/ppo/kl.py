"""KL divergences: three estimators, and two controllers of the penalty toward the reference.

With x = log pi(a) - log ref(a) of a decision a sampled from pi, and KL = KL(pi || ref) = E[x]:

| name | estimate | unbiased | as a penalty in the reward |
|---|---|---|---|
| k1 | x | yes | right: its expected gradient is the gradient of the KL |
| k2 | x^2 / 2 | no (its bias is of third order in x) | |
| k3 | exp(-x) - 1 + x | yes, never negative, low variance | |

As a *loss* (differentiated through log pi) the three behave differently: k2 has the right gradient
on-policy, k3's is a biased first-order approximation, k1's expectation is zero. So Heeler penalises with k1 in
the reward and offers the others for logs and for experiments.

Sources: Schulman, Approximating KL Divergence, 2020; arXiv 2510.01555 for the loss/reward comparison;
Ziegler et al., Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593, section 2.2, for the
adaptive controller. Derivation: docs/algorithm.md#kl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate of KL(pi || ref) in nats at each decision, `[n]`. The log-ratio is clamped to +-20."""
    x = (logprobs - ref_logprobs).clamp(-20, 20)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x**2 / 2
    if estimator == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"unknown KL estimator {estimator!r}: use k1, k2 or k3")


@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """A constant penalty: reward of a decision -= coef * k1.

    Attributes:
        coef: beta, in reward per nat. 0 switches the penalty off.
    """

    coef: float = 0.05


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """A penalty that steers the KL of a sequence toward a target.

    Attributes:
        coef: the first beta.
        target: nats per sequence to aim at.
        horizon: episodes that set the pace: beta changes by error * episodes / horizon, the error within +-20 %.
    """

    coef: float = 0.05
    target: float = 6.0
    horizon: float = 10_000.0


KLConfig = FixedKL | AdaptiveKL


def next_kl_coef(config: KLConfig, coef: float, sequence_kl: float, episodes: int) -> float:
    """Beta for the next update.

    beta <- beta * max(1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon, 1/2)

    The floor is ours: with more than 5 horizons of episodes in one update beta would turn negative.

    Args:
        coef: the beta of this update.
        sequence_kl: mean nats per sequence of this rollout, global.
        episodes: sequences in this rollout, global.
    """
    if isinstance(config, FixedKL):
        return coef
    error = min(max(sequence_kl / config.target - 1, -0.2), 0.2)
    return coef * max(1 + error * episodes / config.horizon, 0.5)
