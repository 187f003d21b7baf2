"""Where the time of PPO in environments goes, part by part, and what other ways of doing each part would cost.

    python benchmarks/control_profile.py [--seconds 8] [--rounds 15]

First a profile of whole runs of control_speed.py's settings: the time of each part without the parts that it calls.
Then the parts alone, each in several ways that take turns in one process; the median counts. Writes
docs/benchmarks/control_profile.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from heeler_control import config as case_config  # noqa: E402
from pages import hardware  # noqa: E402
from torch import nn  # noqa: E402

import heeler.ppo.update as updating  # noqa: E402
import heeler.rollout.vector as collecting  # noqa: E402
import heeler.train.control as control  # noqa: E402
import heeler.train.ppo as loop  # noqa: E402
from heeler.policies.actor_critic import ActorCritic  # noqa: E402
from heeler.policies.distributions import draw, draw_noise  # noqa: E402
from heeler.policies.fused import FlatAdam, FusedMLP  # noqa: E402
from heeler.policies.networks import MLP, NatureCNN, Network  # noqa: E402
from heeler.policies.steps import Steps  # noqa: E402
from heeler.ppo.update import PPOConfig, clip_gradients, loss_gradients  # noqa: E402
from heeler.rollout.actors import NumpyActor, TorchActor  # noqa: E402
from heeler.runtime import machine  # noqa: E402
from heeler.runtime.runs import RunFolder  # noqa: E402
from heeler.train.run import begin  # noqa: E402
from heeler.types import ActionSpec, ObservationSpec  # noqa: E402

CASES = {  # of heeler_control.py: title, threads
    "cartpole": ("CartPole-v1, Gymnasium's SyncVectorEnv", 1),
    "cartpole-vectorized": ("CartPole-v1, Gymnasium's vectorised", 1),
    "halfcheetah": ("HalfCheetah-v5, Gymnasium's SyncVectorEnv", 1),
    "pong": ("Pong, ale-py's AtariVectorEnv", 2),
}
# what is timed: where it is looked up, its name there, and what it is called in the table
PARTS: tuple[tuple[Any, str, str], ...] = (
    (NumpyActor, "act", "the policy acts"),
    (TorchActor, "act", "the policy acts"),
    (collecting, "draw", "actions are drawn"),
    (collecting.VectorCollector, "collect", "rollout: normalising, storing, packing"),
    (control, "read_rollout", "values and old log-probabilities"),
    (control.RewardScaler, "__call__", "rewards are scaled"),
    (loop, "estimate_advantages", "advantages"),
    (FusedMLP, "ppo_gradients", "gradients"),
    (updating, "autograd_gradients", "gradients"),
    (updating, "clip_gradients", "gradient norm"),
    (FlatAdam, "step", "Adam"),
    (torch.optim.Adam, "step", "Adam"),
    (loop, "update", "update: shuffling, gathering, metrics"),
)
ENVIRONMENT, REST = "environments", "the rest: the loop, log, checkpoints"
ORDER = [
    ENVIRONMENT, "the policy acts", "actions are drawn", "rollout: normalising, storing, packing",
    "values and old log-probabilities", "rewards are scaled", "advantages", "gradients", "gradient norm", "Adam",
    "update: shuffling, gathering, metrics", REST,
]  # fmt: skip


class Clock:
    """Seconds of named parts, each without those that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # of every part that is running: the seconds of the parts that it called

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - begun
                self.seconds[name] += taken - self._inside.pop()
                if self._inside:
                    self._inside[-1] += taken

        return call


def profile(case: str, threads: int, steps: int) -> tuple[Clock, float, int]:
    """A run of the case: its clock, the seconds of learning, and the steps."""
    clock = Clock()
    with ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        for owner, name, title in PARTS:
            patches.enter_context(mock.patch.object(owner, name, clock.timed(getattr(owner, name), title)))
        out = str(Path(folder) / "run")
        run = control.build_gym_run(case_config(case, steps, 1, threads, out))
        run.env.step = clock.timed(run.env.step, ENVIRONMENT)
        try:
            begin(run, RunFolder.create(out), None, None, False)
        finally:
            run.env.close()
        total, decisions = run.summary["seconds/ppo"], run.state.decisions
    clock.seconds[REST] = total - sum(clock.seconds[name] for name in ORDER if name != REST)
    return clock, total, decisions


def profile_table(seconds: float) -> list[str]:
    shares: dict[str, dict[str, str]] = {name: {} for name in ORDER}
    speeds: list[str] = []
    for case, (title, threads) in CASES.items():
        _, warm, steps = profile(case, threads, 4096)
        clock, total, decisions = profile(case, threads, max(4096, int(steps / warm * seconds)))
        for name in ORDER:
            taken = clock.seconds[name]
            shares[name][case] = f"{1e6 * taken / decisions:.1f} ({taken / total:.0%})" if taken else ""
        speeds.append(f"{decisions / total:,.0f}")
        print(f"{title}: {speeds[-1]} steps/s", flush=True)
    lines = ["| part | " + " | ".join(title for title, _ in CASES.values()) + " |", "|---|" + "---|" * len(CASES)]
    lines += [f"| {name} | " + " | ".join(row[case] for case in CASES) + " |" for name, row in shares.items()]
    return [*lines, "| steps/s, while every part is timed | " + " | ".join(speeds) + " |", ""]


