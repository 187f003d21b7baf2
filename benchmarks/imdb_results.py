"""The results of the demo over several seeds: docs/results.md, its picture and its raw figures.

    python benchmarks/imdb_results.py [--seeds 1 2 3] [--updates 36] [--parallel 2] [--demo RUN] [--collect-only]

Each seed is one `heeler ppo imdb --seed S --updates N --threads 1` with the cached reward model, as many side by side
as there are cores: that trains more seeds an hour than one after the other with all threads. Runs that are complete
are not repeated, so the command can be continued. `--demo RUN` writes only the table of one `make demo`, one for each
processor: its times are those of the demo, on all cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware, processor, replace_section  # noqa: E402

FIGURES = (
    ("reward", "reward: probability of positive"),
    ("judge", "judge: VADER, -1 to 1"),
    ("judge_words", "judge: bag of words on other reviews, probability"),
    ("perplexity", "perplexity under the reference"),
    ("distinct_2", "distinct_2, all completions together"),
    ("distinct_2_within", "distinct_2 within a completion, mean"),
    ("duplicates", "duplicates"),
    ("length", "length, tokens"),
    ("kl/ref", "KL to the reference, nats a sequence"),
)


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def table(summaries: list[dict[str, Any]]) -> list[str]:
    lines = ["| figure | before | after | change |", "|---|---|---|---|"]
    for key, title in FIGURES:
        before = [s["eval/before"][key] for s in summaries]
        after = [s["eval/after"][key] for s in summaries]
        change = [b - a for a, b in zip(before, after, strict=True)]
        lines.append(f"| {title} | {spread(before)} | {spread(after)} | {spread(change)} |")
    return lines


def seeds_table(seeds: list[int], runs: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> list[str]:
    lines = [
        "| seed | reward | VADER | distinct_2, share of start | duplicates | KL | seconds an update, median"
        " (rollout / score / update) | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seed, (s, rows) in zip(seeds, runs, strict=True):
        b, a = s["eval/before"], s["eval/after"]
        parts = [median(r[f"time/{part}"] for r in rows) for part in ("rollout", "score", "update")]
        lines.append(
            f"| {seed} | {b['reward']:.3f} -> {a['reward']:.3f} | {b['judge']:.3f} -> {a['judge']:.3f}"
            f" | {a['distinct_2'] / b['distinct_2']:.2f} | {b['duplicates']:.3f} -> {a['duplicates']:.3f}"
            f" | {a['kl/ref']:.2f} | {sum(parts):.1f} ({parts[0]:.1f} / {parts[1]:.1f} /"
            f" {parts[2]:.1f}) | {s['peak_memory_gib']:.2f} |"
        )
    return lines


def examples(summary: dict[str, Any], count: int = 4) -> list[str]:
    lines = ["| prompt | before | after |", "|---|---|---|"]
    for e in summary["eval/examples"][:count]:
        cells = [
            " ".join(str(e[k]).split()).replace("|", "\\|") + ("" if k == "prompt" else f" [{e[f'reward/{k}']:.2f}]")
            for k in ("prompt", "before", "after")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def picture(seeds: list[int], runs: list[list[dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for seed, rows in zip(seeds, runs, strict=True):
        steps = [r["step"] for r in rows]
        axes[0].plot(steps, [r["reward/probability"] for r in rows], marker=".", label=f"seed {seed}")
        axes[1].plot(steps, [r["kl/ref"] for r in rows], marker=".", label=f"seed {seed}")
    axes[0].set(title="Reward of the rollouts: probability of positive", xlabel="PPO update", ylim=(0.4, 1.0))
    axes[1].set(title="KL to the reference, nats a sequence", xlabel="PPO update")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def train(seeds: list[int], folders: list[Path], updates: int, parallel: int) -> None:
    """The missing runs, `parallel` at a time, the output of each beside its folder."""
    from heeler.recipes.imdb import imdb_reward_model

    imdb_reward_model()
    missing = [(s, f) for s, f in zip(seeds, folders, strict=True) if not (f / "policy").exists()]
    for start in range(0, len(missing), parallel):
        processes: list[subprocess.Popen[bytes]] = []
        for seed, folder in missing[start : start + parallel]:
            folder.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "heeler.cli", "ppo", "imdb", "--seed", str(seed), "--out", str(folder)]
            command += ["--updates", str(updates), *(["--threads", "1"] if parallel > 1 else [])]
            with folder.with_suffix(".log").open("wb") as log:
                processes.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
        for process in processes:
            if process.wait():
                sys.exit(f"a run failed with status {process.returncode}: see the logs in {folders[0].parent}")


def demo_section(folder: Path) -> list[str]:
    """The figures and times of one `make demo`."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    model = summary["reward_model"]
    return [
        f"### One `make demo` on {hardware()}",
        "",
        f"Made by `python benchmarks/imdb_results.py --demo {folder}`. {config['resolved']['notes'][0]}.",
        f"{summary['updates']} updates took {summary['seconds/ppo']:.0f} s; before them the reward model was trained on"
        f" {model['config']['tokens']:,} tokens in {model['seconds']:.0f} s, and is right on"
        f" {model['figures']['reviews_128']['accuracy']:.1%} of held-out reviews of 128 tokens and on"
        f" {model['figures']['snippets_32']['accuracy']:.1%} of snippets of 32.",
        "",
        *table([summary]),
        "",
        *seeds_table([config["config"]["seed"]], [(summary, rows)]),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--updates", type=int, default=36)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--collect-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.demo:
        lines = demo_section(arguments.demo)
        replace_section(ROOT / "docs" / "results.md", f"demo {processor()}", lines)
        print("\n".join(lines))
        return
    folders = [arguments.runs / f"seed-{seed}" for seed in arguments.seeds]
    if not arguments.collect_only:
        train(arguments.seeds, folders, arguments.updates, arguments.parallel)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    config = json.loads((folders[0] / "config.json").read_text())
    reward_model = summaries[0]["reward_model"]
    lines = [
        "## Movie reviews: `heeler ppo imdb`",
        "",
        f"Made by `{' '.join(['python', 'benchmarks/imdb_results.py', *sys.argv[1:]])}`.",
        f"Hardware: {hardware()}. torch {config['resolved']['torch']}. {config['resolved']['notes'][0]}.",
        "",
        f"SmolLM2-135M-Instruct continues the first 8 words of reviews with 24 tokens."
        f" {config['resolved']['notes'][1]}; {config['config']['prompts_per_update']} prompts an update,"
        f" {summaries[0]['updates']} updates, seeds side by side with {config['resolved']['threads']} thread(s) each,"
        f" {config['config']['ppo']['epochs']} epoch(s) of"
        f" {config['config']['ppo']['minibatches']} minibatches, KL coefficient {config['config']['kl']['coef']}."
        f" Means over 256 held-out prompts, ± over {len(folders)} seeds; the same prompts before and after.",
        "",
        *table(summaries),
        "",
        *seeds_table(arguments.seeds, list(zip(summaries, metrics, strict=True))),
        "",
        "![Reward and KL over the updates](images/imdb_curve.png)",
        "",
        f"Continuations of seed {arguments.seeds[0]}, the first prompts of the held-out set, with the reward model's"
        " probability of positive:",
        "",
        *examples(summaries[0]),
        "",
        "### The reward model",
        "",
        f"MiniLM-L6, {reward_model['config']['tokens']:,} tokens of training in {reward_model['seconds']:.0f} s"
        f" ({reward_model['steps']} steps). Share of right labels on held-out reviews:",
        "",
        "| test | accuracy | log loss |",
        "|---|---|---|",
        *[f"| {k} | {v['accuracy']:.1%} | {v['log_loss']:.3f} |" for k, v in reward_model["figures"].items()],
        "",
    ]
    replace_section(ROOT / "docs" / "results.md", "imdb", lines)
    picture(arguments.seeds, metrics, ROOT / "docs" / "images" / "imdb_curve.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
