"""The objectives, per decision. Weights and denominators are applied in `update.py`, once for all of them.

    r      = exp(log pi_new(a) - log pi_old(a))                       `ratio`
    L_clip = -min(r * A, clip(r, 1 - eps, 1 + eps) * A)               `clipped_surrogate`
    L_V    = (V - R)^2 / 2,  or  max((V - R)^2, (V_clip - R)^2) / 2   `value_loss`
             with V_clip = V_old + clip(V - V_old, -eps_v, eps_v)

The gradient flows through log pi_new only; at pi_new = pi_old it is that of A * log pi, the policy gradient.

Sources: Schulman et al., Proximal Policy Optimization Algorithms, arXiv 1707.06347, equations 7 and 9;
the clipped value loss is from OpenAI's baselines. Derivation: docs/algorithm.md#the-clipped-surrogate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ratio(new_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Probability ratio new / old of each decision, `[n]`; the log-ratio is clamped to +-20 against overflow."""
    return (new_logprobs - old_logprobs).clamp(-20, 20).exp()


def clipped_surrogate(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Loss `[n]` (to be minimised), a pessimistic bound on the improvement.

    Args:
        new_logprobs: `[n]` with gradient.
        old_logprobs: `[n]` constants.
        advantages: `[n]` constants.
        clip_low: eps below 1: the ratio is clipped at 1 - clip_low.
        clip_high: eps above 1; equal to `clip_low` in the paper.
    """
    r = ratio(new_logprobs, old_logprobs.detach())
    clipped = r.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(r * advantages, clipped * advantages)


def is_clipped(
    new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Bool `[n]`: decisions whose gradient the clip switched off."""
    r = ratio(new_logprobs, old_logprobs)
    return ((r > 1 + clip_high) & (advantages > 0)) | ((r < 1 - clip_low) & (advantages < 0))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half squared error `[n]`; with `clip`, the larger of the plain and the clipped one."""
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (clipped - returns) ** 2) / 2
