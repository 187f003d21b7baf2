"""Tasks with verifiers: `heeler ppo arithmetic` (Reasoning Gym) and `heeler ppo qa` (countries, trivia).

SmolLM2-135M is fine-tuned on worked examples first, so that it knows what an answer looks like; then PPO raises the
share of right answers, as the verifier counts them. Base model, fine-tuned and trained policy answer the same
held-out questions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heeler.data.questions import country_questions, trivia_questions
from heeler.data.reasoning import reasoning_gym_prompts
from heeler.policies.language_model import TopLayers
from heeler.policies.loading import load_tokenizer
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.recipes.imdb import smollm2_folder
from heeler.recipes.stages import claim, figures_of, finish, greedy_figures, ppo_stage, sft_stage, write_rows
from heeler.train.dialogue import DialogueConfig
from heeler.train.run import at_least
from heeler.train.sft import SFTConfig
from heeler.train.text import TextConfig
from heeler.types import HeelerError, Sampling


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a task of Reasoning Gym is set, and how it is trained.

    Attributes:
        options: its own configuration.
        answer_tokens: length cap of an answer. Questions whose worked answer is longer are left out.
        examples: worked examples of the fine-tuning.
        batch: of these in an update.
        prompts: questions of an update; each is answered `samples` times, and read once for all of them.
        samples: answers to each.
        updates: PPO updates.
        balanced: fine-tuning and PPO see every answer equally often, so that guessing the commonest one does not pay;
            the held-out questions are as they come.
        worked: answers are worked out before they are given, after "####", as in GSM8K (Cobbe et al., 2110.14168);
            fine-tuning shows the task's own solutions.
        drawn: questions drawn for each that is wanted, since some are equal and some are too long.
    """

    options: dict[str, Any]
    answer_tokens: int
    examples: int
    batch: int = 32
    prompts: int = 32
    samples: int = 8
    updates: int = 30
    balanced: bool = False
    worked: bool = False
    drawn: int = 2


# 10 of the 85 templates of gsm_symbolic have solutions that fit under the cap; held-out questions are of the same ones
TASKS = {
    "chain_sum": Task(
        options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, answer_tokens=6, examples=600
    ),
    "gsm_symbolic": Task(
        options={}, answer_tokens=48, examples=640, batch=8, prompts=32, samples=2, updates=20, worked=True, drawn=5
    ),
    "syllogism": Task(options={}, answer_tokens=3, examples=400, balanced=True),
    "aiw": Task(options={}, answer_tokens=3, examples=400),
    "knights_knaves": Task(
        options={"n_people": 2, "depth_constraint": 2, "width_constraint": 2},
        answer_tokens=24,
        examples=640,
        batch=8,
        prompts=16,
    ),
}

