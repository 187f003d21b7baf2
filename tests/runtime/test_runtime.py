from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from heeler import AdaptiveKL, AdvantageConfig, LoRA, SeparateCritic, TextConfig
from heeler.runtime import machine
from heeler.runtime.configs import from_json, to_json
from heeler.runtime.reduce import LocalReduce
from heeler.types import HeelerError


def test_configs_survive_json() -> None:
    config = TextConfig(
        model="m", trainable=LoRA(rank=3, layers=2), critic=SeparateCritic(model="x"), kl=AdaptiveKL(target=3.0),
        judges=("a=b:c",), advantage=AdvantageConfig(value_lam=1.0), out=None, adam_betas=(0.8, 0.9),
    )  # fmt: skip
    assert from_json(TextConfig, to_json(config)) == config
    broken = to_json(replace(config))
    broken["trainable"]["type"] = "Everything"
    with pytest.raises(HeelerError, match="trainable is 'Everything', but must be one of Full, TopLayers, LoRA"):
        from_json(TextConfig, broken)


def test_random_states_come_back() -> None:
    machine.seed_everything(3)
    states = machine.random_states()
    first = (random.random(), np.random.rand(), torch.rand(2))
    machine.restore_random_states(states)
    again = (random.random(), np.random.rand(), torch.rand(2))
    assert first[:2] == again[:2] and torch.equal(first[2], again[2])


def test_precision_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_seconds_per_product", lambda dtype: 1.0 if dtype == torch.float32 else 0.2)
    assert machine.choose_precision("auto", "cpu")[0] == "bf16"
    monkeypatch.setattr(machine, "_seconds_per_product", lambda dtype: 1.0)
    assert machine.choose_precision("auto", "cpu")[0] == "fp32"
    assert machine.choose_precision("bf16", "cpu") == ("bf16", "bf16, as asked")


def test_one_process_reduces_nothing() -> None:
    x = torch.ones(2)
    assert torch.equal(LocalReduce().sum(x), x) and LocalReduce().world_size == 1
