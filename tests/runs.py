"""Runs of seconds, and what they wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from heeler.policies.language_model import TopLayers
from heeler.ppo.update import PPOConfig
from heeler.train.dialogue import DialogueConfig
from heeler.train.text import TextConfig
from heeler.types import Sampling

CLOCK = ("seconds", "decisions_per_second", "tokens_per_second")


def small(model: str, out: Path, **changes: Any) -> TextConfig:
    """Four updates on a tiny model; `changes` are fields of TextConfig."""
    base = TextConfig(
        model=model, out=str(out), updates=4, prompts_per_update=8, sampling=Sampling(max_new_tokens=6),
        trainable=TopLayers(layers=1), lr=1e-2, threads=1, precision="fp32", checkpoint_every=2,
        ppo=PPOConfig(epochs=2, minibatches=2),
    )  # fmt: skip
    return replace(base, **changes)


def small_dialogue(model: str, out: Path, **changes: Any) -> DialogueConfig:
    """The same with episodes of at most three turns; `changes` are fields of DialogueConfig."""
    return DialogueConfig(**{**vars(small(model, out)), "max_turns": 3, **changes})


def interrupted_save(model: Any, folder: Path, **_: Any) -> None:
    """In place of `PreTrainedModel.save_pretrained`: Ctrl-C after the first half of the first file."""
    folder.mkdir()
    (folder / "config.json").write_text("{")
    raise KeyboardInterrupt


def numbers(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k not in CLOCK} for row in rows]
