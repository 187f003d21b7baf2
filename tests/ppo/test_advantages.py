"""GAE against a plain loop, a peer's numbers and closed forms; then what `estimate_advantages` makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heeler.ppo.advantages import AdvantageConfig, estimate_advantages, gae
from heeler.runtime.reduce import LocalReduce
from heeler.types import Rollout, ScoredRollout

from .toy import in_processes, make_inputs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sb3_gae.json").read_text())
DOUBLE = torch.float64

reals = st.floats(-10, 10, width=32)
fractions = st.floats(0, 1, width=32)


@st.composite
def segments(draw):
    """Rewards, values, bootstrap and offsets of some segments, a few of them empty."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6))
    size = sum(lengths)
    rewards, values = (draw(st.lists(reals, min_size=size, max_size=size)) for _ in range(2))
    bootstrap = draw(st.lists(reals, min_size=len(lengths), max_size=len(lengths)))
    offsets = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    return (*(torch.tensor(x, dtype=DOUBLE) for x in (rewards, values, bootstrap)), torch.tensor(offsets))


def gae_loop(rewards, values, bootstrap, offsets, gamma, lam):
    """The definition, one decision at a time."""
    advantages = [0.0] * len(rewards)
    for s in range(len(offsets) - 1):
        next_value, next_advantage = float(bootstrap[s]), 0.0
        for t in reversed(range(int(offsets[s]), int(offsets[s + 1]))):
            delta = float(rewards[t]) + gamma * next_value - float(values[t])
            next_advantage = advantages[t] = delta + gamma * lam * next_advantage
            next_value = float(values[t])
    return torch.tensor(advantages, dtype=DOUBLE)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(segments(), fractions, fractions)
def test_gae_equals_its_plain_loop(data, gamma, lam):
    close(gae(*data, gamma, lam), gae_loop(*data, gamma, lam))


@given(segments(), fractions, fractions)
def test_packed_segments_equal_each_by_itself(data, gamma, lam):
    rewards, values, bootstrap, offsets = data
    alone = []
    for s in range(len(bootstrap)):
        span = slice(int(offsets[s]), int(offsets[s + 1]))
        alone.append(
            gae(
                rewards[span], values[span], bootstrap[s : s + 1], torch.tensor([0, span.stop - span.start]), gamma, lam
            )
        )
    torch.testing.assert_close(gae(*data, gamma, lam), torch.cat(alone), rtol=0, atol=0)


@given(segments(), fractions)
def test_lambda_0_is_the_td_error(data, gamma):
    rewards, values, bootstrap, offsets = data
    expected = []
    for s in range(len(bootstrap)):
        span = range(int(offsets[s]), int(offsets[s + 1]))
        for t in span:
            following = float(values[t + 1]) if t + 1 in span else float(bootstrap[s])
            expected.append(float(rewards[t]) + gamma * following - float(values[t]))
    close(gae(*data, gamma, 0.0), torch.tensor(expected, dtype=DOUBLE))


@given(segments(), fractions)
def test_lambda_1_is_the_discounted_return_minus_the_value(data, gamma):
    rewards, values, bootstrap, offsets = data
    expected = []
    for s in range(len(bootstrap)):
        end = int(offsets[s + 1])
        for t in range(int(offsets[s]), end):
            discounted = sum(gamma ** (k - t) * float(rewards[k]) for k in range(t, end))
            expected.append(discounted + gamma ** (end - t) * float(bootstrap[s]) - float(values[t]))
    close(gae(*data, gamma, 1.0), torch.tensor(expected, dtype=DOUBLE), 1e-8)


