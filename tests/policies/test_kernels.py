"""What is compiled for training against the formulas."""

from __future__ import annotations

import shutil
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

from heeler.policies import kernels
from heeler.policies.kernels import Kernels, kernels_for, loaded

needs_kernels = pytest.mark.skipif(loaded() is None, reason="nothing can be compiled here")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def found() -> Kernels:
    compiled = loaded()
    assert compiled is not None
    return compiled


@pytest.mark.skipif(not (sys.platform.startswith("linux") and shutil.which("gcc")), reason="there is no gcc on Linux")
def test_where_there_is_a_compiler_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a mistake in the source, which the first questions find, would only skip what is tested here."""
    monkeypatch.delenv("HEELER_KERNELS", raising=False)
    loaded.cache_clear()
    assert loaded() is not None
    monkeypatch.undo()
    loaded.cache_clear()


def test_wrong_answers_are_not_used() -> None:
    loaded.cache_clear()
    with mock.patch.object(kernels, "_is_right", return_value=False):
        assert loaded() is None and kernels_for(torch.zeros(1)) is None
    loaded.cache_clear()


@needs_kernels
def test_what_they_do_not_take() -> None:
    assert kernels_for(torch.zeros(1)) is kernels_for(torch.zeros(1).bfloat16()) is found()
    assert kernels_for(torch.zeros(1).double()) is None and kernels_for(torch.zeros(1, device="meta")) is None


def exact(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(log p [n], H [n], p without the tokens' own [n, V], dH / dz [n, V])` in float64."""
    logp = (logits.double() / temperature).log_softmax(-1)
    p = logp.exp()
    h = -(p * logp.clamp(min=-1e4)).sum(-1)
    without = p.scatter(1, tokens[:, None], 0.0)
    return logp.gather(1, tokens[:, None])[:, 0], h, without, -p * (logp.clamp(min=-1e4) + h[:, None])


@needs_kernels
@TYPES
@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 5003])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax(dtype: torch.dtype, vocabulary: int, temperature: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(7, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(vocabulary, (7,), generator=generator)
    logits[0] += 500.0
    if masked:
        logits[2:4, ::2] = -torch.inf
        tokens[2:4] = min(1, vocabulary - 1)
        if vocabulary == 1:
            return
    wanted = exact(logits, tokens, temperature)
    for inside in (False, True):
        whole = logits.clone()
        e = whole if inside else torch.full_like(logits, torch.nan)
        slope = torch.full_like(logits, torch.nan)
        logprobs, entropy, sums = found().softmax(whole, tokens, temperature, e, slope)
        rough = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 1e-2}
        torch.testing.assert_close(logprobs.double(), wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy.double(), wanted[1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(e.double() / sums[:, None], wanted[2], **rough)
        off = (slope.double() / sums[:, None] - wanted[3]).abs()
        assert float(off.max()) < (1e-5 if dtype == torch.float32 else 1e-2 * max(float(wanted[3].abs().max()), 1e-2))
    for e in (None, torch.empty_like(logits)):  # to the last digit, whatever else is wanted
        alone = found().softmax(logits, tokens, temperature, e)
        assert all(torch.equal(x, y) for x, y in zip(alone, (logprobs, entropy, sums), strict=True))


@needs_kernels
@TYPES
@pytest.mark.parametrize("where", ["chosen", "another", "all"])
def test_a_nan_comes_out_and_stays_in_its_row(dtype: torch.dtype, where: str) -> None:
    logits, tokens = torch.randn(3, 1000).to(dtype), torch.tensor([5, 6, 7])
    logits[1, {"chosen": slice(6, 7), "another": slice(900, 901), "all": slice(None)}[where]] = torch.nan
    for values in found().softmax(logits, tokens, 1.0, None):
        assert torch.isnan(values).tolist() == [False, True, False]


@needs_kernels
def test_layouts_that_they_cannot_read_are_refused() -> None:
    logits, tokens = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    for wrong in (
        (logits.t(), tokens, 1.0, None),
        (logits, tokens, 1.0, torch.empty(4, 7)),
        (logits, tokens, 1.0, logits.bfloat16()),
        (logits, tokens, 1.0, logits, torch.empty(6, 4).t()),
        (logits, tokens.int(), 1.0, None),
        (logits, tokens[:3], 1.0, None),
        (logits, tokens.to("meta"), 1.0, None),
    ):
        with pytest.raises(ValueError, match="layout"):
            found().softmax(*wrong)
    for outside in (6, -1, -100):
        with pytest.raises(IndexError, match="outside the vocabulary of 6"):
            found().softmax(logits, torch.tensor([0, outside, 2, 3]), 1.0, None)


@needs_kernels
@TYPES
def test_infinite_logits_are_no_distribution(dtype: torch.dtype) -> None:
    logits, tokens = torch.randn(3, 300).to(dtype), torch.tensor([5, 6, 7])
    logits[0, 200] = torch.inf
    logits[2] = -torch.inf
    for values in found().softmax(logits, tokens, 1.0, None):
        assert torch.isnan(values).tolist() == [True, False, True]


@needs_kernels
def test_torchs_default_type_changes_nothing() -> None:
    logits, tokens = torch.randn(3, 300), torch.tensor([5, 6, 7])
    x, w, dn, dz = torch.randn(4, 9, 32), torch.ones(32), torch.randn(4, 9, 32), torch.randn(4, 9, 32)
    before = *found().softmax(logits, tokens, 1.0, None), *found().norm_back(dn, x, w, dz, 1e-5)
    torch.set_default_dtype(torch.float64)
    try:
        after = *found().softmax(logits, tokens, 1.0, None), *found().norm_back(dn, x, w, dz, 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
