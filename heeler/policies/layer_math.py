"""What a layer computes between its products, as functions of tensors: llama.py has the formulas.

Nothing here looks at devices or remembers anything, so torch.compile can make each of them a few kernels of a GPU
(runtime/fusing.py). Sums and rotations are in float32 at least. `tests/policies/test_layer_parts.py` holds them to
float64, `tests/policies/test_llama.py` whole layers to transformers and autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(h * weight, h, r)` of `h = r * x`, `r = 1 / rms(x)`."""
    h = wide(x)
    r = (torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
    h = h * r
    return h * weight, h, r


def scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """norm(x) * weight, in float32 at least."""
    return norm(x, weight, eps)[0]


def add_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`(y, norm(y) * weight in the products' type)` of `y = x + added`."""
    y = x if added is None else x + added
    return y, norm(y, weight, eps)[0].to(compute)


def norm_back(
    dn: Tensor, x: Tensor, weight: Tensor, dz: Tensor | None, eps: float, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From `dn`, the gradient of `n = norm(x) * weight`, and `dz`, what reaches x besides:
    `(dx, the same in the products' type, n, the weight's gradient)`."""
    n, h, r = norm(x, weight, eps)
    d = dn.to(h.dtype)
    of_weight = d * h
    mean = (of_weight @ weight.to(h.dtype))[..., None] / h.shape[-1]
    dx = (d * weight - h * mean) * r
    dx = dx if dz is None else dx + dz
    return dx, dx.to(compute), n.to(compute), of_weight.flatten(0, -2).sum(0)


def gate(gu: Tensor) -> Tensor:
    """silu(g) * u of `gu = [g u]`."""
    g, u = gu.chunk(2, dim=-1)
    return nn.functional.silu(g) * u


def gate_back(da: Tensor, gu: Tensor) -> tuple[Tensor, Tensor]:
    """`(gradient of gu, silu(g) * u)`."""
    g, u = gu.chunk(2, dim=-1)
    active = nn.functional.silu(g)
    dgu = torch.empty_like(gu)
    dg, du = dgu.chunk(2, dim=-1)
    dg.copy_(torch.ops.aten.silu_backward(da * u, g))
    du.copy_(da * active)
    return dgu, active * u


def turned(x: Tensor, cos: Tensor, sin: Tensor, kind: torch.dtype) -> Tensor:
    """`x [..., h, D]` rotated by the positions' `cos, sin [..., 1, D]`: x cos + [-x2 x1] sin, x1 and x2 its halves."""
    first, second = wide(x).chunk(2, dim=-1)
    return torch.addcmul(wide(x) * cos, torch.cat([-second, first], dim=-1), sin).to(kind)


def turned_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of x, in float32 at least: dy cos + [s2 -s1] with s = dy sin."""
    first, second = (wide(dy) * sin).chunk(2, dim=-1)
    return wide(dy) * cos + torch.cat([second, -first], dim=-1)
