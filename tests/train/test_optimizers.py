"""AdamW with moments in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from heeler import Full, HeelerError, LoRA, SeparateCritic, TextConfig, resume_text, train_text
from heeler.runtime import packages
from heeler.train.optimizers import make_adamw
from heeler.train.ppo import UpdateReport
from heeler.train.sft import SFTConfig, build_sft_run, train_sft
from heeler.train.text import build_text_run
from tests.runs import numbers, small
from tests.tiny import save_tiny_model
from tests.train.test_text import PROMPTS, vowels

pytest.importorskip("bitsandbytes")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Wide enough for matrices whose moments are worth 8 bits."""
    return save_tiny_model(tmp_path / "model", hidden=64)


def eight_bit(model: str, out: Path, **changes: Any) -> TextConfig:
    return small(model, out, **{"optimizer": "adamw8bit", "trainable": Full(), **changes})


def test_its_steps_are_adamws_to_a_few_percent() -> None:
    """One matrix and one vector, 40 steps on noisy gradients; the vector, in 32 bits, to rounding."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((96, 96), (96,))]
    gradients = [[torch.randn(t.shape, generator=generator) + 1 for t in start] for _ in range(40)]
    ends: list[list[torch.Tensor]] = []
    for kind in ("adamw", "adamw8bit"):
        weights = [torch.nn.Parameter(t.clone()) for t in start]
        optimizer = make_adamw(
            kind, [{"params": weights, "lr": 1e-3}], [], device="cpu", betas=(0.9, 0.95), weight_decay=0.1
        )
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient
            optimizer.step()
        ends.append([w.detach() - t for w, t in zip(weights, start, strict=True)])
    (matrix, vector), (matrix8, vector8) = ends
    torch.testing.assert_close(vector8, vector, atol=1e-6, rtol=1e-4)
    error = float((matrix8 - matrix).norm() / matrix.norm())
    assert 1e-4 < error < 0.05, error


def test_matrices_have_8_bits_and_embeddings_and_vectors_32(model: str, tmp_path: Path) -> None:
    config = eight_bit(model, tmp_path / "run", critic=SeparateCritic())
    run = train_text(config, prompts=PROMPTS, reward=vowels, show=False)
    names = {id(p): name for network in run.policy.networks() for name, p in network.named_parameters()}
    kept = {names[id(p)]: state["state1"].dtype for p, state in run.state.optimizer.state.items()}
    assert kept["model.embed_tokens.weight"] == torch.float32
    assert kept["model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert kept["model.norm.weight"] == torch.float32
    assert not run.state.optimizer.mng.pid2config  # pyright: ignore  # other runs of the process meet none of this
    rewards = [row["reward/mean"] for row in numbers(tmp_path / "run")]
    assert rewards[-1] > rewards[0]


@pytest.mark.parametrize("way", [Full(), LoRA(rank=64)], ids=["full", "lora"])
def test_resume_equals_uninterrupted(model: str, tmp_path: Path, way: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_text(eight_bit(model, whole, trainable=way), prompts=PROMPTS, reward=vowels, show=False)

    def stop(report: UpdateReport) -> None:
        if report.metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(eight_bit(model, parts, trainable=way), prompts=PROMPTS, reward=vowels, on_update=stop, show=False)
    run = resume_text(parts, prompts=PROMPTS, reward=vowels, show=False)
    assert torch.uint8 in {state["state1"].dtype for state in run.state.optimizer.state.values()}
    assert numbers(parts) == numbers(whole)


def test_fine_tuning_takes_it_too(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}{b}=", "completion": a} for a in "abcdefgh" for b in "xyz"]
    config = SFTConfig(
        model=model, out=str(tmp_path / "sft"), optimizer="adamw8bit", epochs=3, lr=1e-2, threads=1,
        examples_per_update=8, precision="fp32", sample_prompts=0,
    )  # fmt: skip
    run = train_sft(config, data=rows, show=False)
    assert torch.uint8 in {state["state1"].dtype for state in run.optimizer.state.values()}


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.zeros(3))]

    def make(device: str) -> Any:
        return make_adamw("adamw8bit", [{"params": weights}], [], device=device, betas=(0.9, 0.95), weight_decay=0.0)

    with pytest.raises(HeelerError, match="adamw8bit runs on cpu and cuda, not on mps"):
        make("mps")
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    missing = r"needs the package bitsandbytes.*pip install 'heeler\[bnb\]'"
    with pytest.raises(HeelerError, match=missing):
        make("cpu")
    with pytest.raises(HeelerError, match=missing):  # before the model is looked for
        build_sft_run(SFTConfig(model="nowhere", optimizer="adamw8bit"), data=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(HeelerError, match=missing):
        build_text_run(TextConfig(model="nowhere", optimizer="adamw8bit"), prompts=["a"], reward=vowels)
