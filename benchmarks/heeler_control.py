"""Heeler's side of benchmarks/control_speed.py: one run in a process of its own, reported as its peers report theirs.

python benchmarks/heeler_control.py --case cartpole --steps 100000 --seed 1 --threads 1 --out report.json
"""

from __future__ import annotations

import time

STARTED = time.time()  # before anything is imported: what a user waits for counts

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Reached(Exception):
    """The target return was reached: by the window of the last 100 episodes, and then by 64 fresh ones.

    With many environments the window is full of episodes that older policies began, so it says too much. The clock
    stands still while the fresh ones are played, and the run goes on where they fall short.
    """


def config(case: str, steps: int, seed: int, threads: int, out: str) -> Any:
    """The settings of a case: those of the peers, or our own fastest ones for `cartpole-fast`."""
    from heeler.envs.vector import Atari, EnvConfig, EnvPool, Sync, Vectorized
    from heeler.policies.networks import MLP, NatureCNN
    from heeler.ppo.advantages import AdvantageConfig
    from heeler.ppo.schedules import Schedule
    from heeler.ppo.update import PPOConfig
    from heeler.train.control import GymConfig

    common: dict[str, Any] = dict(
        out=out, seed=seed, steps=steps, threads=threads, eval_episodes=0, checkpoint_every=10**9
    )
    game, _, backend = case.partition("-")
    backends = {"": Sync(), "vectorized": Vectorized(), "envpool": EnvPool(threads=1)}
    update = PPOConfig(max_grad_norm=0.5, token_budget=1 << 20)
    from dataclasses import replace

    match game, backend:
        case "cartpole", "fast":
            return GymConfig(
                env=EnvConfig(id="CartPole-v1", num_envs=128, backend=Vectorized()), num_steps=64, lr=4e-3,
                network=MLP(hidden=(32, 32)), advantage=AdvantageConfig(gamma=0.98, lam=0.9),
                lr_schedule=Schedule(shape="linear", end=0.1), ppo=replace(update, epochs=2, minibatches=16), **common,
            )  # fmt: skip
        case "cartpole", "once":
            return GymConfig(
                env=EnvConfig(id="CartPole-v1", num_envs=256, backend=Vectorized()), num_steps=32, lr=4e-3,
                advantage=AdvantageConfig(gamma=0.98, lam=0.9), lr_schedule=Schedule(shape="linear", end=0.1),
                ppo=replace(update, epochs=1, minibatches=16), **common,
            )  # fmt: skip
        case "cartpole", _:
            return GymConfig(
                env=EnvConfig(id="CartPole-v1", num_envs=8, backend=backends[backend]), num_steps=128, lr=2.5e-4,
                ppo=replace(update, epochs=4, minibatches=4, entropy_coef=0.01), **common,
            )  # fmt: skip
        case "halfcheetah", _:
            return GymConfig(
                env=EnvConfig(id="HalfCheetah-v5", num_envs=8, backend=backends[backend]), num_steps=256,
                normalize_observations=True, scale_rewards=True,
                ppo=replace(update, epochs=10, minibatches=8), **common,
            )  # fmt: skip
        case _:
            return GymConfig(
                env=EnvConfig(id="ALE/Pong-v5", num_envs=8, backend=Atari(threads=threads)), num_steps=128, lr=2.5e-4,
                network=NatureCNN(), shared=True,
                ppo=replace(update, epochs=4, minibatches=4, clip_range=0.1, entropy_coef=0.01), **common,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", type=float)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from heeler.runtime.runs import RunFolder
    from heeler.train.control import build_gym_run
    from heeler.train.run import begin

    report: dict[str, Any] = {"target": None}
    checking = 0.0  # seconds

    def on_update(update: Any) -> None:
        nonlocal checking
        metrics, target = update.metrics, arguments.target
        if target is None or metrics["episodes"] < 100 or metrics["episode/return_100"] < target:
            return
        began = time.perf_counter()
        fresh = run.evaluate(episodes=64, deterministic=False)["reward"]
        checking += time.perf_counter() - began
        if fresh >= target:
            report["target"] = {
                "process_seconds": time.time() - STARTED - checking, "checking_seconds": checking,
                "step": metrics["decisions"], "fresh": fresh,
            }  # fmt: skip
            raise Reached

    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "run")
        began = time.perf_counter()
        run = build_gym_run(config(arguments.case, arguments.steps, arguments.seed, arguments.threads, out))
        try:
            begin(run, RunFolder.create(out), on_update, None, False)
            rows = run.folder.metrics() if run.folder else []
            times = {k: sum(r[f"time/{k}"] for r in rows) for k in ("rollout", "score", "update")}
            report |= {
                "steps": run.state.decisions, "learning_seconds": run.summary["seconds/ppo"],
                "steps_per_second": run.state.decisions / run.summary["seconds/ppo"], "times": times,
            }  # fmt: skip
        except Reached:
            report["learning_seconds"] = time.perf_counter() - began - checking
        finally:
            run.env.close()
    report["process_seconds"] = time.time() - STARTED
    arguments.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
