"""The parts of one decoding step of a 135M language model: products of few rows, and the attention of single tokens.

    python benchmarks/decoding_parts.py [--threads 2] [--rounds 9]

The shapes are those of SmolLM2-135M, the weights random and different in each of the 30 layers, so that they come from
memory as they do in the model. All ways take turns in one process; the median and the least time count. Writes the
section of this processor in docs/benchmarks/decoding_parts.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from growth import SHAPES, machine  # noqa: E402
from pages import hardware, processor, replace_section  # noqa: E402

from heeler.policies.attention import SHORT, attend, short_rows  # noqa: E402
from heeler.rollout.engines.kernels import loaded  # noqa: E402
from heeler.rollout.engines.packing import Blocks  # noqa: E402
from heeler.rollout.engines.plain import Tokens  # noqa: E402
from heeler.runtime.products import library_for  # noqa: E402

HIDDEN, LAYERS, INNER = SHAPES["135M"].hidden, SHAPES["135M"].layers, SHAPES["135M"].inner
HEADS, GROUPS, WIDTH, VOCABULARY = HIDDEN // 64, HIDDEN // 192, 64, 49152
# (outputs, inputs) of the seven products of a layer
PRODUCTS = (
    *((HIDDEN, HIDDEN), (HIDDEN // 3, HIDDEN), (HIDDEN // 3, HIDDEN), (HIDDEN, HIDDEN)),
    *((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)),
)
ROWS = (8, 24, 64, 128, 256)
ATTENDED = ((64, 40), (64, 100), (64, 300), (16, 1024))  # (rows, columns)
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
    inputs = {width: torch.randn(rows, width).to(weights[0].dtype) for width in (HIDDEN, INNER)}
    columns = [weight.t().contiguous() for weight in weights]
    each = len(PRODUCTS)
    joined: list[torch.Tensor] = []
    for first in range(0, each * LAYERS, each):
        q, k, v, o, gate, up, down = weights[first : first + each]
        joined += [torch.cat([q, k, v]), o, torch.cat([gate, up]), down]
    joined.append(weights[-1])

    def plain() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def by_columns() -> None:
        for weight in columns:
            torch.matmul(inputs[weight.shape[0]], weight)

    def packed(library: str, of: list[torch.Tensor]) -> Way:
        with mock.patch("heeler.rollout.engines.packing.library_for", return_value=library):
            blocks = [(Blocks(weight, None, rows), weight.shape[1]) for weight in of]

        def multiply() -> None:
            for block, width in blocks:
                block(inputs[width])

        return multiply

    ways: dict[str, Way] = {"plain": plain, "weights by columns": by_columns}
    if torch.backends.mkl.is_available() and weights[0].dtype == torch.float32:
        ways["packed by MKL"] = packed("mkl", weights)
    ways["packed by oneDNN"] = packed("onednn", weights)
    library = library_for(weights[0])
    if library is not None:
        ways["packed as Heeler does, same input joined"] = packed(library, joined)
    return ways


def attention_ways(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Way]:
    """The attention of one token a row in all layers; the rows' tokens begin in columns spread over the first half."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, HEADS, 1, WIDTH, generator=generator).to(dtype)
    layers = [torch.randn(2, rows, GROUPS, columns, WIDTH, generator=generator).to(dtype) for _ in range(LAYERS)]
    begins = torch.arange(rows) * (columns // 2) // rows
    mask = (torch.arange(columns) >= begins[:, None])[:, None, None]
    hidden = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
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
            grouped = query.reshape(rows, GROUPS, HEADS // GROUPS, WIDTH)
            sdpa(grouped, key, value, attn_mask=hidden)

    def by_products() -> None:
        for key, value in layers:
            short_rows(query, key, value, hidden, None, causal=False)

    def heeler() -> None:
        for key, value in layers:
            attend(query[:, :, 0], key, value, hidden, None)

    kernel = loaded()[0]
    spoken = torch.randn(rows, (HEADS + 2 * GROUPS) * WIDTH, generator=generator).to(dtype)
    angles = torch.randn(rows, WIDTH // 2, generator=generator).repeat(1, 2)
    turn = angles.cos().to(dtype), angles.sin().to(dtype)
    positions = columns - 1 - begins  # the same numbers of columns, from the first one on
    tokens = Tokens(positions, positions, torch.arange(rows, dtype=torch.int32), columns)

    def compiled() -> None:
        for key, value in layers:
            assert kernel is not None
            kernel.attend(spoken, turn, None, key, value, tokens, WIDTH**-0.5)

    return {
        "keys and values repeated": repeated, "torch's grouping": by_torch, "heads as queries": as_queries,
        "plain products": by_products, f"Heeler without a compiler: products up to {SHORT} columns": heeler,
        **({"Heeler: compiled, rotations included": compiled} if kernel is not None else {}),
    }  # fmt: skip


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
    lines = [
        f"## {hardware()}",
        "",
        f"`python benchmarks/decoding_parts.py --threads {given.threads} --rounds {given.rounds}`, torch"
        f" {torch.__version__}. Shapes of SmolLM2-135M. Milliseconds of all layers together, median (least) of"
        f" {given.rounds} calls, the ways in turns.",
        "",
    ]
    precisions = [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        precisions.append(torch.bfloat16)
    for dtype in precisions:
        lines += section(dtype, given.rounds)
    page = ROOT / "docs" / "benchmarks" / "decoding_parts.md"
    replace_section(page, processor(), lines)
    print("\n".join(lines))


def section(dtype: torch.dtype, rounds: int) -> list[str]:
    """The tables of one precision."""
    name = str(dtype).removeprefix("torch.")
    rate, bandwidth = machine("bf16" if dtype == torch.bfloat16 else "fp32")
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in PRODUCTS] + [torch.randn(VOCABULARY, HIDDEN)]
    weights = [weight.to(dtype) for weight in weights]
    count = sum(weight.numel() for weight in weights)
    products: list[tuple[str, dict[str, tuple[float, float]], list[str]]] = []
    for rows in ROWS:
        times = in_turns(product_ways(weights, rows), rounds)
        floor = max(2.0 * rows * count / rate, dtype.itemsize * count / bandwidth)
        products.append((str(rows), times, [f"{1e3 * floor:.0f}"]))
        print(products[-1], flush=True)
    del weights
    attended: list[tuple[str, dict[str, tuple[float, float]], list[str]]] = []
    for rows, columns in ATTENDED:
        times = in_turns(attention_ways(rows, columns, dtype), rounds)
        attended.append((f"{rows} rows, {columns} columns", times, []))
        print(attended[-1], flush=True)
    return [
        f"### Products of few rows, {name}",
        "",
        f"{len(PRODUCTS)} products in each of {LAYERS} layers and the output layer. The floor: the operations at"
        f" {rate / 1e9:.0f} GFLOP/s, the rate of one large product here, or the weights at {bandwidth / 1e9:.0f} GB/s,"
        " the rate of a large copy; whichever takes longer.",
        "",
        *table("rows", products, ["floor"]),
        "",
        f"### Attention of one token a row, {name}",
        "",
        f"{HEADS} heads over {GROUPS} keys, {LAYERS} layers. The rows' tokens begin in columns spread over the first"
        " half, as in a pool of rows with different lengths.",
        "",
        *table("pool", attended, []),
        "",
    ]


if __name__ == "__main__":
    main()
