"""One PPO update of a 135M language model with and without prompts that are read once for all their samples.

    python benchmarks/prompt_sharing.py [--threads 2]

SmolLM2-135M, top 10 layers, 2 epochs of 2 minibatches, prompts of random tokens, no end of sequence, so that both ways
sample the same number of tokens. The two ways take turns, two updates each after one to warm up; the faster counts.
"Once" reads a prompt once while sampling, while scoring and in every pass of the update; "for each sample" gives every
sample a request and a row of its own. Writes docs/benchmarks/prompt_sharing.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware  # noqa: E402

from heeler import PPOConfig, Sampling, TextConfig, TopLayers  # noqa: E402
from heeler.data.prompts import PromptSet  # noqa: E402
from heeler.recipes.imdb import smollm2_folder  # noqa: E402
from heeler.runtime.reduce import LocalReduce  # noqa: E402
from heeler.train.ppo import train_loop  # noqa: E402
from heeler.train.text import TextRun, build_text_run  # noqa: E402

CASES = (  # prompt tokens, tokens of an answer, prompts, samples of each
    (20, 4, 16, 8),
    (100, 16, 4, 8),
    (10, 24, 32, 1),
)
PARTS = ("rollout", "score", "update")


def build(case: tuple[int, int, int, int], share: bool, threads: int) -> TextRun:
    length, new, prompts, samples = case
    config = TextConfig(
        model=str(smollm2_folder(False)), prompts_per_update=prompts, samples_per_prompt=samples,
        sampling=Sampling(max_new_tokens=new), trainable=TopLayers(layers=10), lr=1e-6,
        ppo=PPOConfig(epochs=2, minibatches=2), threads=threads, precision="fp32", engine_rows=256,
        share_prompts=share,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(100, 40000, (prompts, length), generator=generator).tolist()
    run = build_text_run(config, reward=lambda prompts, completions, **columns: [0.0] * len(prompts))
    run.prompts = PromptSet(prompts=[str(row) for row in rows], tokens=rows, columns={}, name="random tokens")
    run.engine.eos_ids = run.engine.eos_ids[:0]  # pyright: ignore
    return run


def one_update(run: TextRun) -> dict[str, float]:
    seen: list[dict[str, float]] = []
    config = replace(run.config, updates=run.state.step + 1)
    train_loop(
        run.state, run.collector(), run.score(), config, LocalReduce(), lambda r: bool(seen.append(r.metrics)) or True
    )
    return seen[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    lines = [
        "# Prompts that are read once for all their samples",
        "",
        f"Made by `python benchmarks/prompt_sharing.py --threads {threads}`. Hardware: {hardware()}. torch"
        f" {torch.__version__}, fp32. SmolLM2-135M, top 10 layers, 2 epochs of 2 minibatches; seconds an update",
        "(rollout / score / update), the faster of two, the two ways in turns.",
        "",
        "| prompt, answer, prompts x samples | for each sample | once | ratio |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        runs = {share: build(case, share, threads) for share in (False, True)}
        times: dict[bool, list[list[float]]] = {False: [], True: []}
        for turn in range(3):
            for share, run in runs.items():
                metrics = one_update(run)
                if turn:
                    times[share].append([metrics[f"time/{part}"] for part in PARTS])
        cells: list[str] = []
        totals: list[float] = []
        for share in (False, True):
            parts = min(times[share], key=sum)
            totals.append(sum(parts))
            cells.append(f"{sum(parts):.1f} ({' / '.join(f'{x:.1f}' for x in parts)})")
        length, new, prompts, samples = case
        lines.append(
            f"| {length} tokens, {new} tokens, {prompts} x {samples} | {cells[0]} | {cells[1]} |"
            f" {totals[0] / totals[1]:.1f} |"
        )
        print(lines[-1], flush=True)
    (ROOT / "docs" / "benchmarks" / "prompt_sharing.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
