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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from heeler.ppo.kl import kl_estimate
from heeler.ppo.losses import clipped_surrogate, is_clipped, ratio, value_loss
from heeler.ppo.minibatches import budgeted_microbatches, decision_indices, shuffled_minibatches
from heeler.ppo.moments import explained_variance
from heeler.types import CheckFailed, HeelerError, Inputs, Optimizer, Passes, Policy, PolicyOutput, Reduce, TrainBatch


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The numbers of one update.

    Attributes:
        epochs: passes over the batch.
        minibatches: optimiser steps an epoch.
        shuffle: what is shuffled into minibatches: single sequences (or steps), or prompts with their samples, which
            then share the prompt's tokens. Only a prompt at the edge of a minibatch is split.
        clip_range: eps of the clipped surrogate.
        clip_range_high: the upper eps; the same where None.
        value_clip: range of the value clip; None for the plain squared error.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        max_grad_norm: the gradient norm of each optimiser group (policy, critic) is clipped here.
        target_kl: begin no further epoch once the mean KL(old || new) over an epoch's minibatches exceeds it (nats
            a decision, global); None never stops.
        loss_denominator: None divides by the global sum of weights (the token mean, or the sequence mean, as the
            weights say); a number divides by it (Dr. GRPO).
        token_budget: padded tokens (or steps) in one forward and backward pass, which bounds the memory; a last pass
            may be a quarter larger, in place of a small one more. None takes 1,536 on a CPU, and 8,192 elsewhere.
        ratio_tolerance: how far the mean |ratio - 1| of the very first minibatch may lie from 0.
    """

    epochs: int = 1
    minibatches: int = 1
    shuffle: Literal["sequences", "prompts"] = "sequences"
    clip_range: float = 0.2
    clip_range_high: float | None = None
    value_clip: float | None = None
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    target_kl: float | None = None
    loss_denominator: float | None = None
    token_budget: int | None = None
    ratio_tolerance: float = 1e-3

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """eps below 1, and above."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high

    def scaled(self, clip: float, entropy: float) -> PPOConfig:
        """The same with clip ranges and entropy coefficient multiplied: their schedules."""
        high = self.clip_range_high
        return replace(
            self,
            clip_range=self.clip_range * clip,
            clip_range_high=None if high is None else high * clip,
            entropy_coef=self.entropy_coef * entropy,
        )


COLUMNS = (
    "old_logprobs", "old_values", "advantages", "returns", "policy_weights", "value_weights", "importance_weights",
)  # fmt: skip


@dataclass
class _Record:
    """What the policy said of the decisions, kept for the metrics: they are computed once an update.

    Each entry belongs to one micro-batch: its rows of the batch's columns `[n, 7]`, and `[4, n]` new log-probabilities,
    entropies and the terms of the policy and the value loss.
    """

    rows: list[Tensor] = field(default_factory=list[Tensor])
    said: list[Tensor] = field(default_factory=list[Tensor])

    def mean(self, of: Callable[[Tensor, Tensor], Tensor], reduce: Reduce) -> float:
        """Mean of a function of new and old log-probabilities, by policy weight and over all processes, or NaN."""
        sums = torch.zeros(2, dtype=torch.float64)
        if self.rows:
            rows, said = torch.cat(self.rows), torch.cat(self.said, dim=1)
            weights = rows[:, 4]
            sums = torch.stack([weights, _weighted(weights, of(said[0], rows[:, 0]))]).double().sum(1).cpu()
        weight, total = (float(x) for x in reduce.sum(sums))
        return total / weight if weight else math.nan

    def sums(self, clip_low: float, clip_high: float) -> tuple[Tensor, float]:
        """Sums `[7]` over the decisions (in the order of `_SUMS`), and the largest ratio."""
        if not self.rows:
            return torch.zeros(len(_SUMS), dtype=torch.float64), -math.inf
        old_logprobs, _, advantages, _, weights, value_weights, _ = torch.cat(self.rows).unbind(1)
        logprobs, entropy, policy_terms, value_terms = torch.cat(self.said, dim=1)
        ratios = ratio(logprobs, old_logprobs)
        terms = [
            weights,
            value_weights,
            policy_terms,
            value_terms,
            _weighted(weights, entropy),
            weights * is_clipped(logprobs, old_logprobs, advantages, clip_low, clip_high),
            _weighted(weights, kl_old_new(logprobs, old_logprobs)),
        ]
        counted = ratios[weights > 0]
        largest = float(counted.max()) if len(counted) else -math.inf
        return torch.stack(terms).double().sum(1).cpu(), largest


