"""Rewards for a completion's form, against plain loops and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.rewards.shaping import EOSPenalty, LengthReward, Overlong, Repetition
from heeler.types import HeelerError, Samples
from tests.tiny import samples_of


def of_lengths(lengths: list[int]) -> Samples:
    return samples_of(["p"] * len(lengths), [" ".join("x" * n) for n in lengths])


def overlong_by_hand(length: int, limit: int, buffer: int) -> float:
    """Equation 13 of DAPO, case by case."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return ((limit - buffer) - length) / buffer
    return -1.0


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 40), st.data())
def test_overlong_is_dapos_equation(lengths: list[int], limit: int, data: st.DataObject) -> None:
    buffer = data.draw(st.integers(1, limit))
    scores = Overlong(limit, buffer)(of_lengths(lengths)).scores.tolist()
    assert scores == pytest.approx([overlong_by_hand(n, limit, buffer) for n in lengths], abs=1e-6)


def test_overlong_at_its_edges() -> None:
    assert Overlong(10, 4)(of_lengths([0, 6, 7, 10, 11])).scores.tolist() == [0.0, 0.0, -0.25, -1.0, -1.0]
    for limit, buffer in ((4, 5), (4, 0)):
        with pytest.raises(HeelerError, match="the buffer of overlong must be from 1 to its limit of 4 tokens"):
            Overlong(limit, buffer)


def test_length_costs_beyond_the_free_tokens() -> None:
    scores = LengthReward(free=3, per_token=0.5)(of_lengths([0, 3, 4, 7])).scores
    assert scores.tolist() == [0.0, 0.0, -0.5, -2.0]
    assert LengthReward(per_token=-1)(of_lengths([2])).scores.tolist() == [2.0]
    with pytest.raises(HeelerError, match="free tokens of length must be 0 or more, not -1"):
        LengthReward(free=-1)


def test_repetition_counts_repeated_ngrams() -> None:
    texts = ["a b c d e", "a b a b a", "a a a a a", "a b", ""]
    scores = Repetition(2)(samples_of([""] * 5, texts)).scores.tolist()
    assert scores == pytest.approx([0.0, -0.5, -0.75, 0.0, 0.0])
    assert Repetition()(samples_of([""], ["a b c a b c"])).scores.tolist() == pytest.approx([-0.25])
    with pytest.raises(HeelerError, match="at least 1 word, not 0"):
        Repetition(0)


def test_text_without_an_end_is_penalised() -> None:
    samples = samples_of(["p", "p"], ["cut", "whole"], truncated=[True, False])
    assert EOSPenalty()(samples).scores.tolist() == [-1.0, 0.0]
    assert EOSPenalty(0.25)(samples).scores.tolist() == [-0.25, 0.0]
