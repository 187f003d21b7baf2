"""What is compiled for a decoding step against the formulas, and what happens where nothing is."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from heeler.policies.attention import use_fast_attention
from heeler.policies.loading import load_causal_lm
from heeler.rollout.engines import kernels
from heeler.rollout.engines.kernels import WIDTHS, Seen, for_head, loaded
from heeler.rollout.engines.native import NativeEngine
from heeler.train.text import build_text_run
from heeler.types import Request, Sampling
from tests.runs import small
from tests.tiny import save_tiny_model

needs_kernel = pytest.mark.skipif(loaded()[0] is None, reason=loaded()[1])


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and no kernel loaded before or kept after."""
    monkeypatch.setenv("HEELER_CACHE", str(tmp_path / "cache"))
    loaded.cache_clear()
    yield tmp_path / "cache" / "kernels"
    loaded.cache_clear()


Asked = tuple[Tensor, Tensor, Tensor, Seen]


def slow(query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float) -> Tensor:
    """Token by token and head by head, in float64."""
    count, heads, _ = query.shape
    said = torch.zeros(query.shape, dtype=torch.float64)
    for i in range(count):
        b, columns = int(seen.row[i]), slice(int(seen.first[i]), int(seen.end[i]))
        for h in range(heads):
            g = h * key.shape[1] // heads
            weights = (scale * key[b, g, columns].double() @ query[i, h].double()).softmax(0)
            said[i, h] = weights @ value[b, g, columns].double()
    return said


def question(width: int, groups: int, shared: int, end: int, dtype: torch.dtype, prompts: bool = False) -> Asked:
    """A token of each row that sees all to the last column; or of `prompts` all tokens, each what is before it."""
    generator = torch.Generator().manual_seed(width + end)
    heads, rows = groups * shared, 6
    first = torch.randint(0, end, (rows,), generator=generator)
    first[0], first[-1] = 0, end - 1
    row, ends = torch.arange(rows), torch.full((rows,), end)
    if prompts:
        row = torch.repeat_interleave(row, end - first)
        ends = torch.cat([torch.arange(int(begin), end) + 1 for begin in first])
        first = first[row]
    spoken = torch.randn(len(row), heads + 2 * groups, width, generator=generator).to(dtype)
    key, value = torch.randn(2, rows, groups, end + 7, width, generator=generator).to(dtype)
    seen = Seen(row.int(), first.int(), ends.int(), end)
    return spoken[:, :heads], key[:, :, :end], value[:, :, :end], seen


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("groups", "shared", "end", "prompts"),
    [(3, 3, 41, False), (1, 8, 300, False), (4, 1, 1, False), (2, 2, 1030, False), (3, 3, 23, True), (1, 2, 1, True)],
)
def test_it_is_attention(dtype: torch.dtype, width: int, groups: int, shared: int, end: int, prompts: bool) -> None:
    kernel = for_head(width, torch.zeros(1, dtype=dtype))
    assert kernel is not None
    asked = question(width, groups, shared, end, dtype, prompts)
    found, wanted = kernel.attend(*asked, 1 / math.sqrt(width)), slow(*asked, 1 / math.sqrt(width))
    assert found.dtype == dtype and found.is_contiguous()
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-3, "rtol": 1e-2}
    torch.testing.assert_close(found.double(), wanted, **near)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (5, 576), (70, 24)])
