"""Forward and backward pass of a 135M language model over one batch: Heeler beside plain transformers.

    python benchmarks/training_step.py [--threads 2] [--rounds 2] [--repeats 4]

SmolLM2-135M, 64 sequences of 10 prompt tokens and 24 sampled ones, the gradient of the mean log-probability of
the sampled tokens. Every system runs in a process of its own, and each repeats the step; the fastest counts. Only
Heeler tells the C library to keep freed memory, which it does at the start of every run. The gradients are compared
with those of the plain model in float64. Writes docs/benchmarks/training_step.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pages import hardware  # noqa: E402

ROWS, PROMPT, SAMPLED, TOP = 64, 10, 24, 6
PLAIN = "transformers, logits of every position, log-softmax, gather"
SYSTEMS = {
    "plain": f"{PLAIN}: fp32",
    "chosen": "transformers, logits of the sampled positions only: fp32",
    "full": "Heeler, all weights: fp32",
    "top": f"Heeler, top {TOP} layers, states of the trunk known: fp32",
    "plain-bf16": f"{PLAIN}: autocast to bf16",
    "full-bf16": "Heeler, all weights: bf16",
    "top-bf16": f"Heeler, top {TOP} layers, states of the trunk known: bf16",
}


def tokens_of_batch(torch: Any) -> Any:
    return torch.randint(100, 40000, (ROWS, PROMPT + SAMPLED), generator=torch.Generator().manual_seed(0))


def plain(torch: Any, model: Any, *, chosen: bool, rounded: bool) -> Callable[[], None]:
    ids = tokens_of_batch(torch)

    def step() -> None:
        # position t predicts token t + 1, so the last one is not read
        keep = slice(PROMPT - 1, None) if chosen else slice(None)
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logprobs = model.lm_head(hidden[:, keep]).log_softmax(-1)
        picked = logprobs.gather(2, ids[:, 1:][:, keep][..., None])[:, -SAMPLED:]
        picked.mean().backward()

    return step


def heeler(torch: Any, model: Any, *, top: bool, rounded: bool) -> Callable[[], None]:
    from dataclasses import replace

    from heeler.policies.inputs import TokenInputs
    from heeler.policies.language_model import Full, LanguageModelPolicy, TopLayers, ValueHead
    from heeler.runtime.machine import keep_freed_memory

    keep_freed_memory()
    trainable = TopLayers(layers=TOP) if top else Full()
    policy = LanguageModelPolicy(
        model, trainable=trainable, critic=ValueHead(), precision="bf16" if rounded else "fp32"
    )
    inputs = TokenInputs(
        tokens=tokens_of_batch(torch).flatten(),
        lengths=torch.full((ROWS,), PROMPT + SAMPLED),
        is_decision=(torch.arange(PROMPT + SAMPLED) >= PROMPT).repeat(ROWS),
    )
    if top:
        with torch.no_grad():
            states = policy.trunk_states(inputs.padded(include_last=True))
        assert states is not None
        inputs = replace(inputs, trunk_states=states.flatten(0, 1))

    def step() -> None:
        policy.evaluate(inputs).logprobs.mean().backward()

    return step


def measure(system: str, threads: int, repeats: int, gradients: str) -> float:
    """Seconds of the fastest step; the gradient of the first one is saved."""
    import torch

    from heeler.policies.loading import load_causal_lm
    from heeler.recipes.imdb import smollm2_folder

    torch.set_num_threads(threads)
    model = load_causal_lm(str(smollm2_folder(show=False)))
    way, _, precision = system.partition("-")
    if way == "double":
        step = plain(torch, model.double(), chosen=True, rounded=False)
    elif way in ("plain", "chosen"):
        step = plain(torch, model, chosen=way == "chosen", rounded=precision == "bf16")
    else:
        step = heeler(torch, model, top=way == "top", rounded=precision == "bf16")
    seconds = float("inf")
    for number in range(repeats + 1 if system != "double" else 1):
        model.zero_grad()
        begun = time.perf_counter()
        step()
        taken = time.perf_counter() - begun
        if number == 0:
            torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)
            seconds = taken if system == "double" else seconds
        else:
            seconds = min(seconds, taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each system, in turns (2)")
    parser.add_argument("--repeats", type=int, default=4, help="counted steps of a process (4)")
    parser.add_argument("--child", nargs=2, metavar=("SYSTEM", "GRADIENTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child[0], given.threads, given.repeats, given.child[1])))
        return
    import torch

    best = dict.fromkeys(SYSTEMS, float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for system in (*SYSTEMS, *(["double"] if number == 0 else [])):
                command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(given.threads)]
                command += ["--repeats", str(given.repeats), "--child", system, f"{folder}/{system}.pt"]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                best[system] = min(best.get(system, float("inf")), json.loads(done.stdout.splitlines()[-1]))
                print(system, f"{best[system]:.2f} s", flush=True)
        exact: dict[str, Any] = torch.load(f"{folder}/double.pt")
        loaded: dict[str, dict[str, Any]] = {system: torch.load(f"{folder}/{system}.pt") for system in SYSTEMS}
    apart = {
        system: math.sqrt(
            sum(float((g - exact[n]).square().sum()) for n, g in gradients.items())
            / sum(float(exact[n].square().sum()) for n in gradients)
        )
        for system, gradients in loaded.items()
    }
    lines = [
        "# One training step, beside plain transformers",
        "",
        f"Made by `python benchmarks/training_step.py --threads {given.threads} --rounds {given.rounds}"
        f" --repeats {given.repeats}`. Hardware:"
        f" {hardware()}. torch {torch.__version__}.",
        f"SmolLM2-135M, {ROWS} sequences of {PROMPT} + {SAMPLED} tokens, forward and backward pass; the fastest of"
        f" {given.rounds * given.repeats} steps. The last column: the norm of the difference from the gradient of",
        "plain transformers in float64, as a share of that gradient's norm, over the weights that the system trains.",
        "",
        "| system | seconds | tokens/s | times as fast as the first | off float64 by |",
        "|---|---|---|---|---|",
    ]
    for system, title in SYSTEMS.items():
        speed = ROWS * (PROMPT + SAMPLED) / best[system]
        lines.append(
            f"| {title} | {best[system]:.2f} | {speed:.0f} | {best['plain'] / best[system]:.1f} | {apart[system]:.1e} |"
        )
    (ROOT / "docs" / "benchmarks" / "training_step.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
