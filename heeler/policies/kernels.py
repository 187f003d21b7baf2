"""What training does between its matrix products, compiled: kernels.c, through runtime/compiled.py.

A softmax over a vocabulary is many operations of torch, each of which goes through all logits. Compiled it is two
reads of a row: a sixth of the time. Used on a CPU where it can be built and its answers to a first question are right.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heeler.runtime.compiled import TYPES, compiled, ends

SOURCE = Path(__file__).with_name("kernels.c")


class Kernels:
    """The loaded kernels; `kernels_for` gives them only where they can be used."""

    def __init__(self, library: Any) -> None:
        self.library = library
        pointer, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
        last = [number, number]  # whether bf16, threads
        self.library.softmax.argtypes = [*[pointer] * 7, number, number, real, *last]
        self.library.add_norm.argtypes = [*[pointer] * 5, number, number, real, number, *last]
        self.library.norm_back.argtypes = [*[pointer] * 8, number, number, real, number, *last]
        self.library.gate.argtypes = [*[pointer] * 2, number, number, *last]
        self.library.gate_back.argtypes = [*[pointer] * 4, number, number, *last]
        self.library.rows.argtypes = [*[pointer] * 7, *[number] * 5, real, *last]

    def softmax(
        self, logits: Tensor, tokens: Tensor, temperature: float, e: Tensor | None, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(log p [n], H [n], sums [n])` of `logits [n, V]` over the temperature, z, and of the `tokens [n]`.

        `e [n, V]` gets exp(z - max z), whose sums they are, and 0 for each token; it may be the logits. `slope [n, V]`
        gets the sums times dH / dz. Both may be None.

        Raises:
            ValueError: the tensors lie otherwise.
            IndexError: a token is outside the vocabulary.
        """
        parts = [x for x in (logits, e, slope) if x is not None]
        fits = all(x.is_contiguous() and x.dtype == logits.dtype and x.shape == logits.shape for x in parts)
        on_cpu = all(x.device.type == "cpu" for x in (*parts, tokens))
        if not (fits and on_cpu and tokens.dtype == torch.int64 and len(tokens) == len(logits)):
            raise ValueError("logits or tokens have a layout that the kernel does not read")
        tokens = tokens.contiguous()
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < logits.shape[1]:
            raise IndexError(f"a token is outside the vocabulary of {logits.shape[1]} tokens")
        found = torch.empty(3, len(logits), dtype=torch.float32, device="cpu")
        self.library.softmax(*_at(logits, e, slope, tokens, *found), *logits.shape, temperature, *ends(logits))
        return found[0], found[1], found[2]

    def add_norm(
        self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, compute: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`Parts.add_norm` of layer_parts.py."""
        x, w = x.contiguous(), weight.detach().float()
        y, n = x if added is None else torch.empty_like(x), torch.empty_like(x, dtype=compute)
        _check(n, *(() if added is None else (added,)))
        self.library.add_norm(
            *_at(x, added, w, y, n), x.numel() // x.shape[-1], x.shape[-1], eps, x.dtype == torch.bfloat16, *ends(n)
        )
        return y, n

    def norm_back(
        self, dn: Tensor, x: Tensor, weight: Tensor, dz: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`Parts.norm_back`."""
        x, width, w, dz = x.contiguous(), x.shape[-1], weight.detach().float(), dz.float().contiguous()
        dx, rounded, n = torch.empty_like(dz), torch.empty_like(dn), torch.empty_like(dn)
        _check(dn)
        rounding, threads = ends(dn)
        dw = torch.zeros(threads, width, dtype=torch.float32, device="cpu")
        self.library.norm_back(
            *_at(dn, x, w, dz, dx, rounded, n, dw), x.numel() // width, width, eps, x.dtype == torch.bfloat16, rounding,
            threads,
        )  # fmt: skip
        return dx, rounded, n, dw.sum(0)

    def gate(self, gu: Tensor) -> Tensor:
        """`Parts.gate`."""
        _check(gu)
        active = gu.new_empty(*gu.shape[:-1], gu.shape[-1] // 2)
        self.library.gate(*_at(gu, active), active.numel() // active.shape[-1], active.shape[-1], *ends(gu))
        return active

    def gate_back(self, da: Tensor, gu: Tensor) -> tuple[Tensor, Tensor]:
        """`Parts.gate_back`."""
        _check(gu, da)
        dgu, active = torch.empty_like(gu), torch.empty_like(da)
        self.library.gate_back(*_at(da, gu, dgu, active), da.numel() // da.shape[-1], da.shape[-1], *ends(gu))
        return dgu, active

    def rows(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, heads: int, groups: int, scale: float
    ) -> Tensor:
        """`Parts.attend`: `[B, L, heads * D]`.

        Args:
            qkv: `[B, L, (heads + 2 groups) * D]`.
            cos, sin: `[B, L, D]` float32, by which queries and keys are rotated.
            seen: `[B, L, L]` bool, True where a token (first L) sees another; None where it sees all before it.
            heads, groups: of queries, and of keys and values.
            scale: of the attention's logits.
        """
        said = qkv.new_empty(*qkv.shape[:2], heads * cos.shape[-1])
        self._rows(qkv, cos, sin, seen, said, None, None, heads, groups, scale)
        return said

    def rows_back(
        self, do: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, heads: int, groups: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`(gradient of qkv, what `rows` gives)` from `do`, the gradient of that."""
        said, dqkv = torch.empty_like(do), torch.empty_like(qkv)
        self._rows(qkv, cos, sin, seen, said, do, dqkv, heads, groups, scale)
        return dqkv, said

    def _rows(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, said: Tensor, do: Tensor | None,
        dqkv: Tensor | None, heads: int, groups: int, scale: float,
    ) -> None:  # fmt: skip
        _check(qkv, *(() if do is None else (do,)))
        _check(cos, sin)
        if cos.dtype != torch.float32 or (seen is not None and (seen.dtype != torch.bool or not seen.is_contiguous())):
            raise ValueError("rotations or a mask have a layout that the kernel does not read")
        count, length, width = cos.shape
        if self.library.rows(
            *_at(qkv, cos, sin, seen, said, do, dqkv), count, length, groups, heads // groups, width, scale, *ends(qkv)
        ):
            raise MemoryError(f"no memory for the attention of rows of {length} tokens")


def _at(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _check(*tensors: Tensor) -> None:
    if not all(x.is_contiguous() and x.dtype == tensors[0].dtype for x in tensors):
        raise ValueError("states of a layer have a layout that the kernel does not read")


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for numbers of this type and place, or None."""
    return loaded() if x.device.type == "cpu" and x.dtype in TYPES else None


@lru_cache(maxsize=1)
def loaded() -> Kernels | None:
    """The kernels, or None."""
    library, _ = compiled(SOURCE)
    kernels = None if library is None else Kernels(library)
    return kernels if kernels is not None and all(_is_right(kernels, dtype) for dtype in TYPES) else None


def _is_right(kernels: Kernels, dtype: torch.dtype) -> bool:
    logits = 3 * torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    logits, tokens = logits.to(dtype), torch.tensor([0, 299, 7, 256, 31])
    e, slope = torch.empty(2, *logits.shape, dtype=dtype)
    logprobs, entropy, sums = kernels.softmax(logits, tokens, 0.7, e, slope)
    wanted = (logits.float() / 0.7).log_softmax(-1)
    p = wanted.exp().scatter(1, tokens[:, None], 0.0)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    broken = logits.clone()
    broken[1, 4], broken[2, ::2], broken[3, 8] = torch.nan, -torch.inf, torch.inf
    told = kernels.softmax(broken, tokens, 0.7, broken)[0]
    return (
        torch.isnan(told).tolist() == [False, True, False, True, False]
        and torch.allclose(logprobs, wanted.gather(1, tokens[:, None])[:, 0], atol=1e-4, rtol=1e-5)
        and torch.allclose(entropy, h := -(wanted.exp() * wanted).sum(-1), atol=1e-4, rtol=1e-5)
        and torch.allclose(e.float() / sums[:, None], p, atol=near, rtol=near)
        and torch.allclose(slope.float() / sums[:, None], -wanted.exp() * (wanted + h[:, None]), atol=near, rtol=near)
    )