# the parts alone ------------------------------------------------------------------------------------------------

Way = Callable[[], Any]
CARTPOLE = (ObservationSpec(vector=4), ActionSpec(kind="discrete", sizes=(2,)))
CHEETAH = (ObservationSpec(vector=17), ActionSpec(kind="box", sizes=(1,) * 6, shape=(6,)))
GAME = (ObservationSpec(vector=0, images=(("image", (4, 84, 84)),)), ActionSpec(kind="discrete", sizes=(6,)))


def in_turns(ways: dict[str, Way], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Median milliseconds of a call of each way; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            for _ in range(repeats):
                way()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - begun) / repeats)
    return {name: median(values) for name, values in taken.items()}


def table(title: str, columns: list[str], rows: dict[str, list[float]], digits: int) -> list[str]:
    lines = [f"### {title}", "", "| way | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, values in rows.items():
        cells = [f"{value:.{digits}f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def policy_of(task: tuple[ObservationSpec, ActionSpec], network: Network | None = None, **more: Any) -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(*task, network or MLP(), **more)


def ways_to_act(policy: ActorCritic) -> dict[str, Way]:
    """One step of 8 environments: from observations to actions as the environments take them."""
    spec, generator = policy.actions, np.random.default_rng(0)
    seen = generator.standard_normal((8, policy.observations.vector)).astype(np.float32)
    noise = draw_noise(spec.kind, generator, (8, spec.num_parameters))
    std = policy.standard_deviations()

    def by(actor: NumpyActor | TorchActor) -> Way:
        actor.publish(policy)
        return lambda: draw(spec.kind, spec.sizes, actor.act(seen, None)[0], noise, std, None)

    return {
        "numpy, the actor alone, noise of the whole rollout drawn before (Heeler)": by(NumpyActor()),
        "torch, the same otherwise": by(TorchActor()),
        "torch: actor, critic, a distribution, its log-probabilities, values, conversions": lambda: as_usual(
            policy, seen
        ),
    }


def acting(rounds: int) -> list[str]:
    """What an action costs."""
    columns = {
        name: in_turns(ways_to_act(policy_of(task)), rounds, 200)
        for name, task in (("CartPole", CARTPOLE), ("HalfCheetah", CHEETAH))
    }
    rows = {name: [1e3 * columns[task][name] for task in columns] for name in columns["CartPole"]}
    return table("A step of 8 environments: microseconds", list(columns), rows, 0)


@torch.no_grad()
def as_usual(policy: ActorCritic, seen: Any) -> Any:
    """What the libraries of the field do at each step."""
    parameters, values, _ = policy.parameters_and_values(torch.as_tensor(seen))
    if policy.log_std is None:
        said: Any = torch.distributions.Categorical(logits=parameters)
        actions = said.sample()
        logprobs = said.log_prob(actions)
    else:
        said = torch.distributions.Normal(parameters, policy.log_std.exp().expand_as(parameters))
        actions = said.sample()
        logprobs = said.log_prob(actions).sum(1)
    return actions.cpu().numpy(), logprobs.cpu().numpy(), values.cpu().numpy()


class Minibatch:
    """An optimiser step on random decisions, in one of several ways."""

    def __init__(self, policy: ActorCritic, size: int) -> None:
        self.policy, spec, shown = policy, policy.actions, policy.observations
        observations = (
            torch.randint(0, 256, (size, *shown.images[0][1]), dtype=torch.uint8)
            if shown.images
            else torch.randn(size, shown.vector)
        )
        actions = torch.randn(size, 6) if spec.kind == "box" else torch.randint(0, spec.sizes[0], (size,))
        self.inputs = Steps(observations=observations, actions=actions)
        with torch.no_grad():
            said = policy.evaluate(self.inputs)
        ones = torch.ones(size)
        columns = [said.logprobs, said.values, torch.randn(size), torch.randn(size), ones, ones, ones]
        self.rows = torch.stack(columns, dim=1)
        self.config = PPOConfig(max_grad_norm=0.5, entropy_coef=0.01)
        self.size = float(size)

    def written_out(self) -> Way:
        """Heeler's way for small MLPs: no autograd, one vector of weights."""
        self.policy.fuse()
        assert self.policy.fused is not None
        optimizer = FlatAdam([{"params": self.policy.trained()}], lr=3e-4, eps=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            assert self.policy.fused is not None
            self.policy.fused.ppo_gradients(self.inputs, self.rows, self.size, self.size, self.config)
            clip_gradients(self.policy.trained(), 0.5)
            optimizer.step()

        return step

    def autograd(self, evaluate: Callable[..., Any] | None = None, read: bool = False, **adam: Any) -> Way:
        """torch's way; with `read`, six figures of the minibatch are asked for at once, one by one."""
        parameters = list(self.policy.parameters())
        optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5, **adam)
        said_by = evaluate or self.policy.evaluate

        def step() -> None:
            optimizer.zero_grad()
            _, said = loss_gradients(said_by(self.inputs), self.rows, self.size, self.size, self.config)
            if read:
                ratio = (said[0] - self.rows[:, 0]).exp()
                figures = (said[1], said[2], said[3], ratio - 1 - ratio.log(), ((ratio - 1).abs() > 0.2).float())
                for figure in figures:
                    figure.mean().item()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()

        return step


def minibatches(rounds: int) -> list[str]:
    """The optimiser step of small MLPs."""
    columns: dict[str, dict[str, float]] = {}
    for name, task in (("CartPole", CARTPOLE), ("HalfCheetah", CHEETAH)):
        for size in (64, 256):
            start = policy_of(task)
            make: Callable[[], Minibatch] = lambda start=start, size=size: Minibatch(copy.deepcopy(start), size)  # noqa: E731
            ways: dict[str, Way] = {
                "gradients written out, flat Adam, figures once an update (Heeler)": make().written_out(),
                "autograd, Adam fused, figures once an update": make().autograd(fused=True),
                "autograd, Adam fused, five figures read at each minibatch": make().autograd(fused=True, read=True),
                "autograd, Adam foreach, five figures": make().autograd(foreach=True, read=True),
                "autograd, Adam parameter by parameter, five figures": make().autograd(foreach=False, read=True),
            }
            columns[f"{name}, {size}"] = in_turns(ways, rounds, 20)
    rows = {name: [columns[column][name] for column in columns] for name in next(iter(columns.values()))}
    return table("An optimiser step of two 64-64 MLPs, one thread: milliseconds", list(columns), rows, 2)


def compiled(rounds: int) -> list[str]:
    """torch.compile on the evaluation of a minibatch, beside the same without it."""
    minibatch = Minibatch(policy_of(CHEETAH), 256)
    other = Minibatch(policy_of(CHEETAH), 256)
    begun = time.perf_counter()
    try:
        faster = minibatch.autograd(torch.compile(minibatch.policy.evaluate, dynamic=False), fused=True)
        faster()
        faster()
    except Exception as error:  # no compiler on this machine
        return [f"`torch.compile` could not be tried here: {type(error).__name__}.", ""]
    waited = time.perf_counter() - begun
    own = Minibatch(policy_of(CHEETAH), 256).written_out()
    found = in_turns({"plain": other.autograd(fused=True), "compiled": faster, "own": own}, rounds, 20)
    return [
        f"`torch.compile` on the evaluation (HalfCheetah, 256, autograd, Adam fused): {found['compiled']:.2f} ms"
        f" instead of {found['plain']:.2f}, after {waited:.0f} s of compilation; written out: {found['own']:.2f}.",
        "",
    ]


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_table(rounds: int) -> list[str]:
    """What a second thread gives to small and to convolutional networks."""
    counts = [1, 2] if machine.usable_cores()[0] > 1 else [1]
    channels_first = policy_of(GAME, NatureCNN(), shared=True)
    ways: dict[str, Way] = {
        "HalfCheetah, minibatch of 256, autograd": Minibatch(policy_of(CHEETAH), 256).autograd(fused=True),
        "HalfCheetah, minibatch of 256, written out": Minibatch(policy_of(CHEETAH), 256).written_out(),
        "Nature CNN, minibatch of 256, fp32": Minibatch(channels_first, 256).autograd(fused=True),
        "Nature CNN, minibatch of 256, bf16": Minibatch(
            policy_of(GAME, NatureCNN(), shared=True, precision="bf16"), 256
        ).autograd(fused=True),
    }
    shown = np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), dtype=np.uint8)
    for precision in ("fp32", "bf16"):
        actor = TorchActor()
        actor.publish(policy_of(GAME, NatureCNN(), shared=True, precision=precision))
        ways[f"Nature CNN, acting in 8 games, {precision}"] = lambda actor=actor: actor.act(shown, None)
    columns: dict[str, dict[str, float]] = {}
    for count in counts:
        with threads_of(count):
            columns[f"{count} thread{'s' if count > 1 else ''}"] = in_turns(ways, rounds, 3)
    rows = {name: [columns[column][name] for column in columns] for name in ways}
    return table("Threads and precision: milliseconds", list(columns), rows, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each profiled run")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    machine.keep_freed_memory()
    profiles = profile_table(arguments.seconds)
    torch.set_num_threads(1)
    lines = [
        "# Where the time goes in environments",
        "",
        "Made by `python benchmarks/control_profile.py`.",
        "",
        f"Hardware: {hardware()}; torch {torch.__version__}, {machine.choose_precision('auto', 'cpu')[1]}.",
        "",
        "### A whole run: microseconds a step, and their share of learning",
        "",
        "The settings of [control_speed.md](control_speed.md): 8 environments, minibatches of 256; 64-64 tanh networks"
        " on one thread, and for Pong the Nature CNN on two. Each part without those that it calls.",
        "",
        *profiles,
        *acting(arguments.rounds),
        *minibatches(arguments.rounds),
        *compiled(arguments.rounds),
        *threads_table(arguments.rounds),
    ]
    page = ROOT / "docs" / "benchmarks" / "control_profile.md"
    page.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
