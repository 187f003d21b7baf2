"""What an actor-critic reads to score decisions again: steps, or whole segments where it has a memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from heeler.ppo.minibatches import decision_indices

Observed = Tensor | dict[str, Tensor]


def pick(observations: Observed, indices: Tensor | slice) -> Observed:
    """The rows `indices` of observations, which may be a dict."""
    if isinstance(observations, dict):
        return {name: part[indices] for name, part in observations.items()}
    return observations[indices]


def count(observations: Observed) -> int:
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


class _WithoutPrompts:
    @property
    def groups(self) -> None:
        return None

    @property
    def neighbours(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Steps(_WithoutPrompts):
    """Environment steps, each an item of its own; implements `heeler.types.Inputs`.

    Attributes:
        observations: `[N, ...]` as the policy saw them, normalised where it normalises.
        actions: `[N]` or `[N, A]`, raw (before clipping to the environment's bounds).
        masks: `[N, M]` bool, allowed actions, or None.
    """

    observations: Observed
    actions: Tensor
    masks: Tensor | None = None

    @property
    def decision_counts(self) -> Tensor:
        return torch.ones(len(self.actions), dtype=torch.int64, device=self.actions.device)

    @property
    def costs(self) -> Tensor:
        return self.decision_counts

    def select(self, items: Tensor | slice) -> Self:
        masks = None if self.masks is None else self.masks[items]
        return type(self)(observations=pick(self.observations, items), actions=self.actions[items], masks=masks)


@dataclass(frozen=True, kw_only=True)
class Segments(_WithoutPrompts):
    """Runs of steps, each an item, for policies with a memory; implements `heeler.types.Inputs`.

    Attributes:
        observations, actions, masks: `[N, ...]` the steps of all segments behind one another.
        offsets: `[S+1]` where each segment begins.
        states: `[S, D]` the memory before each segment's first step (0 where an episode begins).
    """

    observations: Observed
    actions: Tensor
    masks: Tensor | None
    offsets: Tensor
    states: Tensor

    @property
    def decision_counts(self) -> Tensor:
        return self.offsets.diff()

    @property
    def costs(self) -> Tensor:
        return self.offsets.diff()

    def select(self, items: Tensor) -> Self:
        lengths = self.offsets.diff()
        steps = decision_indices(items, lengths)
        chosen = lengths[items]
        return type(self)(
            observations=pick(self.observations, steps),
            actions=self.actions[steps],
            masks=None if self.masks is None else self.masks[steps],
            offsets=torch.cat([chosen.new_zeros(1), chosen.cumsum(0)]),
            states=self.states[items],
        )
