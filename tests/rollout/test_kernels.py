"""What is compiled for a decoding step against the formulas, and what happens where nothing is."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from heeler.policies.attention import use_fast_attention
from heeler.policies.loading import load_causal_lm
from heeler.rollout.engines import kernels
from heeler.rollout.engines.kernels import WIDTHS, Kernels, for_model, loaded
from heeler.rollout.engines.native import NativeEngine
from heeler.rollout.engines.plain import Plain, Tokens
from heeler.runtime import compiled
from heeler.train.text import build_text_run
from heeler.types import Request, Sampling
from tests.rollout.test_decoder import random_model
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


@dataclass
class Asked:
    """What `attend` is asked: spoken [N, heads + 2 groups, D], the rotation, norms, keys, values, places and scale."""

    spoken: Tensor
    turn: tuple[Tensor, Tensor]
    norms: Any
    keys: Tensor
    values: Tensor
    tokens: Tokens
    scale: float

    def of(self, ways: Kernels | Plain) -> Tensor:
        spoken = self.spoken.clone().flatten(1)
        return ways.attend(spoken, self.turn, self.norms, self.keys, self.values, self.tokens, self.scale)

    def copy(self) -> Asked:
        return replace(self, keys=self.keys.clone(), values=self.values.clone())


def slow(asked: Asked) -> Tensor:
    """Token by token and head by head, in float64; keys and values are those that the tokens have joined."""
    groups = asked.keys.shape[1]
    heads = asked.spoken.shape[1] - 2 * groups
    queries = asked.spoken[:, :heads].double()
    if asked.norms is not None:
        queries = normed(queries, asked.norms[0].weight)
    queries = turned(queries, asked.turn)
    said = torch.zeros(queries.shape, dtype=torch.float64)
    for i, (b, position) in enumerate(zip(asked.tokens.rows.tolist(), asked.tokens.positions.tolist(), strict=True)):
        for h in range(heads):
            seen = b, h * groups // heads, slice(0, position + 1)
            weights = (asked.scale * asked.keys[seen].double() @ queries[i, h]).softmax(0)
            said[i, h] = weights @ asked.values[seen].double()
    return said.flatten(1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()


def turned(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.double()[:, None] for part in turn)
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin


def question(
    width: int,
    groups: int,
    shared: int,
    longest: int,
    dtype: torch.dtype,
    *,
    prompts: bool = False,
    norms: bool = False,
) -> Asked:
    """A token of each of six rows, in any columns; or all tokens of `prompts`. The rows are any of nine."""
    generator = torch.Generator().manual_seed(width + longest)
    lengths = torch.randint(1, longest + 1, (6,), generator=generator)
    lengths[0], lengths[-1] = longest, 1
    rows, positions = torch.randperm(9, generator=generator)[:6], lengths - 1
    if prompts:
        rows = torch.repeat_interleave(rows, lengths)
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    count, heads = len(rows), groups * shared

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    angles = random(count, width // 2).repeat(1, 2)
    weights = [SimpleNamespace(weight=1 + 0.1 * random(width), variance_epsilon=1e-5) for _ in range(2)]
    tokens = Tokens(positions, positions, rows.int(), longest, lengths=lengths.tolist() if prompts else None)
    return Asked(
        random(count, heads + 2 * groups, width), (angles.cos(), angles.sin()), weights if norms else None,
        random(9, groups, longest + 7, width), random(9, groups, longest + 7, width), tokens, 1 / math.sqrt(width),
    )  # fmt: skip


def kernel() -> Kernels:
    found = loaded()[0]
    assert found is not None
    return found


def near(dtype: torch.dtype, rough: float = 1e-2) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": rough, "rtol": rough}


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("groups", "shared", "longest", "prompts"),
    [(3, 3, 41, False), (1, 8, 300, False), (4, 1, 1, False), (2, 2, 1030, False), (3, 5, 23, True), (1, 2, 1, True)],
)
def test_it_is_attention(dtype: torch.dtype, width: int, groups: int, shared: int, longest: int, prompts: bool) -> None:
    asked = question(width, groups, shared, longest, dtype, prompts=prompts)
    before = asked.copy()
    found = asked.of(kernel())
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), slow(asked), **near(dtype, 2e-2))
    places = asked.tokens.rows, slice(None), asked.tokens.positions
    keys, values = asked.spoken.double().split([groups * shared, groups, groups], dim=1)[1:]
    torch.testing.assert_close(asked.keys[places].double(), turned(keys, asked.turn), **near(dtype))
    assert torch.equal(asked.values[places].double(), values)
    for mine, old in ((asked.keys, before.keys), (asked.values, before.values)):  # nothing else is touched
        old[places] = mine[places]
        assert torch.equal(mine, old)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompts", [False, True])
def test_queries_and_keys_may_have_norms(dtype: torch.dtype, prompts: bool) -> None:
    asked = question(32, 2, 3, 29, dtype, prompts=prompts, norms=True)
    found, wanted = asked.of(kernel()), slow(asked)
    torch.testing.assert_close(found.double(), wanted, **near(dtype, 3e-2))
    keys = turned(normed(asked.spoken[:, 6:8].double(), asked.norms[1].weight), asked.turn)
    torch.testing.assert_close(
        asked.keys[asked.tokens.rows, :, asked.tokens.positions].double(), keys, **near(dtype, 3e-2)
    )


@pytest.mark.parametrize("ways", ["plain", pytest.param("compiled", marks=needs_kernel)])
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_the_twin_answers_alike(ways: str, prompts: bool, norms: bool) -> None:
    """Of rows that lie behind one another, which is what it takes."""
    asked = question(16, 2, 3, 140, torch.float32, prompts=prompts, norms=norms)
    _, first = asked.tokens.rows.unique_consecutive(return_inverse=True)
    asked.tokens = replace(asked.tokens, rows=first.int())
    asked.keys.nan_to_num_()
    found = asked.of(kernel() if ways == "compiled" else Plain())
    torch.testing.assert_close(found.double(), slow(asked), atol=1e-5, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (5, 576), (70, 24)])
def test_norms_and_gates(dtype: torch.dtype, tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, added = (3 * torch.randn(2, tokens, width, generator=generator)).to(dtype)
    norm = SimpleNamespace(weight=torch.randn(width, generator=generator).to(dtype), variance_epsilon=1e-5)
    gates = (20 * torch.randn(tokens, 2 * width, generator=generator)).to(dtype)
    gates[0, :2] = torch.tensor([-300.0, 300.0])
    given, alone = x.clone(), kernel().add_norm(x, None, norm)
    assert torch.equal(x, given)
    after = kernel().add_norm(x, added, norm)
    assert torch.equal(x, given + added)
    gated = torch.nn.functional.silu(gates[:, :width].double()) * gates[:, width:].double()
    pairs = (
        (alone, normed(given.double(), norm.weight)),
        (after, normed(x.double(), norm.weight)),
        (kernel().gate(gates, None), gated),
    )
    for mine, other in pairs:
        assert mine.dtype == dtype and mine.is_contiguous()
        torch.testing.assert_close(mine.double(), other, **near(dtype))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sharp_and_far_logits(dtype: torch.dtype) -> None:
    """One column has all the weight, or the logits lie far below 0."""
    for factor, shift in ((100.0, 0.0), (1.0, -500.0)):
        asked = question(64, 2, 2, 50, dtype)
        asked.spoken[:, :4].abs_().mul_(factor)
        asked.keys[..., 0] += shift
        said = asked.of(kernel())
        if dtype == torch.float32:
            torch.testing.assert_close(said.double(), slow(asked), atol=1e-4, rtol=1e-3)
        else:  # the rotated queries are rounded, which moves such logits
            assert bool(torch.isfinite(said).all()) and float(said.abs().max()) <= float(asked.values.abs().max())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    """To the last digit: whatever stands in other rows and beyond its own columns, and wherever it lies."""
    asked = question(64, 3, 3, 60, dtype)
    for row, position in zip(asked.tokens.rows.tolist(), asked.tokens.positions.tolist(), strict=True):
        for part in (asked.keys, asked.values):
            part[row, :, position:] = torch.nan
    whole = asked.of(kernel())
    assert bool(torch.isfinite(whole).all())
    for i, row in enumerate(asked.tokens.rows.tolist()):
        at = slice(i, i + 1)
        position = asked.tokens.positions[at]
        alone = replace(
            asked, spoken=asked.spoken[at], turn=(asked.turn[0][at], asked.turn[1][at]),
            keys=asked.keys[row : row + 1].clone(), values=asked.values[row : row + 1].clone(),
            tokens=Tokens(position, position, torch.zeros(1, dtype=torch.int32), int(position) + 1),
        )  # fmt: skip
        assert torch.equal(alone.of(kernel())[0], whole[i])


@needs_kernel
def test_layouts_that_it_cannot_read_are_refused() -> None:
    asked = question(64, 2, 2, 50, torch.float32)
    for wrong in (
        replace(asked, keys=asked.keys[..., :40, :].contiguous()),
        replace(asked, values=asked.values.bfloat16()),
        replace(asked, tokens=replace(asked.tokens, rows=asked.tokens.rows.long())),
        replace(asked, tokens=replace(asked.tokens, positions=asked.tokens.positions.int())),
        replace(asked, spoken=asked.spoken[:-1]),
        replace(asked, turn=(asked.turn[0][:, ::2], asked.turn[1])),
        question(512, 1, 1, 3, torch.float32),
    ):
        with pytest.raises(ValueError, match="layout"):
            wrong.of(kernel())
    x, norm = torch.randn(6, 8), SimpleNamespace(weight=torch.ones(8), variance_epsilon=1e-5)
    for call in (
        lambda: kernel().attend(x.t(), asked.turn, None, asked.keys, asked.values, asked.tokens, 1.0),
        lambda: kernel().add_norm(x.t(), None, norm),
        lambda: kernel().add_norm(x.double(), None, norm),
        lambda: kernel().add_norm(x, x.bfloat16(), norm),
        lambda: kernel().gate(x[:, ::2], None),
        lambda: kernel().draw(x.t(), x[0], 1.0, None),
        lambda: kernel().draw(x, x[0, :5], 1.0, None),
        lambda: kernel().draw(x, x[:6, 0].double(), 1.0, None),
        lambda: kernel().draw(x, x.flatten()[:6], 1.0, x[0, :7]),
    ):
        with pytest.raises(ValueError, match="layout"):
            call()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 3, 256, 257, 1500])
@pytest.mark.parametrize("biased", [False, True])
def test_draws_are_those_of_a_plain_loop(dtype: torch.dtype, vocabulary: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(200, vocabulary, generator=generator)).to(dtype)
    u = torch.rand(200, generator=generator)
    u[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    bias = None
    if biased:  # a mask
        bias = torch.randn(vocabulary, generator=generator)
        bias[: vocabulary // 2] = -torch.inf
    tokens, logprobs = kernel().draw(logits, u, 0.8, bias)
    logp = ((logits.double() + (0.0 if bias is None else bias)) / 0.8).log_softmax(-1)
    p = logp.exp()
    own, cumulative = (x.gather(1, tokens[:, None])[:, 0] for x in (p, p.cumsum(-1)))
    assert bool((own > 0).all())
    assert bool((cumulative > u - 1e-5).all()) and bool((cumulative - own <= u + 1e-5).all())
    torch.testing.assert_close(logprobs.double(), logp.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    if vocabulary > 1:
        assert len(tokens.unique()) > 1


@needs_kernel
@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-24])
def test_what_cannot_be_drawn_is_not_drawn(u: float) -> None:
    """Whatever rounding does: only one of 1,000 tokens is possible, or two of which one is far more likely."""
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 617] = -3.0
    assert kernel().draw(logits, torch.tensor([u]), 1.0, None)[0].item() == 617
    logits[0, 618] = -40.0
    tokens, logprobs = kernel().draw(logits, torch.tensor([u]), 1.0, None)
    assert tokens.item() == 617 and abs(logprobs.item()) < 1e-6
    greedy = torch.linspace(-1, 1, 1000)[None, torch.randperm(1000)]
    assert kernel().draw(greedy, torch.tensor([u]), 1e-5, None)[0].item() == int(greedy.argmax())


@needs_kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_distribution_are_seen(value: float) -> None:
    logits = torch.randn(3, 700)
    logits[1, 650 if value > 0 or math.isnan(value) else slice(None)] = value
    tokens, logprobs = kernel().draw(logits, torch.full((3,), 0.5), 1.0, None)
    assert torch.isnan(logprobs).tolist() == [False, True, False] and bool((tokens < 700).all())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 64])
def test_a_nan_among_queries_keys_and_values_comes_out(dtype: torch.dtype, width: int) -> None:
    for part in range(3):
        asked = question(width, 2, 2, 50, dtype)
        asked.spoken[2, (0, 4, 6)[part], 3] = torch.nan
        assert asked.of(kernel()).isnan().any(1).tolist() == [False, False, True, False, False, False]


@needs_kernel
def test_they_are_found_again_in_another_process() -> None:
    assert pickle.loads(pickle.dumps(kernel())) is kernel()


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
    assert loaded()[0] is not None
    (library,) = anew.iterdir()
    loaded.cache_clear()
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("compiled again")):
        assert loaded()[0] is not None
    assert list(anew.iterdir()) == [library]


@needs_kernel
def test_what_it_does_not_take() -> None:
    model = random_model("llama")
    assert for_model(model) is kernel() and for_model(random_model("qwen3").bfloat16()) is kernel()
    assert for_model(random_model("llama").double()) is None
    assert for_model(random_model("llama").to("meta")) is None
    assert for_model(random_model("llama", hidden_act="gelu")) is None
    assert for_model(random_model("llama", head_dim=24)) is None
    model.model.norm.double()
    assert for_model(model) is None


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def failing(command: Any, **_: Any) -> Any:
    raise subprocess.CalledProcessError(1, command, stderr="kernels.c: no such instruction\nand more")


@pytest.mark.parametrize(
    ("where", "name", "instead", "said"),
    [
        (compiled.shutil, "which", lambda name: None, "there is no C compiler"),
        (compiled.subprocess, "run", failing, "kernels.c: no such instruction"),
        (kernels, "_is_right", lambda kernel, dtype: False, "answers wrongly"),
        (compiled.sys, "platform", "darwin", "on Linux only"),
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
    (note,) = [note for note in run.notes if "between matrix products" in note]
    assert said in note
    for mine, other in zip(*answers, strict=True):
        assert mine.tokens == other.tokens
        torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)


def test_it_can_be_left_out(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEELER_KERNELS", "off")
    assert loaded() == (None, "HEELER_KERNELS is off") and not anew.exists()
