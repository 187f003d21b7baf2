"""A whole text run by two processes is the run by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heeler import PPOConfig
from heeler.ppo.kl import AdaptiveKL
from heeler.ppo.shaping import ScoreShaping
from heeler.train.ppo import UpdateReport, train_loop
from heeler.train.text import TextRun, build_text_run
from heeler.types import CheckFailed
from tests.ppo.toy import ThreadReduce, in_processes
from tests.runs import small
from tests.train.test_text import PROMPTS, vowels


def trained(run: TextRun) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The weights after the run's updates, and their metrics without what a clock decides."""
    told: list[dict[str, Any]] = []

    def after(report: UpdateReport) -> bool:
        told.append(
            {k: v for k, v in report.metrics.items() if not k.startswith(("time/", "decisions_per", "seconds"))}
        )
        return True

    train_loop(run.state, run.collector(), run.score(), run.config, run.reduce, after)
    return {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}, told


def built(model: str, out: Path, reduce: ThreadReduce | None = None, **changes: Any) -> TextRun:
    options = {"ppo": PPOConfig(epochs=2, minibatches=1), "updates": 3, "lr": 1e-3, "samples_per_prompt": 2}
    run = build_text_run(small(model, out, **{**options, **changes}), prompts=PROMPTS, reward=vowels)
    if reduce is not None:
        run.reduce = reduce
    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"old_logprobs": "trainer", "truncation": "drop"},
        {"shaping": ScoreShaping(scale=True, whiten=True), "kl": AdaptiveKL(target=0.5)},
    ],
    ids=str,
)
def test_two_processes_compute_what_one_does(changes: dict[str, Any], tiny_llama: str, tmp_path: Path) -> None:
    """Each samples and scores half of the prompts; sums, controllers, whitening and gradients are those of all."""
    weights, metrics = trained(built(tiny_llama, tmp_path / "one", **changes))
    # built one after the other: building seeds the process's generators, which threads share
    runs = [built(tiny_llama, tmp_path / f"rank-{rank}", **changes) for rank in range(2)]

    def part(reduce: ThreadReduce) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        runs[reduce.rank].reduce = reduce
        return trained(runs[reduce.rank])

    for found, told in in_processes(2, part):
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(told, metrics, strict=True):
            assert ours.keys() == theirs.keys()
            known = {k: v for k, v in theirs.items() if isinstance(v, (int, float)) and k != "engine/logprob_gap"}
            assert {k: ours[k] for k in known} == pytest.approx(known, rel=1e-3, abs=1e-5, nan_ok=True)


def test_a_gap_in_one_process_stops_all(tiny_llama: str, tmp_path: Path) -> None:
    runs = [built(tiny_llama, tmp_path / f"rank-{rank}", old_logprobs="trainer") for rank in range(2)]
    with torch.no_grad():
        for parameter in runs[1].policy.engine_model.parameters():  # what one engine samples with is not the policy
            parameter.mul_(0.5)
    runs[1].policy.changed_names = []  # so that a publish mends nothing
    stopped: list[int] = []

    def part(reduce: ThreadReduce) -> None:
        runs[reduce.rank].reduce = reduce
        with pytest.raises(CheckFailed, match="engine and trainer differ"):
            trained(runs[reduce.rank])
        stopped.append(reduce.rank)

    in_processes(2, part)
    assert sorted(stopped) == [0, 1]
