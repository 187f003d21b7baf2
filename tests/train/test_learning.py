"""Learning: tasks small enough for a tiny random model, with a threshold over several seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from heeler import AdvantageConfig, FixedKL, Full, PPOConfig, Sampling, TextConfig, ValueHead, train_text
from heeler.ppo.schedules import Schedule


def bandit(prompts: list[str], completions: list[str]) -> list[float]:
    """Pull arm 3."""
    return [float(c.strip() == "3") for c in completions]


def count(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of the right digits before the first wrong one, counting up from the prompt's digit to it plus 4."""
    scores: list[float] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        start = int(prompt.split()[-1])
        wanted = [str(start + k) for k in range(1, 5)]
        said = completion.replace(" ", "")
        right = 0
        while right < len(wanted) and right < len(said) and said[right] == wanted[right]:
            right += 1
        scores.append(right / len(wanted) - 0.1 * (len(said) > len(wanted)))
    return scores


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_token_bandit(count_llama: str, tmp_path: Path, seed: int) -> None:
    config = TextConfig(
        model=count_llama, out=str(tmp_path / "run"), seed=seed, updates=20, prompts_per_update=32, lr=1e-3,
        trainable=Full(), critic=ValueHead(), sampling=Sampling(max_new_tokens=1), kl=FixedKL(coef=0.0), threads=1,
        checkpoint_every=1000, ppo=PPOConfig(epochs=2, minibatches=2),
    )  # fmt: skip
    run = train_text(config, prompts=["go"], reward=bandit, show=False)
    assert run.folder is not None
    metrics = run.folder.metrics()
    assert metrics[0]["reward/mean"] < 0.4
    assert sum(m["reward/mean"] for m in metrics[-5:]) / 5 > 0.9


@pytest.mark.parametrize("seed", [0, 1])
def test_count_to_n(count_llama: str, tmp_path: Path, seed: int) -> None:
    """Four digits in order for five different starts: credit has to reach each token."""
    config = TextConfig(
        model=count_llama, out=str(tmp_path / "run"), seed=seed, updates=60, prompts_per_update=64, lr=1e-3,
        critic_lr=3e-3, lr_schedule=Schedule(shape="linear", end=0.1), trainable=Full(),
        sampling=Sampling(max_new_tokens=4), kl=FixedKL(coef=0.0), threads=1,
        checkpoint_every=1000, advantage=AdvantageConfig(lam=0.95),
        ppo=PPOConfig(epochs=4, minibatches=2, entropy_coef=0.03),
    )  # fmt: skip
    run = train_text(config, prompts=[f"go {i}" for i in range(5)], reward=count, show=False)
    assert run.folder is not None
    metrics = run.folder.metrics()
    assert metrics[0]["reward/mean"] < 0.2
    assert sum(m["reward/mean"] for m in metrics[-5:]) / 5 > 0.8
