"""The page of the control recipes is made of runs of the recipes as they are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from heeler.recipes.control import RECIPES
from heeler.runtime.configs import to_json
from heeler.train.control import GymConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import control_results

    return control_results


def test_runs_of_other_settings_are_not_averaged(page, tmp_path: Path) -> None:
    def saved(config: GymConfig) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"config": to_json(config)}))
        return tmp_path

    recipe = RECIPES["acrobot"]()
    run = replace(recipe, out="x", seed=7, threads=1, eval_episodes=3, updates=245, steps=recipe.steps + 100)
    assert page.apart("acrobot", saved(run)) == []
    assert page.apart("acrobot", saved(replace(run, lr=0.5))) == [f"lr 0.5 is now {recipe.lr}"]
    assert page.apart("acrobot", saved(replace(run, steps=recipe.steps * 2)))[0].startswith("steps ")
    assert page.apart("acrobot", saved(replace(run, ppo=replace(run.ppo, epochs=99))))[0].startswith("ppo ")
