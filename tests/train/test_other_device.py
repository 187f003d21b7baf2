"""Runs on a device that is not the CPU: nothing lies on the wrong one, and the numbers are the CPU's.

Policies with memory are not among them: torch takes a kernel for them that only CUDA has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler.envs.vector import EnvConfig
from heeler.policies.language_model import Full, LoRA, SeparateCritic
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.policies.networks import MLP, NatureCNN
from heeler.ppo.advantages import AdvantageConfig
from heeler.rollout.engines.native import NativeEngine
from heeler.train.control import GymConfig, resume_gym, train_gym
from heeler.train.dialogue import train_dialogue
from heeler.train.reward import LabelledTexts, RewardConfig, train_reward_model
from heeler.train.sft import SFTConfig, train_sft
from heeler.train.text import resume_text, train_text
from heeler.types import Completion, Request, Sampling
from tests.runs import numbers, small, small_dialogue
from tests.tiny import save_tiny_model, save_tiny_seq2seq
from tests.toy_dialogues import Vowels

pretend_gpu = pytest.importorskip("tests.pretend_gpu", exc_type=ImportError).pretend_gpu
PROMPTS = ["once upon", "a", "the sea", "b and c"]
Train = Callable[[str, Path], Any]


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def agree(train: Train, tmp_path: Path, again: Callable[[Path], Any] | None = None) -> None:
    """`train(device, folder)` on both devices, and `again` on the folder, write the same numbers up to rounding."""
    train("cpu", tmp_path / "cpu")
    with pretend_gpu():
        train("pretend:0", tmp_path / "gpu")
    if again is not None:
        again(tmp_path / "cpu")
        with pretend_gpu():
            again(tmp_path / "gpu")
    rows, others = numbers(tmp_path / "cpu"), numbers(tmp_path / "gpu")
    assert len(rows) == len(others) > 2
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == (pytest.approx(value, rel=1e-3, abs=2e-3) if value is not None else None), name


def text(model: str, **changes: Any) -> Train:
    def train(device: str, out: Path) -> Any:
        config = small(model, out, device=device, **{"lr": 1e-3, "updates": 3, **changes})
        return train_text(config, prompts=PROMPTS, eval_prompts=["x y"], reward=vowels, show=False)

    return train


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": Full(), "critic": SeparateCritic(), "samples_per_prompt": 2},
        pytest.param({"trainable": LoRA(rank=2)}, marks=pytest.mark.slow),
        {"sampling": Sampling(max_new_tokens=6, stop=("a", "e"))},
        pytest.param({"engine": "hf"}, marks=pytest.mark.slow),
    ],
    ids=["top layers", "full, critic, samples", "LoRA", "stop strings", "generate"],
)
def test_ppo_on_text(tiny_llama: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    agree(text(tiny_llama, **changes), tmp_path)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param("gpt2", marks=pytest.mark.slow), "gpt_neox", pytest.param("qwen3", marks=pytest.mark.slow)],
)
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    agree(text(save_tiny_model(tmp_path / "model", architecture)), tmp_path)


def test_resumed_ppo(tiny_llama: str, tmp_path: Path) -> None:
    def again(folder: Path) -> None:
        resume_text(folder, updates=4, prompts=PROMPTS, eval_prompts=["x y"], reward=vowels, show=False)

    agree(text(tiny_llama), tmp_path, again)


def test_sequence_to_sequence(tmp_path: Path) -> None:
    agree(text(save_tiny_seq2seq(tmp_path / "model"), trainable=Full(), lr=1e-4), tmp_path)


def test_dialogues(tiny_llama: str, tmp_path: Path) -> None:
    def train(device: str, out: Path) -> Any:
        return train_dialogue(small_dialogue(tiny_llama, out, device=device), prompts=PROMPTS, env=Vowels, show=False)

    agree(train, tmp_path)


def test_fine_tuning(tiny_llama: str, tmp_path: Path) -> None:
    data = [{"prompt": f"q{i}", "completion": f" a{i} b"} for i in range(40)]

    def train(device: str, out: Path) -> Any:
        config = SFTConfig(
            model=tiny_llama, out=str(out), updates=4, device=device, threads=1, examples_per_update=4, precision="fp32"
        )
        return train_sft(config, data=data, show=False)

    agree(train, tmp_path)


def test_a_reward_model(tiny_llama: str, tmp_path: Path) -> None:
    texts = ["good", "a fine film", "bad", "a poor film then"] * 3
    data = LabelledTexts(texts, [True, True, False, False] * 3, load_tokenizer(tiny_llama))
    losses: dict[str, list[float]] = {"cpu": [], "pretend:0": []}

    def train(device: str) -> dict[str, Any]:
        config = RewardConfig(
            model=tiny_llama, tokens=600, lr=1e-3, batch_size=4, device=device, threads=1, precision="fp32"
        )
        said = losses[device]
        return train_reward_model(
            config,
            data,
            {"test": (data, None)},
            tmp_path / device,
            show=False,
            on_step=lambda m: said.append(m["loss"]),
        )

    cpu = train("cpu")
    with pretend_gpu():
        gpu = train("pretend:0")
    assert losses["pretend:0"] == pytest.approx(losses["cpu"], rel=1e-3) and len(losses["cpu"]) > 5
    assert gpu["figures"]["test"] == pytest.approx(cpu["figures"]["test"], rel=1e-3)


@pytest.mark.parametrize(
    "id, changes",
    [
        ("CartPole-v1", {"network": MLP(hidden=(16,)), "advantage": AdvantageConfig(recompute=True)}),
        ("Pendulum-v1", {"normalize_observations": True, "scale_rewards": True}),
        ("tests.toy_envs:Identity", {"kwargs": {"actions": "multi_binary"}}),
        ("tests.toy_envs:Pictures", {"network": NatureCNN()}),
    ],
)
def test_environments(id: str, changes: dict[str, Any], tmp_path: Path) -> None:
    kwargs = changes.pop("kwargs", {})

    def train(device: str, out: Path) -> Any:
        env = EnvConfig(id=id, num_envs=2, kwargs=kwargs)
        config = GymConfig(
            env=env,
            out=str(out),
            updates=3,
            num_steps=8,
            eval_episodes=2,
            threads=1,
            device=device,
            precision="fp32",
            **changes,
        )
        return train_gym(config, show=False)

    agree(train, tmp_path, lambda folder: resume_gym(folder, updates=4, show=False))


@pytest.mark.parametrize(("architecture", "each"), [("llama", 0), ("qwen3", 0), ("gpt_neox", 8)])
def test_sampling_seldom_waits_for_the_device(architecture: str, each: int, tmp_path: Path) -> None:
    """Once in eight steps, for tokens, log-probabilities and states; where transformers takes the steps it waits in
    each of them too (it asks whether a mask can be left out)."""
    path = save_tiny_model(tmp_path, architecture)
    requests = [Request(prompt=[5 + i] * (1 + i % 3), seed=i) for i in range(6)]

    def sampled(device: str, steps: int) -> list[Completion]:
        engine = NativeEngine(load_causal_lm(path).to(device), eos_ids=[], trunk_layers=1, final_states=True)
        return engine.generate(requests, Sampling(max_new_tokens=steps))

    with pretend_gpu() as waits:
        counts = list[int]()
        for steps in (9, 17, 33):  # the first token comes with the prompts
            waits.clear()
            there = sampled("pretend:0", steps)
            counts.append(waits.total())
    assert [counts[1] - counts[0], counts[2] - counts[1]] == [4 + each, 2 * (4 + each)]
    for here, other in zip(sampled("cpu", 33), there, strict=True):
        assert here.tokens == other.tokens and other.logprobs.device.type == "cpu"
        torch.testing.assert_close(here.final_states, other.final_states, atol=1e-4, rtol=1e-4)


def test_it_refuses_what_cuda_refuses() -> None:
    with pretend_gpu() as waits:
        there = torch.ones(2, 3).to("pretend:0")
        assert there.device.type == "pretend" and (there + torch.tensor(1.0)).device == there.device
        with pytest.raises(RuntimeError, match=r"add.* expected all tensors on pretend:0, but .*\(3,\).* on the cpu"):
            _ = there + torch.ones(3)
        assert (there[torch.tensor([1])] @ there.T).tolist() == [[3.0, 3.0]]
        there[0].add_(1)
        assert float(there.sum()) == 9.0 and waits == {"copy to the device": 1, "copy to the host": 1, "item": 1}
        layer = torch.nn.Linear(3, 1).to("pretend:0")
        layer(there).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.device == there.device
