"""Tokens sampled a second: Heeler's native engine, transformers' generate, and vLLM for the CPU, side by side.

    python benchmarks/sampling_speed.py [--systems native batches generate vllm] [--threads 2] [--rounds 1]

SmolLM2-135M at temperature 1. Each system runs in a process of its own, one after the other; each loads, samples a
small batch that is not counted, and then every workload of WORKLOADS. `batches` is the native engine without
continuous batching: all rows of a batch end before the next begins. `vllm` needs the environment that `make test-vllm`
makes, and is left out where there is none. Writes docs/benchmarks/sampling_speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
TITLES = {
    "native": "Heeler, native",
    "unpacked": "Heeler, native, weights not packed",
    "batches": "Heeler, native, one batch after the other",
    "generate": "transformers' generate",
    "vllm": "vLLM for the CPU",
}


@dataclass(frozen=True)
class Workload:
    """What is sampled: `samples` completions of each of `prompts` prompts.

    Attributes:
        shortest, longest: tokens of a prompt, evenly spread.
        cap: tokens of a completion at most.
        ends: share of the vocabulary that ends a completion; 0 lets all reach the cap.
    """

    prompts: int
    samples: int
    shortest: int
    longest: int
    cap: int
    ends: float = 0.0

    def __str__(self) -> str:
        lengths = f"{self.shortest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        ends = f"up to {self.cap}" if self.ends else f"{self.cap}"
        return f"{self.prompts} prompts of {lengths} tokens x {self.samples}, {ends} tokens each"


WORKLOADS = (
    Workload(64, 1, 10, 10, 32),
    Workload(256, 1, 10, 10, 32),
    Workload(96, 1, 5, 200, 256, ends=0.01),
    Workload(32, 8, 100, 100, 24),
)
WARM_UP = Workload(8, 1, 10, 10, 4)
SLOW = ("generate", WORKLOADS[2])  # a quarter of an hour: it copies keys and values once a head at every step
ROWS = 64  # sampled at once
Sampler = Callable[[list[list[int]], int, list[int]], list[int]]  # (prompts, cap, ends) -> tokens of each completion


def requests_of(workload: Workload, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """`(prompts, tokens that end)`, the same for every system."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(workload.shortest, workload.longest, workload.prompts).round().long()
    prompts = [torch.randint(100, 40000, (int(n),), generator=generator).tolist() for n in lengths]
    ends = torch.randperm(vocabulary, generator=generator)[: round(workload.ends * vocabulary)].tolist()
    return [prompt for prompt in prompts for _ in range(workload.samples)], ends


