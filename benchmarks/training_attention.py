"""Attention of short rows in a training step: torch's kernel beside two products of small matrices.

    python benchmarks/training_attention.py [--threads 2] [--rounds 15]

The heads are those of SmolLM2-135M; every case has 1,024 tokens, in rows of different lengths. Both ways take turns in
one process; the median and the least time count. Writes the section of this processor in
docs/benchmarks/training_attention.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from decoding_parts import GROUPS, HEADS, WIDTH, Way, in_turns, table  # noqa: E402
from pages import hardware, processor, replace_section  # noqa: E402
from torch import Tensor  # noqa: E402

from heeler.policies.attention import SHORT, short_rows  # noqa: E402
from heeler.runtime.machine import keep_freed_memory  # noqa: E402

TOKENS = 1024
LENGTHS = (16, 32, 64, 128, 256)


def ways(length: int, dtype: torch.dtype) -> dict[str, Way]:
    generator = torch.Generator().manual_seed(0)
    rows = TOKENS // length
    shapes = (rows, length, HEADS, WIDTH), *[(rows, length, GROUPS, WIDTH)] * 2
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    cotangent = torch.randn(rows, length, HEADS, WIDTH, generator=generator).to(dtype)

    def by_torch() -> Tensor:
        query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    def products() -> Tensor:
        query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
        return short_rows(query, key, value, None, None, causal=True)

    def both_passes(attend: Callable[[], Tensor]) -> Way:
        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            attend().backward(cotangent)

        return run

    def forward(attend: Callable[[], Tensor]) -> Way:
        def run() -> None:
            with torch.no_grad():
                attend()

        return run

    return {
        "forward: torch": forward(by_torch), "forward: products": forward(products),
        "forward and backward: torch": both_passes(by_torch),
        "forward and backward: products": both_passes(products),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="counted calls of each way (15)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    lines = [
        f"## {hardware()}",
        "",
        f"`python benchmarks/training_attention.py --threads {given.threads} --rounds {given.rounds}`, torch"
        f" {torch.__version__}. {HEADS} heads over {GROUPS} keys, {TOKENS:,} tokens in rows of one length.",
        f"Milliseconds of one layer, median (least) of {given.rounds} calls, the ways in turns. Heeler takes the"
        f" products up to {SHORT} tokens.",
        "",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        cases = [(str(length), in_turns(ways(length, dtype), given.rounds), list[str]()) for length in LENGTHS]
        lines += [f"### {str(dtype).removeprefix('torch.')}", "", *table("tokens a row", cases, []), ""]
    page = ROOT / "docs" / "benchmarks" / "training_attention.md"
    if not page.exists():
        page.write_text(
            "# Attention of short rows in training\n\nMade by `python benchmarks/training_attention.py`, a section for"
            " each processor that it ran on.\n",
            encoding="utf-8",
        )
    replace_section(page, processor(), lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
