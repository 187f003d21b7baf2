"""Speed in environments, side by side with Stable-Baselines3, CleanRL's method and PureJaxRL's method.

    python benchmarks/control_speed.py [--repeats 3] [--seeds 5] [--only cartpole pong target ...]

Every measurement is a process of its own, one after the other; peers live in Python environments of their own with
pinned versions (benchmarks/peers/environments.py). The order alternates over the repeats (in the race to 475 over the
seeds), the median counts. Writes the table to docs/benchmarks/control_speed.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]

from environments import PACKAGES, run_peer  # noqa: E402
from pages import hardware, replace_section  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks" / "control_speed.md"
Measure = Callable[[int], dict[str, Any]]


def heeler(case: str, steps: int, threads: int = 1, target: float | None = None) -> Measure:
    def measure(seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            command = [sys.executable, str(ROOT / "benchmarks" / "heeler_control.py"), "--case", case]
            command += ["--steps", str(steps), "--seed", str(seed), "--threads", str(threads), "--out", str(out)]
            command += [] if target is None else ["--target", str(target)]
            began = time.perf_counter()
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            wall = time.perf_counter() - began
            if done.returncode:
                sys.exit(f"heeler {case} failed:\n{done.stderr[-2000:]}")
            report = json.loads(out.read_text())
            if report["target"] is not None:  # the process ends there: seen from outside, without the fresh episodes
                report["target"]["process_seconds"] = wall - report["target"]["checking_seconds"]
            return report

    return measure


def peer(name: str, *arguments: str, threads: int = 1) -> Measure:
    def measure(seed: int) -> dict[str, Any]:
        return run_peer(name, arguments=[*arguments, "--seed", str(seed), "--eval-episodes", "0"], threads=threads)

    return measure


def throughput(title: str, rows: dict[str, Measure], ours: str, repeats: int, note: str = "") -> list[str]:
    """Median steps/s of each row, and how often ours is as fast; `note` stands above the table."""
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    parts: dict[str, str] = {}
    for repeat in range(repeats):
        for name in list(rows) if repeat % 2 == 0 else list(rows)[::-1]:
            report = rows[name](1)
            speeds[name].append(report["steps_per_second"])
            if "times" in report:
                total = sum(report["times"].values())
                parts[name] = ", ".join(f"{k} {v / total:.0%}" for k, v in report["times"].items())
            print(f"{title}, {name}: {report['steps_per_second']:,.0f} steps/s", flush=True)
    lines = [f"### {title}", "", *([note, ""] if note else [])]
    lines += ["| system | steps/s, median | lowest to highest | heeler is faster by | time |", "|---|---|---|---|---|"]
    for name, values in speeds.items():
        factor = "" if name.startswith("heeler") else f"{median(speeds[ours]) / median(values):.1f} times"
        span = f"{min(values):,.0f} to {max(values):,.0f}"
        lines.append(f"| {name} | {median(values):,.0f} | {span} | {factor} | {parts.get(name, '')} |")
    return [*lines, ""]


def to_target(rows: dict[str, Measure], seeds: int) -> list[str]:
    """Seconds from the start of the process to a mean return of 475 over the last 100 episodes."""
    lines = [
        "### CartPole-v1 to a mean return of 475 over the last 100 episodes, from the start of the process",
        "",
        "Imports and compilation included. Heeler: 64 steps of 128 environments, 2 epochs of 16 minibatches, 32-32",
        "tanh, one thread; its time ends with the process. 64 fresh episodes with drawn actions must return 475 too,",
        "since with many environments the last 100 episodes were begun by older policies; the clock stands still while",
        "they are played. Stable-Baselines3: one thread, until the end of the rollout that reached the target.",
        "PureJaxRL's method: one compiled program on two threads, which writes no logs; its time is the start and that",
        "share of the program's run after which the target was reached, as if it had stopped there. Medians are over",
        "the seeds that reached it.",
        "",
        "| system | reached | seconds, median | lowest to highest | steps, median |",
        "|---|---|---|---|---|",
    ]
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for seed in range(1, seeds + 1):
        for name in list(rows) if seed % 2 else list(rows)[::-1]:
            reports[name].append(rows[name](seed))
            print(f"to 475, {name}, seed {seed}: {reports[name][-1]['target']}", flush=True)
    for name, found in reports.items():
        done = [r["target"] for r in found if r["target"] is not None]
        seconds = [float(r["process_seconds"]) for r in done]
        steps = [int(r["step"]) for r in done]
        if not done:
            lines.append(f"| {name} | 0 of {seeds} | | | |")
            continue
        lines.append(
            f"| {name} | {len(done)} of {seeds} | {median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} |"
            f" {median(steps):,.0f} |"
        )
    return [*lines, ""]


def backends(seconds: float) -> list[str]:
    """Environment steps/s of each backend, with random actions and no policy."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from heeler.envs.vector import Async, Atari, EnvConfig, EnvPool, Sync, Vectorized, make_vector

    cases = [
        ("CartPole-v1", (8, 64), (Sync(), Vectorized(), EnvPool(threads=1), Async())),
        ("LunarLander-v3", (8, 16), (Sync(), EnvPool(threads=1), Async())),
        ("HalfCheetah-v5", (8,), (Sync(), EnvPool(threads=1), EnvPool(threads=2), Async())),
        ("ALE/Pong-v5", (8,), (Atari(threads=1), Atari(threads=2))),
    ]
    lines = ["### Which backend is fastest for what: steps/s with random actions, no policy", ""]
    lines += ["| environment | environments | backend | steps/s |", "|---|---|---|---|"]
    for id, counts, choices in cases:
        for n in counts:
            for backend in choices:
                if isinstance(backend, Async) and n > 8:
                    continue
                env = make_vector(EnvConfig(id=id, num_envs=n, backend=backend), 0)
                env.reset(0)
                generator = np.random.default_rng(0)
                spec = env.actions
                shape = (64, n, len(spec.sizes)) if spec.kind == "box" else (64, n)
                actions = (
                    generator.uniform(-1, 1, shape).astype(np.float32)
                    if spec.kind == "box"
                    else generator.integers(0, spec.sizes[0], shape)
                )
                for t in range(16):
                    env.step(actions[t])
                began, steps = time.perf_counter(), 0
                while time.perf_counter() - began < seconds:
                    env.step(actions[steps % 64])
                    steps += 1
                speed = steps * n / (time.perf_counter() - began)
                env.close()
                name = type(backend).__name__ + (
                    f", {backend.threads} thread(s)" if hasattr(backend, "threads") else ""
                )
                lines.append(f"| {id} | {n} | {name} | {speed:,.0f} |")
                print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="cartpole, halfcheetah, pong, target, steady, backends (all)")
    arguments = parser.parse_args()
    cart, cheetah = ("--env", "CartPole-v1"), ("--env", "HalfCheetah-v5")
    sections: dict[str, Callable[[], list[str]]] = {
        "cartpole": lambda: throughput(
            "CartPole-v1, 8 environments, T = 128, minibatches of 256, 4 epochs, 64-64 tanh, one thread",
            {
                "heeler, Gymnasium's SyncVectorEnv": heeler("cartpole", 61_440),
                "heeler, Gymnasium's vectorised CartPole": heeler("cartpole-vectorized", 61_440),
                "heeler, EnvPool": heeler("cartpole-envpool", 61_440),
                "Stable-Baselines3 2.9.2": peer("sb3", "--settings", "cartpole-bench", *cart, "--steps", "40960"),
                "CleanRL's method": peer("cleanrl", "--settings", "cartpole-bench", *cart, "--steps", "40960"),
                "PureJaxRL's method, lean, compiled already": peer(
                    "jax", "--settings", "cartpole-bench", "--variant", "lean", "--steps", "409600"
                ),
            },
            "heeler, Gymnasium's SyncVectorEnv",
            arguments.repeats,
        ),
        "halfcheetah": lambda: throughput(
            "HalfCheetah-v5, 8 environments, T = 256, minibatches of 256, 10 epochs, 64-64 tanh, one thread",
            {
                "heeler, Gymnasium's SyncVectorEnv": heeler("halfcheetah", 40_960),
                "heeler, EnvPool": heeler("halfcheetah-envpool", 40_960),
                "Stable-Baselines3 2.9.2": peer("sb3", "--settings", "halfcheetah-bench", *cheetah, "--steps", "20480"),
                "CleanRL's method": peer("cleanrl", "--settings", "halfcheetah-bench", *cheetah, "--steps", "20480"),
            },
            "heeler, Gymnasium's SyncVectorEnv",
            arguments.repeats,
        ),
        "pong": lambda: throughput(
            "Pong, 8 environments, T = 128, minibatches of 256, 4 epochs, Nature CNN, two threads",
            {
                "heeler, ale-py's AtariVectorEnv": heeler("pong", 4096, threads=2),
                "Stable-Baselines3 2.9.2": peer(
                    "sb3", "--settings", "pong-bench", "--env", "PongNoFrameskip-v4", "--steps", "3072", threads=2
                ),
            },
            "heeler, ale-py's AtariVectorEnv",
            min(arguments.repeats, 2),
        ),
        "target": lambda: to_target(
            {
                "heeler, Gymnasium's vectorised CartPole": heeler("cartpole-fast", 500_000, target=475),
                "PureJaxRL's method, lean": peer(
                    "jax", "--steps", "500000", "--target", "475", "--variant", "lean", threads=2
                ),
                "PureJaxRL's method, as published": peer(
                    "jax", "--steps", "500000", "--target", "475", "--variant", "published", threads=2
                ),
                "Stable-Baselines3 2.9.2, the RL Zoo's settings": peer(
                    "sb3", "--settings", "zoo", *cart, "--steps", "100000", "--target", "475"
                ),
            },
            arguments.seeds,
        ),
        "steady": lambda: throughput(
            "CartPole-v1, steps/s of learning without start and compilation, each with settings of its own",
            {
                "heeler, one epoch, 64-64": heeler("cartpole-once", 1_000_000),
                "heeler, settings of the race to 475": heeler("cartpole-fast", 1_000_000),
                "PureJaxRL's method, lean": peer("jax", "--steps", "1000000", "--variant", "lean", threads=2),
                "PureJaxRL's method, as published": peer(
                    "jax", "--steps", "1000000", "--variant", "published", threads=2
                ),
            },
            "heeler, one epoch, 64-64",
            arguments.repeats,
            "Heeler, one thread: 32 steps of 256 environments, one epoch of 16 minibatches, 64-64 tanh; and those of"
            " the race. PureJaxRL's method, two threads: 128 steps of 4 environments, 4 epochs of 4 minibatches, 64-64"
            " tanh, which is four times the arithmetic of an update. With equal settings: the first table.",
        ),
        "backends": lambda: backends(1.0),
    }  # fmt: skip
    for name in arguments.only or sections:
        title, *table = sections[name]()
        replace_section(PAGE, name, [title, "", f"Machine: {hardware()}.", *table])
    pins = "; ".join(f"{name}: {', '.join(packages)}" for name, packages in PACKAGES.items())
    head = [
        "# Speed in environments",
        "",
        "Made by `python benchmarks/control_speed.py`, section by section; every measurement is a process of its own.",
        "Steps/s are those of learning: imports, construction and evaluation are left out, logging is in.",
        f"Peers: {pins}.",
        "",
    ]
    replace_section(PAGE, "head", head)


if __name__ == "__main__":
    main()
