"""Adapters on weights of 4 bits, against the same adapters on the rounded weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from heeler import Full, HeelerError, LoRA, resume_text, train_text
from heeler.policies.language_model import LanguageModelPolicy, ValueHead
from heeler.policies.loading import load_causal_lm
from heeler.policies.precision import is_linear
from heeler.policies.quantized import numbers, quantize_linear
from tests.policies.test_language_model import plain_logprobs, sequences, shake
from tests.tiny import save_tiny_model
from tests.train.test_text import PROMPTS, small, vowels
from tests.train.test_text import numbers as metrics

pytest.importorskip("bitsandbytes")
NF4 = LoRA(rank=2, quantize="nf4")
WAYS = [NF4, LoRA(rank=2, layers=1, quantize="nf4")]
VALUES = [  # Dettmers et al., 2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def kept_in_4_bits(model: nn.Module) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if getattr(p, "quant_state", None) is not None}


def rounded_model(path: str, policy: LanguageModelPolicy) -> Any:
    """The plain model with the policy's rounded weights in it."""
    model = load_causal_lm(path)
    plain = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in kept_in_4_bits(policy.model).items():
            plain[name.replace(".base_layer", "")].copy_(numbers(weight))
    return model


def test_a_weight_is_the_nearest_of_16_values_times_its_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    weight = torch.as_tensor(model[0].weight).detach().clone()
    quantize_linear(model, {"0": model[0]}, torch.float32)
    table = torch.tensor(VALUES)
    scale = weight.abs().amax(1, keepdim=True)  # a row is one block of 64
    nearest = table[(weight[..., None] / scale[..., None] - table).abs().argmin(-1)] * scale
    error = (numbers(model[0].weight) - nearest).abs().max() / scale.max()
    assert float(error) < 0.02  # the scales themselves have 8 bits
    assert float((nearest - weight).abs().max()) > 3 * float(error * scale.max())


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_policy_reference_and_engine_are_the_rounded_model(architecture: str, way: LoRA, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, architecture)
    policy = LanguageModelPolicy(load_causal_lm(path), trainable=way, critic=ValueHead())
    inputs = sequences()
    rounded = plain_logprobs(rounded_model(path, policy), inputs, 1.0).detach()
    original = plain_logprobs(AutoModelForCausalLM.from_pretrained(path).eval(), inputs, 1.0).detach()
    assert float((rounded - original).abs().max()) > 1e-3  # 4 bits are felt
    torch.testing.assert_close(policy.logprobs(inputs), rounded, atol=1e-4, rtol=1e-4)
    sampled_by = plain_logprobs(policy.engine_model, inputs, 1.0).detach()  # before anything is published
    torch.testing.assert_close(sampled_by, rounded, atol=1e-4, rtol=1e-4)

    shake(policy)
    torch.testing.assert_close(policy.logprobs(inputs, reference=True), rounded, atol=1e-4, rtol=1e-4)
    trained = policy.logprobs(inputs)
    assert float((trained - rounded).abs().max()) > 1e-3
    torch.testing.assert_close(policy.evaluate(inputs).logprobs.detach(), trained, atol=0, rtol=0)  # ratio is 1
    exported = plain_logprobs(policy.export_model(), inputs, 1.0).detach()
    torch.testing.assert_close(exported, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_are_those_on_the_rounded_weights(tiny_llama: str, way: LoRA) -> None:
    """In passes before and after those without gradients, which choose other kernels in bitsandbytes."""
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=way, critic=ValueHead())
    plain = LoRA(rank=way.rank, layers=way.layers)
    twin = LanguageModelPolicy(rounded_model(tiny_llama, policy), trainable=plain, critic=ValueHead())
    shake(policy)
    twin.load_state_dict(policy.state_dict())

    def gradients(of: LanguageModelPolicy) -> dict[str, Tensor]:
        of.model.zero_grad()
        of.evaluate(sequences()).logprobs.square().sum().backward()
        return {n: p.grad.clone() for n, p in of.model.named_parameters() if p.grad is not None}

    expected = gradients(twin)
    assert expected and all(float(g.abs().max()) > 0 for g in expected.values())
    for _ in range(2):
        found = gradients(policy)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
        policy.score(sequences())


def test_bf16_keeps_what_is_not_adapted_in_two_bytes_and_the_rest_in_half_a_byte(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, hidden=256, layers=2)
    policy = LanguageModelPolicy(load_causal_lm(path), trainable=NF4, critic=ValueHead(), precision="bf16")
    small_ones = kept_in_4_bits(policy.model)
    linear = [m for m in load_causal_lm(path).base_model.modules() if is_linear(m)]
    assert len(small_ones) == len(linear)
    for weight in small_ones.values():
        state = weight.quant_state
        scales = state.absmax.nbytes + state.state2.absmax.nbytes
        assert (weight.data.nbytes + scales) / math.prod(state.shape) < 0.53
    others = [p for n, p in policy.model.named_parameters() if n not in small_ones and "lora_" not in n]
    assert others and all(p.dtype == torch.bfloat16 for p in others)
    assert all(p.dtype == torch.float32 for n, p in policy.model.named_parameters() if "lora_" in n)
    assert all(p.dtype == torch.bfloat16 for p in policy.engine_model.parameters())

    shake(policy)
    inputs = sequences()
    torch.testing.assert_close(policy.evaluate(inputs).logprobs.detach(), policy.logprobs(inputs), atol=0, rtol=0)
    exported = plain_logprobs(policy.export_model(), inputs, 1.0).detach()
    torch.testing.assert_close(policy.logprobs(inputs), exported, atol=0.15, rtol=0.05)


def test_a_run_resumes_and_exports(tiny_llama: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"trainable": NF4, "precision": "fp32"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = train_text(small(tiny_llama, whole, **changes), prompts=PROMPTS, reward=vowels, show=False)

    def stop(report: Any) -> None:
        if report.metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(small(tiny_llama, parts, **changes), prompts=PROMPTS, reward=vowels, on_update=stop, show=False)
    resume_text(parts, prompts=PROMPTS, reward=vowels, show=False)
    assert metrics(parts) == metrics(whole)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl/ref"] == pytest.approx(0, abs=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(whole / "policy")
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, run.policy.model(ids).logits, atol=1e-4, rtol=1e-4)
    adapter = load_file(whole / "policy" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)


def test_what_4_bits_cannot_be_is_said(tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = save_tiny_model(tmp_path, "gpt2")
    with pytest.raises(HeelerError, match=r"keeps its matrices in Conv1D.*leave --trainable.quantize none"):
        LanguageModelPolicy(load_causal_lm(gpt2), trainable=NF4, critic=ValueHead())
    with pytest.raises(HeelerError, match=r"nf4 runs on cpu and cuda, not on mps"):
        LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=NF4, critic=ValueHead(), device="mps")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(HeelerError, match=r"needs the package bitsandbytes.*pip install 'heeler\[bnb\]'"):
        LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=NF4, critic=ValueHead())
    assert LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=Full(), critic=ValueHead()).peft_model is None
