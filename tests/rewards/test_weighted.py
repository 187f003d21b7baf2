"""Sums of rewards: the score, the mass of the tokens, and what the log gets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heeler.ppo.shaping import shape_rewards
from heeler.rewards.weighted import WeightedSum
from heeler.types import HeelerError, Reward, RewardOutput, Samples
from tests.tiny import samples_of

numbers = st.floats(-10, 10, width=32)


class Given:
    """A reward that says what it was given: a score a sample, or rewards of tokens."""

    def __init__(self, values: Sequence[float] | Sequence[Sequence[float]], **components: list[float]) -> None:
        self.values, self.components = values, components

    def __call__(self, samples: Samples) -> RewardOutput:
        rows = [list(v) for v in self.values if isinstance(v, Sequence)]
        scores = [sum(row) for row in rows] if rows else self.values
        return RewardOutput(
            scores=torch.tensor(scores, dtype=torch.float32),
            token_rewards=rows or None,
            components={name: torch.tensor(values) for name, values in self.components.items()},
        )


def of_lengths(lengths: list[int]) -> Samples:
    return samples_of(["p"] * len(lengths), [" ".join("x" * n) for n in lengths])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_no_reward_is_lost_between_scores_and_tokens(lengths: list[int], data: st.DataObject) -> None:
    terms: dict[str, tuple[float, Reward]] = {}
    wanted = [[0.0] * n for n in lengths]
    kinds = ["token", *data.draw(st.lists(st.sampled_from(["token", "sequence"]), max_size=3))]
    for number, kind in enumerate(data.draw(st.permutations(kinds))):
        weight = data.draw(numbers)
        if kind == "token":
            values = [data.draw(st.lists(numbers, min_size=n, max_size=n)) for n in lengths]
            for row, given_row in zip(wanted, values, strict=True):
                for token, value in enumerate(given_row):
                    row[token] += weight * value
        else:
            values = data.draw(st.lists(numbers, min_size=len(lengths), max_size=len(lengths)))
            for row, value in zip(wanted, values, strict=True):
                row[-1] += weight * value
        terms[f"t{number}"] = (weight, Given(values))
    output = WeightedSum(terms)(of_lengths(lengths))
    assert output.token_rewards is not None
    for row, wanted_row, score in zip(output.token_rewards, wanted, output.scores.tolist(), strict=True):
        assert list(row) == pytest.approx(wanted_row, rel=1e-5, abs=1e-3)
        assert sum(row) == pytest.approx(score, rel=1e-5, abs=1e-3)

    offsets = torch.tensor([0, *lengths]).cumsum(0)  # and the run's own check of the mass agrees
    flat = torch.tensor([value for row in output.token_rewards for value in row])
    nothing = torch.zeros(len(flat))
    shape_rewards(output.scores, flat, nothing, 0.0, offsets, torch.zeros(len(lengths), dtype=torch.bool))


def test_the_score_is_the_weighted_sum() -> None:
    reward = WeightedSum({"a": (2.0, Given([1.0, -1.0])), "b": (-0.5, Given([4.0, 0.0]))})
    output = reward(of_lengths([1, 3]))
    assert output.scores.dtype == torch.float32 and output.scores.tolist() == [0.0, -2.0]
    assert output.token_rewards is None


def test_sequence_scores_go_to_the_last_token() -> None:
    reward = WeightedSum({"s": (2.0, Given([1.0, 3.0])), "t": (1.0, Given([[0.5], [1.0, 2.0]]))})
    output = reward(of_lengths([1, 2]))
    assert output.token_rewards == [[2.5], [1.0, 8.0]] and output.scores.tolist() == [2.5, 9.0]


def test_every_component_is_logged_by_itself() -> None:
    terms: dict[str, tuple[float, Reward]] = {
        "rm": (2.0, Given([3.0], probability=[0.9])),
        "json": (1.0, Given([1.0], parses=[1.0])),
    }
    components = {k: v.tolist() for k, v in WeightedSum(terms)(of_lengths([1])).components.items()}
    approx = pytest.approx([0.9])
    assert components == {
        "rm": [3.0], "rm/probability": approx, "json": [1.0], "json/parses": [1.0], "probability": approx,
    }  # fmt: skip
    terms["rm2"] = (1.0, Given([0.0], probability=[0.1]))
    assert "probability" not in WeightedSum(terms)(of_lengths([1])).components


def test_what_is_no_sum() -> None:
    zero = Given([0.0])
    with pytest.raises(HeelerError, match="at least one reward"):
        WeightedSum({})
    with pytest.raises(HeelerError, match="cannot be called 'mean'"):
        WeightedSum({"mean": (1.0, zero)})
    with pytest.raises(HeelerError, match="the weight of the reward a is inf"):
        WeightedSum({"a": (float("inf"), zero)})
    with pytest.raises(HeelerError, match="the reward a returned 1 token rewards for completion 2, which has 2 tokens"):
        WeightedSum({"a": (1.0, Given([[1.0], [1.0]]))})(of_lengths([1, 2]))
    with pytest.raises(HeelerError, match="completion 2 has no token to put the score of the reward b on"):
        WeightedSum({"a": (1.0, Given([[1.0], []])), "b": (1.0, Given([1.0, 1.0]))})(of_lengths([1, 0]))