_SUMS = ("weight", "value_weight", "policy_loss", "value_loss", "entropy", "clipped", "kl")


def kl_old_new(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """KL(old || new) of each decision, sampled from old: the k3 estimate with the roles of the two exchanged."""
    return kl_estimate(old_logprobs, logprobs, "k3")


def _mean(sums: Tensor, name: str, weight: str = "weight") -> float:
    total = float(sums[_SUMS.index(weight)])
    return float(sums[_SUMS.index(name)]) / total if total else math.nan


def _weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """`weights * terms` where a weight of 0 silences even a NaN."""
    return torch.where(weights == 0, torch.zeros_like(terms), weights * terms)


def _columns(batch: TrainBatch) -> Tensor:
    """`[N, 7]` the batch's `COLUMNS` side by side: one gather a minibatch."""
    return torch.stack([getattr(batch, name) for name in COLUMNS], dim=1)


class _Reader:
    """How items of a batch become rows of its columns, and passes of a size."""

    def __init__(self, inputs: Inputs, share_prompts: bool) -> None:
        self.inputs, self.costs, self.decision_counts = inputs, inputs.costs, inputs.decision_counts
        self.neighbours = inputs.neighbours if share_prompts else None
        self.one_each = bool((self.decision_counts == 1).all())  # items are decisions
        alike = bool((self.costs == self.costs[:1]).all())
        self.in_order = alike and self.neighbours is None  # nothing is gained by sorting them
        self.attached: Sequence[tuple[Tensor, PolicyOutput]] = ()  # what the policy has said already
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def rows(self, columns: Tensor, items: Tensor) -> Tensor:
        """`[n, 7]` the decisions of `items`, in their order; those of the last call are remembered."""
        if self._last is None or self._last[0] is not columns or self._last[1] is not items:
            indices = items if self.one_each else decision_indices(items, self.decision_counts)
            self._last = columns, items, columns[indices]
        return self._last[2]

    def split(self, items: Tensor, tokens: int) -> Sequence[Tensor]:
        """`items` in passes of that many tokens, or in those that the policy has made already."""
        if self.attached:
            return [done for done, _ in self.attached]
        if not self.in_order:
            return budgeted_microbatches(items, self.costs, tokens, self.neighbours)
        each = max(tokens // max(int(self.costs[0]), 1), 1)
        return [items] if each >= len(items) else list(items.split(each))  # pyright: ignore


def _add_gradients(
    gradients: Callable[..., tuple[float, Tensor]], optimizer: Optimizer, reader: _Reader, columns: Tensor,
    denominators: tuple[float, float], config: PPOConfig, passes: Sequence[Tensor],
) -> tuple[_Record, str]:  # fmt: skip
    """The gradient of an optimiser step in `.grad`; returns what the policy said, and what is wrong with the loss."""
    optimizer.zero_grad(set_to_none=True)
    record = _Record()
    known = {id(items): output for items, output in reader.attached}
    reader.attached = ()  # their gradient can be taken once: if it does not fit, they are evaluated anew
    for items in passes:
        rows = reader.rows(columns, items)
        output = known.pop(id(items), None)
        if output is None:
            loss, said = gradients(reader.inputs.select(items), rows, *denominators, config)
        else:
            loss, said = loss_gradients(output, rows, *denominators, config)
        record.rows.append(rows)
        record.said.append(said)
        if not math.isfinite(loss):
            parts = said[2:].sum(1) / torch.tensor(denominators, device=said.device)
            return record, f"policy part {parts[0].item():.4g}, value part {parts[1].item():.4g}"
    return record, ""


def _check_shapes(output: PolicyOutput, n: int) -> None:
    for name in ("logprobs", "entropy", "values"):
        shape = tuple(getattr(output, name).shape)
        if shape != (n,):  # `[n, 1]` against `[n]` would broadcast to `[n, n]` and train on nonsense
            raise ValueError(f"policy.evaluate returned {name} of shape {shape} for {n} decisions: it must be ({n},)")


def autograd_gradients(
    policy: Policy, inputs: Inputs, rows: Tensor, policy_denominator: float, value_denominator: float, config: PPOConfig
) -> tuple[float, Tensor]:
    """Add the gradient of a micro-batch's loss to the parameters' `.grad`.

    A policy may bring a method `ppo_gradients` with the same arguments that does the same without autograd.

    Args:
        policy: trained.
        inputs: of the micro-batch.
        rows: `[n, 7]` its rows of `COLUMNS`.
        policy_denominator, value_denominator: of the whole optimiser step.
        config: of the update.

    Returns:
        The loss (where it is not finite, nothing was added), and `[4, n]` new log-probabilities, entropies, and the
        terms of the policy and the value loss.
    """
    return loss_gradients(policy.evaluate(inputs), rows, policy_denominator, value_denominator, config)


def loss_gradients(
    output: PolicyOutput, rows: Tensor, policy_denominator: float, value_denominator: float, config: PPOConfig
) -> tuple[float, Tensor]:
    """The same from what the policy said of the micro-batch: arguments and results as in `autograd_gradients`."""
    _check_shapes(output, len(rows))
    old_logprobs, old_values, advantages, returns, policy_weights, value_weights, importance = rows.unbind(1)
    surrogate = clipped_surrogate(output.logprobs, old_logprobs, advantages, *config.clip_ranges)
    value_errors = value_loss(output.values, old_values, returns, config.value_clip)
    policy_terms = _weighted(policy_weights, importance * surrogate)
    value_terms = _weighted(value_weights, value_errors)
    loss = policy_terms.sum() / policy_denominator + config.value_coef * (value_terms.sum() / value_denominator)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * ((policy_weights * output.entropy).sum() / policy_denominator)
    if math.isfinite(loss.item()):
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
    return loss.item(), torch.stack([output.logprobs, output.entropy, policy_terms, value_terms]).detach()


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradients down to a global norm of `max_norm`; returns the norm before."""
    if len(parameters) != 1:
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    gradient = parameters[0].grad  # one flat vector: a few operations are enough
    if gradient is None:
        return 0.0
    norm = float(torch.linalg.vector_norm(gradient))  # pyright: ignore
    if norm > max_norm:
        gradient.mul_(max_norm / (norm + 1e-6))
    return norm


def update(
    policy: Policy, optimizer: Optimizer, batch: TrainBatch, config: PPOConfig, *, generator: torch.Generator,
    reduce: Reduce, passes: Passes, refresh: Callable[[], TrainBatch] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Improve the policy on one batch, in place; returns the metrics of the update.

    The optimiser's parameter groups may carry a `name`; "policy" and "critic" are reported by name. Where `refresh` is
    given, each epoch but the first learns the advantages, returns and values of the batch that it returns: the same
    decisions, judged by the critic as it is then. `passes` says what fits into the memory.

    Raises:
        HeelerError: prompts are to be shuffled where there are none, or a single item does not fit into the memory.
        CheckFailed: the ratio is off 1 at the first minibatch, or a loss is not finite. The parameters are then
            those of the last good optimiser step.
    """
    gradients: Callable[..., tuple[float, Tensor]] = getattr(policy, "ppo_gradients", None) or partial(
        autograd_gradients, policy
    )
    reader = _Reader(batch.inputs, getattr(policy, "shares_prompts", False))
    reader.attached = batch.attached if config.minibatches == 1 else ()
    columns, costs = _columns(batch), reader.costs
    num_items = -int(reduce.max(-torch.tensor(len(costs))))  # the smallest share of any process
    groups = batch.inputs.groups if config.shuffle == "prompts" else None
    if groups is None and config.shuffle == "prompts":
        raise HeelerError('shuffle="prompts" is for samples of prompts, of which this batch has none')
    record = _Record()
    grad_norms: dict[str, list[float]] = {}
    stopped = False
    optimizer_steps = 0

    for epoch in range(config.epochs):
        if epoch > 0 and refresh is not None:
            columns = _columns(refresh())
        before = len(record.rows)
        num_minibatches = min(config.minibatches, num_items)  # fewer where there are fewer items
        for items in shuffled_minibatches(len(costs), num_minibatches, generator, groups) if num_items else []:
            items = items.to(costs.device)
            rows = reader.rows(columns, items)
            policy_denominator, value_denominator = (float(x) for x in reduce.sum(rows[:, 4:6].sum(0)))
            if policy_denominator == 0.0 and value_denominator == 0.0:
                continue  # nothing to learn from: every decision was dropped
            if config.loss_denominator is not None:
                policy_denominator = config.loss_denominator
            denominators = max(policy_denominator, 1e-12), max(value_denominator, 1e-12)
            of_step, broken = passes.fit(
                partial(reader.split, items),
                partial(_add_gradients, gradients, optimizer, reader, columns, denominators, config),
            )
            record.rows += of_step.rows
            record.said += of_step.said
            if reduce.world_size > 1 and float(reduce.max(torch.tensor(float(bool(broken))))):
                broken = broken or "in another process"  # every process stops together
            if broken:
                raise CheckFailed(
                    f"the loss is not finite in epoch {epoch + 1} of the update ({broken}):"
                    " lower the learning rate, or look for NaN in the rewards and in the model's weights"
                )
            if optimizer_steps == 0:
                error = record.mean(lambda new, old: (ratio(new, old) - 1).abs(), reduce)
                if error > config.ratio_tolerance:
                    raise CheckFailed(
                        f"the probability ratio is off 1 by {error:.2g} on average at the first minibatch, before any"
                        " optimiser step (tolerance"
                        f" {config.ratio_tolerance:.2g}): old and new log-probabilities take different paths; look for"
                        " dropout, another precision, or a temperature or mask applied on one side only"
                    )
            for group in optimizer.param_groups:
                parameters: Sequence[Tensor] = group["params"]
                reduce.gradients(parameters)
                norm = clip_gradients(parameters, config.max_grad_norm)
                if not math.isfinite(norm):
                    raise CheckFailed(
                        f"the gradient norm of the {group.get('name', 'policy')} became {norm}: lower the learning"
                        " rate or max_grad_norm, or train in fp32"
                    )
                grad_norms.setdefault(str(group.get("name", "policy")), []).append(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # gradients would lie beside the activations of the next rollout
            optimizer_steps += 1
        if config.target_kl is not None:
            of_epoch = _Record(record.rows[before:], record.said[before:])
            if of_epoch.mean(kl_old_new, reduce) > config.target_kl:
                stopped = epoch + 1 < config.epochs
                break

    if optimizer_steps == 0:
        print("update skipped: every decision of the batch has weight 0, so there is nothing to learn from")
    sums, ratio_max = record.sums(*config.clip_ranges)
    sums = reduce.sum(sums)
    explained = explained_variance(batch.old_values, batch.returns, batch.value_weights, reduce)
    metrics = {
        "policy/loss": _mean(sums, "policy_loss"),
        "policy/entropy": _mean(sums, "entropy"),
        "policy/clip_fraction": _mean(sums, "clipped"),
        "policy/ratio_max": float(reduce.max(torch.tensor(ratio_max))),
        "policy/kl_stopped": float(stopped),
        "value/loss": _mean(sums, "value_loss", "value_weight"),
        "value/explained_variance": float(explained),
        "kl/old_new": _mean(sums, "kl"),
        "optimizer_steps": float(optimizer_steps),
    }
    for name, norms in grad_norms.items():
        metrics["grad_norm" if name == "policy" else f"{name}/grad_norm"] = sum(norms) / len(norms)
    return metrics
