"""The compiled parts of a layer against the same by torch in float64."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from heeler.policies import layer_parts
from heeler.policies.attention import SHORT
from heeler.policies.kernels import loaded
from heeler.policies.layer_parts import CompiledParts, Parts, _are_right, kernels_of_layers
from tests.policies.test_llama import shared_rows

pytestmark = pytest.mark.skipif(loaded() is None, reason="nothing can be compiled here")

SINGLE, HALF = torch.float32, torch.bfloat16
KINDS = pytest.mark.parametrize(("states", "compute"), [(SINGLE, SINGLE), (SINGLE, HALF), (HALF, HALF)])
COMPUTE = pytest.mark.parametrize("compute", [SINGLE, HALF], ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def parts_of(compute: torch.dtype, length: int, width: int, mask: Tensor | None = None) -> tuple[Parts, Parts]:
    """`(compiled, by torch in float64)`, rotations by random angles."""
    angles = random(1, length, width // 2).repeat(1, 1, 2)
    turn = angles.cos(), angles.sin()
    parts = CompiledParts(compute=compute, width=width, scale=0.3, eps=1e-5, turn=turn, mask=mask)
    exact = Parts(
        compute=torch.float64, width=width, scale=0.3, eps=1e-5, mask=mask, turn=(turn[0].double(), turn[1].double())
    )
    return parts, exact


def near(found: Any, exact: Any) -> None:
    """Each to the rounding of its own type, as a share of the largest number."""
    for mine, other in zip(found, exact, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            allowed = (2e-5 if mine.dtype == SINGLE else 1e-2) * max(float(other.abs().max()), 1.0)
            torch.testing.assert_close(mine.double(), other, atol=allowed, rtol=0)


@KINDS
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 40), (2, 70, 576)])
def test_norms(states: torch.dtype, compute: torch.dtype, threads: int, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(threads)
    parts, exact = parts_of(compute, 4, 16)
    x, weight = (3 * random(*shape)).to(states), random(shape[-1], seed=1)
    added, dn = random(*shape, seed=2).to(compute), random(*shape, seed=3).to(compute)
    dz = random(*shape, seed=4)
    for extra in (None, added):
        y, n = parts.add_norm(x, extra, weight)
        assert y.dtype == states and n.dtype == compute
        near((y, n), exact.add_norm(x.double(), None if extra is None else extra.double(), weight.double()))
    found = parts.norm_back(dn, x, weight, dz)
    assert [t.dtype for t in found] == [SINGLE, compute, compute, SINGLE]
    near(found, exact.norm_back(dn.double(), x.double(), weight.double(), dz.double()))
    apart = x.transpose(0, 1)  # states that do not lie behind one another
    near(parts.add_norm(apart, None, weight), exact.add_norm(apart.double(), None, weight.double()))
    back = parts.norm_back(dn.transpose(0, 1).contiguous(), apart, weight, dz.transpose(0, 1))
    near(back[:1], (exact.norm_back(dn.double(), x.double(), weight.double(), dz.double())[0].transpose(0, 1),))


@COMPUTE
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 24), (2, 33, 200)])
def test_gates(compute: torch.dtype, shape: tuple[int, ...]) -> None:
    parts, exact = parts_of(compute, 4, 16)
    rows, length, width = shape
    gu, da = (4 * random(rows, length, 2 * width)).to(compute), random(*shape, seed=5).to(compute)
    gu[0, 0, 0] = 300.0
    gu[-1, -1, 0] = -300.0
    near((parts.gate(gu),), (exact.gate(gu.double()),))
    near(parts.gate_back(da.clone(), gu), exact.gate_back(da.double(), gu.double()))


@COMPUTE
@pytest.mark.parametrize("length", [1, 2, 6, 7, 16, 17, 34, SHORT, 301])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (3, 1, 64), (2, 2, 80), (9, 3, 32)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(compute: torch.dtype, length: int, heads: int, groups: int, width: int, masked: bool) -> None:
    rows = 3
    mask = shared_rows(rows, length)[0].clone() if masked else None
    if mask is not None and length > 2:
        mask[1, :, :, 0] = False  # the first token of a row is padding: it sees nothing, and nobody sees it
    parts, exact = parts_of(compute, length, width, mask)
    qkv = random(rows, length, (heads + 2 * groups) * width).to(compute)
    do = random(rows, length, heads * width, seed=1).to(compute)
    real = torch.ones(rows, length, 1, dtype=torch.bool)
    if mask is not None and length > 2:
        real[1, 0] = False
    do *= real
    with mock.patch.object(Parts, "attend", side_effect=AssertionError("by torch")):
        found = parts.attend(qkv, heads, groups, None, None)
        back = parts.attend_back(do, qkv, heads, groups, None, None)
    assert bool(torch.isfinite(found).all()) and all(bool(torch.isfinite(t).all()) for t in back[:2])
    assert torch.equal(back[1], found)
    in_double = replace(exact, compute=torch.float64)
    wanted = in_double.attend(qkv.double(), heads, groups, None, None)
    near((found * real,), (wanted * real,))
    near(back[:1], in_double.attend_back(do.double(), qkv.double(), heads, groups, None, None)[:1])


@COMPUTE
def test_a_row_depends_on_itself_alone(compute: torch.dtype) -> None:
    """To the last digit, in both directions."""
    parts, _ = parts_of(compute, 20, 16)
    qkv, do = random(5, 20, 8 * 16).to(compute), random(5, 20, 4 * 16).to(compute)
    whole = parts.attend_back(do, qkv, 4, 2, None, None)
    for row in range(5):
        alone = parts.attend_back(do[row : row + 1], qkv[row : row + 1], 4, 2, None, None)
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone[:2], whole[:2], strict=True) if x is not None)


@COMPUTE
def test_a_nan_comes_out(compute: torch.dtype) -> None:
    """Wherever it stands: training must stop at it."""
    parts, _ = parts_of(compute, 20, 16)
    for part in range(3):  # of queries, keys, values
        qkv, do = random(3, 20, 8 * 16).to(compute), random(3, 20, 4 * 16).to(compute)
        qkv[1, 4, 64 * (part > 0) + 32 * (part > 1)] = torch.nan
        dqkv, said, _, _ = parts.attend_back(do, qkv, 4, 2, None, None)
        for found in (said, dqkv):
            assert [bool(torch.isnan(row).any()) for row in found] == [False, True, False]
    gu, da = random(2, 3, 32).to(compute), random(2, 3, 16).to(compute)
    gu[0, 1, 3] = torch.nan
    gu[1, 2, 20] = torch.nan
    dgu, active = parts.gate_back(da.clone(), gu)
    assert torch.isnan(parts.gate(gu)).sum() == torch.isnan(active).sum() == 2 <= torch.isnan(dgu).sum()
    x = random(2, 3, 16)
    x[1, 1, 0] = torch.nan
    for found in (parts.add_norm(x, None, random(16))[1], *parts.norm_back(da, x, random(16), x)[:3]):
        assert bool(torch.isnan(found[1, 1]).all()) and torch.isnan(found).sum() == 16


@pytest.mark.parametrize("why", ["norms of queries and keys", "a long row", "a narrow head"])
def test_torch_takes_the_other_attention(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_parts, "LONGEST", SHORT)
    length, width = (SHORT + 1 if why == "a long row" else 5), (8 if why == "a narrow head" else 16)
    parts, exact = parts_of(SINGLE, length, width)
    norms = (random(width), random(width, seed=1)) if why.startswith("norms") else (None, None)
    monkeypatch.setattr(CompiledParts, "kernels", None)  # whatever asks them fails
    qkv, do = random(2, length, 8 * width), random(2, length, 4 * width)
    given = [None if norm is None else norm.double() for norm in norms]
    near((parts.attend(qkv, 4, 2, *norms),), (exact.attend(qkv.double(), 4, 2, *given),))
    near(parts.attend_back(do, qkv, 4, 2, *norms), exact.attend_back(do.double(), qkv.double(), 4, 2, *given))


def test_what_they_do_not_take() -> None:
    assert kernels_of_layers(torch.zeros(1), HALF) is kernels_of_layers(torch.zeros(1), SINGLE) is loaded()
    assert kernels_of_layers(torch.zeros(1).double(), torch.float64) is None
    assert kernels_of_layers(torch.zeros(1).double(), HALF) is None
    assert kernels_of_layers(torch.zeros(1, device="meta"), SINGLE) is None
    assert kernels_of_layers(torch.zeros(1).half(), torch.float16) is None
    with pytest.raises(ValueError, match="layout"):
        parts_of(SINGLE, 4, 16)[0].gate(torch.zeros(2, 4, 8)[..., ::2])
    with pytest.raises(ValueError, match="layout"):  # a mask that is added
        parts_of(SINGLE, 4, 16, torch.zeros(2, 1, 4, 4))[0].attend(random(2, 4, 128), 4, 2, None, None)


def test_wrong_answers_are_not_used() -> None:
    _are_right.cache_clear()
    with mock.patch.object(CompiledParts, "gate", lambda self, gu: 1.1 * Parts.gate(self, gu)):
        assert kernels_of_layers(torch.zeros(1), SINGLE) is None
    _are_right.cache_clear()
    assert kernels_of_layers(torch.zeros(1), SINGLE) is not None


@pytest.mark.parametrize("around", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.skipif(not (sys.platform.startswith("linux") and shutil.which("gcc")), reason="there is no gcc on Linux")
def test_where_there_is_a_compiler_the_first_questions_are_answered(around: Any) -> None:
    """Whatever is going on when they are asked."""
    _are_right.cache_clear()
    with around:
        assert _are_right()
