"""Tasks with verifiers: `heeler ppo arithmetic` (Reasoning Gym) and `heeler ppo qa` (countries, trivia), and both on a
user's own questions.

SmolLM2-135M is fine-tuned on worked examples first, so that it knows what an answer looks like; then PPO raises the
share of right answers, as the verifier counts them. Base model, fine-tuned and trained policy answer the same
held-out questions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from heeler.data.preferences import check_disjoint
from heeler.data.prompts import load_prompts
from heeler.data.questions import country_questions, trivia_questions
from heeler.data.reasoning import reasoning_gym_prompts
from heeler.policies.language_model import TopLayers
from heeler.policies.loading import load_tokenizer
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.recipes.imdb import smollm2_folder
from heeler.recipes.own import MOST, asked, digest, hold_out, key_of, read_questions, start_of
from heeler.recipes.stages import claim, figures_of, finish, greedy_figures, ppo_stage, sft_stage, write_rows
from heeler.rewards.specs import load_reward
from heeler.runtime.progress import say
from heeler.train.dialogue import DialogueConfig
from heeler.train.run import at_least
from heeler.train.sft import SFTConfig
from heeler.train.text import TextConfig
from heeler.types import HeelerError, Samples, Sampling


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
    """Fine-tuning, then PPO, on a task of Reasoning Gym, or on your own questions with numbers or LaTeX as answers.

    Attributes:
        task: of Reasoning Gym; aiw where neither it nor `data` is given.
        data: your own questions: a file (JSONL, CSV, Parquet) or a datasets id with the columns question and answer.
        eval_data: the same, held out; where None, a fifth of the questions of `data` is, at most `eval_prompts`.
        model: folder or hub id of a causal model; SmolLM2-135M-Instruct where None.
        out: the folder of all stages; runs/TASK or runs/arithmetic where None.
        seed: of every draw.
        examples: worked examples of the fine-tuning; None takes the task's own number, of your own questions half of
            those that are not held out.
        updates: PPO updates; None takes the task's own number, with your own questions 30.
        eval_prompts: held-out questions.
        answer_tokens: length cap of an answer; None takes the task's own, with your own questions that of the longest.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    task: Literal["chain_sum", "gsm_symbolic", "syllogism", "aiw", "knights_knaves"] | None = None
    data: str | None = None
    eval_data: str | None = None
    model: str | None = None
    out: str | None = None
    seed: int = 1
    examples: int | None = None
    updates: int | None = None
    eval_prompts: int = MOST
    answer_tokens: int | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class QA:
    """Fine-tuning, then PPO, on closed-book questions: those that come along, or your own.

    Attributes:
        questions: about countries, or 258 trivia; countries where neither it nor `data` is given.
        data: your own questions: a file (JSONL, CSV, Parquet) or a datasets id with the columns question and answer; an
            answer is a string or a list of those that are accepted.
        eval_data: the same, held out; where None, a fifth of the questions of `data` is, at most 256.
        model: folder or hub id of a causal model; SmolLM2-135M-Instruct where None.
        out: the folder of all stages; runs/qa or runs/trivia where None.
        seed: of every draw.
        epochs: of the fine-tuning.
        updates: PPO updates.
        answer_tokens: length cap of an answer; None takes 12, with your own questions that of the longest.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    questions: Literal["countries", "trivia"] | None = None
    data: str | None = None
    eval_data: str | None = None
    model: str | None = None
    out: str | None = None
    seed: int = 1
    epochs: float = 3.0
    updates: int = 30
    answer_tokens: int | None = None
    threads: int | None = None


def run_arithmetic(recipe: Arithmetic, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    if has_own(recipe, "--task", recipe.task):
        return train_own(
            recipe,
            "arithmetic",
            reward="math",
            updates=30 if recipe.updates is None else recipe.updates,
            examples=recipe.examples,
            most=recipe.eval_prompts,
            show=show,
        )
    recipe = replace(recipe, task=recipe.task or "aiw")
    assert recipe.task is not None
    task = TASKS[recipe.task]
    if recipe.answer_tokens is not None:
        task = replace(task, answer_tokens=recipe.answer_tokens)
    out = claim(recipe.out, recipe.task, recipe, settings=vars(task))
    examples = task.examples if recipe.examples is None else recipe.examples
    at_least({"--examples": (examples, 1), "--eval-prompts": (recipe.eval_prompts, 1)})
    size = task.drawn * (examples + PROMPTS + recipe.eval_prompts)
    # row i of seed s is row i + 1 of seed s - 1 in Reasoning Gym, so seeds lie far apart
    rows = distinct(reasoning_gym_prompts(recipe.task, size, seed=recipe.seed * 1_000_000, **task.options))
    rows = [{**r, "prompt": asked(r["prompt"])} for r in rows]
    if task.worked:
        tokenizer = load_tokenizer(recipe.model or str(smollm2_folder(show)))
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
    config = replace(
        text_config(recipe, out, prompts, held_out),
        reward=AFTER_MARK if task.worked else FIRST_LINE,
        updates=task.updates if recipe.updates is None else recipe.updates,
        prompts_per_update=task.prompts,
        samples_per_prompt=task.samples,
        sampling=Sampling(max_new_tokens=task.answer_tokens),
    )
    return train_stages(out, solved, config, 1.0, task.batch, show, recipe.model)


def run_qa(recipe: QA, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    if has_own(recipe, "--questions", recipe.questions):
        return train_own(
            recipe, "qa", reward="f1", judges=EXACT, epochs=recipe.epochs, updates=recipe.updates, show=show
        )
    recipe = replace(recipe, questions=recipe.questions or "countries")
    out = claim(recipe.out, "qa" if recipe.questions == "countries" else "trivia", recipe)
    questions = country_questions if recipe.questions == "countries" else trivia_questions
    solved = [{"prompt": r["prompt"], "completion": f" {r['answer']}"} for r in questions("sft")]
    config = replace(
        text_config(recipe, out, questions("ppo"), questions("held_out")),
        reward="f1",
        judges=EXACT,
        updates=recipe.updates,
        sampling=Sampling(max_new_tokens=12 if recipe.answer_tokens is None else recipe.answer_tokens),
    )
    return train_stages(out, solved, config, recipe.epochs, 32, show, recipe.model)


EXACT = ("exact=exact-match",)  # a judge, not the reward
LAYERS = 10  # at the top, that fine-tuning and PPO train
PPO_SETTINGS: dict[str, Any] = {  # of tasks whose answers are checked
    "trainable": TopLayers(layers=LAYERS),
    "kl": FixedKL(coef=0.01),
    "lr": 1e-4,
    "critic_lr": 1e-3,
    "lr_schedule": Schedule(shape="linear", warmup=4, end=0.2),
    "advantage": AdvantageConfig(gamma=1.0, lam=1.0),
    "ppo": PPOConfig(epochs=2, minibatches=2, shuffle="prompts", target_kl=0.05),
    "engine_rows": 256,
}


def has_own(recipe: Arithmetic | QA, flag: str, value: str | None) -> bool:
    """Whether a recipe is to run on a user's own questions; the option `flag` names those that come along."""
    if recipe.data is not None and value is not None:
        raise HeelerError(f"{flag} names questions that come along, and --data your own: give one of the two")
    if recipe.data is None and recipe.eval_data is not None:
        raise HeelerError("--eval-data is held out of your own questions: give them too, with --data")
    return recipe.data is not None


