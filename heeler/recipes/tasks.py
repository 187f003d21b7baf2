"""Tasks with verifiers: `heeler ppo arithmetic` (Reasoning Gym) and `heeler ppo qa` (countries).

SmolLM2-135M is fine-tuned on worked examples first, so that it knows what an answer looks like; then PPO raises the
share of right answers, as the verifier counts them. Base model, fine-tuned and trained policy answer the same
held-out questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heeler.data.questions import country_questions
from heeler.data.reasoning import reasoning_gym_prompts
from heeler.policies.language_model import TopLayers
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.recipes.imdb import smollm2_folder
from heeler.recipes.stages import figures_of, finish, ppo_stage, sft_stage, write_rows
from heeler.train.run import default_out
from heeler.train.sft import SFTConfig
from heeler.train.text import TextConfig
from heeler.types import Sampling

# tasks of Reasoning Gym: their own configuration, and the length cap of an answer in tokens
TASKS: dict[str, tuple[dict[str, Any], int]] = {
    "chain_sum": ({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, 6),
    "gsm_symbolic": ({}, 6),
    "syllogism": ({}, 4),
    "knights_knaves": ({"n_people": 2, "depth_constraint": 2, "width_constraint": 2}, 24),
}

FIRST_LINE = r"reasoning-gym(^\s*([^\n]*))"  # of the completion is the answer


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Fine-tuning, then PPO, on a task of Reasoning Gym.

    Attributes:
        task: which one.
        out: the folder of all stages; runs/TASK where None.
        seed: of every draw.
        examples: worked examples of the fine-tuning.
        updates: PPO updates.
        eval_prompts: questions of unseen seeds.
        threads: CPU threads; None takes all.
    """

    task: Literal["chain_sum", "gsm_symbolic", "syllogism", "knights_knaves"] = "chain_sum"
    out: str | None = None
    seed: int = 1
    examples: int = 2000
    updates: int = 30
    eval_prompts: int = 256
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class QA:
    """Fine-tuning, then PPO, on closed-book questions about countries.

    Attributes:
        out: the folder of all stages; runs/qa where None.
        seed: of every draw.
        epochs: of the fine-tuning.
        updates: PPO updates.
        threads: CPU threads; None takes all.
    """

    out: str | None = None
    seed: int = 1
    epochs: float = 2.0
    updates: int = 30
    threads: int | None = None


def run_arithmetic(recipe: Arithmetic, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    out = Path(recipe.out or default_out(recipe.task))
    options, answer_tokens = TASKS[recipe.task]
    size = recipe.examples + 2000 + recipe.eval_prompts
    rows = _distinct(reasoning_gym_prompts(recipe.task, size, seed=recipe.seed, **options))
    held_out, rest = rows[: recipe.eval_prompts], rows[recipe.eval_prompts :]
    solved = [{"prompt": _asked(r["prompt"]), "completion": f" {r['answer']}"} for r in rest[: recipe.examples]]
    prompts = [{**r, "prompt": _asked(r["prompt"])} for r in rest[-2000:]]
    held_out = [{**r, "prompt": _asked(r["prompt"])} for r in held_out]
    return _train(out, solved, prompts, held_out, FIRST_LINE, answer_tokens, 1.0, recipe, (), show)


def run_qa(recipe: QA, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    out = Path(recipe.out or default_out("qa"))
    known, held_out = country_questions(held_out=False), country_questions(held_out=True)
    solved = [{"prompt": r["prompt"], "completion": f" {r['answer']}"} for r in known]
    return _train(out, solved, known, held_out, "f1", 12, recipe.epochs, recipe, ("exact=exact-match",), show)


def _asked(question: str) -> str:
    return question if question.endswith("=") else f"{question.strip()}\nAnswer:"


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose questions differ, so that nothing held out is trained on."""
    return list({row["prompt"]: row for row in rows}.values())


def _train(
    out: Path,
    solved: list[dict[str, Any]],
    prompts: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    reward: str,
    answer_tokens: int,
    epochs: float,
    recipe: Arithmetic | QA,
    judges: tuple[str, ...],
    show: bool,
) -> Path:
    model = str(smollm2_folder(show))
    sft_stage(
        SFTConfig(
            model=model,
            data=write_rows(out / "data" / "solved.jsonl", solved),
            out=str(out / "sft"),
            seed=recipe.seed,
            epochs=epochs,
            trainable=TopLayers(layers=10),
            lr=2e-4,
            threads=recipe.threads,
        ),
        show,
    )
    config = TextConfig(
        model=str(out / "sft"),
        prompts=write_rows(out / "data" / "prompts.jsonl", prompts),
        eval_prompts=write_rows(out / "data" / "held_out.jsonl", held_out),
        reward=reward,
        judges=judges,
        out=str(out / "ppo"),
        seed=recipe.seed,
        updates=recipe.updates,
        threads=recipe.threads,
        prompts_per_update=64,
        samples_per_prompt=2,
        sampling=Sampling(max_new_tokens=answer_tokens),
        trainable=TopLayers(layers=10),
        kl=FixedKL(coef=0.01),
        lr=3e-5,
        critic_lr=1e-3,
        lr_schedule=Schedule(shape="linear", warmup=3, end=0.1),
        advantage=AdvantageConfig(gamma=1.0, lam=1.0),
        ppo=PPOConfig(epochs=2, minibatches=2),
    )
    base = figures_of(model, config, out / "base.json", show)
    ppo = ppo_stage(config, show)
    stages = {"base": base, "SFT": ppo["eval/before"], "SFT+PPO": ppo["eval/after"]}
    finish(out, stages, ("reward", "exact", "length", "truncated_fraction", "kl/ref"), {"reward": reward})
    return out
