"""The parts of a layer between its products, forwards and backwards: by torch, and compiled.

llama.py has the formulas. The compiled ones are those of kernels.c; the slow twin is torch's, which takes what they do
not: GPUs, other types, norms of queries and keys, very long rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from heeler.policies.attention import SHORT, short_rows
from heeler.policies.kernels import Kernels, loaded
from heeler.runtime.compiled import TYPES

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
        y = x if added is None else x + added
        return y, self._norm(y, weight)[0]

    def norm_back(self, dn: Tensor, x: Tensor, weight: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From `dn`, the gradient of `n = norm(x) * weight`, and `dz`, what reaches x besides.

        Returns:
            `(dx, the same in the products' type, n, the weight's gradient)`.
        """
        n, h, r = self._norm(x, weight)
        d = dn.to(h.dtype)
        of_weight = d * h
        mean = (of_weight @ weight.to(h.dtype))[..., None] / h.shape[-1]
        dx = (d * weight).sub_(h * mean).mul_(r).add_(dz)
        return dx, dx.to(self.compute), n, of_weight.flatten(0, -2).sum(0)

    def gate(self, gu: Tensor) -> Tensor:
        """silu(g) * u."""
        gate, up = gu.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    def gate_back(self, da: Tensor, gu: Tensor) -> tuple[Tensor, Tensor]:
        """`(gradient of gu, silu(g) * u)`; `da` may be lost."""
        gate, up = gu.chunk(2, dim=-1)
        active = nn.functional.silu(gate)
        dgu = torch.empty_like(gu)
        dg, du = dgu.chunk(2, dim=-1)
        torch.mul(da, active, out=du)
        dg.copy_(torch.ops.aten.silu_backward(da.mul_(up), gate))
        return dgu, active.mul_(up)

    def attend(self, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None) -> Tensor:
        """`[B, L, heads * D]` from `qkv [B, L, (heads + 2 groups) * D]`."""
        spoken = qkv.unflatten(-1, (-1, self.width))
        qk, v = spoken.split([heads + groups, groups], dim=2)
        if qk.dtype != torch.float64:
            qk = qk.float()
        if nq is not None and nk is not None:
            parts = zip(qk.split([heads, groups], dim=2), (nq, nk), strict=True)
            qk = torch.cat([self._norm(x, weight)[1] * weight for x, weight in parts], dim=2)
        cos, sin = (part[:, :, None].to(qk.dtype) for part in self.turn)
        first, second = qk.chunk(2, dim=-1)
        qk = torch.addcmul(qk * cos, torch.cat([-second, first], dim=-1), sin)
        q, k = (x.transpose(1, 2) for x in qk.split([heads, groups], dim=2))
        v, length = v.transpose(1, 2), qkv.shape[1]
        causal = self.mask is None and length > 1
        if length <= SHORT and qkv.device.type == "cpu":
            attended = short_rows(q, k, v, self.mask, self.scale, causal)
        else:
            attended = nn.functional.scaled_dot_product_attention(
                q.to(v.dtype), k.to(v.dtype), v, attn_mask=self.mask, is_causal=causal, scale=self.scale,
                enable_gqa=heads != groups,
            ).transpose(1, 2)  # fmt: skip
        return attended.flatten(2)

    def attend_back(
        self, do: Tensor, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`(gradient of qkv, what `attend` gave, gradients of nq and nk)`."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (qkv, nq, nk) if t is not None]
            norms = leaves[1:] if nq is not None else (None, None)
            attended = self.attend(leaves[0], heads, groups, *norms)
        dqkv, *dnorms = torch.autograd.grad(attended, leaves, do)
        dnq, dnk = dnorms if dnorms else (None, None)
        return dqkv, attended.detach(), dnq, dnk

    def joined(self, *parts: Tensor) -> Tensor:
        """The matrices behind one another, in the products' type."""
        if len(parts) == 1:
            return parts[0].to(self.compute)
        whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=self.compute)
        for place, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        return whole

    def _norm(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(h * weight, h, r)` of the states `x`: the first in the products' type, h and r in float32 at least."""
        h = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        r = (torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / x.shape[-1] + self.eps).rsqrt()
        h = h * r
        return (h * weight).to(self.compute), h, r


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
