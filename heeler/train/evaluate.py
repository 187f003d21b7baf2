"""Held-out figures of a text policy: reward, independent judges, and the signs of a collapse.

Reward alone cannot tell a better policy from a fooled reward model. Text that collapses shows elsewhere: its
perplexity under the reference falls (or explodes), it repeats itself (`distinct_2`), samples become equal
(`duplicates`), or lengths change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heeler.data.prompts import PromptSet
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy
from heeler.ppo.minibatches import budgeted_microbatches
from heeler.rollout.engines.draws import draw_seed
from heeler.rollout.text import sample_rollout, samples_of
from heeler.types import Engine, Reward, Sampling


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures (means over the prompts) and the samples they were made from."""

    figures: dict[str, float]
    prompts: Sequence[Any]
    completions: Sequence[str]
    rewards: Sequence[float]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams, within each text, averaged over texts (Li et al., 1510.03055).

    Texts of fewer than n words count as 1: they repeat nothing.
    """
    shares: list[float] = []
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return sum(shares) / max(len(shares), 1)


def corpus_distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of all texts together: falls when samples resemble each other."""
    grams = [tuple(words[i : i + n]) for words in (t.split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def duplicates(texts: Sequence[str]) -> float:
    """Share of texts that repeat an earlier one, case and spaces aside."""
    normal = [" ".join(t.lower().split()) for t in texts]
    return 1 - len(set(normal)) / len(normal) if normal else 0.0


@torch.no_grad()
def evaluate_text(
    policy: LanguageModelPolicy,
    engine: Engine,
    tokenizer: Any,
    prompts: PromptSet,
    reward: Reward,
    judges: Mapping[str, Reward],
    sampling: Sampling,
    *,
    seed: int,
    token_budget: int,
) -> Evaluation:
    """Sample one completion for every prompt with the published weights and measure it.

    The draws depend on the seed and the prompt only, so before and after differ by the policy alone.

    Returns:
        figures: `reward` (the probability where the reward model gives one, else the score), `reward_score`, one
        figure a judge, `perplexity` of the completions under the reference (exp of the mean nats a token),
        `distinct_2` (over all completions together), `distinct_2_within` (within each), `duplicates`, `length`
        (tokens), `truncated_fraction`, `kl/ref` (nats a sequence).
    """
    indices = list(range(len(prompts)))
    seeds = [draw_seed(seed, 0xE7A1, i) for i in indices]
    rollout = sample_rollout(engine, tokenizer, prompts, indices, [0] * len(indices), seeds, sampling, policy.device)
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs)
    kl, nll = 0.0, 0.0
    for items in budgeted_microbatches(torch.arange(len(indices)), inputs.costs.cpu(), token_budget):
        output, ref_logprobs, _ = policy.score(inputs.select(items.to(inputs.lengths.device)))
        kl += float((output.logprobs - ref_logprobs).double().sum())
        nll -= float(ref_logprobs.double().sum())
    given = samples_of(rollout)
    scored = reward(given)
    shown = scored.components.get("probability", scored.scores)
    count, tokens = len(indices), len(rollout.actions)
    figures = {
        "reward": float(shown.mean()),
        "reward_score": float(scored.scores.mean()),
        **{name: float(judge(given).scores.mean()) for name, judge in judges.items()},
        "perplexity": math.exp(min(nll / tokens, 50.0)),
        "distinct_2": corpus_distinct(rollout.completions, 2),
        "distinct_2_within": distinct(rollout.completions, 2),
        "duplicates": duplicates(rollout.completions),
        "length": tokens / count,
        "truncated_fraction": float(rollout.truncated.float().mean()),
        "kl/ref": kl / count,
    }
    return Evaluation(figures=figures, prompts=rollout.prompts, completions=rollout.completions, rewards=shown.tolist())
