"""The chunked kernel against its slow twin: the whole array, log_softmax, autograd."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heeler.policies.logprobs import logprobs_alone, token_logprobs
from heeler.runtime.products import product


def slow(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logp = ((hidden @ weight.t() + (0 if bias is None else bias)) / temperature).log_softmax(-1)
    return logp.gather(1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@settings(deadline=None)  # the first example pays for warming up
@example(
    9, 12, 1, 0.5, False, False, True, 1, 0, 1000, False
)  # 2.3e-5 off where the gradient's largest entry is above 1
@given(
    n=st.integers(1, 9),
    vocab=st.integers(2, 12),
    chunk=st.integers(1, 5),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    frozen=st.booleans(),
    with_bias=st.booleans(),
    entropy_gradient=st.booleans(),
    seed=st.integers(0, 1000),
    kept=st.sampled_from([0, 200, 4000]),
    block=st.sampled_from([1, 20, 1000]),
    compiled=st.booleans(),
)
def test_chunked_equals_whole(
    n: int,
    vocab: int,
    chunk: int,
    temperature: float,
    frozen: bool,
    with_bias: bool,
    entropy_gradient: bool,
    seed: int,
    kept: int,
    block: int,
    compiled: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 6, generator=generator)
    weight, bias = torch.randn(vocab, 6, generator=generator), torch.randn(vocab, generator=generator)
    tokens = torch.randint(vocab, (n,), generator=generator)
    cotangents = torch.randn(2, n, generator=generator)
    results = []
    for kernel in ("chunked", "whole"):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_(not frozen)
        b = bias.clone().requires_grad_(not frozen) if with_bias else None
        if kernel == "chunked":
            options = {"bias": b, "temperature": temperature, "chunk": chunk}
            changed: dict[str, Any] = {"KEPT_BYTES": kept, "BLOCK_LOGITS": block}
            if not compiled:
                changed["kernels_for"] = lambda x: None
            with mock.patch.multiple("heeler.policies.logprobs", **changed):
                logprobs, entropy = token_logprobs(h, w, tokens, entropy_gradient=entropy_gradient, **options)
                assert torch.equal(logprobs_alone(h, w, tokens, **options), logprobs)
        else:
            logprobs, entropy = slow(h, w, tokens, b, temperature)
        total = (logprobs * cotangents[0]).sum()
        if entropy_gradient:
            total = total + (entropy * cotangents[1]).sum()
        total.backward()
        results.append([logprobs, entropy, h.grad, w.grad, None if b is None else b.grad])
    for i, (chunked, whole) in enumerate(zip(*results, strict=True)):
        assert (chunked is None) == (whole is None)
        if chunked is not None:
            is_gradient = i >= 2  # whose terms cancel: float32 leaves an error of the largest one's size
            scale = max(1.0, float(whole.abs().max())) if is_gradient else 1.0
            torch.testing.assert_close(chunked, whole, atol=2e-5 * scale, rtol=1e-4)


def test_entropy_without_a_gradient_is_a_constant() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]))
    assert logprobs.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize(("frozen", "limit"), [(True, 256 * 5000), (False, 256 * 5000 - 1), (False, 256 * 5000)])
def test_no_large_array_of_positions_by_vocabulary_is_kept(
    frozen: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between forward and backward no more than the limit of it is alive: that is what the kernel is for."""
    monkeypatch.setattr("heeler.policies.logprobs.KEPT_BYTES", limit)
    n, vocab = 64, 5000
    hidden = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=not frozen)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        logprobs, _ = token_logprobs(hidden, weight, torch.randint(vocab, (n,)), chunk=16)
    logprobs.sum().backward()
    large = [size for size in kept if size >= 16 * vocab]
    assert kept and large == ([n * vocab] if not frozen and 4 * n * vocab <= limit else [])


def test_entropies_keep_their_digits_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (4 * torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 16), (300, 16)))
    tokens = torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight).float()
        logprobs, entropy = token_logprobs(hidden, weight, tokens)
    logp = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs, logp[tokens, tokens], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_products_under_autocast_are_bf16_forward_and_backward(kept: int, frozen: bool, entropy_gradient: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((40, 16), (300, 16)))
    tokens = torch.arange(40)
    cotangents = torch.randn(2, 40, generator=generator)
    cotangents[1] *= float(entropy_gradient)
    gradients: list[list[Tensor]] = []
    with mock.patch("heeler.policies.logprobs.KEPT_BYTES", kept):
        for rounded in (False, True):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
            with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                logprobs, entropy = token_logprobs(h, w, tokens, entropy_gradient=entropy_gradient, chunk=7)
            with mock.patch("heeler.policies.logprobs.product", wraps=product) as products:
                torch.autograd.backward(
                    [logprobs, entropy][: 1 + entropy_gradient], list(cotangents[: 1 + entropy_gradient])
                )
            types = {call.args[0].dtype for call in products.call_args_list}
            assert h.grad is not None and h.grad.dtype == torch.float32
            assert frozen or types == {torch.bfloat16 if rounded else torch.float32}
            gradients.append([leaf.grad for leaf in (h, w) if leaf.grad is not None])
    for exact, near in zip(*gradients, strict=True):
        torch.testing.assert_close(near, exact, atol=0.03 * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_of_a_token_that_is_nearly_certain_keeps_its_digits_in_bf16(kept: int, frozen: bool) -> None:
    """Its 1 - p is 0.0003; bf16 has 1.0 and 0.996 beside each other."""
    vocab, rounding = 4, 0.02
    hidden, weight = torch.tensor([[9.25, 1.0]]), torch.eye(vocab, 2)
    gradients: list[list[Tensor]] = []
    for rounded in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with (
            mock.patch("heeler.policies.logprobs.KEPT_BYTES", kept),
            torch.autocast("cpu", torch.bfloat16, enabled=rounded),
        ):
            logprobs, _ = token_logprobs(h, w, torch.tensor([0]))
            logprobs.sum().backward()
        gradients.append([leaf.grad for leaf in (h, w) if leaf.grad is not None])
    assert 1e-4 < float(gradients[0][0].abs().max()) < 1e-3
    for exact, near in zip(*gradients, strict=True):
        torch.testing.assert_close(near, exact, atol=rounding * float(exact.abs().max()), rtol=0)
