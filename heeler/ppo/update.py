"""One PPO update: epochs of shuffled, clipped, minibatched optimiser steps.

    loss = sum(w_pi * rho * L_clip) / D_pi  +  c_v * sum(w_v * L_V) / D_v  -  c_e * sum(w_pi * H) / D_pi

| symbol | variable |
|---|---|
| w_pi, w_v | `policy_weights`, `value_weights` |
| rho | `importance_weights` (engine against trainer) |
| D_pi, D_v | the weights' global sums over the minibatch, or a constant |
| c_v, c_e | `value_coef`, `entropy_coef` |

The denominators are fixed per optimiser step and global, so that neither micro-batching nor the number of
processes changes a gradient. Source: arXiv 1707.06347, algorithm 1 and equation 9.
Derivation: docs/algorithm.md#the-loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from heeler.ppo.kl import kl_estimate
from heeler.ppo.losses import clipped_surrogate, is_clipped, ratio, value_loss
from heeler.ppo.minibatches import budgeted_microbatches, decision_indices, shuffled_minibatches
from heeler.ppo.moments import explained_variance
from heeler.types import CheckFailed, Policy, PolicyOutput, Reduce, TrainBatch


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The numbers of one update.

    Attributes:
        epochs: passes over the batch.
        minibatches: optimiser steps an epoch.
        clip_range: eps of the clipped surrogate; `clip_range_high`, where given, is the upper one.
        value_clip: range of the value clip; None for the plain squared error.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        max_grad_norm: the gradient norm of each optimiser group (policy, critic) is clipped here.
        target_kl: begin no further epoch once the mean KL(old || new) over an epoch's minibatches exceeds it (nats
            a decision, global); None never stops.
        loss_denominator: None divides by the global sum of weights (the token mean, or the sequence mean, as the
            weights say); a number divides by it (Dr. GRPO).
        token_budget: padded tokens (or steps) in one forward pass.
        ratio_tolerance: how far the mean |ratio - 1| of the very first minibatch may lie from 0.
    """

    epochs: int = 1
    minibatches: int = 1
    clip_range: float = 0.2
    clip_range_high: float | None = None
    value_clip: float | None = None
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    target_kl: float | None = None
    loss_denominator: float | None = None
    token_budget: int = 4096
    ratio_tolerance: float = 1e-3

    def scaled(self, clip: float, entropy: float) -> PPOConfig:
        """The same with clip ranges and entropy coefficient multiplied: their schedules."""
        high = self.clip_range_high
        return replace(
            self,
            clip_range=self.clip_range * clip,
            clip_range_high=None if high is None else high * clip,
            entropy_coef=self.entropy_coef * entropy,
        )


@dataclass
class _Sums:
    """Sums over the decisions of an update, on their way to the metrics."""

    totals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    ratio_max: Tensor = field(default_factory=lambda: torch.tensor(-math.inf))

    def add(self, name: str, x: Tensor) -> None:
        x = x.detach().double().sum()
        self.totals[name] = self.totals[name] + x if name in self.totals else x

    def mean(self, name: str, weight: str, reduce: Reduce) -> float:
        zero = torch.zeros((), dtype=torch.float64)
        total = float(reduce.sum(self.totals.get(weight, zero)))
        return float(reduce.sum(self.totals.get(name, zero))) / total if total else math.nan


def _weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """`weights * terms` where a weight of 0 silences even a NaN."""
    return torch.where(weights == 0, torch.zeros_like(terms), weights * terms)


