from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

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
    precision, why = machine.choose_precision("auto", "mps")  # the CPU's rate says nothing about it
    assert precision == "fp32" and "on mps is not known" in why


def test_one_process_reduces_nothing() -> None:
    x = torch.ones(2)
    assert torch.equal(LocalReduce().sum(x), x) and LocalReduce().world_size == 1


@pytest.mark.parametrize(
    ("files", "cores", "why"),
    [
        ({}, 8, ""),
        ({f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}" for i in range(8)}, 4,
         "4 cores have 8 hardware threads"),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 8, ""),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "250000 100000"}, 2, "may use 2.5 of 8 processors"),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1, "may use 0.5 of 8 processors"),
        ({"sys/fs/cgroup/cpu.max": "1600000 100000"}, 8, ""),
        ({"proc/self/cgroup": "3:memory:/m\n1:cpu,cpuacct:/docker/x\n0::/",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3, "may use 3 of 8 processors"),
        ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8, ""),
    ],
)  # fmt: skip
def test_cores_of_a_process(
    files: dict[str, str], cores: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardware threads of one core count once, and a container's share of the time is a limit (cgroup 1 and 2)."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    found, reason = machine.usable_cores(tmp_path)
    assert found == cores and (why in reason if why else reason == "")


def test_threads_are_the_cores_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "usable_cores", lambda: (2, "2 cores have 4 hardware threads"))
    try:
        assert machine.set_threads(None) == torch.get_num_threads() == 2
        assert machine.say_threads() == "2 threads (2 cores have 4 hardware threads)"
        assert machine.set_threads(1) == 1 and machine.say_threads() == "1 thread"
    finally:
        torch.set_num_threads(before)