def native(folder: str, precision: str, *, continuous: bool = True, packed: bool = True) -> Sampler:
    import torch

    from heeler.policies.loading import load_causal_lm
    from heeler.rollout.engines.native import NativeEngine
    from heeler.types import Request, Sampling

    model = load_causal_lm(folder).to(torch.bfloat16 if precision == "bf16" else torch.float32)

    def sample(prompts: list[list[int]], cap: int, ends: list[int]) -> list[int]:
        engine = NativeEngine(model, eos_ids=ends, max_rows=ROWS, pack_weights=packed)
        requests = [Request(prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
        batches = [requests] if continuous else [requests[i : i + ROWS] for i in range(0, len(requests), ROWS)]
        done = [engine.generate(batch, Sampling(max_new_tokens=cap)) for batch in batches]
        return [len(completion.tokens) for batch in done for completion in batch]

    return sample


def generate(folder: str, precision: str) -> Sampler:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config = GenerationConfig()

    def sample(prompts: list[list[int]], cap: int, ends: list[int]) -> list[int]:
        counts: list[int] = []
        ending = torch.tensor(ends or [-1])
        for start in range(0, len(prompts), ROWS):
            rows = prompts[start : start + ROWS]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            config = GenerationConfig(
                max_new_tokens=cap, do_sample=True, top_k=0, eos_token_id=ends or None, pad_token_id=0
            )
            out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
            for row in torch.isin(out, ending):
                first = row.nonzero()[:, 0]
                counts.append(int(first[0]) + 1 if len(first) else out.shape[1])
        return counts

    return sample


def vllm(folder: str, precision: str) -> Sampler:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    dtype = "bfloat16" if precision == "bf16" else "float32"
    llm = LLM(
        model=folder, dtype=dtype, generation_config="vllm", max_num_seqs=ROWS, max_model_len=1024, seed=0,
        skip_tokenizer_init=True, disable_log_stats=True,
    )  # fmt: skip

    def sample(prompts: list[list[int]], cap: int, ends: list[int]) -> list[int]:
        params = SamplingParams(
            temperature=1.0, max_tokens=cap, stop_token_ids=ends, ignore_eos=True, detokenize=False, logprobs=0
        )
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        llm.reset_prefix_cache()
        return [len(output.outputs[0].token_ids) for output in outputs]

    return sample


def measure(system: str, folder: str, threads: int, rounds: int, precision: str, slow: bool) -> list[dict[str, float]]:
    """Tokens and seconds of every workload, the fastest of the rounds; 0 tokens where it was left out."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(threads)
    if system == "vllm":
        sampler = vllm(folder, precision)
    elif system == "generate":
        sampler = generate(folder, precision)
    else:
        sampler = native(folder, precision, continuous=system != "batches", packed=system != "unpacked")
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    best: list[dict[str, float]] = []
    for workload in (WARM_UP, *WORKLOADS):
        if (system, workload) == SLOW and not slow:
            best.append({"tokens": 0, "seconds": 1.0})
            continue
        prompts, ends = requests_of(workload, vocabulary)
        found: list[dict[str, float]] = []
        for _ in range(1 if workload is WARM_UP else rounds):
            begun = time.perf_counter()
            counts = sampler(prompts, workload.cap, ends)
            found.append({"tokens": sum(counts), "seconds": time.perf_counter() - begun})
        best.append(max(found, key=lambda f: f["tokens"] / f["seconds"]))
    return best[1:]


def child(
    system: str, folder: str, threads: int, rounds: int, precision: str, slow: bool
) -> list[dict[str, float]] | None:
    """`measure` in a process of its own; None where the system is not installed."""
    python = VLLM_PYTHON if system == "vllm" else Path(sys.executable)
    if not python.exists():
        print(f"{TITLES[system]}: left out, since {python.relative_to(ROOT)} is missing (make test-vllm)", flush=True)
        return None
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        arguments = ["--child", system, folder, str(out), "--threads", str(threads), "--rounds", str(rounds)]
        command = [str(python), str(Path(__file__).resolve()), *arguments, "--precision", precision]
        command += ["--slow"] * slow
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
        subprocess.run(command, check=True, cwd=scratch, env=environment)
        return json.loads(out.read_text())


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    names = list(found)
    lines = [f"| workload | {' | '.join(TITLES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for i, workload in enumerate(WORKLOADS):
        speeds = {name: found[name][i]["tokens"] / found[name][i]["seconds"] for name in names}
        cells = [
            "-"
            if speed == 0
            else f"{speed:.0f}"
            + ("" if name == "native" or "native" not in speeds else f" ({speeds['native'] / speed:.2f})")
            for name, speed in speeds.items()
        ]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--slow", action="store_true", help="time generate on mixed lengths too (a quarter of an hour)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="measured where it is not given")
    parser.add_argument("--child", nargs=3, metavar=("SYSTEM", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        system, folder, out = given.child
        Path(out).write_text(
            json.dumps(measure(system, folder, given.threads, given.rounds, given.precision, given.slow))
        )
        return
    import torch
    from pages import hardware

    from heeler.recipes.imdb import smollm2_folder
    from heeler.runtime.machine import choose_precision

    folder = str(smollm2_folder(False))
    precision = given.precision or choose_precision("auto", "cpu")[0]
    load = os.getloadavg()[0]
    found: dict[str, list[dict[str, float]]] = {}
    for system in given.systems:
        result = child(system, folder, given.threads, given.rounds, precision, given.slow)
        if result is not None:
            found[system] = result
            print(system, [f"{r['tokens'] / r['seconds']:.0f}" for r in result], flush=True)
    lines = [
        "# Tokens sampled a second",
        "",
        f"Made by `python benchmarks/sampling_speed.py --systems {' '.join(given.systems)} --threads {given.threads}"
        f" --rounds {given.rounds}`. Hardware:"
        f" {hardware()}. Load average before the start: {load:.1f}. torch {torch.__version__}, {precision}.",
        "SmolLM2-135M, temperature 1, 64 rows at once, one process after the other in one call. In brackets: how many",
        "times as fast the native engine is. Prompts are random tokens; completions that end by themselves are ended",
        "by a hundredth of the vocabulary. Where generate has no figure it was left out (`--slow` times it).",
        "",
        *table(found),
    ]
    page = ROOT / "docs" / "benchmarks" / "sampling_speed.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
