"""Advantages on packed decisions: generalised advantage estimation (GAE).

    delta_t = r_t + gamma * V_{t+1} - V_t          V after the last decision of segment s is bootstrap[s]
    A_t     = delta_t + gamma * lambda * A_{t+1}   never across a segment's edge
    R_t     = A'_t + V_t                           target of the value function; A' uses lambda_value

| symbol | variable | shape |
|---|---|---|
| r_t | `rewards` | `[N]` |
| V_t | `values` | `[N]` |
| V after the end | `bootstrap` | `[S]` |
| gamma, lambda | `gamma`, `lam` | scalars |
| segment edges | `offsets` | `[S+1]` |

Source: Schulman et al., High-Dimensional Continuous Control Using GAE, arXiv 1506.02438, equations 11 and 16.
A lambda of its own for the critic: VC-PPO, arXiv 2503.01491. Derivation: docs/algorithm.md#advantages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heeler.ppo.moments import whiten
from heeler.types import Reduce, ScoredRollout, TrainBatch


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How rewards become advantages.

    Attributes:
        gamma: discount per decision. 1 for language models: a token is no unit of time.
        lam: lambda of GAE; 0 is one-step TD, 1 is Monte Carlo.
        value_lam: lambda for the value targets; `lam` where None (then returns = A + V).
        whiten: normalise advantages to mean 0 and std 1 over the global batch, by policy weight.
        recompute: before each epoch of an update but the first, values and advantages are computed again by the critic
            as it is then [Andrychowicz et al., 2006.05990, section 3.5]; in environments only.
        importance_cap: behavior-to-old ratios are truncated here before they weight the loss.
    """

    gamma: float = 1.0
    lam: float = 0.95
    value_lam: float | None = None
    whiten: bool = True
    recompute: bool = False
    importance_cap: float = 2.0


def gae(rewards: Tensor, values: Tensor, bootstrap: Tensor, offsets: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE of every decision, `[N]`.

    Vectorised over segments: one step of the backward recursion serves all segments, so the cost in Python is
    the longest segment, not N. `tests/ppo/test_advantages.py` holds the plain-loop twin.

    Args:
        rewards: `[N]` reward of each decision.
        values: `[N]` value before each decision.
        bootstrap: `[S]` value after the last decision of each segment (0 where it terminated).
        offsets: `[S+1]` segment edges; empty segments are allowed.
        gamma: discount.
        lam: GAE's lambda.

    Raises:
        ValueError: the shapes disagree.
    """
    num_decisions, num_segments = rewards.shape[0], offsets.shape[0] - 1
    if values.shape != (num_decisions,) or bootstrap.shape != (num_segments,):
        raise ValueError(
            f"gae: rewards {tuple(rewards.shape)}, values {tuple(values.shape)}, bootstrap"
            f" {tuple(bootstrap.shape)} and offsets {tuple(offsets.shape)} do not describe the same segments"
        )
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_decisions or bool((offsets.diff() < 0).any()):
        raise ValueError(f"gae: offsets must rise from 0 to the {num_decisions} decisions, not {offsets[:8]}")
    if num_decisions == 0:
        return torch.zeros_like(values)
    lengths = offsets.diff()
    segment = torch.repeat_interleave(torch.arange(num_segments, device=offsets.device), lengths)
    position = torch.arange(num_decisions, device=offsets.device) - offsets[segment]

    next_values = torch.cat([values[1:], values.new_zeros(1)])
    nonempty = lengths > 0
    next_values[offsets[1:][nonempty] - 1] = bootstrap[nonempty].to(values.dtype)
    deltas = rewards + gamma * next_values - values

    grid = deltas.new_zeros(int(lengths.max()), num_segments)  # (L, S); beyond a segment's end it stays 0
    grid[position, segment] = deltas
    rows = grid.unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].add_(rows[t + 1], alpha=gamma * lam)
    return grid[position, segment]


def estimate_advantages(scored: ScoredRollout, config: AdvantageConfig, reduce: Reduce) -> TrainBatch:
    """Turn a scored rollout into what the update reads."""
    rollout = scored.rollout
    segments = (scored.bootstrap, rollout.offsets, config.gamma)
    advantages = gae(scored.rewards, scored.values, *segments, config.lam)
    target_advantages = advantages
    if config.value_lam is not None and config.value_lam != config.lam:
        target_advantages = gae(scored.rewards, scored.values, *segments, config.value_lam)
    returns = target_advantages + scored.values
    if config.whiten:
        advantages = whiten(advantages, scored.policy_weights, reduce)
    log_ratio = (scored.old_logprobs - rollout.behavior_logprobs).clamp(-20, 20)
    return TrainBatch(
        inputs=rollout.inputs,
        old_logprobs=scored.old_logprobs,
        old_values=scored.values,
        advantages=advantages,
        returns=returns,
        policy_weights=scored.policy_weights,
        value_weights=scored.value_weights,
        importance_weights=log_ratio.exp().clamp(max=config.importance_cap),
        attached=scored.attached,
    )