def train_own(
    recipe: Arithmetic | QA,
    name: str,
    *,
    reward: str,
    judges: tuple[str, ...] = (),
    epochs: float = 3.0,
    updates: int,
    examples: int | None = None,
    most: int = MOST,
    show: bool,
) -> Path:
    """The recipe `name` on a user's own questions; the folder of its stages.

    One part is held out, fine-tuning learns the answers of another, and PPO asks the rest: what it asks is as new to
    the fine-tuned model as what is held out.

    Args:
        recipe: its options.
        name: of the recipe.
        reward: a verifier that reads the column "answer".
        judges: that are only reported.
        epochs: of the fine-tuning.
        updates: of PPO.
        examples: questions of the fine-tuning; None takes half of what is not held out.
        most: questions that are held out of `recipe.data` at most.
        show: print progress.
    """
    assert recipe.data is not None
    at_least({"--updates": (updates, 1), "--eval-prompts": (most, 1), "--epochs": (epochs, 0)})
    questions = {"--data": read_questions(recipe.data)}
    if recipe.eval_data is not None:
        questions["--eval-data"] = read_questions(recipe.eval_data)
        check_disjoint({flag: [row["prompt"] for row in rows] for flag, rows in questions.items()})
    start = start_of(recipe.model or str(smollm2_folder(show)))
    everything = [row for rows in questions.values() for row in rows]
    longest = max(
        len(start.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
        for row in everything
        for answer in row["answer"]
    )
    answer_tokens = longest + 1 if recipe.answer_tokens is None else recipe.answer_tokens  # the end of sequence too
    at_least({"--answer-tokens": (answer_tokens, 1)})
    for flag, rows in questions.items():
        source = recipe.data if flag == "--data" else recipe.eval_data
        load_prompts(rows, start.tokenizer, max_tokens=start.room(answer_tokens), name=source)
        if reward == "math":
            check_mathematics(rows, str(source))
    mixed = questions["--data"].copy()
    random.Random(recipe.seed).shuffle(mixed)
    if recipe.eval_data is None:
        keys = [key_of(row["prompt"]) for row in mixed]
        held_out, rest = hold_out(mixed, keys, recipe.seed, recipe.data, most=most)
    else:
        held_out, rest = questions["--eval-data"], mixed
    if examples is None:
        examples = len(rest) // 2
    if not 1 <= examples < len(rest):
        raise HeelerError(
            f"{recipe.data}: too few questions: {len(rest)} beside those that are held out, for {max(examples, 1)} of"
            " the fine-tuning and others of PPO: give more"
        )
    solved, prompts = rest[:examples], rest[examples:]
    out = claim(recipe.out, name, recipe, data_digest=digest(questions))
    say(
        f"{len(everything):,} different questions: {len(solved):,} for fine-tuning, {len(prompts):,} for PPO,"
        f" {len(held_out):,} held out; answers have up to {longest} tokens",
        show,
    )
    config = replace(
        text_config(recipe, out, prompts, held_out),
        reward=reward,
        judges=judges,
        updates=updates,
        sampling=Sampling(max_new_tokens=answer_tokens),
    )
    shown = [{"prompt": row["prompt"], "completion": _completion(row)} for row in solved]
    return train_stages(out, shown, config, epochs, 8, show, start.path)  # own questions may be few


def check_mathematics(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise a sentence where math-verify does not find the first answer of a row in what fine-tuning shows of it."""
    samples = Samples(
        prompts=[row["prompt"] for row in rows],
        completions=[_completion(row) for row in rows],
        columns={"answer": [row["answer"] for row in rows]},
        completion_ids=[[] for _ in rows],
        truncated=[False] * len(rows),
    )
    words = "answers in words are for heeler ppo qa --data"
    try:
        scores = load_reward("math")(samples).scores.tolist()
    except HeelerError as error:
        raise HeelerError(f"{name}: {error}; {words}") from error
    wrong = [row["answer"][0] for row, score in zip(rows, scores, strict=True) if score < 1]
    if wrong:
        raise HeelerError(
            f"{name}: math-verify does not read {len(wrong)} of {len(rows)} answers where they stand in a text, for"
            f" instance {wrong[0]!r}: write a number, or LaTeX between dollars; {words}"
        )


def _completion(row: Mapping[str, Any]) -> str:
    """What fine-tuning shows after a user's own question."""
    return f" {row['answer'][0]}" if isinstance(row["prompt"], str) else row["answer"][0]


def text_config(
    recipe: Arithmetic | QA, out: Path, prompts: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> TextConfig:
    """PPO of a recipe, but for the reward, and with the settings of most tasks."""
    return TextConfig(
        model=str(out / "sft"),
        prompts=write_rows(out / "data" / "prompts.jsonl", prompts),
        eval_prompts=write_rows(out / "data" / "held_out.jsonl", held_out),
        out=str(out / "ppo"),
        seed=recipe.seed,
        threads=recipe.threads,
        prompts_per_update=32,
        samples_per_prompt=8,
        **PPO_SETTINGS,
    )


def _solved(row: dict[str, Any], task: Task) -> str:
    """What fine-tuning shows after the question."""
    return f" {row['entry']['metadata']['answer_cot'] if task.worked else row['answer']}"


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
    out: Path,
    solved: Sequence[Mapping[str, Any]],
    config: TextConfig,
    epochs: float,
    batch: int,
    show: bool,
    model: str | None = None,
) -> Path:
    """Fine-tune on the solved questions, then PPO by `config`; figures of the base model and of both stages.

    The base model is SmolLM2 unless another one is given.
    """
    if model is None:
        model = str(smollm2_folder(show))
    else:
        config = replace(config, trainable=start_of(model).top(LAYERS))
    sft_stage(
        SFTConfig(
            model=model,
            data=write_rows(out / "data" / "solved.jsonl", solved),
            out=str(out / "sft"),
            seed=config.seed,
            epochs=epochs,
            examples_per_update=batch,
            trainable=config.trainable,
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
