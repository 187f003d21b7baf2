"""Rounding the weights of linear layers once changes nothing that autocast would not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import Full, LanguageModelPolicy, TopLayers, Trainable, ValueHead
from heeler.policies.loading import load_causal_lm, load_classifier
from heeler.policies.precision import round_linear
from tests.tiny import ARCHITECTURES, save_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_numbers_under_autocast(architecture: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, architecture)
    for load in (load_causal_lm, lambda path: load_classifier(path, num_labels=1)):
        torch.manual_seed(0)
        model = load(path)
        model.config.pad_token_id = 0
        ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = model(input_ids=ids).logits
            round_linear(model)
            assert torch.equal(model(input_ids=ids).logits, before)
        kinds = {p.dtype for p in model.parameters() if p.ndim > 1}
        assert kinds == {torch.bfloat16, torch.float32}  # and embeddings
        assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, nn.Embedding))


@pytest.mark.parametrize("way", [Full(), TopLayers(layers=1)], ids=["full", "top"])
def test_the_reference_is_rounded_and_the_policy_is_not(tiny_llama: str, way: Trainable) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=way, critic=ValueHead(), precision="bf16")
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    assert {p.dtype for p in weights} == {torch.float32}
    reference = policy._reference_model()
    assert reference.model.layers[-1].mlp.up_proj.weight.dtype == torch.bfloat16
    inputs = TokenInputs(
        tokens=torch.randint(3, 200, (24,), generator=torch.Generator().manual_seed(1)),
        lengths=torch.tensor([12, 12]),
        is_decision=torch.arange(24) % 12 >= 4,
    )
    said, ref_logprobs, _ = policy.score(inputs)
    assert torch.equal(said.logprobs, ref_logprobs)
    with torch.no_grad():
        weights[-2].add_(0.1)
    assert not torch.equal(policy.score(inputs)[0].logprobs, ref_logprobs)
