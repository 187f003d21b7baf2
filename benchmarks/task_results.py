"""The results of the recipes of several stages over several seeds: docs/results.md and a picture of their curves.

    python benchmarks/task_results.py [--tasks qa translate] [--seeds 1 2 3] [--parallel 2] [--collect-only]

Each run is one `heeler` command of COMMANDS with `--seed S --threads 1`, as many side by side as `--parallel` says:
two runs with a thread each train more an hour on two cores than one after the other with both. Stages that are
complete are not repeated, so the command can be continued. What every complete run gave is kept in
docs/data/tasks.json, and the page is made of all of that; runs of a task with different settings are not averaged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "data" / "tasks.json"
OF_THE_RUN = ("model", "data", "eval_data", "prompts", "eval_prompts", "reward", "out", "seed", "threads", "name")
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware, replace_section  # noqa: E402

from heeler.runtime.configs import to_json  # noqa: E402
from heeler.train.reward import RewardConfig  # noqa: E402
from heeler.train.reward_run import RewardTask  # noqa: E402
from heeler.train.sft import SFTConfig  # noqa: E402
from heeler.train.text import TextConfig  # noqa: E402

COMMANDS = {
    "chain_sum": ("ppo", "arithmetic", "--task", "chain_sum"),
    "syllogism": ("ppo", "arithmetic", "--task", "syllogism"),
    "aiw": ("ppo", "arithmetic", "--task", "aiw"),
    "knights_knaves": ("ppo", "arithmetic", "--task", "knights_knaves"),
    "gsm_symbolic": ("ppo", "arithmetic", "--task", "gsm_symbolic"),
    "qa": ("ppo", "qa"),
    "trivia": ("ppo", "qa", "--questions", "trivia"),
    "calculator": ("ppo", "calculator"),
    "translate": ("ppo", "translate"),
    "rlhf": ("rlhf", "imdb"),
}

TITLES = {
    "chain_sum": "Sums of Reasoning Gym (chain_sum)",
    "syllogism": "Syllogisms of Reasoning Gym",
    "aiw": "Alice in Wonderland problems of Reasoning Gym (aiw)",
    "knights_knaves": "Knights and knaves of Reasoning Gym",
    "gsm_symbolic": "GSM-symbolic of Reasoning Gym, worked out in at most 48 tokens",
    "qa": "Questions about countries that no training question names",
    "trivia": "Trivia",
    "calculator": "Sums of three numbers, with a calculator to call",
    "translate": "English into French, JupyterLab's interface",
    "rlhf": "RLHF on movie reviews",
}

NOTES = {
    "rlhf": "GRUE's IMDB task [Ramamurthy et al., 2210.01241] has a sentiment score of .489 for GPT-2 as it came, .539"
    " after fine-tuning and .626 after fine-tuning and PPO, at perplexities of 32.2, 35.5 and 35.0, with about 64k"
    " sampled tokens; PPO without fine-tuning .602. The measures are of the same kind, the rest is not: another"
    " model (SmolLM2-135M-Instruct) and classifier, 24 tokens after 8 words, and likelihood under the base model (nats"
    " a token, whose exponential is a perplexity). PPO without fine-tuning is `heeler ppo imdb`, further up. The"
    " preference model and the judge of the probability of positive are the same encoder trained on the same reviews,"
    " with other losses; the bag of words has reviews of its own, and VADER has none. Fine-tuning here is on positive"
    " and negative reviews alike: texts become like reviews, less positive than the model's own and less likely under"
    " it, where GRUE's fine-tuned model is a little more positive.",
}

FIGURES = {
    "reward": "reward, draws at temperature 1",
    "reward/greedy": "reward, most likely tokens",
    "reward/solved": "right answers, draws at temperature 1",
    "reward/solved/greedy": "right answers, most likely tokens",
    "exact": "exact match, draws",
    "reward/answer/solved": "right answers, draws at temperature 1",
    "reward/answer/solved/greedy": "right answers, most likely tokens",
    "episode/turns": "turns of an episode, draws (1: no call, 2: one call)",
    "episode/turns/greedy": "turns of an episode, most likely tokens",
    "exact/greedy": "exact match, most likely tokens",
    "sampled/chrf": "corpus chrF, draws",
    "greedy/chrf": "corpus chrF, most likely tokens",
    "sampled/bleu": "corpus BLEU, draws",
    "greedy/bleu": "corpus BLEU, most likely tokens",
    "sentiment": "judge: probability of positive",
    "vader": "judge: VADER, -1 to 1",
    "words": "judge: bag of words, probability",
    "nats": "nats a token under SmolLM2 as it came",
    "distinct_2": "distinct_2",
    "duplicates": "duplicates",
    "length": "length, tokens",
    "truncated_fraction": "cut at the length cap",
    "kl/ref": "KL to the fine-tuned policy, nats a sequence",
}

OF_TASK = {
    "rlhf": ("reward", "sentiment", "vader", "words", "nats", "distinct_2", "duplicates", "length", "kl/ref"),
    "translate": ("reward", "sampled/chrf", "greedy/chrf", "sampled/bleu", "greedy/bleu", "length", "kl/ref"),
    "qa": ("reward", "reward/greedy", "exact", "exact/greedy", "length", "kl/ref"),
    "trivia": ("reward", "reward/greedy", "exact", "exact/greedy", "length", "kl/ref"),
    "calculator": (
        "reward/answer/solved",
        "reward/answer/solved/greedy",
        "episode/turns",
        "episode/turns/greedy",
        "length",
        "kl/ref",
    ),
}


SHOWN = ("reward/solved", "reward/solved/greedy", "reward", "reward/greedy", "length", "kl/ref")


def _settings(config: Any) -> Any:
    """A config without the files, folders and seeds of one run."""
    if not isinstance(config, dict):
        return config
    return {key: _settings(value) for key, value in config.items() if key not in OF_THE_RUN}


def differences(one: Any, other: Any, default: Any = None, where: str = "") -> list[str]:
    """What two runs were set to differently; an option that one version did not have yet counts as its default."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [f"{where} {one} and {other}"]
    default = default if isinstance(default, dict) else {}
    found: list[str] = []
    for key in sorted({*one, *other}):
        usual = default.get(key)
        found += differences(one.get(key, usual), other.get(key, usual), usual, f"{where}.{key}".strip("."))
    return found