def test_norms_rotations_and_gates(dtype: torch.dtype, tokens: int, width: int) -> None:
    kernel = loaded()[0]
    assert kernel is not None
    generator = torch.Generator().manual_seed(tokens)
    x, w = 3 * torch.randn(tokens, width, generator=generator), torch.randn(width, generator=generator)
    heads = torch.randn(tokens, 7, width, generator=generator).to(dtype)[:, :5]
    angles = torch.randn(tokens, 1, width // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    gates = 20 * torch.randn(tokens, 2 * width, generator=generator).to(dtype)
    gates[0, :2] = torch.tensor([-300.0, 300.0])
    x, w = x.to(dtype), w.to(dtype)
    h = heads.double()
    half = width // 2
    exact = (
        x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double(),
        h * cos.double() + torch.cat([-h[..., half:], h[..., :half]], -1) * sin.double(),
        torch.nn.functional.silu(gates[:, :width].double()) * gates[:, width:].double(),
    )
    found = kernel.norm(x, w, 1e-5), kernel.turn(heads, cos, sin), kernel.gate(gates[:, :width], gates[:, width:])
    for mine, other in zip(found, exact, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(mine.double(), other, **near)


@needs_kernel
def test_sharp_and_far_logits() -> None:
    """One column has all the weight, or the logits lie far below 0."""
    kernel = loaded()[0]
    assert kernel is not None
    query, key, value, seen = question(64, 2, 2, 50, torch.float32)
    for factor, shift in ((100.0, 0.0), (1.0, -500.0)):
        asked = (factor * query.abs(), key.contiguous(), value.contiguous(), seen)
        asked[1][..., 0] += shift
        torch.testing.assert_close(kernel.attend(*asked, 0.125).double(), slow(*asked, 0.125), atol=1e-4, rtol=1e-3)


@needs_kernel
def test_a_row_depends_on_itself_alone() -> None:
    """To the last digit: whatever stands before its first column, in other rows, and wherever it lies."""
    kernel = loaded()[0]
    assert kernel is not None
    query, key, value, seen = question(64, 3, 3, 60, torch.bfloat16)
    seen = replace(seen, first=seen.first.clamp(min=5))
    whole = kernel.attend(query, key, value, seen, 0.125)
    for row in range(len(query)):
        begin = int(seen.first[row])
        mine = [part[row : row + 1, :, begin:].contiguous() for part in (key, value)]
        zero = torch.zeros(1, dtype=torch.int32)
        alone = kernel.attend(query[row : row + 1], *mine, Seen(zero, zero, zero + 60 - begin, 60), 0.125)
        assert torch.equal(alone[0], whole[row])
    key[:, :, :5], value[:, :, :5] = torch.nan, torch.nan
    assert torch.equal(kernel.attend(query, key, value, seen, 0.125), whole)


@needs_kernel
def test_layouts_that_it_cannot_read_are_refused() -> None:
    kernel = loaded()[0]
    assert kernel is not None
    query, key, value, seen = question(64, 2, 2, 50, torch.float32)
    for wrong in (
        (query, key.contiguous(), value, seen),
        (query, key, value, replace(seen, first=seen.first.long())),
        (query[:-1], key, value, seen),
        (query.transpose(1, 2).contiguous().transpose(1, 2), key, value, seen),
    ):
        with pytest.raises(ValueError, match="layout"):
            kernel.attend(*wrong, 0.125)
    x = torch.randn(6, 8)
    for call in (
        lambda: kernel.norm(x.t(), x[0], 1e-5),
        lambda: kernel.norm(x, x[0].double(), 1e-5),
        lambda: kernel.turn(x[:, None].bfloat16(), x[:, None], x[:, None]),
        lambda: kernel.turn(x.view(6, 2, 4).transpose(1, 2), x[:, None, :2], x[:, None, :2]),
        lambda: kernel.gate(x[:, ::2], x[:, 1::2]),
        lambda: kernel.gate(x[:, :4], x[:, 4:].contiguous()),
    ):
        with pytest.raises(ValueError, match="layout"):
            call()


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and shutil.which("gcc")) or os.environ.get("HEELER_KERNELS") == "off",
    reason="there is no gcc on Linux",
)
def test_where_there_is_a_compiler_it_is_used() -> None:
    """Else a mistake in the source, which the first questions find, would only skip what is tested here."""
    kernel, why_not = loaded()
    assert kernel is not None, why_not


@needs_kernel
def test_it_is_compiled_once(anew: Path) -> None:
    assert for_head(64, torch.zeros(1)) is not None
    (library,) = anew.iterdir()
    loaded.cache_clear()
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("compiled again")):
        assert for_head(64, torch.zeros(1)) is not None
    assert list(anew.iterdir()) == [library]


def test_what_it_does_not_take() -> None:
    assert for_head(24, torch.zeros(1)) is None
    assert for_head(64, torch.zeros(1, dtype=torch.float64)) is None
    assert for_head(64, torch.zeros(1, device="meta")) is None


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def failing(command: Any, **_: Any) -> Any:
    raise subprocess.CalledProcessError(1, command, stderr="kernels.c: no such instruction\nand more")


@pytest.mark.parametrize(
    ("where", "name", "instead", "said"),
    [
        (kernels.shutil, "which", lambda name: None, "there is no C compiler"),
        (kernels.subprocess, "run", failing, "kernels.c: no such instruction"),
        (kernels, "_is_right", lambda kernel, dtype: False, "answers wrongly"),
        (kernels.sys, "platform", "darwin", "on Linux only"),
    ],
)
def test_without_it_a_run_says_so_once_and_samples_the_same(
    where: Any, name: str, instead: Any, said: str, anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model")
    requests = [Request(prompt=[3 + i] * (1 + i % 5), seed=i) for i in range(12)]
    answers = []
    for _ in range(2):
        policy = load_causal_lm(model)
        use_fast_attention(policy)
        answers.append(NativeEngine(policy, eos_ids=range(20)).generate(requests, Sampling(max_new_tokens=16)))
        monkeypatch.setattr(where, name, instead)
        loaded.cache_clear()
        for file in anew.glob("*"):
            file.unlink()
    run = build_text_run(small(model, tmp_path / "run"), prompts=["abc", "de"], reward=lengths)
    (note,) = [note for note in run.notes if "attend by torch" in note]
    assert said in note
    for mine, other in zip(*answers, strict=True):
        assert mine.tokens == other.tokens
        torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)


def test_it_can_be_left_out(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEELER_KERNELS", "off")
    assert loaded() == (None, "HEELER_KERNELS is off") and not anew.exists()