PROMPTS = 2000  # that PPO asks about
FIRST_LINE = r"reasoning-gym(^\s*([^\n]*))"  # of the completion is the answer
AFTER_MARK = r"reasoning-gym(####\s*([^\n]*))"  # stands the answer


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Fine-tuning, then PPO, on a task of Reasoning Gym.

    Attributes:
        task: which one.
        out: the folder of all stages; runs/TASK where None.
        seed: of every draw.
        examples: worked examples of the fine-tuning; None takes the task's own number.
        updates: PPO updates; None takes the task's own number.
        eval_prompts: questions of unseen seeds.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    task: Literal["chain_sum", "gsm_symbolic", "syllogism", "aiw", "knights_knaves"] = "aiw"
    out: str | None = None
    seed: int = 1
    examples: int | None = None
    updates: int | None = None
    eval_prompts: int = 256
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class QA:
    """Fine-tuning, then PPO, on closed-book questions.

    Attributes:
        questions: about countries, or 258 trivia.
        out: the folder of all stages; runs/qa or runs/trivia where None.
        seed: of every draw.
        epochs: of the fine-tuning.
        updates: PPO updates.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    questions: Literal["countries", "trivia"] = "countries"
    out: str | None = None
    seed: int = 1
    epochs: float = 3.0
    updates: int = 30
    threads: int | None = None


def run_arithmetic(recipe: Arithmetic, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    task = TASKS[recipe.task]
    out = claim(recipe.out, recipe.task, recipe, settings=vars(task))
    examples = task.examples if recipe.examples is None else recipe.examples
    at_least({"--examples": (examples, 1), "--eval-prompts": (recipe.eval_prompts, 1)})
    size = task.drawn * (examples + PROMPTS + recipe.eval_prompts)
    # row i of seed s is row i + 1 of seed s - 1 in Reasoning Gym, so seeds lie far apart
    rows = distinct(reasoning_gym_prompts(recipe.task, size, seed=recipe.seed * 1_000_000, **task.options))
    rows = [{**r, "prompt": _asked(r["prompt"])} for r in rows]
    if task.worked:
        tokenizer = load_tokenizer(str(smollm2_folder(show)))
        lengths = [len(ids) for ids in tokenizer([_solved(r, task) for r in rows])["input_ids"]]
        rows = [r for r, length in zip(rows, lengths, strict=True) if length < task.answer_tokens]
    random.Random(recipe.seed).shuffle(rows)  # what is drawn often came first
    if len(rows) < examples + recipe.eval_prompts + task.prompts:
        raise HeelerError(
            f"{recipe.task} gave {len(rows)} different questions, too few for {examples} examples and"
            f" {recipe.eval_prompts} held-out ones: give a smaller --examples or --eval-prompts"
        )
    held_out, rest = rows[: recipe.eval_prompts], rows[recipe.eval_prompts :]
    if task.balanced:
        rest = _balanced(rest)
    solved = [{"prompt": r["prompt"], "completion": _solved(r, task)} for r in rest[:examples]]
    prompts = rest[examples : examples + PROMPTS]  # PPO asks what fine-tuning did not teach
    config = TextConfig(
        model=str(out / "sft"),
        prompts=write_rows(out / "data" / "prompts.jsonl", prompts),
        eval_prompts=write_rows(out / "data" / "held_out.jsonl", held_out),
        reward=AFTER_MARK if task.worked else FIRST_LINE,
        out=str(out / "ppo"),
        seed=recipe.seed,
        updates=task.updates if recipe.updates is None else recipe.updates,
        threads=recipe.threads,
        prompts_per_update=task.prompts,
        samples_per_prompt=task.samples,
        sampling=Sampling(max_new_tokens=task.answer_tokens),
        **PPO_SETTINGS,
    )
    return train_stages(out, solved, config, 1.0, task.batch, show)


def run_qa(recipe: QA, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    out = claim(recipe.out, "qa" if recipe.questions == "countries" else "trivia", recipe)
    questions = country_questions if recipe.questions == "countries" else trivia_questions
    solved = [{"prompt": r["prompt"], "completion": f" {r['answer']}"} for r in questions("sft")]
    config = TextConfig(
        model=str(out / "sft"),
        prompts=write_rows(out / "data" / "prompts.jsonl", questions("ppo")),
        eval_prompts=write_rows(out / "data" / "held_out.jsonl", questions("held_out")),
        reward="f1",
        judges=("exact=exact-match",),
        out=str(out / "ppo"),
        seed=recipe.seed,
        updates=recipe.updates,
        threads=recipe.threads,
        prompts_per_update=32,
        samples_per_prompt=8,
        sampling=Sampling(max_new_tokens=12),
        **PPO_SETTINGS,
    )
    return train_stages(out, solved, config, recipe.epochs, 32, show)


PPO_SETTINGS: dict[str, Any] = {  # of tasks whose answers are checked
    "trainable": TopLayers(layers=10),
    "kl": FixedKL(coef=0.01),
    "lr": 1e-4,
    "critic_lr": 1e-3,
    "lr_schedule": Schedule(shape="linear", warmup=4, end=0.2),
    "advantage": AdvantageConfig(gamma=1.0, lam=1.0),
    "ppo": PPOConfig(epochs=2, minibatches=2, shuffle="prompts", target_kl=0.05),
    "engine_rows": 256,
}


def _solved(row: dict[str, Any], task: Task) -> str:
    """What fine-tuning shows after the question."""
    return f" {row['entry']['metadata']['answer_cot'] if task.worked else row['answer']}"


def _asked(question: str) -> str:
    return question if question.endswith("=") else f"{question.strip()}\nAnswer:"


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose questions differ, so that nothing held out is trained on."""
    return list({row["prompt"]: row for row in rows}.values())


def _balanced(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers in turn, until the rarest has no more rows: the beginning is balanced too."""
    of_answer: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_answer.setdefault(row["answer"], []).append(row)
    return [row for turn in zip(*of_answer.values(), strict=False) for row in turn]


def train_stages(
    out: Path, solved: Sequence[Mapping[str, Any]], config: TextConfig, epochs: float, batch: int, show: bool
) -> Path:
    """Fine-tune on the solved questions, then PPO by `config`; figures of the base model and of both stages."""
    model = str(smollm2_folder(show))
    sft_stage(
        SFTConfig(
            model=model,
            data=write_rows(out / "data" / "solved.jsonl", solved),
            out=str(out / "sft"),
            seed=config.seed,
            epochs=epochs,
            examples_per_update=batch,
            trainable=TopLayers(layers=10),
            lr=2e-4,
            threads=config.threads,
        ),
        show,
    )
    base = figures_of(model, config, out / "base.json", show)
    ppo = ppo_stage(config, show)
    stages = {"base": base, "SFT": ppo["eval/before"], "SFT+PPO": ppo["eval/after"]}
    for name, folder in {"SFT": "sft", "SFT+PPO": "ppo"}.items():
        greedy = greedy_figures(str(out / folder), config, out / f"greedy_{folder}.json", show)
        stages[name] = {**stages[name], **greedy}
    keep = (
        "reward",
        "reward/solved",
        "reward/answer/solved",
        "exact",
        "reward/greedy",
        "reward/solved/greedy",
        "reward/answer/solved/greedy",
        "exact/greedy",
        "episode/turns",
        "episode/turns/greedy",
        "length",
        "truncated_fraction",
        "kl/ref",
    )
    dialogues = isinstance(config, DialogueConfig)  # heeler sample would write one turn
    look = f"heeler eval {out}/ppo, or {out}/ppo/samples.jsonl for episodes" if dialogues else ""
    finish(out, stages, keep, {"reward": config.reward}, look)
    return out