def defaults() -> dict[str, Any]:
    rewards = RewardTask(training=RewardConfig(model=""))
    whole = {"sft": SFTConfig(model=""), "reward": rewards, "ppo": TextConfig(model="")}
    return {stage: _settings(to_json(config)) for stage, config in whole.items()}


def read(task: str, seed: int, folder: Path) -> dict[str, Any]:
    """What the page needs of a complete run: settings, figures of the stages, minutes, the curve of the rollouts."""
    stages = json.loads((folder / "summary.json").read_text())["stages"]
    for name in stages:
        if name not in ("SFT", "SFT+PPO"):
            stages[name].pop("kl/ref", None)  # a base model is no KL away from itself
    minutes = {"ppo": json.loads((folder / "ppo" / "summary.json").read_text())["seconds/ppo"] / 60, "before": 0.0}
    settings: dict[str, Any] = {}
    for stage in ("sft", "reward", "ppo"):
        if (folder / stage / "summary.json").exists():
            saved = json.loads((folder / stage / "config.json").read_text())["config"]
            settings[stage] = _settings(saved)
            if stage != "ppo":
                minutes["before"] += json.loads((folder / stage / "summary.json").read_text())["seconds"] / 60
    whole = json.loads((folder / "ppo" / "config.json").read_text())
    ppo, resolved = whole["config"], whole["resolved"]
    settings["precision"] = resolved["precision"]
    rows = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    held_out = folder / "data" / "held_out.jsonl"
    questions = [json.loads(line) for line in held_out.read_text().splitlines()] if held_out.exists() else []
    answers = Counter(str(row["answer"]) for row in questions if "answer" in row)
    return {
        "task": task,
        "seed": seed,
        "settings": settings,
        "setting": {key: ppo[key] for key in ("updates", "prompts_per_update", "samples_per_prompt")}
        | {"shuffle": ppo["ppo"]["shuffle"]},
        "hardware": hardware(),
        "threads": resolved["threads"],
        "minutes": {key: round(value, 1) for key, value in minutes.items()},
        "stages": {
            name: {key: round(figures[key], 4) for key in OF_TASK.get(task, SHOWN) if key in figures}
            for name, figures in stages.items()
        },
        "commonest": [(answer, count / answers.total()) for answer, count in answers.most_common(1)],
        "curve": [round(row["reward/mean"], 4) for row in rows],
    }


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def minutes(runs: list[dict[str, Any]]) -> str:
    """How long the runs took, machine by machine."""
    where: dict[tuple[str, int], list[dict[str, float]]] = {}
    for run in runs:
        where.setdefault((run["hardware"], run["threads"]), []).append(run["minutes"])
    return "; ".join(
        f"{mean(m['before'] for m in found):.0f} minutes before PPO and {mean(m['ppo'] for m in found):.0f} of PPO with"
        f" {threads} thread{'s' * (threads > 1)} of {hardware} ({len(found)})"
        for (hardware, threads), found in where.items()
    )


