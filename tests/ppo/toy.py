"""The smallest things that meet the protocols: a tabular policy, its inputs, and processes made of threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from heeler.ppo.update import PPOConfig, update
from heeler.runtime.passes import PassBudget, pass_budget
from heeler.runtime.reduce import LocalReduce
from heeler.types import PolicyOutput, Reduce, TrainBatch

T = TypeVar("T")

NUM_STATES, NUM_ACTIONS = 5, 4


def rows_of(items: Iterable[int], decision_counts: Tensor) -> list[int]:
    """The plain-loop twin of `decision_indices`."""
    counts = decision_counts.tolist()
    rows: list[int] = []
    for item in items:
        start = sum(counts[:item])
        rows.extend(range(start, start + counts[item]))
    return rows


@dataclass(frozen=True)
class ToyInputs:
    """A state and the action taken there, for each decision; `names [I]` says which item is which."""

    states: Tensor
    actions: Tensor
    decision_counts: Tensor
    costs: Tensor
    names: Tensor
    groups: Tensor | None = None
    neighbours: tuple[Tensor, Tensor] | None = None

    def select(self, items: Tensor) -> ToyInputs:
        rows = torch.tensor(rows_of(items.tolist(), self.decision_counts), dtype=torch.int64)
        return ToyInputs(
            self.states[rows], self.actions[rows], self.decision_counts[items], self.costs[items], self.names[items]
        )


class TablePolicy(nn.Module):
    """A softmax over actions and a value for every state, in float64. Remembers the items it evaluated."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(NUM_STATES, NUM_ACTIONS, generator=generator, dtype=torch.float64))
        self.state_values = nn.Parameter(torch.randn(NUM_STATES, generator=generator, dtype=torch.float64))
        self.evaluated: list[list[int]] = []

    def evaluate(self, inputs: Any) -> PolicyOutput:
        self.evaluated.append(inputs.names.tolist())
        table = self.logits.log_softmax(-1)
        entropies = -(table.exp() * table).sum(-1)
        return PolicyOutput(
            logprobs=table[inputs.states, inputs.actions],
            entropy=entropies[inputs.states],
            values=self.state_values[inputs.states],
        )


def make_inputs(decision_counts: Sequence[int], states: Sequence[int], actions: Sequence[int]) -> ToyInputs:
    counts = torch.tensor(decision_counts, dtype=torch.int64)
    return ToyInputs(torch.tensor(states), torch.tensor(actions), counts, counts + 1, torch.arange(len(counts)))


def make_batch(
    policy: TablePolicy, decision_counts: Sequence[int] = (3, 1, 4, 2, 5, 2, 1, 3), seed: int = 1
) -> TrainBatch:
    """A batch of random decisions with random weights, scored by the policy before its update."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(decision_counts)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)

    states = torch.randint(NUM_STATES, (size,), generator=generator).tolist()
    actions = torch.randint(NUM_ACTIONS, (size,), generator=generator).tolist()
    inputs = make_inputs(decision_counts, states, actions)
    with torch.no_grad():
        output = policy.evaluate(inputs)
    policy.evaluated.clear()
    return TrainBatch(
        inputs=inputs,
        old_logprobs=output.logprobs,
        old_values=output.values,
        advantages=uniform(-2, 2),
        returns=uniform(-2, 2),
        policy_weights=uniform(0.1, 1),
        value_weights=uniform(0.1, 1),
        importance_weights=uniform(0.5, 1.5),
    )


def select_batch(batch: TrainBatch, items: Sequence[int]) -> TrainBatch:
    """The batch of these items only."""
    rows = rows_of(items, batch.inputs.decision_counts)
    vectors = {f.name: getattr(batch, f.name)[rows] for f in fields(batch) if f.name not in ("inputs", "attached")}
    return replace(batch, inputs=batch.inputs.select(torch.tensor(items)), **vectors)


def updated(
    policy: TablePolicy,
    batch: TrainBatch,
    config: PPOConfig,
    *,
    lr: float = 0.5,
    seed: int = 0,
    reduce: Reduce | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    passes: PassBudget | None = None,
) -> tuple[TablePolicy, dict[str, float]]:
    """A copy of the policy after one update, and the metrics."""
    policy = copy.deepcopy(policy)
    metrics = update(
        policy,
        optimizer(policy.parameters(), lr=lr),
        batch,
        config,
        generator=torch.Generator().manual_seed(seed),
        reduce=reduce or LocalReduce(),
        passes=passes or PassBudget(pass_budget(config.token_budget, torch.device("cpu"))),
    )
    return policy, metrics


def flat(policy: TablePolicy) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


class ThreadReduce:
    """`Reduce` over threads that stand for processes; see `in_processes`."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def _gather(self, x: Any) -> list[Any]:
        self._slots[self.rank] = x
        self._barrier.wait()
        everything = list(self._slots)
        self._barrier.wait()  # nobody writes before everybody has read
        return everything

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._gather(x.detach().clone())).sum(0)

    def max(self, x: Tensor) -> Tensor:
        return torch.stack(self._gather(x.detach().clone())).amax(0)

    def gradients(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            gradients = [g for g in self._gather(parameter.grad) if g is not None]
            total = torch.stack(gradients).sum(0) if gradients else None
            self._barrier.wait()  # the gradients that others read must outlive their sum
            parameter.grad = total


def in_processes(num_processes: int, work: Callable[[ThreadReduce], T]) -> list[T]:
    """Run `work` in threads that reduce among each other; the results by rank."""
    slots: list[Any] = [None] * num_processes
    barrier = threading.Barrier(num_processes, timeout=20)

    def process(rank: int) -> T:
        try:
            return work(ThreadReduce(rank, slots, barrier))
        except BaseException:
            barrier.abort()  # else the others would wait for ever
            raise

    with ThreadPoolExecutor(num_processes) as pool:
        futures = [pool.submit(process, rank) for rank in range(num_processes)]
    errors = [error for error in (f.exception() for f in futures) if error is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [f.result() for f in futures]
