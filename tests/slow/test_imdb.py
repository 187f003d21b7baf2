"""The demo for real: a 135M model, a trained reward model, PPO. Needs the demo's packages; takes many minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from heeler.recipes.imdb import IMDB, run_imdb


@pytest.mark.slow
def test_reward_rises_without_collapse(tmp_path: Path) -> None:
    summary = run_imdb(IMDB(out=str(tmp_path / "run"))).summary
    before, after = summary["eval/before"], summary["eval/after"]
    assert after["reward"] > before["reward"] + 0.1
    assert after["judge"] > before["judge"] + 0.1  # a judge that PPO never saw agrees
    assert after["distinct_2"] > 0.9 * before["distinct_2"]
    assert after["duplicates"] <= before["duplicates"] + 0.01
    assert summary["reward_model"]["figures"]["reviews_128"]["accuracy"] > 0.8
    assert summary["peak_memory_gib"] < 6
