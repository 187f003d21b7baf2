"""How the cost of a PPO update grows with the batch, the length of responses and the size of the model.

    python benchmarks/growth.py [--threads 2] [--only batch length size]

Random models in the shape of SmolLM2, all weights trained, value head, one epoch of one minibatch, prompts of 16 random
tokens, no end of sequence. Every row is a process of its own; its second update counts. Beside the seconds of each
stage stands the floor: the operations of its matrix products at the rate of one large product, the weights and the
optimiser's numbers at the bandwidth of one large copy, both measured in the same process. Writes
docs/benchmarks/growth.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware  # noqa: E402

PROMPT = 16
STAGES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Shape:
    """A Llama with heads of 64, three to a key, and the vocabulary of SmolLM2."""

    hidden: int
    layers: int
    inner: int

    def config(self, vocabulary: int) -> Any:
        import transformers

        return transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            intermediate_size=self.inner, num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 192, max_position_embeddings=4096, tie_word_embeddings=True,
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Weights in the matrix products of all layers."""
        attention = self.hidden * self.hidden * 2 + 2 * self.hidden * (self.hidden // 3)
        return self.layers * (attention + 3 * self.hidden * self.inner)


SHAPES = {
    "15M": Shape(192, 12, 512),
    "40M": Shape(384, 12, 1024),
    "135M": Shape(576, 30, 1536),
    "360M": Shape(960, 32, 2560),
}


@dataclass(frozen=True)
class Case:
    """One update: `prompts` prompts, `response` tokens each, a model of `size`."""

    size: str
    prompts: int
    response: int


CASES = {
    "batch": [Case("40M", prompts, 32) for prompts in (8, 16, 32, 64, 128, 256)],
    "length": [Case("40M", 8, response) for response in (32, 64, 128, 256, 512, 1024)],
    "size": [Case(size, 16, 32) for size in SHAPES],
}
TITLES = {
    "batch": "Prompts in an update (40M weights, 32 tokens a response)",
    "length": "Tokens of a response (40M weights, 8 prompts)",
    "size": "Weights (16 prompts, 32 tokens a response)",
}


def floors(case: Case, vocabulary: int, rate: float, bandwidth: float, rounded: bool) -> dict[str, float]:
    """Seconds that each stage takes at least, at `rate` operations and `bandwidth` bytes a second.

    In fp32 the engine's log-probabilities are the old policy's and scoring runs the reference alone; in bf16
    (`rounded`) it runs the policy too, whose pass the update goes on from.
    """
    number = 2.0 if rounded else 4.0  # bytes
    shape = SHAPES[case.size]
    sequences, last = case.prompts, PROMPT + case.response - 1
    layers, head = 2.0 * shape.layer_weights, 2.0 * vocabulary * shape.hidden  # operations a token
    decisions, fed = sequences * case.response, sequences * last
    pairs = 4.0 * shape.layers * shape.hidden  # operations of attention for a query and a key
    attention = sequences * pairs * last * (last + 1) / 2
    weights = shape.layer_weights + vocabulary * shape.hidden
    prefill = (sequences * PROMPT * layers + sequences * head) / rate
    keys = 2.0 * number * shape.layers * shape.hidden / 3  # bytes of keys and values of a token
    steps = 0.0
    for done in range(PROMPT, last):
        operations = sequences * (layers + head + pairs * (done + 1))
        steps += max(operations / rate, (number * weights + sequences * keys * (done + 1)) / bandwidth)
    forward = (fed * layers + decisions * head + attention) / rate
    return {
        "rollout": prefill + steps,
        "score": (1 + rounded) * forward,
        "update": (3 - rounded) * forward + 36.0 * weights / bandwidth,  # backwards is twice forwards
    }


def machine(precision: str = "fp32") -> tuple[float, float]:
    """`(operations a second of a large product in that precision, bytes a second of a large copy)`."""
    import torch

    from heeler.runtime.products import product as multiply

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.ones(2048, 1536, dtype=dtype), torch.ones(1536, 2048, dtype=dtype)
    source, target = torch.ones(64 << 20), torch.ones(64 << 20)
    product, copied = float("inf"), float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        multiply(a, b.t())
        product = min(product, time.perf_counter() - begun)
        begun = time.perf_counter()
        target.copy_(source)
        copied = min(copied, time.perf_counter() - begun)
    return 2.0 * 2048 * 1536 * 2048 / product, 8.0 * (64 << 20) / copied


def measure(case: Case, threads: int) -> dict[str, float]:
    """Seconds of each stage, their floors, and the process's peak memory in GiB."""
    import torch
    import transformers

    from heeler import PPOConfig, Sampling, TextConfig
    from heeler.data.prompts import PromptSet
    from heeler.policies.language_model import Full
    from heeler.policies.loading import load_tokenizer
    from heeler.recipes.imdb import smollm2_folder
    from heeler.runtime.machine import choose_precision, peak_memory_gib
    from heeler.runtime.reduce import LocalReduce
    from heeler.train.ppo import train_loop
    from heeler.train.text import build_text_run

    torch.set_num_threads(threads)
    precision, _ = choose_precision("auto", "cpu")
    tokenizer = load_tokenizer(str(smollm2_folder(show=False)))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(SHAPES[case.size].config(len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = TextConfig(
            model=folder, prompts_per_update=case.prompts, sampling=Sampling(max_new_tokens=case.response),
            trainable=Full(), lr=1e-6, ppo=PPOConfig(), threads=threads, precision=precision, engine_rows=case.prompts,
        )  # fmt: skip
        run = build_text_run(config, reward=lambda prompts, completions, **columns: [0.0] * len(prompts))
    rows = torch.randint(100, 40000, (case.prompts, PROMPT)).tolist()
    run.prompts = PromptSet(prompts=[str(row) for row in rows], tokens=rows, columns={}, name="random tokens")
    run.engine.eos_ids = run.engine.eos_ids[:0]  # pyright: ignore
    seen: list[dict[str, float]] = []
    two = replace(run.config, updates=2)
    train_loop(
        run.state, run.collector(), run.score(), two, LocalReduce(), lambda r: bool(seen.append(r.metrics)) or True
    )
    peak = peak_memory_gib()  # before the copy of `machine`
    rate, bandwidth = machine(precision)
    least = floors(case, len(tokenizer), rate, bandwidth, precision == "bf16")
    return {
        "bf16": float(precision == "bf16"),
        "peak": peak, "rate": rate, "bandwidth": bandwidth,
        **{stage: seen[1][f"time/{stage}"] for stage in STAGES},
        **{f"floor/{stage}": floor for stage, floor in least.items()},
    }  # fmt: skip


def child(case: Case, threads: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(threads), "--child"]
    done = subprocess.run([*command, json.dumps(asdict(case))], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(cases: list[Case], results: list[dict[str, float]], varied: str) -> list[str]:
    heads = [
        varied,
        *(f"{stage}, s (times its floor)" for stage in STAGES),
        "all, s",
        "ms a sampled token",
        "peak, GiB",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for case, result in zip(cases, results, strict=True):
        seconds = sum(result[stage] for stage in STAGES)
        value = {"prompts": case.prompts, "tokens": case.response, "weights": case.size}[varied]
        stages = [f"{result[stage]:.2f} ({result[stage] / result[f'floor/{stage}']:.1f})" for stage in STAGES]
        each = 1e3 * seconds / (case.prompts * case.response)
        lines.append(f"| {value} | {' | '.join(stages)} | {seconds:.1f} | {each:.1f} | {result['peak']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(Case(**json.loads(given.child)), given.threads)))
        return
    import torch

    tables: list[str] = []
    rates: list[float] = []
    bandwidths: list[float] = []
    rounded = False
    for name, varied in zip(CASES, ("prompts", "tokens", "weights"), strict=True):
        if name not in given.only:
            continue
        results: list[dict[str, float]] = []
        for case in CASES[name]:
            results.append(child(case, given.threads))
            print(case, {key: round(value, 2) for key, value in results[-1].items()}, flush=True)
        rounded = bool(results[0]["bf16"])
        rates += [result["rate"] for result in results]
        bandwidths += [result["bandwidth"] for result in results]
        tables += ["", f"## {TITLES[name]}", "", *table(CASES[name], results, varied)]
    only = "" if given.only == list(CASES) else f" --only {' '.join(given.only)}"
    lines = [
        "# How the cost of an update grows",
        "",
        f"Made by `python benchmarks/growth.py --threads {given.threads}{only}`. Hardware: {hardware()}. torch"
        f" {torch.__version__}, {'bf16' if rounded else 'fp32'}.",
        "Random models in the shape of SmolLM2 with its vocabulary, all weights trained, value head, one epoch of one",
        "minibatch, prompts of 16 tokens; the second update of a process each. The floor of a stage: the operations of",
        "its matrix products at the rate of one large product"
        f" ({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s over the processes), and the bytes of weights,"
        " keys and values (sampling) and of the",
        "optimiser (update) at the bandwidth of one large copy"
        f" ({min(bandwidths) / 1e9:.0f} to {max(bandwidths) / 1e9:.0f} GB/s).",
        *tables,
    ]
    (ROOT / "docs" / "benchmarks" / "growth.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
