"""The parts of a layer between its products, forwards and backwards: by torch, compiled, and fused.

llama.py has the formulas. The compiled ones are those of kernels.c; the slow twin is torch's (layer_math.py), which
takes what they do not: other types, norms of queries and keys, very long rows, and GPUs, where torch.compile can fuse
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from heeler.policies import layer_math
from heeler.policies.attention import SHORT, short_rows
from heeler.policies.kernels import Kernels, loaded
from heeler.runtime.compiled import TYPES
from heeler.runtime.fusing import call_fused, fuses_on

LONGEST = 1536  # tokens of a row whose matrices the compiled attention holds whole; from 2,048 on torch's is as fast


@dataclass(frozen=True)
class Parts:
    """What a layer computes besides its products, by torch: any device and type.

    Attributes:
        compute: type of the products.
        width: D, of a head.
        scale: of the attention's logits.
        eps: of the norms.
        turn: cosines and sines of the positions, `[B or 1, L, D]` each.
        mask: see `run_layers`.
    """

    compute: torch.dtype
    width: int
    scale: float
    eps: float
    turn: tuple[Tensor, Tensor]
    mask: Tensor | None

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`(y, norm(y) * weight in the products' type)` of `y = x + added`."""
        return self._do(layer_math.add_norm, x, added, weight, self.eps, self.compute)

    def norm_back(self, dn: Tensor, x: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From `dn`, the gradient of `n = norm(x) * weight`, and `dz`, what reaches x besides.

        Returns:
            `(dx, the same in the products' type, n, the weight's gradient)`.
        """
        return self._do(layer_math.norm_back, dn, x, weight, dz, self.eps, self.compute)

    def gate(self, gu: Tensor) -> Tensor:
        """silu(g) * u."""
        return self._do(layer_math.gate, gu)

    def gate_back(self, da: Tensor, gu: Tensor) -> tuple[Tensor, Tensor]:
        """`(gradient of gu, silu(g) * u)`."""
        return self._do(layer_math.gate_back, da, gu)

    def attend(self, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None) -> Tensor:
        """`[B, L, heads * D]` from `qkv [B, L, (heads + 2 groups) * D]`."""
        return self._attended(*self._spoken(qkv, heads, groups, nq, nk)).flatten(2)

    def attend_back(
        self, do: Tensor, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`(gradient of qkv, what `attend` gave, gradients of nq and nk)`."""
        leaves = [t.detach().requires_grad_() for t in self._spoken(qkv, heads, groups, nq, nk)]
        with torch.enable_grad():
            attended = self._attended(*leaves)
        dq, dk, dv = torch.autograd.grad(attended, leaves, do.view(attended.shape))
        kind = qkv.dtype
        cos, sin = self._angles(qkv)
        dqk = self._do(layer_math.turned_back, torch.cat([dq, dk], dim=1).transpose(1, 2), cos, sin)
        dnq: Tensor | None = None
        dnk: Tensor | None = None
        if nq is not None and nk is not None:
            q, k = qkv.unflatten(-1, (-1, self.width)).split([heads, groups, groups], dim=2)[:2]
            dq, dk = dqk.split([heads, groups], dim=2)
            dq, _, _, dnq = self._do(layer_math.norm_back, dq, q, nq, None, self.eps, dq.dtype)
            dk, _, _, dnk = self._do(layer_math.norm_back, dk, k, nk, None, self.eps, dk.dtype)
            dqk = torch.cat([dq, dk], dim=2)
        dqkv = torch.cat([dqk.to(kind), dv.transpose(1, 2).to(kind)], dim=2).flatten(2)
        return dqkv, attended.detach().flatten(2), dnq, dnk

    def joined(self, *parts: Tensor) -> Tensor:
        """The matrices behind one another, in the products' type."""
        if len(parts) == 1:
            return parts[0].to(self.compute)
        whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=self.compute)
        for place, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        return whole

    def _spoken(
        self, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, heads or groups, L, D]`; queries and keys normalised and rotated."""
        q, k, v = qkv.unflatten(-1, (-1, self.width)).split([heads, groups, groups], dim=2)
        if nq is not None and nk is not None:
            q, k = (self._do(layer_math.scaled, x, weight, self.eps) for x, weight in ((q, nq), (k, nk)))
        cos, sin = self._angles(qkv)
        kind = cos.dtype if self._is_short(qkv) else v.dtype  # short rows are read in float32 anyway
        q, k = (self._do(layer_math.turned, x, cos, sin, kind) for x in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, L, heads, D]`."""
        causal = self.mask is None and q.shape[2] > 1
        if self._is_short(q.transpose(1, 2)):
            return short_rows(q, k, v, self.mask, self.scale, causal)
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)

    def _angles(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B or 1, L, 1, D]`, in float32 at least."""
        kind = qkv.dtype if qkv.dtype == torch.float64 else torch.float32
        cos, sin = (part[:, :, None].to(kind) for part in self.turn)
        return cos, sin

    def _do(self, function: Callable[..., Any], *given: Any) -> Any:
        """A function of layer_math.py, as it is."""
        return function(*given)

    @staticmethod
    def _is_short(x: Tensor) -> bool:
        """Whether rows `[B, L, ...]` are read by two plain products."""
        return x.shape[1] <= SHORT and x.device.type == "cpu"


