"""Peak memory of a PPO update of a 135M language model, and what each option that saves memory costs in time.

    python benchmarks/memory.py [--out docs/benchmarks/memory.md]

The updates are those of update_speed.py: 64 prompts with 24 sampled tokens each on SmolLM2-135M, every setting in a
process of its own, one after the other, two updates each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pages import hardware
from update_speed import HEELER, KL_COEF, LR, RESPONSE_TOKENS, System, cores, in_process, this_script

ROOT = Path(__file__).resolve().parents[1]
EIGHT, AGAIN = {"optimizer": "adamw8bit"}, {"activation_checkpointing": True}
WAYS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("none", {}, 1024),
    ("`--activation-checkpointing`", AGAIN, 1024),
    ("`--optimizer adamw8bit`", EIGHT, 1024),
    ("`--optimizer adamw8bit --activation-checkpointing`", EIGHT | AGAIN, 1024),
    ("both, `--ppo.token-budget 512`", EIGHT | AGAIN, 512),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "memory.md")
    parser.add_argument("--threads", type=int, default=cores())
    arguments = parser.parse_args()
    lines = [
        "# Peak memory of an update",
        "",
        "SmolLM2-135M, one update of 64 prompts with 24 sampled tokens each, 1 epoch and 1 minibatch; the second of two"
        " updates is timed. Peak memory is the resident memory of the whole process, Python and torch included"
        f" ({baseline():.2f} GiB after the imports).",
        "",
        f"    python benchmarks/memory.py --threads {arguments.threads}",
        "",
        f"Machine: {hardware()}.",
    ]
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        made = in_process(this_script("prepare"), {"tiny": False, "folder": folder, "threads": arguments.threads})
        for system in HEELER:
            if system.full:
                lines += rows(system, made, arguments.threads)
    text = "\n".join([*lines, ""])
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def baseline() -> float:
    """GiB of a process that has imported what a run needs."""
    modules = "heeler.train.text, transformers.models.llama as _, heeler.runtime.machine as machine"
    code = f"import {modules}; print(machine.peak_memory_gib())"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def rows(system: System, made: dict[str, Any], threads: int) -> list[str]:
    lines = [
        "",
        f"## ({system.key}) {system.name}",
        "",
        "| options | peak memory, GiB | seconds an update | of these, update |",
        "|---|---:|---:|---:|",
    ]
    for name, options, budget in WAYS:
        job = made | vars(system) | {
            "response_tokens": RESPONSE_TOKENS, "lr": LR, "kl_coef": KL_COEF, "threads": threads, "top_layers": 6,
            "updates": 2, "options": options, "token_budget": budget,
        }  # fmt: skip
        found = in_process(this_script("heeler"), job)
        peak, seconds, update = max(found["peak_gib"]), found["seconds"][-1], found["update"][-1]
        lines.append(f"| {name} | {peak:.2f} | {seconds:.2f} | {update:.2f} |")
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
