"""The parts of one decoding step of a 135M language model: products of few rows, and the attention of single tokens.

    python benchmarks/decoding_parts.py [--threads 2] [--rounds 9]

The shapes are those of SmolLM2-135M, the weights random and different in each of the 30 layers, so that they come from
memory as they do in the model. All ways take turns in one process; the median and the least time count. Writes
docs/benchmarks/decoding_parts.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from growth import SHAPES, machine  # noqa: E402
from pages import hardware  # noqa: E402

from heeler.policies.attention import attend  # noqa: E402
from heeler.rollout.engines.packing import can_pack  # noqa: E402

HIDDEN, LAYERS, INNER = SHAPES["135M"].hidden, SHAPES["135M"].layers, SHAPES["135M"].inner
HEADS, GROUPS, WIDTH, VOCABULARY = HIDDEN // 64, HIDDEN // 192, 64, 49152
# (outputs, inputs) of the seven products of a layer
PRODUCTS = (
    *((HIDDEN, HIDDEN), (HIDDEN // 3, HIDDEN), (HIDDEN // 3, HIDDEN), (HIDDEN, HIDDEN)),
    *((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)),
)
ROWS = (8, 24, 64, 128, 256)
ATTENDED = ((64, 40), (64, 300), (16, 1024))  # (rows, columns)
Way = Callable[[], None]


def in_turns(ways: dict[str, Way], rounds: int) -> dict[str, tuple[float, float]]:
    """`(median, least)` milliseconds of each way; a first call of each is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - begun))
    return {name: (median(values), min(values)) for name, values in taken.items()}


def product_ways(weights: list[torch.Tensor], rows: int) -> dict[str, Way]:
    """All products of one step with `rows` rows; `weights` are those of the layers in turn and the output's."""
    inputs = {width: torch.randn(rows, width) for width in (HIDDEN, INNER)}
    columns = [weight.t().contiguous() for weight in weights]
    of_mkl = [torch.ops.mkl._mkl_reorder_linear_weight(weight, rows) for weight in weights]
    of_onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]

    each = len(PRODUCTS)
    joined: list[torch.Tensor] = []
    for first in range(0, each * LAYERS, each):
        q, k, v, o, gate, up, down = weights[first : first + each]
        joined += [torch.cat([q, k, v]), o, torch.cat([gate, up]), down]
    joined.append(weights[-1])
    of_joined = [torch.ops.mkl._mkl_reorder_linear_weight(weight, rows) for weight in joined]

    def plain() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def by_columns() -> None:
        for weight in columns:
            torch.matmul(inputs[weight.shape[0]], weight)

    def onednn() -> None:
        for weight, packed in zip(weights, of_onednn, strict=True):
            torch.ops.mkldnn._linear_pointwise(inputs[weight.shape[1]], packed, None, "none", [], "")

    def mkl() -> None:
        for weight, packed in zip(weights, of_mkl, strict=True):
            torch.ops.mkl._mkl_linear(inputs[weight.shape[1]], packed, weight, None, rows)

    def mkl_joined() -> None:
        for weight, packed in zip(joined, of_joined, strict=True):
            torch.ops.mkl._mkl_linear(inputs[weight.shape[1]], packed, weight, None, rows)

    return {
        "plain": plain, "weights by columns": by_columns, "packed by oneDNN": onednn, "packed by MKL": mkl,
        "packed by MKL, same input joined (Heeler)": mkl_joined,
    }  # fmt: skip


def attention_ways(rows: int, columns: int) -> dict[str, Way]:
    """The attention of one token a row in all layers; the rows' tokens begin in columns spread over the first half."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, HEADS, 1, WIDTH, generator=generator)
    layers = [torch.randn(2, rows, GROUPS, columns, WIDTH, generator=generator) for _ in range(LAYERS)]
    begins = torch.arange(rows) * (columns // 2) // rows
    mask = (torch.arange(columns) >= begins[:, None])[:, None, None]
    hidden = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def repeated() -> None:
        for key, value in layers:
            spread = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (key, value))
            sdpa(query, *spread, attn_mask=mask)

    def by_torch() -> None:
        for key, value in layers:
            sdpa(query, key, value, attn_mask=mask, enable_gqa=True)

    def as_queries() -> None:
        for key, value in layers:
            attend(query[:, :, 0], key, value, hidden, None)

    return {"keys and values repeated": repeated, "torch's grouping": by_torch, "heads as queries (Heeler)": as_queries}


def table(first: str, cases: list[tuple[str, dict[str, tuple[float, float]], list[str]]], more: list[str]) -> list[str]:
    ways = list(cases[0][1])
    lines = ["| " + " | ".join([first, *ways, *more]) + " |", "|" + "---|" * (1 + len(ways) + len(more))]
    for name, times, figures in cases:
        cells = [f"{middle:.1f} ({least:.1f})" for middle, least in times.values()]
        lines.append("| " + " | ".join([name, *cells, *figures]) + " |")
    return lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="counted calls of each way (9)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not can_pack(torch.zeros(1)):
        raise SystemExit("this torch has no packed products of MKL: there is nothing to compare")
    rate, bandwidth = machine()
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in PRODUCTS] + [torch.randn(VOCABULARY, HIDDEN)]
    count = sum(weight.numel() for weight in weights)
    products: list[tuple[str, dict[str, tuple[float, float]], list[str]]] = []
    for rows in ROWS:
        times = in_turns(product_ways(weights, rows), given.rounds)
        floor = max(2.0 * rows * count / rate, 4.0 * count / bandwidth)
        products.append((str(rows), times, [f"{1e3 * floor:.0f}"]))
        print(products[-1], flush=True)
    del weights
    attended: list[tuple[str, dict[str, tuple[float, float]], list[str]]] = []
    for rows, columns in ATTENDED:
        times = in_turns(attention_ways(rows, columns), given.rounds)
        attended.append((f"{rows} rows, {columns} columns", times, []))
        print(attended[-1], flush=True)
    lines = [
        "# The parts of a decoding step",
        "",
        f"Made by `python benchmarks/decoding_parts.py --threads {given.threads} --rounds {given.rounds}`. Hardware:"
        f" {hardware()}. torch {torch.__version__}, fp32.",
        "Shapes of SmolLM2-135M. Milliseconds of all layers together, median (least) of"
        f" {given.rounds} calls, the ways in turns.",
        "",
        "## Products of few rows",
        "",
        f"{len(PRODUCTS)} products in each of {LAYERS} layers and the output layer. The floor: the operations at"
        f" {rate / 1e9:.0f} GFLOP/s, the rate of one large product here, or the weights at {bandwidth / 1e9:.0f} GB/s,"
        " the rate of a large copy; whichever takes longer.",
        "",
        *table("rows", products, ["floor"]),
        "",
        "## Attention of one token a row",
        "",
        f"{HEADS} heads over {GROUPS} keys, {LAYERS} layers. The rows' tokens begin in columns spread over the first"
        " half, as in a pool of rows with different lengths.",
        "",
        *table("pool", attended, []),
    ]
    (ROOT / "docs" / "benchmarks" / "decoding_parts.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