def test_gae_by_hand():
    """Two decisions, then one: worked out on paper with gamma = 1/2 and lambda = 1/2."""
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 2.0, 1.0])
    # first segment: delta = [1 + 2/2 - 3, 2 + 6/2 - 2] = [-1, 3], A = [-1 + 3/4, 3]; second: 4 + 0 - 1
    advantages = gae(rewards, values, torch.tensor([6.0, 0.0]), torch.tensor([0, 2, 3]), 0.5, 0.5)
    assert advantages.tolist() == [-0.25, 3.0, 3.0]


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_a_perfect_critic_has_no_advantages(lam):
    """gamma = 1/2; the first segment bootstraps with 8, the second terminates."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    values = torch.tensor([1 + 6 / 2, 2 + 8 / 2, 3 + 6.5 / 2, 4 + 5 / 2, 5.0])
    advantages = gae(rewards, values, torch.tensor([8.0, 0.0]), torch.tensor([0, 2, 5]), 0.5, lam)
    assert advantages.tolist() == [0.0] * 5


def test_only_empty_segments():
    none = torch.zeros(0)
    assert gae(none, none, torch.ones(2), torch.tensor([0, 0, 0]), 1.0, 1.0).shape == (0,)


def test_gae_keeps_the_dtype():
    x = torch.ones(2)
    assert gae(x, x, torch.ones(1, dtype=DOUBLE), torch.tensor([0, 2]), 1.0, 1.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "bootstrap", "offsets"), [(2, 1, [0, 3]), (3, 2, [0, 3]), (3, 1, [0, 2]), (3, 1, [0, 4])]
)
def test_gae_refuses_shapes_that_disagree(values, bootstrap, offsets):
    with pytest.raises(ValueError, match="gae"):
        gae(torch.zeros(3), torch.zeros(values), torch.zeros(bootstrap), torch.tensor(offsets), 1.0, 1.0)


def pack_grid(case):
    """The segments of a [step][env] grid, cut at every episode start, and the bootstrap each deserves."""
    rewards, values, bootstrap, offsets, order = [], [], [], [0], []
    num_steps = len(case["rewards"])
    for env in range(len(case["dones"])):
        for t in range(num_steps):
            rewards.append(case["rewards"][t][env])
            values.append(case["values"][t][env])
            order.append((t, env))
            if t == num_steps - 1:
                bootstrap.append(0.0 if case["dones"][env] else case["last_values"][env])
            elif case["episode_starts"][t + 1][env]:
                bootstrap.append(case["final_values"][t][env] if case["time_limits"][t][env] else 0.0)
            else:
                continue
            offsets.append(len(rewards))
    tensors = (torch.tensor(x, dtype=DOUBLE) for x in (rewards, values, bootstrap))
    return (*tensors, torch.tensor(offsets)), order


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"gamma={case['gamma']},lam={case['lam']}")
def test_golden_values_of_stable_baselines3(case):
    data, order = pack_grid(case)
    advantages = gae(*data, case["gamma"], case["lam"])
    for name, ours in (("advantages", advantages), ("returns", advantages + data[1])):
        close(ours, torch.tensor([case[name][t][env] for t, env in order], dtype=DOUBLE), 2e-6)


def test_the_golden_values_hold_every_kind_of_end():
    for case in GOLDEN["cases"]:
        assert any(map(any, case["time_limits"])) and any(case["dones"]) and not all(case["dones"])
        ends = sum(map(sum, case["episode_starts"][1:]))
        assert ends > sum(map(sum, case["time_limits"]))


def scored_rollout(lengths=(3, 0, 2, 4), seed=0) -> ScoredRollout:
    generator = torch.Generator().manual_seed(seed)
    size, num = sum(lengths), len(lengths)

    def normal(n):
        return torch.randn(n, generator=generator, dtype=DOUBLE)

    ids = torch.arange(num)
    offsets = torch.tensor([sum(lengths[:s]) for s in range(num + 1)])
    old_logprobs = normal(size) - 3
    rollout = Rollout(
        inputs=make_inputs(lengths, [0] * size, [0] * size),
        offsets=offsets,
        actions=torch.zeros(size, dtype=torch.int64),
        behavior_logprobs=old_logprobs.clone(),
        policy_versions=torch.zeros(size, dtype=torch.int64),
        terminated=torch.ones(num, dtype=torch.bool),
        truncated=torch.zeros(num, dtype=torch.bool),
        prompt_ids=ids,
        group_ids=ids,
        sample_ids=ids,
        prompts=[],
        completions=[],
        columns={},
    )
    return ScoredRollout(
        rollout=rollout,
        scores=normal(num),
        rewards=normal(size),
        old_logprobs=old_logprobs,
        ref_logprobs=normal(size) - 3,
        values=normal(size),
        bootstrap=normal(num),
        policy_weights=torch.rand(size, generator=generator, dtype=DOUBLE),
        value_weights=torch.rand(size, generator=generator, dtype=DOUBLE),
        components={},
    )


def test_estimate_advantages_carries_the_batch_over():
    scored = scored_rollout()
    batch = estimate_advantages(scored, AdvantageConfig(gamma=0.9, lam=0.8, whiten=False), LocalReduce())
    expected = gae(scored.rewards, scored.values, scored.bootstrap, scored.rollout.offsets, 0.9, 0.8)
    close(batch.advantages, expected)
    close(batch.returns, expected + scored.values)
    close(batch.importance_weights, torch.ones(9, dtype=DOUBLE))
    assert batch.inputs is scored.rollout.inputs
    assert batch.old_logprobs is scored.old_logprobs and batch.old_values is scored.values
    assert batch.policy_weights is scored.policy_weights and batch.value_weights is scored.value_weights


def test_the_critic_may_have_its_own_lambda():
    scored = scored_rollout()
    data = (scored.rewards, scored.values, scored.bootstrap, scored.rollout.offsets, 0.9)
    batch = estimate_advantages(scored, AdvantageConfig(gamma=0.9, lam=0.5, value_lam=1.0, whiten=False), LocalReduce())
    close(batch.advantages, gae_loop(*data, 0.5))
    close(batch.returns, gae_loop(*data, 1.0) + scored.values)


def test_whitening_changes_advantages_and_leaves_returns():
    scored = scored_rollout()
    white = estimate_advantages(scored, AdvantageConfig(), LocalReduce())
    plain = estimate_advantages(scored, AdvantageConfig(whiten=False), LocalReduce())
    weights = scored.policy_weights / scored.policy_weights.sum()
    assert float((weights * white.advantages).sum()) == pytest.approx(0, abs=1e-9)
    assert float((weights * white.advantages**2).sum()) == pytest.approx(1, abs=1e-6)
    close(white.returns, plain.returns)


def test_a_dropped_decision_does_not_move_the_whitening():
    """Weight 0 on the last segment gives the other segments the advantages they have without it."""
    scored = scored_rollout((3, 2, 4))
    dropped = scored.policy_weights.clone()
    dropped[5:] = 0
    rewards = scored.rewards.clone()
    rewards[5:] = 1000.0
    with_it = estimate_advantages(
        replace(scored, policy_weights=dropped, rewards=rewards), AdvantageConfig(), LocalReduce()
    )
    cut = {
        name: getattr(scored, name)[:5]
        for name in ("rewards", "old_logprobs", "ref_logprobs", "values", "policy_weights", "value_weights")
    }
    rollout = replace(
        scored.rollout, offsets=scored.rollout.offsets[:3], behavior_logprobs=scored.rollout.behavior_logprobs[:5]
    )
    without = estimate_advantages(
        replace(scored, rollout=rollout, bootstrap=scored.bootstrap[:2], **cut), AdvantageConfig(), LocalReduce()
    )
    close(with_it.advantages[:5], without.advantages)


def test_importance_weights_are_old_over_behavior_and_capped():
    scored = scored_rollout((4,))
    gaps = torch.tensor([0.0, 0.5, -1.0, 50.0], dtype=DOUBLE)
    rollout = replace(scored.rollout, behavior_logprobs=scored.old_logprobs - gaps)
    batch = estimate_advantages(replace(scored, rollout=rollout), AdvantageConfig(importance_cap=1.5), LocalReduce())
    close(batch.importance_weights, torch.tensor([1.0, 1.5, 0.36787944117144233, 1.5], dtype=DOUBLE))


def test_two_processes_whiten_as_one():
    parts = [scored_rollout((3, 0, 2), seed=1), scored_rollout((5, 1), seed=2)]
    advantages = in_processes(
        2, lambda reduce: estimate_advantages(parts[reduce.rank], AdvantageConfig(), reduce).advantages
    )
    raw = [estimate_advantages(part, AdvantageConfig(whiten=False), LocalReduce()).advantages for part in parts]
    raw, weights = torch.cat(raw), torch.cat([part.policy_weights for part in parts])
    mean = (weights * raw).sum() / weights.sum()
    std = ((weights * (raw - mean) ** 2).sum() / weights.sum()).sqrt()
    close(torch.cat(advantages), (raw - mean) / std, 1e-7)
