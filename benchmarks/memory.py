"""Peak memory of a PPO update of a 135M language model, what each option that saves memory costs in time, and what
weights take when adapters are trained.

    python benchmarks/memory.py [--out docs/benchmarks/memory.md] [--parts updates weights]

The updates are those of update_speed.py: 64 prompts with 24 sampled tokens each on SmolLM2-135M, every setting in a
process of its own, one after the other, two updates each. Weights are counted, not measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from pages import hardware, replace_section
from update_speed import HEELER, KL_COEF, LR, RESPONSE_TOKENS, System, cores, in_process, this_script

ROOT = Path(__file__).resolve().parents[1]
EIGHT, AGAIN = {"optimizer": "adamw8bit"}, {"activation_checkpointing": True}
REVIEWS, REVIEW_TOKENS = 64, 64  # of the perplexity
WAYS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("none", {}, 1536),
    ("`--activation-checkpointing`", AGAIN, 1536),
    ("`--optimizer adamw8bit`", EIGHT, 1536),
    ("`--optimizer adamw8bit --activation-checkpointing`", EIGHT | AGAIN, 1536),
    ("both, `--ppo.token-budget 512`", EIGHT | AGAIN, 512),
    ("both, the same, `--no-keep-first-pass`", EIGHT | AGAIN | {"keep_first_pass": False}, 512),
)


TITLE = "# Memory of a language model's PPO\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "memory.md")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--parts", nargs="+", choices=("updates", "weights"), default=("updates", "weights"))
    arguments = parser.parse_args()
    if not arguments.out.exists():
        arguments.out.write_text(TITLE, encoding="utf-8")
    for part in arguments.parts:
        lines = updates(arguments.threads) if part == "updates" else weights(arguments.threads)
        replace_section(arguments.out, part, lines)
        print("\n".join(lines))


def updates(threads: int) -> list[str]:
    lines = [
        "## Peak memory of an update",
        "",
        "SmolLM2-135M, one update of 64 prompts with 24 sampled tokens each, 1 epoch and 1 minibatch; the second of two"
        " updates is timed. Peak memory is the resident memory of the whole process, Python and torch included"
        f" ({baseline():.2f} GiB after the imports).",
        "",
        f"    python benchmarks/memory.py --parts updates --threads {threads}",
        "",
        f"Machine: {hardware()}.",
    ]
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        made = in_process(this_script("prepare"), {"tiny": False, "folder": folder, "threads": threads})
        for system in HEELER:
            if system.full:
                lines += rows(system, made, threads)
    return [*lines, ""]


def weights(threads: int) -> list[str]:
    """What is kept of SmolLM2-135M with adapters on all its linear layers, and what 4 bits do to its predictions."""
    import torch

    from heeler.data.reviews import reviews
    from heeler.policies.inputs import TokenInputs
    from heeler.policies.language_model import LanguageModelPolicy, LoRA, ValueHead
    from heeler.policies.loading import load_causal_lm, load_tokenizer
    from heeler.recipes.imdb import smollm2_folder

    torch.set_num_threads(threads)
    path = str(smollm2_folder(show=False))
    tokenizer = load_tokenizer(path)
    read = (tokenizer(review.text)["input_ids"][:REVIEW_TOKENS] for review in reviews("test", "imdb"))
    tokens = torch.tensor(list(islice((ids for ids in read if len(ids) == REVIEW_TOKENS), REVIEWS)))
    inputs = TokenInputs(
        tokens=tokens.flatten(),
        lengths=torch.full((REVIEWS,), REVIEW_TOKENS),
        is_decision=(torch.arange(REVIEW_TOKENS) > 0).repeat(REVIEWS),
    )
    lines = [
        "## What weights take when adapters are trained",
        "",
        "SmolLM2-135M, `trainable:lora --trainable.rank 16` on all layers: MiB of the weights of policy and reference"
        " (one model, adapters on and off), of the engine's own copy with the adapters merged (what does not change is"
        " the policy's), and of adapters, value head, gradients and moments of AdamW. Beside them the perplexity of"
        f" the first {REVIEW_TOKENS} tokens of {REVIEWS} reviews before any training, which says what rounding costs.",
        "",
        f"    python benchmarks/memory.py --parts weights --threads {threads}",
        "",
        "| precision | `--trainable.quantize` | policy and reference | engine's copy | trained | sum | perplexity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for precision in ("fp32", "bf16"):
        for quantize in ("none", "nf4"):
            lora = LoRA(rank=16, quantize=quantize)
            policy = LanguageModelPolicy(load_causal_lm(path), trainable=lora, critic=ValueHead(), precision=precision)
            trained = [p for group in policy.parameter_groups() for p in group["params"]]
            own = {id(p) for p in trained}
            base = [p for p in policy.model.parameters() if id(p) not in own]
            known = {p.data_ptr() for p in base}
            copy = [p for p in policy.engine_model.parameters() if p.data_ptr() not in known]
            sizes = [sum(map(kept_bytes, base)), sum(map(kept_bytes, copy)), 4 * sum(map(kept_bytes, trained))]
            scored = [policy.logprobs(inputs.select(part)) for part in torch.arange(REVIEWS).split(8)]
            perplexity = float((-torch.cat(scored).mean()).exp())
            cells = [f"{size / 2**20:.0f}" for size in (*sizes, sum(sizes))]
            lines.append(f"| {precision} | {quantize} | {' | '.join(cells)} | {perplexity:.2f} |")
    return [*lines, ""]


def kept_bytes(weight: Any) -> int:
    """Bytes of a weight, the scales of 4 bits included."""
    state = getattr(weight, "quant_state", None)
    parts = [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in (weight.data, *parts))


def baseline() -> float:
    """GiB of a process that has imported what a run needs."""
    modules = "heeler.train.text, transformers.models.llama as _, heeler.runtime.machine as machine"
    code = f"import {modules}; print(machine.peak_memory_gib())"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def rows(system: System, made: dict[str, Any], threads: int) -> list[str]:
    lines = [
        "",
        f"### ({system.key}) {system.name}",
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
