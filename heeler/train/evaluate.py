"""Held-out figures of a text policy: reward, independent judges, and the signs of a collapse.

Reward alone cannot tell a better policy from a fooled reward model. Text that collapses shows elsewhere: its
perplexity under the reference falls (or explodes), it repeats itself (`distinct_2`), samples become equal
(`duplicates`), or lengths change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy
from heeler.ppo.minibatches import budgeted_microbatches, decision_indices
from heeler.runtime.passes import PassBudget
from heeler.types import Reward, RewardOutput, Rollout, Samples


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
    """Share of texts that repeat another's, case and spaces aside: both of a pair count."""
    counts = Counter(" ".join(t.lower().split()) for t in texts)
    return sum(count for count in counts.values() if count > 1) / max(len(texts), 1)


@torch.no_grad()
def evaluate_text(
    policy: LanguageModelPolicy,
    rollout: Rollout,
    samples: Samples,
    scored: RewardOutput,
    judges: Mapping[str, Reward],
    *,
    texts: Sequence[str],
    passes: PassBudget,
    engine_logprobs: Tensor | None = None,
    on_judged: Callable[[int], Any] = lambda count: None,
) -> Evaluation:
    """Measure a rollout of held-out prompts.

    Args:
        policy: that sampled it.
        rollout: one completion, or one episode, for each prompt.
        samples: what judges see of it.
        scored: what the reward said of it.
        judges: independent scorers by name.
        texts: what the policy wrote, without what an environment answered.
        passes: tokens of a forward pass.
        engine_logprobs: `[n]` of the decisions under the policy, where they need not be computed again.
        on_judged: called with the number of texts that the reference or a judge is done with, for a progress bar.

    Returns:
        figures: `reward` (the probability where the reward model gives one, else the score), `reward_score`, one
        figure for each component of the reward (`reward/NAME`), one for each judge, `perplexity` of the completions
        under the reference (exp of the mean nats a token), `distinct_2` (over all completions together),
        `distinct_2_within` (within each), `duplicates`, `length` (tokens), `truncated_fraction`, `kl/ref` (nats a
        sequence).
    """
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs)

    def read(parts: Sequence[torch.Tensor]) -> tuple[float, float]:
        kl, nll = 0.0, 0.0
        for items in parts:
            items = items.to(inputs.lengths.device)
            part = inputs.select(items)
            if engine_logprobs is None:
                output, ref_logprobs, _ = policy.score(part)
                logprobs = output.logprobs
            else:
                logprobs = engine_logprobs[decision_indices(items, inputs.decision_counts)]
                ref_logprobs = policy.logprobs(part, reference=True)
            kl += float((logprobs - ref_logprobs).double().sum())
            nll -= float(ref_logprobs.double().sum())
            on_judged(len(items))
        return kl, nll

    everything, costs = torch.arange(len(inputs.lengths)), inputs.costs.cpu()
    kl, nll = passes.fit(partial(budgeted_microbatches, everything, costs), read)
    judged: dict[str, float] = {}
    for name, judge in judges.items():
        judged[name] = float(judge(samples).scores.mean())
        on_judged(len(rollout.terminated))
    shown = scored.components.get("probability", scored.scores)
    count, tokens = len(rollout.terminated), len(rollout.actions)
    figures = {
        "reward": float(shown.mean()),
        "reward_score": float(scored.scores.mean()),
        **{f"reward/{name}": float(values.mean()) for name, values in scored.components.items()},
        **judged,
        "perplexity": math.exp(min(nll / tokens, 50.0)),
        "distinct_2": corpus_distinct(texts, 2),
        "distinct_2_within": distinct(texts, 2),
        "duplicates": duplicates(texts),
        "length": tokens / count,
        "truncated_fraction": float(rollout.truncated.float().mean()),
        "kl/ref": kl / count,
    }
    return Evaluation(figures=figures, prompts=rollout.prompts, completions=rollout.completions, rewards=shown.tolist())
