"""The results of the control recipes over several seeds: their section of docs/results.md, picture and raw curves.

    python benchmarks/control_results.py [--recipes cartpole acrobot ...] [--seeds 5] [--parallel 2] [--collect-only]

Each run is one `heeler ppo RECIPE --seed S --threads 1`, as many side by side as there are cores. Runs that are
complete are not repeated, so the command can be continued; a run of other settings than the recipe's is refused, unless
`--extra` says what they are. `--unfinished pong` also collects Pong's runs that were stopped before their last step;
they have a table of their own, as their schedules are not at their end. Curves are kept in docs/data/control.json
(100 points each), so that the page can be made again without the runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware, replace_section  # noqa: E402

from heeler.recipes.control import RECIPES  # noqa: E402
from heeler.runtime.configs import from_json  # noqa: E402
from heeler.train.control import GymConfig  # noqa: E402

DATA = ROOT / "docs" / "data" / "control.json"
# recipe: title, what is asked of it, where that comes from
GOALS: dict[str, tuple[str, float, str]] = {
    "cartpole": ("CartPole-v1", 500, "SB3 zoo, 100k"),
    "acrobot": ("Acrobot-v1", -75, "SB3 zoo -73.5, 1M"),
    "mountaincar": ("MountainCar-v0", -115, "SB3 zoo -110, 1M"),
    "pendulum": ("Pendulum-v1", -170, "SB3 zoo -172, 100k"),
    "lunarlander": ("LunarLander-v3", 240, "SB3 zoo 242 on v2, 1M"),
    "lunarlander-continuous": ("LunarLanderContinuous-v3", 270, "SB3 zoo 271 on v2, 1M"),
    "bipedalwalker": ("BipedalWalker-v3", 280, "SB3 zoo 288, 5M"),
    "halfcheetah": ("HalfCheetah-v5", 5800, "SB3 zoo 5819 on v3, 1M"),
    "hopper": ("Hopper-v5", 2600, "Tianshou 2609, 1M"),
    "walker2d": ("Walker2d-v5", 3600, "Tianshou 3589, 1M"),
    "swimmer": ("Swimmer-v5", 280, "SB3 zoo 282 on v3, 1M"),
    "ant": ("Ant-v5", 3250, "Tianshou 3258, 1M"),
    "pong": ("Pong", 20.7, "PPO paper, 10M"),
    "breakout": ("Breakout", 275, "PPO paper, 10M"),
}


def train(recipe: str, seed: int, folder: Path, extra: list[str]) -> None:
    if (folder / "policy").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():  # it was interrupted
        command = [sys.executable, "-m", "heeler.cli", "resume", str(folder)]
    else:
        command = [sys.executable, "-m", "heeler.cli", "ppo", recipe, "--seed", str(seed), "--out", str(folder)]
        episodes = "100" if recipe not in ("pong", "breakout") else "16"
        command += ["--threads", "1", "--eval-episodes", episodes, "--eval-every", "0", *extra]
    with folder.with_suffix(".log").open("wb") as log:
        status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{recipe} seed {seed}: {'done' if status == 0 else f'status {status}, see {folder}.log'}", flush=True)


def read(recipe: str, folder: Path) -> dict[str, Any]:
    """One run as the data file keeps it; one that was stopped before its last step has no `after`."""
    summary = json.loads((folder / "summary.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [(r["decisions"], r["episode/return_100"]) for r in rows if r["episode/return_100"] is not None]
    points = points[:: max(1, len(points) // 100)]
    run = {
        "recipe": recipe,
        "seed": config["config"]["seed"],
        "steps": rows[-1]["decisions"],
        "before": summary["eval/before"]["reward"],
        "curve": [[s, round(v, 3)] for s, v in points],
    }
    if complete(folder):
        after = summary["eval/after"]
        return {**run, "after": after["reward"], "after_std": after["reward/std"], "episodes": after["episodes"]}
    planned = config["config"]["steps"]
    return {**run, "planned": planned, "last": rows[-1]["episode/return_100"], "hours": rows[-1]["seconds"] / 3600}


def complete(folder: Path) -> bool:
    return (folder / "policy").exists() and "eval/after" in (folder / "summary.json").read_text()


def apart(recipe: str, folder: Path) -> list[str]:
    """The settings of a run that are not those of its recipe as it is now."""
    run = from_json(GymConfig, json.loads((folder / "config.json").read_text())["config"])
    now = RECIPES[recipe]()
    if 0 <= run.steps - now.steps < run.num_steps * run.env.num_envs:  # whole rollouts
        now = replace(now, steps=run.steps)
    run = replace(run, ppo=replace(run.ppo, ratio_tolerance=now.ppo.ratio_tolerance))  # in bf16 a run widens it
    of_the_run = ("out", "seed", "threads", "eval_episodes", "eval_every", "updates")
    names = [field.name for field in fields(now) if field.name not in of_the_run]
    return [
        f"{name} {getattr(run, name)} is now {getattr(now, name)}"
        for name in names
        if getattr(run, name) != getattr(now, name)
    ]


def interquartile_mean(values: list[float]) -> float:
    """The mean of the middle half, runs at its edges by their share [Agarwal et al., 2021]."""
    ordered, n = sorted(values), len(values)
    low, high = n / 4, 3 * n / 4
    shares = [max(0.0, min(i + 1, high) - max(i, low)) for i in range(n)]
    return sum(s * v for s, v in zip(shares, ordered, strict=True)) / sum(shares)


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the interquartile mean."""
    generator = np.random.default_rng(0)
    samples = [interquartile_mean(list(generator.choice(values, len(values)))) for _ in range(draws)]
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| recipe | environment | steps | seeds | return, interquartile mean [95 %] | mean | each seed | asked | by"
        " | before |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, (title, goal, source) in GOALS.items():
        mine = sorted((r for r in runs if r["recipe"] == recipe and "after" in r), key=lambda r: r["seed"])
        if not mine:
            continue
        after = [r["after"] for r in mine]
        low, high = interval(after)
        spread = f" [{low:.1f}, {high:.1f}]" if len(after) > 2 else ""
        each = ", ".join(f"{v:.1f}" if abs(v) < 1000 else f"{v:.0f}" for v in after)
        met = "" if interquartile_mean(after) >= goal else " (short)"
        lines.append(
            f"| `{recipe}` | {title} | {mine[0]['steps'] / 1e6:.1f}M | {len(mine)} |"
            f" **{interquartile_mean(after):.1f}**{spread}{met} | {mean(after):.1f} | {each} |"
            f" {goal:g} | {source} | {mean(r['before'] for r in mine):.1f} |"
        )
    return lines


