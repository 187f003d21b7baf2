from __future__ import annotations

import math

import pytest
import torch

from heeler.data.prompts import load_prompts
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy, TopLayers, ValueHead
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.rollout.engines.native import NativeEngine
from heeler.rollout.text import sample_rollout, samples_of
from heeler.runtime.passes import PassBudget
from heeler.train.evaluate import corpus_distinct, distinct, duplicates, evaluate_text
from heeler.train.report import figures_table
from heeler.types import RewardOutput, Samples, Sampling
from tests.policies.test_language_model import shake


def test_distinct_and_duplicates() -> None:
    assert distinct(["a b a b", "c"], 2) == pytest.approx((2 / 3 + 1) / 2)
    assert corpus_distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert corpus_distinct([], 2) == 1.0
    assert duplicates(["A  film", "a film", "a book"]) == pytest.approx(2 / 3)  # each repeats the other
    assert duplicates(["a", "b", "b", "c", "b"]) == pytest.approx(3 / 5)
    assert duplicates(["a", "b"]) == 0.0
    assert duplicates([]) == 0.0


def test_figures_of_a_policy_that_left_its_reference(tiny_llama: str) -> None:
    """Perplexity is the reference's, a sequence's KL the sum over its tokens, the reward shown the probability."""
    tokenizer = load_tokenizer(tiny_llama)
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    shake(policy)
    prompts = load_prompts(["ab", "c", "def"], tokenizer, max_tokens=None)
    engine = NativeEngine(policy.export_model(), eos_ids=range(40))
    sampling = Sampling(max_new_tokens=9)
    rollout = sample_rollout(engine, tokenizer, prompts, [0, 1, 2], [0] * 3, [1, 2, 3], sampling, policy.device)
    scores = torch.tensor([-1.0, 0.5, 2.0])
    scored = RewardOutput(scores=scores, token_rewards=None, components={"probability": scores.sigmoid()})

    def judge(samples: Samples) -> RewardOutput:
        return RewardOutput(scores=torch.arange(3.0), token_rewards=None, components={})

    figures = evaluate_text(
        policy, rollout, samples_of(rollout), scored, {"judge": judge}, texts=["a b a b", "a b", "a b"],
        passes=PassBudget(16),
    ).figures  # fmt: skip
    assert isinstance(rollout.inputs, TokenInputs)
    own, reference, _ = policy.score(rollout.inputs)
    assert figures["perplexity"] == pytest.approx(math.exp(-float(reference.mean())), rel=1e-4)
    assert figures["perplexity"] != pytest.approx(math.exp(-float(own.logprobs.mean())), rel=1e-2)
    assert figures["kl/ref"] == pytest.approx(float((own.logprobs - reference).sum()) / 3, rel=1e-4)
    assert figures["reward"] == pytest.approx(float(scores.sigmoid().mean())) and figures["judge"] == 1.0
    assert figures["reward_score"] == pytest.approx(0.5)
    assert figures["distinct_2"] == pytest.approx(2 / 5) and figures["duplicates"] == pytest.approx(2 / 3)
    assert figures["length"] == pytest.approx(len(rollout.actions) / 3)


def test_the_table_lines_up() -> None:
    table = figures_table({"before": {"reward": 0.5, "own": 1.0}, "after": {"reward": 0.8}}).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["reward", "0.500", "0.800"] and table[2].split() == ["own", "1.000", "-"]


def test_a_kl_of_rounding_errors_has_no_sign() -> None:
    (_, row) = figures_table({"before": {"kl/ref": -1.5e-7}}).splitlines()
    assert row.split() == ["kl/ref", "0.000"]
