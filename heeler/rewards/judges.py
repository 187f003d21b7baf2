"""Judges of text that PPO is never trained on: they tell a better policy from a fooled reward model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from heeler.data.prompts import texts_of
from heeler.runtime.packages import require


@lru_cache(maxsize=1)
def _vader() -> Any:
    require("vaderSentiment", "demo")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER's compound sentiment, -1 to 1, of prompt and completion together (Hutto and Gilbert, ICWSM 2014)."""
    analyzer = _vader()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts_of(prompts, completions)]


def bag_of_words(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Probability of positive by a linear model on word pairs, trained on reviews the reward model never saw."""
    from heeler.data.reviews import bag_of_words_judge

    model = bag_of_words_judge()
    return [float(p) for p in model.predict_proba(texts_of(prompts, completions))[:, 1]]
