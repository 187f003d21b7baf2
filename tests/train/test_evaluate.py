from __future__ import annotations

import pytest

from heeler.train.evaluate import corpus_distinct, distinct, duplicates
from heeler.train.report import figures_table


def test_distinct_and_duplicates() -> None:
    assert distinct(["a b a b", "c"], 2) == pytest.approx((2 / 3 + 1) / 2)
    assert corpus_distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert corpus_distinct([], 2) == 1.0
    assert duplicates(["A  film", "a film", "a book"]) == pytest.approx(2 / 3)  # each repeats the other
    assert duplicates(["a", "b", "b", "c", "b"]) == pytest.approx(3 / 5)
    assert duplicates(["a", "b"]) == 0.0
    assert duplicates([]) == 0.0


def test_the_table_lines_up() -> None:
    table = figures_table({"before": {"reward": 0.5, "own": 1.0}, "after": {"reward": 0.8}}).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["reward", "0.500", "0.800"] and table[2].split() == ["own", "1.000", "-"]


def test_a_kl_of_rounding_errors_has_no_sign() -> None:
    (_, row) = figures_table({"before": {"kl/ref": -1.5e-7}}).splitlines()
    assert row.split() == ["kl/ref", "0.000"]