def section(task: str, runs: list[dict[str, Any]]) -> list[str]:
    for run in runs[1:]:
        apart = differences(runs[0]["settings"], run["settings"], defaults())
        if apart:
            seeds = f"{runs[0]['seed']} and {run['seed']}"
            sys.exit(f"seeds {seeds} of {task} had other settings ({'; '.join(apart[:3])}): repeat the older one")
    found = [run["stages"] for run in runs]
    setting, names = runs[0]["setting"], list(found[0])
    keys = [key for key in OF_TASK.get(task, SHOWN) if any(key in figures for figures in found[0].values())]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines = [
        f"### {TITLES[task]}",
        "",
        f"`heeler {' '.join(COMMANDS[task])}`, seed{'s' * (len(runs) > 1)} {seeds}; {setting['updates']} updates of"
        f" {setting['prompts_per_update']} prompts with {setting['samples_per_prompt']} completions each, minibatches"
        f" of {setting['shuffle']}. {minutes(runs)}.",
        "",
        f"| figure | {' | '.join(names)} | change by PPO |",
        "|---" * (len(names) + 2) + "|",
    ]
    for key in keys:
        per_stage = [[f[name].get(key) for f in found] for name in names]
        cells = ["" if None in values else spread(values) for values in per_stage]
        change = spread([f["SFT+PPO"][key] - f["SFT"][key] for f in found])
        lines.append(f"| {FIGURES[key]} | {' | '.join(cells)} | {change} |")
    lines += [""]
    if runs[0]["commonest"] and task != "translate":
        answer, share = runs[0]["commonest"][0][0], mean(run["commonest"][0][1] for run in runs)
        if share >= 0.05:
            lines += [f"Always answering {answer!r} would be right for {share:.0%} of the questions.", ""]
    return [*lines, *([NOTES[task], ""] if task in NOTES else [])]


def picture(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.2), layout="constrained", squeeze=False)
    for axis, (task, runs) in zip(axes[0], found.items(), strict=True):
        for run in runs:
            smooth = [mean(run["curve"][max(0, i - 4) : i + 1]) for i in range(len(run["curve"]))]
            axis.plot(range(1, len(smooth) + 1), smooth, label=f"seed {run['seed']}")
        axis.set(title=task, xlabel="PPO update")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("reward of the rollouts, mean of 5 updates")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def train(wanted: list[tuple[str, int, Path]], parallel: int) -> None:
    """The missing runs, `parallel` at a time, the output of each beside its folder."""

    def run(job: tuple[str, int, Path]) -> str:
        task, seed, folder = job
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "heeler.cli", *COMMANDS[task], "--seed", str(seed), "--out", str(folder)]
        log = folder.with_suffix(".log")
        with log.open("wb") as stream:
            status = subprocess.run(
                [*command, "--threads", "1"], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False
            ).returncode
        return f"{task}, seed {seed}: status {status}, see {log}" if status else ""

    from heeler.recipes.imdb import imdb_reward_model, smollm2_folder

    smollm2_folder()  # what runs share is made before they start
    if any(task == "rlhf" for task, _, _ in wanted):
        imdb_reward_model()
    missing = [job for job in wanted if not (job[2] / "summary.json").exists()]
    with ThreadPoolExecutor(parallel) as pool:
        failed = [message for message in pool.map(run, missing) if message]
    if failed:
        sys.exit("\n".join(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    usual = ["chain_sum", "syllogism", "aiw", "calculator", "qa", "trivia", "translate", "rlhf"]
    parser.add_argument("--tasks", nargs="+", choices=list(COMMANDS), default=usual)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tasks")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--collect-only", action="store_true")
    arguments = parser.parse_args()
    wanted = [(t, s, arguments.runs / f"{t}-{s}") for s in arguments.seeds for t in arguments.tasks]
    if not arguments.collect_only:
        train(wanted, arguments.parallel)
    kept = json.loads(DATA.read_text())["runs"] if DATA.exists() else []
    known = {(run["task"], run["seed"]): run for run in kept}
    for folder in sorted(arguments.runs.glob("*-*")):
        task, _, seed = folder.name.rpartition("-")
        if task in COMMANDS and (folder / "summary.json").exists():
            before, found = known.get((task, int(seed)), {}), read(task, int(seed), folder)
            same = before.get("curve") == found["curve"]  # the run that is kept, which knows the machine that made it
            known[task, int(seed)] = found | ({"hardware": before["hardware"]} if same else {})
    of_tasks = {task: [known[key] for key in sorted(known) if key[0] == task] for task in COMMANDS}
    of_tasks = {task: runs for task, runs in of_tasks.items() if runs}
    if not of_tasks:
        sys.exit(f"no complete run in {arguments.runs}")
    rows = ",\n".join(json.dumps(known[key]) for key in sorted(known))
    DATA.write_text(f'{{"runs": [\n{rows}\n]}}\n')
    picture(of_tasks, ROOT / "docs" / "images" / "task_curves.png")
    lines = [
        "## Recipes of several stages",
        "",
        "Made by `python benchmarks/task_results.py`. The same held-out prompts for every stage; ± is the standard"
        " deviation over seeds; behind the machine stands how many of the runs it made.",
        "",
        *[line for task, runs in of_tasks.items() for line in section(task, runs)],
        "![Rewards of the rollouts over the updates](images/task_curves.png)",
        "",
    ]
    replace_section(ROOT / "docs" / "results.md", "tasks", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
