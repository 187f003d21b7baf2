"""The results of the recipes of several stages over several seeds: docs/results.md and a picture of their curves.

    python benchmarks/task_results.py [--tasks qa translate] [--seeds 1 2 3] [--parallel 2] [--collect-only]

Each run is one `heeler` command of COMMANDS with `--seed S --threads 1`, as many side by side as `--parallel` says:
two runs with a thread each train more an hour on two cores than one after the other with both. Stages that are
complete are not repeated, so the command can be continued. What a row has no run for is left out, and the table says
how many seeds it stands on.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware, replace_section  # noqa: E402

COMMANDS = {
    "chain_sum": ("ppo", "arithmetic", "--task", "chain_sum"),
    "syllogism": ("ppo", "arithmetic", "--task", "syllogism"),
    "knights_knaves": ("ppo", "arithmetic", "--task", "knights_knaves"),
    "gsm_symbolic": ("ppo", "arithmetic", "--task", "gsm_symbolic"),
    "qa": ("ppo", "qa"),
    "translate": ("ppo", "translate"),
    "rlhf": ("rlhf", "imdb"),
}

TITLES = {
    "chain_sum": "Sums of Reasoning Gym (chain_sum)",
    "syllogism": "Syllogisms of Reasoning Gym",
    "knights_knaves": "Knights and knaves of Reasoning Gym",
    "gsm_symbolic": "GSM-symbolic of Reasoning Gym, answered at once",
    "qa": "Questions about countries that no training question names",
    "translate": "English into French, JupyterLab's interface",
    "rlhf": "RLHF on movie reviews",
}

NOTES = {
    "rlhf": "GRUE's IMDB task [Ramamurthy et al., 2210.01241] has a sentiment score of .489 for GPT-2 as it came, .539"
    " after fine-tuning and .626 after fine-tuning and PPO, at perplexities of 32.2, 35.5 and 35.0, with about 64k"
    " sampled tokens. The measures are of the same kind, the rest is not the same: another model"
    " (SmolLM2-135M-Instruct) and classifier, 24 tokens after 8 words, and likelihood under the base model (nats a"
    " token, whose exponential is a perplexity).",
}

FIGURES = {
    "reward": "reward, draws at temperature 1",
    "reward/greedy": "reward, most likely tokens",
    "reward/solved": "right answers, draws at temperature 1",
    "reward/solved/greedy": "right answers, most likely tokens",
    "exact": "exact match, draws",
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
}


def stages(folder: Path) -> dict[str, dict[str, float]]:
    """Figures by stage."""
    return json.loads((folder / "summary.json").read_text())["stages"]


def minutes(folder: Path) -> tuple[float, float]:
    """Minutes of the stages before PPO, and of PPO (evaluations aside)."""
    before, ppo = 0.0, json.loads((folder / "ppo" / "summary.json").read_text())["seconds/ppo"]
    for stage in ("sft", "reward"):
        if (folder / stage / "summary.json").exists():
            before += json.loads((folder / stage / "summary.json").read_text())["seconds"]
    return before / 60, ppo / 60


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def section(task: str, runs: dict[int, Path]) -> list[str]:
    found = {seed: stages(folder) for seed, folder in runs.items()}
    names = list(next(iter(found.values())))
    config = json.loads((next(iter(runs.values())) / "ppo" / "config.json").read_text())["config"]
    shuffle = config["ppo"].get("shuffle", "sequences")
    before, after = zip(*(minutes(folder) for folder in runs.values()), strict=True)
    keys = [
        key
        for key in OF_TASK.get(
            task, ("reward/solved", "reward/solved/greedy", "reward", "reward/greedy", "length", "kl/ref")
        )
        if any(key in figures for figures in next(iter(found.values())).values())
    ]
    lines = [
        f"### {TITLES[task]}",
        "",
        f"`heeler {' '.join(COMMANDS[task])}`, seed{'s' * (len(runs) > 1)} {', '.join(map(str, runs))};"
        f" {config['updates']} updates of {config['prompts_per_update']} prompts with {config['samples_per_prompt']}"
        f" completions each, minibatches of {shuffle}. On one thread {mean(before):.0f} minutes before PPO and"
        f" {mean(after):.0f} of PPO.",
        "",
        f"| figure | {' | '.join(names)} | change by PPO |",
        "|---" * (len(names) + 2) + "|",
    ]
    for key in keys:
        cells = [
            spread([f[name][key] for f in found.values()]) if all(key in f[name] for f in found.values()) else ""
            for name in names
        ]
        change = [f["SFT+PPO"][key] - f["SFT"][key] for f in found.values()]
        lines.append(f"| {FIGURES[key]} | {' | '.join(cells)} | {spread(change)} |")
    lines += [""]
    held_out = next(iter(runs.values())) / "data" / "held_out.jsonl"
    if task not in NOTES and held_out.exists():
        answers = Counter(str(json.loads(line)["answer"]) for line in held_out.read_text().splitlines())
        answer, count = answers.most_common(1)[0]
        lines += [f"Always answering {answer!r} would be right for {count / answers.total():.0%} of the questions.", ""]
    return [*lines, *([NOTES[task], ""] if task in NOTES else [])]


def picture(found: dict[str, dict[int, Path]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.2), layout="constrained", squeeze=False)
    for axis, (task, runs) in zip(axes[0], found.items(), strict=True):
        for seed, folder in runs.items():
            rows = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
            rewards = [row["reward/mean"] for row in rows]
            smooth = [mean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
            axis.plot([row["step"] for row in rows], smooth, label=f"seed {seed}")
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
    parser.add_argument(
        "--tasks", nargs="+", choices=list(COMMANDS), default=["chain_sum", "syllogism", "qa", "translate", "rlhf"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tasks")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--collect-only", action="store_true")
    arguments = parser.parse_args()
    wanted = [(t, s, arguments.runs / f"{t}-{s}") for s in arguments.seeds for t in arguments.tasks]
    if not arguments.collect_only:
        train(wanted, arguments.parallel)
    found: dict[str, dict[int, Path]] = {}
    for task, seed, folder in sorted(wanted, key=lambda w: (arguments.tasks.index(w[0]), w[1])):
        if (folder / "summary.json").exists():
            found.setdefault(task, {})[seed] = folder
    if not found:
        sys.exit(f"no complete run in {arguments.runs}")
    picture(found, ROOT / "docs" / "images" / "task_curves.png")
    lines = [
        "## Recipes of several stages",
        "",
        f"Made by `python benchmarks/task_results.py`. Hardware: {hardware()}. Every run had one thread. The same"
        " held-out prompts for every stage; ± is the standard deviation over seeds.",
        "",
        *[line for task, runs in found.items() for line in section(task, runs)],
        "![Rewards of the rollouts over the updates](images/task_curves.png)",
        "",
    ]
    replace_section(ROOT / "docs" / "results.md", "tasks", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
