"""Heeler's attention against transformers' "sdpa", forward and backward."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from heeler.policies import attention
from heeler.policies.language_model import Full, LanguageModelPolicy, SeparateCritic
from heeler.policies.loading import load_causal_lm, load_classifier
from tests.tiny import save_tiny_model


def layer(causal: bool) -> Any:
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, causal
    return module


def masks(rows: int, asked: int, columns: int) -> dict[str, Tensor | None]:
    seen = torch.rand(rows, 1, asked, columns, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[..., 0] = True
    return {
        "none": None,
        "seen": seen,
        "added": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
        "of all rows": seen[:1],
    }


@pytest.mark.parametrize("columns", [20, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_single_tokens(columns: int, masked: bool) -> None:
    query, key, value = torch.randn(4, 6, 1, 8), torch.randn(4, 2, columns, 8), torch.randn(4, 2, columns, 8)
    mask = torch.rand(4, 1, 1, columns) < 0.7 if masked else None
    ours, _ = attention.attention(layer(True), query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(layer(True), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("asked, columns", [(7, 7), (1, 5), (5, 9), (40, 40), (129, 129)])
@pytest.mark.parametrize("kind", ["none", "seen", "added", "of all rows"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_rows(asked: int, columns: int, kind: str, causal: bool, scaling: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 6, asked, 8), (4, 2, columns, 8), (4, 2, columns, 8)
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    cotangent = torch.randn(4, asked, 6, 8, generator=generator)
    results: list[list[Tensor]] = []
    for attend in (attention.attention, sdpa_attention_forward):
        leaves = [part.clone().requires_grad_() for part in parts]
        output, _ = attend(layer(causal), *leaves, masks(4, asked, columns)[kind], scaling=scaling)  # pyright: ignore
        output.backward(cotangent)
        results.append([output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_query_that_sees_nothing_harms_nobody() -> None:
    parts = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    seen[0, 0, 2] = False
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
        output = attention.short_rows(*parts, mask, None, False)
        output[:, [0, 1, 3]].sum().backward()
        assert output.isfinite().all() and all(part.grad is not None and part.grad.isfinite().all() for part in parts)


def test_digits_under_autocast() -> None:
    """In bf16 the inside of the attention keeps float32: closer to the truth than inputs rounded in between."""
    parts = [torch.randn(2, 4, 16, 8).bfloat16() for _ in range(3)]
    exact = attention.short_rows(*(part.double().float() for part in parts), None, None, True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention.short_rows(*parts, None, None, True)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())


def test_who_attends_so(tiny_llama: str, tmp_path: Any) -> None:
    """Policy, reference, critic and classifiers; padding and shared prompts come through it as through "sdpa"."""
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=Full(), critic=SeparateCritic())
    classifier = load_classifier(tiny_llama, num_labels=1)
    classifier.config.pad_token_id = 0
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]])
    models = policy.model, policy._reference_lm, policy.critic_body, classifier  # pyright: ignore[reportPrivateUsage]
    for model in models:
        with mock.patch.object(attention, "short_rows", wraps=attention.short_rows) as short, torch.no_grad():
            model(input_ids=ids)
        assert short.call_count == 3

    eager = save_tiny_model(tmp_path, "llama")
    model = load_causal_lm(eager)
    model.config._attn_implementation = "eager"
    attention.use_fast_attention(model)
    assert model.config._attn_implementation == "eager"  # what somebody chose stays
