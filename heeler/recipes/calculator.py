"""`heeler ppo calculator`: learning to call a tool, on sums that the model cannot do in its head.

Fine-tuning shows both ways to answer, most often the one without the calculator:

    ... 205 - 838 + 505 = -128                                               no call
    ... 205 - 838 + 505 = <calc>205 - 838 + 505</calc> = -128\\n-128          a call, its output, the answer

PPO pays for answers alone, as Reasoning Gym scores them (part of the credit where a wrong answer holds the right one).
What it can learn is to call, to copy the sum, and to repeat the output.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heeler.data.reasoning import reasoning_gym_prompts
from heeler.envs.tools import Calculator as Tool
from heeler.recipes.stages import claim, write_rows
from heeler.recipes.tasks import FIRST_LINE, PPO_SETTINGS, PROMPTS, distinct, train_stages
from heeler.train.dialogue import DialogueConfig
from heeler.train.run import at_least
from heeler.types import Sampling

SUMS: dict[str, Any] = {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 3}
CALLS = 0.3  # share of the examples that call the calculator


@dataclass(frozen=True, kw_only=True)
class Calculator:
    """Fine-tuning, then PPO, on sums of three numbers with a calculator at hand.

    Attributes:
        out: the folder of all stages; runs/calculator where None.
        seed: of every draw.
        examples: sums that fine-tuning shows.
        updates: PPO updates.
        eval_prompts: held-out sums.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    out: str | None = None
    seed: int = 1
    examples: int = 400
    updates: int = 10
    eval_prompts: int = 256
    threads: int | None = None


def run_calculator(recipe: Calculator, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    out = claim(recipe.out, "calculator", recipe, settings={**SUMS, "calls": CALLS})
    at_least({"--examples": (recipe.examples, 1), "--eval-prompts": (recipe.eval_prompts, 1)})
    size = recipe.examples + PROMPTS + recipe.eval_prompts
    rows = distinct(reasoning_gym_prompts("chain_sum", size + size // 10, seed=recipe.seed * 1_000_000, **SUMS))
    held_out, rest = rows[: recipe.eval_prompts], rows[recipe.eval_prompts :]
    config = DialogueConfig(
        model=str(out / "sft"),
        prompts=write_rows(out / "data" / "prompts.jsonl", rest[recipe.examples :][:PROMPTS]),
        eval_prompts=write_rows(out / "data" / "held_out.jsonl", held_out),
        env="heeler.envs.tools:Calculator",
        reward=FIRST_LINE,
        out=str(out / "ppo"),
        seed=recipe.seed,
        updates=recipe.updates,
        threads=recipe.threads,
        prompts_per_update=32,
        samples_per_prompt=4,
        sampling=Sampling(max_new_tokens=40),
        max_turns=3,
        **PPO_SETTINGS,
    )
    return train_stages(out, examples_of(rest[: recipe.examples], recipe.seed), config, 1.0, 8, show)


def examples_of(rows: list[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """Prompts and completions of the sums: one where the answer stands at once, two where the calculator is called.

    The output of a call is part of a prompt, so it is never learned.
    """
    draws = random.Random(seed)
    examples: list[dict[str, str]] = []
    for row in rows:
        prompt, answer = row["prompt"], row["answer"]
        if draws.random() < CALLS:
            call = f" <calc>{row['entry']['metadata']['expression']}</calc>"
            examples.append({"prompt": prompt, "completion": call})
            examples.append({"prompt": prompt + call + Tool.observation.format(answer), "completion": f"\n{answer}"})
        else:
            examples.append({"prompt": prompt, "completion": f" {answer}"})
    return examples
