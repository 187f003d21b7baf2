"""What the peers' scripts share: the command line, the clock, the training curve and the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import deque
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

IMPORTED = time.perf_counter()
WINDOW = 100  # finished episodes over which a point of the curve is the mean


def process_seconds() -> float:
    """Seconds since this process was started. Where the system does not say, since this module was imported."""
    status, clock = Path("/proc/self/stat"), getattr(time, "CLOCK_BOOTTIME", None)
    if clock is None or not status.exists():
        return time.perf_counter() - IMPORTED
    after_name = status.read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
    return time.clock_gettime(clock) - started


def parser(description: str, env: str, steps: int) -> argparse.ArgumentParser:
    """The flags that all peers have."""
    made = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    made.add_argument("--env", default=env, help=f"environment ({env})")
    made.add_argument("--steps", type=int, default=steps, help=f"environment steps, of all copies together ({steps:,})")
    made.add_argument("--seed", type=int, default=1, help="(1)")
    made.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    made.add_argument("--num-envs", type=int, help="copies of the environment (what the settings say)")
    made.add_argument("--eval-episodes", type=int, default=10, help="after training, 0 for none (10)")
    made.add_argument("--target", type=float, help="report when the curve reaches this return")
    made.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    return made


def reached_at(curve: Sequence[Sequence[float]], target: float | None) -> int | None:
    """Index of the curve's first point at or above the target; None where there is none."""
    return next((i for i, (_, value) in enumerate(curve) if target is not None and value >= target), None)


class Progress:
    """The training curve and its clock.

    Attributes:
        episodes: [step, return] of each finished episode.
        curve: [step, mean return of the last 100 finished episodes] at the end of each rollout. The first points are
            means over fewer episodes, and there is none before the first episode ends.
        curve_seconds: [C] seconds of learning at each point of the curve.
        startup_seconds: from the start of the process to the start of learning.
    """

    def __init__(self) -> None:
        self.episodes: list[list[float]] = []
        self.curve: list[list[float]] = []
        self.curve_seconds: list[float] = []
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.startup_seconds = self.start = 0.0

    def begin(self) -> None:
        self.startup_seconds, self.start = process_seconds(), time.perf_counter()

    def seconds(self) -> float:
        """Seconds of learning so far."""
        return time.perf_counter() - self.start

    def add_episode(self, step: int, episode_return: float) -> None:
        self.episodes.append([step, episode_return])
        self.recent.append(episode_return)

    def add_point(self, step: int, seconds: float | None = None) -> None:
        if self.recent:
            self.curve.append([step, fmean(self.recent)])
            self.curve_seconds.append(self.seconds() if seconds is None else seconds)

    def target(self, target: float | None) -> dict[str, float] | None:
        """When the curve reached the target: step, seconds of learning, seconds of the process."""
        index = reached_at(self.curve, target)
        if index is None or target is None:
            return None
        seconds = self.curve_seconds[index]
        return {
            "return": target,
            "step": self.curve[index][0],
            "learning_seconds": seconds,
            "process_seconds": self.startup_seconds + seconds,
        }


def summary(returns: Sequence[float]) -> dict[str, Any] | None:
    """Mean and standard deviation (of the episodes, not of the mean) of evaluation returns; None without any."""
    if not returns:
        return None
    return {"mean": fmean(returns), "std": pstdev(returns), "episodes": len(returns), "returns": list(returns)}


def write_report(
    arguments: argparse.Namespace,
    packages: Sequence[str],
    settings: dict[str, Any],
    steps: int,
    learning_seconds: float,
    progress: Progress,
    evaluation: Sequence[float],
    evaluation_seconds: float,
    **more: Any,
) -> None:
    """Write the JSON file and print a summary line.

    Args:
        packages: distributions whose versions are reported.
        settings: hyperparameters, plain values.
        steps: that were really taken, which may differ a little from those asked for.
        learning_seconds: without imports, construction and evaluation.
        evaluation: returns of the evaluation episodes.
        more: further keys of the report.
    """
    report = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "env": arguments.env,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "settings": settings,
        "steps": steps,
        "startup_seconds": progress.startup_seconds,
        "learning_seconds": learning_seconds,
        "evaluation_seconds": evaluation_seconds,
        "steps_per_second": steps / learning_seconds,
        "target": progress.target(arguments.target),
        "eval_return": summary(evaluation),
        "curve": progress.curve,
        "curve_seconds": progress.curve_seconds,
        "episodes": progress.episodes,
        **more,
        "process_seconds": process_seconds(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report), encoding="utf-8")
    last = f"last return {progress.curve[-1][1]:.1f}" if progress.curve else "no episode has ended"
    print(
        f"{arguments.env}: {steps:,} steps in {learning_seconds:.2f} s of learning"
        f" ({report['steps_per_second']:,.0f} steps/s), {report['process_seconds']:.2f} s from the process's start;"
        f" {last}"
    )
    if report["eval_return"]:
        print("evaluation: {mean:.1f} ± {std:.1f} over {episodes} episodes".format(**report["eval_return"]))
    if arguments.target is not None:
        hit = report["target"]
        print(
            "target {return:g} reached at step {step:,}: {learning_seconds:.2f} s of learning,"
            " {process_seconds:.2f} s from the process's start".format(**hit)
            if hit
            else f"target {arguments.target:g} not reached"
        )