@dataclass(frozen=True)
class FusedParts(Parts):
    """The same by torch.compile; where `fuses_on` holds."""

    def _do(self, function: Callable[..., Any], *given: Any) -> Any:
        return call_fused(function, *given)


def parts_for(x: Tensor, **settings: Any) -> Parts:
    """The parts of layers of states `x`: compiled on a CPU where that is possible, fused where somebody chose it."""
    if kernels_of_layers(x, settings["compute"]) is not None:
        return CompiledParts(**settings)
    return (FusedParts if fuses_on(x.device) else Parts)(**settings)


def kernels_of_layers(x: Tensor, compute: torch.dtype) -> Kernels | None:
    """The kernels for layers of states `x` and products of this type, or None."""
    fits = x.device.type == "cpu" and x.dtype in TYPES and compute in (x.dtype, torch.bfloat16)
    return loaded() if fits and _are_right() else None


@lru_cache(maxsize=1)
@torch.inference_mode(False)
@torch.autocast("cpu", enabled=False)
def _are_right() -> bool:
    """Whether the compiled parts answer first questions as torch does."""
    if loaded() is None:
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    angles, x, weight, qkv, do = random(1, 7, 8), random(2, 7, 32), random(32), random(2, 7, 128), random(2, 7, 64)
    turn = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
    seen = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    seen[0, :, 4:, 2:4] = False
    nan = random(1, 7, 128)
    nan[0, 3, 0] = torch.nan
    kinds = [(dtype, mask) for dtype in TYPES for mask in (None, seen)]
    for compute, mask in kinds:
        rounding = 1e-4 if compute == torch.float32 else 5e-2
        answers: list[list[Tensor]] = []
        for kind in (Parts, CompiledParts):
            parts = kind(compute=compute, width=16, scale=0.25, eps=1e-5, turn=turn, mask=mask)
            added, spoken, d = x.to(compute), qkv.to(compute), do.to(compute)
            dqkv, said, _, _ = parts.attend_back(d, spoken, 4, 2, None, None)
            answers.append([
                *parts.add_norm(x, added, weight), *parts.norm_back(added, x, weight, x), parts.gate(spoken),
                *parts.gate_back(d.clone(), spoken), parts.attend(spoken, 4, 2, None, None), dqkv, said,
            ])  # fmt: skip
        pairs = zip(*answers, strict=True)
        if not all(torch.allclose(a.float(), b.float(), atol=rounding, rtol=rounding) for a, b in pairs):
            return False
    alone = CompiledParts(compute=torch.float32, width=16, scale=0.25, eps=1e-5, turn=turn, mask=None)
    lost = alone.attend(nan, 4, 2, None, None)[0].isnan().any(1)
    return lost.tolist() == [False, False, False, True, False, False, False]


@dataclass(frozen=True)
class CompiledParts(Parts):
    """The same, compiled; only where `kernels_of_layers` gives kernels."""

    @cached_property
    def kernels(self) -> Kernels:
        found = loaded()
        assert found is not None
        return found

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.add_norm(x, added, weight, self.eps, self.compute)

    def norm_back(self, dn: Tensor, x: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.kernels.norm_back(dn, x, weight, dz, self.eps)

    def gate(self, gu: Tensor) -> Tensor:
        return self.kernels.gate(gu)

    def gate_back(self, da: Tensor, gu: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.gate_back(da, gu)

    def attend(self, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None) -> Tensor:
        if not self._short(qkv, nq):
            return super().attend(qkv, heads, groups, nq, nk)
        cos, sin, seen = self._places(qkv)
        return self.kernels.rows(qkv, cos, sin, seen, heads, groups, self.scale)

    def attend_back(
        self, do: Tensor, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if not self._short(qkv, nq):
            return super().attend_back(do, qkv, heads, groups, nq, nk)
        cos, sin, seen = self._places(qkv)
        return *self.kernels.rows_back(do, qkv, cos, sin, seen, heads, groups, self.scale), None, None

    def _short(self, qkv: Tensor, nq: Tensor | None) -> bool:
        return nq is None and qkv.shape[1] <= LONGEST and self.width % 16 == 0

    def _places(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines `[B, L, D]`, and `[B, L, L]` who sees whom: made once for all layers."""
        rows, length, _ = qkv.shape
        if rows not in self._made:
            cos, sin = (part.float().expand(rows, length, self.width).contiguous() for part in self.turn)
            seen = None if self.mask is None else self.mask.expand(rows, 1, length, length)[:, 0].contiguous()
            self._made[rows] = cos, sin, seen
        return self._made[rows]

    @cached_property
    def _made(self) -> dict[int, tuple[Tensor, Tensor, Tensor | None]]:
        return {}
