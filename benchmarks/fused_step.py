"""One PPO minibatch of small MLPs: autograd and Adam of torch, against the fused pass and the flat Adam.

    python benchmarks/fused_step.py

CPU time of an optimiser step on one thread, the smallest of several updates of 2,048 decisions with 10 epochs; the two
take turns. Writes docs/benchmarks/fused_step.md.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware  # noqa: E402

from heeler.policies.actor_critic import ActorCritic  # noqa: E402
from heeler.policies.fused import FlatAdam  # noqa: E402
from heeler.policies.networks import MLP  # noqa: E402
from heeler.policies.steps import Steps  # noqa: E402
from heeler.ppo.update import PPOConfig, update  # noqa: E402
from heeler.runtime.reduce import LocalReduce  # noqa: E402
from heeler.types import ActionSpec, ObservationSpec, Optimizer, TrainBatch  # noqa: E402

DECISIONS = 2048
TASKS = {
    "CartPole (4 numbers, 2 actions)": (4, ActionSpec(kind="discrete", sizes=(2,))),
    "HalfCheetah (17 numbers, 6 dimensions)": (17, ActionSpec(kind="box", sizes=(1,) * 6, shape=(6,))),
}


class Case:
    """A policy, its optimiser and a batch."""

    def __init__(self, size: int, actions: ActionSpec, minibatch: int, fused: bool) -> None:
        torch.manual_seed(0)
        self.policy = ActorCritic(ObservationSpec(vector=size), actions, MLP())
        chosen = torch.randn(DECISIONS, 6) if actions.kind == "box" else torch.randint(0, 2, (DECISIONS,))
        inputs = Steps(observations=torch.randn(DECISIONS, size), actions=chosen)
        with torch.no_grad():
            said = self.policy.evaluate(inputs)
        if fused:
            self.policy.fuse()
        groups = [{"params": self.policy.trained(), "name": "policy"}]
        self.optimizer: Optimizer
        if fused:
            self.optimizer = FlatAdam(groups, lr=3e-4, eps=1e-5)
        else:
            self.optimizer = torch.optim.Adam(groups, lr=3e-4, eps=1e-5, fused=True)
        ones = torch.ones(DECISIONS)
        self.batch = TrainBatch(
            inputs=inputs, old_logprobs=said.logprobs, old_values=said.values, advantages=torch.randn(DECISIONS),
            returns=torch.randn(DECISIONS), policy_weights=ones, value_weights=ones, importance_weights=ones,
        )  # fmt: skip
        self.config = PPOConfig(
            epochs=10, minibatches=DECISIONS // minibatch, max_grad_norm=0.5, token_budget=65536, entropy_coef=0.01,
            ratio_tolerance=1e9,  # the old log-probabilities stay those of the first update
        )  # fmt: skip

    def milliseconds(self) -> float:
        """CPU time of an optimiser step in one update."""
        start = time.process_time()
        metrics = update(
            self.policy, self.optimizer, self.batch, self.config, generator=torch.Generator().manual_seed(0),
            reduce=LocalReduce(),
        )  # fmt: skip
        return (time.process_time() - start) / metrics["optimizer_steps"] * 1e3


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# One minibatch of small networks",
        "",
        "Made by `python benchmarks/fused_step.py`: CPU time of an optimiser step, two 64-64 MLPs, one thread, metrics",
        "of the update included. The two columns took turns.",
        "",
        f"Hardware: {hardware()}; torch {torch.__version__}.",
        "",
        "| task | minibatch | autograd, torch's fused Adam | fused pass, flat Adam | ratio |",
        "|---|---|---|---|---|",
    ]
    for title, (size, actions) in TASKS.items():
        for minibatch in (64, 256):
            plain, fused = Case(size, actions, minibatch, False), Case(size, actions, minibatch, True)
            pairs = [(plain.milliseconds(), fused.milliseconds()) for _ in range(8)]
            slow, fast = (min(column) for column in zip(*pairs, strict=True))
            lines.append(f"| {title} | {minibatch} | {slow:.2f} ms | {fast:.2f} ms | {slow / fast:.1f} |")
    page = ROOT / "docs" / "benchmarks" / "fused_step.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