def unfinished_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| recipe | seed | steps so far, of | hours | return of the last 100 episodes, actions drawn | before | asked"
        " of the whole | by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| `{r['recipe']}` | {r['seed']} | {r['steps'] / 1e6:.1f}M of {r['planned'] / 1e6:.1f}M | {r['hours']:.1f} |"
        f" **{r['last']:.1f}** | {r['before']:.1f} | {GOALS[r['recipe']][1]:g} | {GOALS[r['recipe']][2]} |"
        for r in runs
    ]


def picture(runs: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recipes = [r for r in GOALS if any(run["recipe"] == r for run in runs)]
    columns = 4
    height = -(-len(recipes) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(3.1 * columns, 2.3 * height), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(recipes) :]:
        axis.axis("off")
    for axis, recipe in zip(axes.flat, recipes, strict=False):
        for run in (r for r in runs if r["recipe"] == recipe):
            steps, values = zip(*run["curve"], strict=True)
            axis.plot([s / 1e6 for s in steps], values, linewidth=1)
        axis.axhline(GOALS[recipe][1], color="gray", linestyle=":", linewidth=1)
        axis.set_title(recipe, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel("million steps", fontsize=9)
    figure.supylabel("return of the last 100 episodes, actions drawn", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def machines(runs: list[dict[str, Any]]) -> str:
    counts = Counter(run["hardware"] for run in runs)
    return "; ".join(f"{name} ({count})" for name, count in counts.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=[r for r in RECIPES if r not in ("pong", "breakout")])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "control")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--collect-only", action="store_true")
    parser.add_argument("--unfinished", nargs="*", default=[], help="recipes whose stopped runs are collected too")
    parser.add_argument("--extra", nargs="*", default=[], help="further flags of heeler ppo")
    arguments = parser.parse_args()
    if not arguments.collect_only:
        jobs = [(r, s) for s in range(1, arguments.seeds + 1) for r in arguments.recipes]
        with ThreadPoolExecutor(arguments.parallel) as pool:
            for recipe, seed in jobs:
                pool.submit(train, recipe, seed, arguments.runs / f"{recipe}-{seed}", arguments.extra)
    kept = json.loads(DATA.read_text()) if DATA.exists() else {"runs": []}
    known = {(r["recipe"], r["seed"]): r for r in kept["runs"]}
    for folder in sorted(arguments.runs.glob("*-*")):
        recipe = folder.name.rpartition("-")[0]
        if recipe in GOALS and folder.is_dir() and (complete(folder) or recipe in arguments.unfinished):
            if (other := apart(recipe, folder)) and not arguments.extra:
                sys.exit(f"{folder} is no run of the recipe as it is now ({'; '.join(other)}): move it away")
            run = read(recipe, folder)
            known[recipe, run["seed"]] = {**run, "hardware": hardware()}
    runs = [known[key] for key in sorted(known)]
    DATA.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(r) for r in runs)
    DATA.write_text(f'{{"runs": [\n{rows}\n]}}\n')
    finished, stopped = [r for r in runs if "after" in r], [r for r in runs if "after" not in r]
    if not finished:
        sys.exit("no complete run yet")
    picture(runs, ROOT / "docs" / "images" / "control_curves.png")
    lines = [
        "## Control and games: `heeler ppo RECIPE`",
        "",
        "Made by `python benchmarks/control_results.py`. Each run had one thread, two or three side by side.",
        "Hardware, and how many runs it made: " + machines(runs) + ".",
        f"Returns are raw and undiscounted, of the most likely actions, over {finished[0]['episodes']:.0f} episodes of",
        "the last policy (not the best one of the run), observation statistics frozen. In brackets 95 % bootstrap",
        "intervals over seeds. What is asked was measured by others, on older versions of some environments.",
        "",
        *table(finished),
        "",
        *(["Stopped before their last step:", "", *unfinished_table(stopped), ""] if stopped else []),
        "![Returns over the steps, a line a seed](images/control_curves.png)",
        "",
    ]
    replace_section(ROOT / "docs" / "results.md", "control", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
