"""The loop. It reads like the algorithm, and knows nothing of language models or environments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from heeler.ppo.advantages import AdvantageConfig, estimate_advantages
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig, update
from heeler.runtime.passes import PassBudget
from heeler.types import Collector, Optimizer, Policy, Reduce, Rollout, ScoredRollout, TrainBatch


class LoopConfig(Protocol):
    """What the loop reads of a run's config."""

    @property
    def updates(self) -> int: ...
    @property
    def lr_schedule(self) -> Schedule: ...
    @property
    def clip_schedule(self) -> Schedule: ...
    @property
    def entropy_schedule(self) -> Schedule: ...
    @property
    def advantage(self) -> AdvantageConfig: ...
    @property
    def ppo(self) -> PPOConfig: ...


@dataclass
class TrainState:
    """What changes over a run, and what a checkpoint holds.

    Attributes:
        policy: trained in place.
        optimizer: its groups carry `base_lr`, which the schedule multiplies, and where they wait for others
            `starts_at`, the first update that trains them.
        generator: shuffles the minibatches.
        step: updates done.
        passes: tokens of a forward and backward pass; no checkpoint holds them, since they are the machine's.
        kl_coef: beta of the penalty toward the reference.
        decisions, episodes, seconds: totals so far.
    """

    policy: Any
    optimizer: Optimizer
    generator: torch.Generator
    passes: PassBudget
    step: int = 0
    kl_coef: float = 0.0
    decisions: int = 0
    episodes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class UpdateReport:
    """What a callback sees after each update: the metrics, and the rollout they came from."""

    metrics: dict[str, float]
    scored: ScoredRollout


Score = Callable[[Rollout, TrainState], tuple[ScoredRollout, dict[str, float]]]
Revalue = Callable[[ScoredRollout], ScoredRollout]


def _judge_again(revalue: Revalue, scored: ScoredRollout, config: AdvantageConfig, reduce: Reduce) -> TrainBatch:
    return estimate_advantages(revalue(scored), config, reduce)


def train_loop(
    state: TrainState, collector: Collector, score: Score, config: LoopConfig, reduce: Reduce,
    after_update: Callable[[UpdateReport], bool], revalue: Revalue | None = None,
) -> None:  # fmt: skip
    """Run updates until `config.updates`, or until `after_update` returns False.

    `revalue` gives a rollout the values and bootstraps of the critic as it is now: `config.advantage.recompute` asks it
    in each epoch.
    """
    policy: Policy = state.policy
    collector.publish(policy, state.step)  # before the first rollout too: a resumed run must not sample old weights
    while state.step < config.updates:
        start = time.perf_counter()
        rollout = collector.collect(state.step)
        collected = time.perf_counter()
        scored, metrics = score(rollout, state)
        batch = estimate_advantages(scored, config.advantage, reduce)
        judged = time.perf_counter()
        factor = config.lr_schedule.factor(state.step, config.updates)
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor if state.step >= group.get("starts_at", 0) else 0.0
        ppo = config.ppo.scaled(
            clip=config.clip_schedule.factor(state.step, config.updates),
            entropy=config.entropy_schedule.factor(state.step, config.updates),
        )
        refresh = None
        if config.advantage.recompute:
            if revalue is None:
                raise ValueError("advantage.recompute needs a run that can value a rollout again")
            refresh = partial(_judge_again, revalue, scored, config.advantage, reduce)
        metrics |= update(
            policy, state.optimizer, batch, ppo, generator=state.generator, reduce=reduce, passes=state.passes,
            refresh=refresh,
        )  # fmt: skip
        state.step += 1
        collector.publish(policy, state.step)
        end = time.perf_counter()

        counts = reduce.sum(torch.tensor([len(rollout.behavior_logprobs), rollout.num_episodes]))
        decisions = int(counts[0])
        state.decisions += decisions
        state.episodes += int(counts[1])
        state.seconds += end - start
        metrics |= {
            "step": state.step,
            "decisions": state.decisions,
            "episodes": state.episodes,
            "seconds": state.seconds,
            "decisions_per_second": decisions / (end - start),
            "lr": state.optimizer.param_groups[0]["lr"],
            "time/rollout": collected - start,
            "time/score": judged - collected,
            "time/update": end - judged,
        }
        if not after_update(UpdateReport(metrics, scored)):
            break
