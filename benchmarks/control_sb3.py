"""Stable-Baselines3 with the RL Zoo's settings on MuJoCo v5, beside Heeler's recipes: docs/results.md.

    python benchmarks/control_sb3.py [--envs HalfCheetah-v5 Hopper-v5 Walker2d-v5] [--seeds 1 2 3] [--parallel 2]

The settings were tuned on v3 and older; here both learn the same environments for the same number of steps, one thread
each, and both are evaluated on the raw returns of the most likely actions with the statistics of observations frozen.
What every run gave is kept in docs/data/control_sb3.json; Heeler's figures are those of control_results.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]

from control_results import DATA, GOALS, interquartile_mean, interval  # noqa: E402
from environments import PACKAGES, peer_python, run_peer  # noqa: E402
from pages import hardware, replace_section  # noqa: E402

KEPT = ROOT / "docs" / "data" / "control_sb3.json"
STEPS, EPISODES = 1_000_000, 112


def train(env: str, seed: int) -> dict[str, Any]:
    settings = ["--settings", "zoo", "--env", env, "--steps", str(STEPS)]
    report = run_peer("sb3", arguments=[*settings, "--seed", str(seed), "--eval-episodes", str(EPISODES)])
    found = {"env": env, "seed": seed, "return": report["eval_return"]["mean"], "hardware": hardware()}
    return found | {"steps": report["steps"]}


def write(kept: dict[tuple[str, int], dict[str, Any]]) -> None:
    rows = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
    KEPT.write_text(f'{{"runs": [\n{rows}\n]}}\n', encoding="utf-8")


def cells(returns: list[float]) -> str:
    low, high = interval(returns)
    spread = f" [{low:.0f}, {high:.0f}]" if len(returns) > 2 else ""
    return (
        f"{interquartile_mean(returns):.0f}{spread} | {len(returns)} | {', '.join(f'{value:.0f}' for value in returns)}"
    )


def page(kept: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    ours = json.loads(DATA.read_text(encoding="utf-8"))["runs"]
    machines = sorted({run["hardware"] for run in kept.values()})
    lines = [
        "### The same environments with Stable-Baselines3 and the RL Zoo's settings",
        "",
        f"Made by `python benchmarks/control_sb3.py`: {PACKAGES['sb3'][0]}, the settings that the zoo tuned for each"
        f" task, {STEPS / 1e6:.0f}M steps on v5, one thread, {EPISODES} episodes with the most likely actions after"
        f" training. On {'; '.join(machines)}. Interquartile means with 95 % bootstrap intervals.",
        "",
        "| environment | Heeler | seeds | each | Stable-Baselines3 | seeds | each |",
        "|---|---|---|---|---|---|---|",
    ]
    for env in sorted({env for env, _ in kept}):
        theirs = [kept[key]["return"] for key in sorted(kept) if key[0] == env]
        recipe = next(name for name, goal in GOALS.items() if goal[0] == env)
        mine = [run["after"] for run in ours if run["recipe"] == recipe]
        lines.append(f"| {env} | {cells(mine)} | {cells(theirs)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parallel", type=int, default=2)
    arguments = parser.parse_args()
    runs = json.loads(KEPT.read_text(encoding="utf-8"))["runs"] if KEPT.exists() else []
    kept = {(run["env"], run["seed"]): run for run in runs}
    jobs = [(env, seed) for seed in arguments.seeds for env in arguments.envs if (env, seed) not in kept]
    if jobs:
        peer_python("sb3")  # made before two runs look for it
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for future in as_completed([pool.submit(train, *job) for job in jobs]):
            found = future.result()
            kept[found["env"], found["seed"]] = found
            write(kept)
            print(found, flush=True)
    lines = page(kept)
    replace_section(ROOT / "docs" / "results.md", "control-sb3", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