def _check_shapes(output: PolicyOutput, n: int) -> None:
    for name in ("logprobs", "entropy", "values"):
        shape = tuple(getattr(output, name).shape)
        if shape != (n,):  # `[n, 1]` against `[n]` would broadcast to `[n, n]` and train on nonsense
            raise ValueError(f"policy.evaluate returned {name} of shape {shape} for {n} decisions: it must be ({n},)")


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    config: PPOConfig,
    *,
    generator: torch.Generator,
    reduce: Reduce,
) -> dict[str, float]:
    """Improve the policy on one batch, in place; returns the metrics of the update.

    The optimiser's parameter groups may carry a `name`; "policy" and "critic" are reported by name.

    Raises:
        CheckFailed: the ratio is off 1 at the first minibatch, or a loss is not finite. The parameters are then
            those of the last good optimiser step.
    """
    clip_low = config.clip_range
    clip_high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    costs, decision_counts = batch.inputs.costs, batch.inputs.decision_counts
    num_items = -int(reduce.max(-torch.tensor(len(costs))))  # the smallest share of any process
    sums = _Sums()
    grad_norms: dict[str, list[float]] = {}
    stopped = False
    optimizer_steps = 0

    for epoch in range(config.epochs):
        epoch_sums = _Sums()
        num_minibatches = min(config.minibatches, num_items)  # fewer where there are fewer items
        for items in shuffled_minibatches(len(costs), num_minibatches, generator) if num_items else []:
            items = items.to(costs.device)
            decisions = decision_indices(items, decision_counts)
            policy_denominator = reduce.sum(batch.policy_weights[decisions].sum())
            value_denominator = reduce.sum(batch.value_weights[decisions].sum())
            if float(policy_denominator) == 0.0 and float(value_denominator) == 0.0:
                continue  # nothing to learn from: every decision was dropped
            if config.loss_denominator is not None:
                policy_denominator = torch.full_like(policy_denominator, config.loss_denominator)
            minibatch_sums = _Sums()
            broken = ""
            optimizer.zero_grad(set_to_none=True)
            for micro_items in budgeted_microbatches(items, costs, config.token_budget):
                indices = decision_indices(micro_items, decision_counts)
                output = policy.evaluate(batch.inputs.select(micro_items))
                _check_shapes(output, len(indices))
                old_logprobs, advantages = batch.old_logprobs[indices], batch.advantages[indices]
                policy_weights, value_weights = batch.policy_weights[indices], batch.value_weights[indices]

                surrogate = clipped_surrogate(output.logprobs, old_logprobs, advantages, clip_low, clip_high)
                value_errors = value_loss(
                    output.values, batch.old_values[indices], batch.returns[indices], config.value_clip
                )
                policy_terms = _weighted(policy_weights, batch.importance_weights[indices] * surrogate)
                value_terms = _weighted(value_weights, value_errors)
                policy_part = policy_terms.sum() / policy_denominator.clamp(min=1e-12)
                value_part = value_terms.sum() / value_denominator.clamp(min=1e-12)
                loss = policy_part + config.value_coef * value_part
                if config.entropy_coef:
                    entropy = (policy_weights * output.entropy).sum() / policy_denominator.clamp(min=1e-12)
                    loss = loss - config.entropy_coef * entropy
                if not torch.isfinite(loss):
                    broken = f"policy part {policy_part.item():.4g}, value part {value_part.item():.4g}"
                    break
                loss.backward()  # pyright: ignore[reportUnknownMemberType]

                with torch.no_grad():
                    new_logprobs = output.logprobs.detach()
                    ratios = ratio(new_logprobs, old_logprobs)
                    clipped = is_clipped(new_logprobs, old_logprobs, advantages, clip_low, clip_high)
                    minibatch_sums.add("weight", policy_weights)
                    minibatch_sums.add("value_weight", value_weights)
                    minibatch_sums.add("policy_loss", policy_terms)
                    minibatch_sums.add("value_loss", value_terms)
                    minibatch_sums.add("entropy", _weighted(policy_weights, output.entropy))
                    minibatch_sums.add("ratio_error", _weighted(policy_weights, (ratios - 1).abs()))
                    minibatch_sums.add("clipped", policy_weights * clipped)
                    # KL(old || new), sampled from old: the k3 estimate with the roles of the two exchanged
                    kl = kl_estimate(old_logprobs, new_logprobs, "k3")
                    minibatch_sums.add("kl", _weighted(policy_weights, kl))
                    if bool((policy_weights > 0).any()):
                        sums.ratio_max = torch.maximum(sums.ratio_max, ratios[policy_weights > 0].max().cpu())
            if float(reduce.max(torch.tensor(float(bool(broken))))):  # every process stops together
                raise CheckFailed(
                    f"the loss is not finite in epoch {epoch + 1} of the update ({broken or 'in another process'}):"
                    " lower the learning rate, or look for NaN in the rewards and in the model's weights"
                )
            if optimizer_steps == 0:
                error = minibatch_sums.mean("ratio_error", "weight", reduce)
                if error > config.ratio_tolerance:
                    raise CheckFailed(
                        f"the probability ratio is off 1 by {error:.2g} on average at the first minibatch, before any"
                        " optimiser step (tolerance"
                        f" {config.ratio_tolerance:.2g}): old and new log-probabilities take different paths; look for"
                        " dropout, another precision, or a temperature or mask applied on one side only"
                    )
            groups = optimizer.param_groups
            for group in groups:
                parameters: Sequence[Tensor] = group["params"]
                reduce.gradients(parameters)
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
                if not math.isfinite(norm):
                    raise CheckFailed(
                        f"the gradient norm of the {group.get('name', 'policy')} became {norm}: lower the learning"
                        " rate or max_grad_norm, or train in fp32"
                    )
                grad_norms.setdefault(str(group.get("name", "policy")), []).append(norm)
            optimizer.step()
            optimizer_steps += 1
            for name, total in minibatch_sums.totals.items():
                sums.add(name, total)
                epoch_sums.add(name, total)
        if config.target_kl is not None and epoch_sums.mean("kl", "weight", reduce) > config.target_kl:
            stopped = epoch + 1 < config.epochs
            break

    if optimizer_steps == 0:
        print("update skipped: every decision of the batch has weight 0, so there is nothing to learn from")
    metrics = {
        "policy/loss": sums.mean("policy_loss", "weight", reduce),
        "policy/entropy": sums.mean("entropy", "weight", reduce),
        "policy/clip_fraction": sums.mean("clipped", "weight", reduce),
        "policy/ratio_max": float(reduce.max(sums.ratio_max)),
        "policy/kl_stopped": float(stopped),
        "value/loss": sums.mean("value_loss", "value_weight", reduce),
        "value/explained_variance": float(
            explained_variance(batch.old_values, batch.returns, batch.value_weights, reduce)
        ),
        "kl/old_new": sums.mean("kl", "weight", reduce),
        "optimizer_steps": float(optimizer_steps),
    }
    for name, norms in grad_norms.items():
        metrics["grad_norm" if name == "policy" else f"{name}/grad_norm"] = sum(norms) / len(norms)
    return metrics
