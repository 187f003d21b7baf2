"""From scores to rewards: the score at the last decision, minus beta times the KL; nothing gets lost."""

from __future__ import annotations

import pytest
import torch

from heeler.ppo.shaping import segment_sums, segment_weights, shape_rewards
from heeler.types import CheckFailed

OFFSETS = torch.tensor([0, 3, 4, 6])
KL = torch.tensor([0.1, -0.2, 0.3, 0.5, 0.0, 1.0])
SCORES = torch.tensor([1.0, -2.0, 4.0])
PAID = torch.zeros(3, dtype=torch.bool)


def test_the_score_stands_at_the_last_decision() -> None:
    rewards = shape_rewards(SCORES, None, KL, 0.5, OFFSETS, PAID)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 0.1, 0.85, -2.25, 0.0, 3.5]))
    torch.testing.assert_close(segment_sums(rewards, OFFSETS), SCORES - 0.5 * segment_sums(KL, OFFSETS))


def test_a_withheld_score_is_not_paid_but_its_kl_is() -> None:
    rewards = shape_rewards(SCORES, None, KL, 0.5, OFFSETS, torch.tensor([True, False, False]))
    torch.testing.assert_close(rewards[:3], -0.5 * KL[:3])


def test_token_rewards_replace_the_score() -> None:
    tokens = torch.tensor([0.5, 0.25, 0.25, -2.0, 1.0, 3.0])
    torch.testing.assert_close(shape_rewards(SCORES, tokens, KL, 0.0, OFFSETS, PAID), tokens)


def test_lost_reward_is_noticed() -> None:
    with pytest.raises(CheckFailed, match="segment 1 was scored -2"):  # an empty completion cannot carry its score
        shape_rewards(SCORES, None, KL[:5], 0.5, torch.tensor([0, 3, 3, 5]), PAID)
    with pytest.raises(CheckFailed, match="segment 2 was scored 4"):
        shape_rewards(SCORES, torch.tensor([0.5, 0.25, 0.25, -2.0, 1.0, 0.0]), KL, 0.0, OFFSETS, PAID)


def test_weights() -> None:
    dropped = torch.tensor([False, True, False])
    assert segment_weights(OFFSETS, dropped, "token").tolist() == [1, 1, 1, 0, 1, 1]
    torch.testing.assert_close(
        segment_weights(OFFSETS, dropped, "sequence"), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 1 / 2, 1 / 2])
    )
