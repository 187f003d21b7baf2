"""The reward models for movie reviews, the demo's quick one and the full one: their section of docs/results.md.

    python benchmarks/reward_results.py

Takes those in the cache and trains the ones that are missing: the full one for an hour or two on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware, replace_section  # noqa: E402

from heeler.recipes.imdb import imdb_reward_model  # noqa: E402

COLUMNS = {
    "reviews_256": "reviews, 256 tokens",
    "reviews_128": "reviews, 128 tokens",
    "reviews_32": "reviews, 32 tokens",
    "snippets_32": "reviews and snippets, 32 tokens",
}


def row(name: str, report: dict[str, Any]) -> str:
    """One model: what it was trained on, for how long, and its accuracy (log loss in nats) on held-out texts."""
    config, figures = report["config"], report["figures"]
    cells = [
        f"{figures[key]['accuracy']:.1%} ({figures[key]['log_loss']:.3f})" if key in figures else "" for key in COLUMNS
    ]
    lengths = ", ".join(str(n) for n in sorted(set(config["lengths"])))
    layers = f"top {6 - config['frozen_layers']} of 6" if config["frozen_layers"] else "all, embeddings frozen"
    minutes = f"{report['seconds'] / 60:.0f}"
    return f"| {name} | {config['tokens'] / 1e6:g}M | {lengths} | {layers} | {minutes} | {' | '.join(cells)} |"


def main() -> None:
    lines = [
        "### Reward models: `heeler reward imdb`, and with `--full`",
        "",
        f"Made by `python benchmarks/reward_results.py` on {hardware()}; MiniLM (22M weights), seed 0. Accuracy and, in"
        " brackets, log loss in nats on 1,000 held-out texts each.",
        "",
        f"| model | tokens | lengths | layers | minutes | {' | '.join(COLUMNS.values())} |",
        "|---|---|---|---|---|" + "---|" * len(COLUMNS),
        row("quick, the demo's", imdb_reward_model()[1]),
        row("full", imdb_reward_model(full=True)[1]),
        "",
    ]
    replace_section(ROOT / "docs" / "results.md", "reward-models", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
