"""Runs of a task are averaged only where they were set alike."""

from __future__ import annotations

from typing import Any

from benchmarks.task_results import _settings, defaults, differences
from heeler import Full, Sampling, TextConfig
from heeler.runtime.configs import to_json


def settings(**changes: Any) -> dict[str, Any]:
    return {"ppo": _settings(to_json(TextConfig(model="m", **changes))), "precision": "fp32"}


def test_an_option_that_is_new_counts_as_its_default() -> None:
    older = settings()
    del older["ppo"]["optimizer"], older["ppo"]["sampling"]["top_k"], older["ppo"]["advantage"]
    assert differences(older, settings(seed=7, out="elsewhere"), defaults()) == []
    newer = settings(optimizer="adamw8bit", trainable=Full(), sampling=Sampling(top_k=3))
    apart = ["ppo.optimizer adamw and adamw8bit", "ppo.sampling.top_k 0 and 3", "ppo.trainable.type TopLayers and Full"]
    assert differences(older, newer, defaults()) == apart
    assert len(differences(newer, older, defaults())) == len(apart)
    assert differences(settings(), settings() | {"precision": "bf16"}, defaults()) == ["precision fp32 and bf16"]
