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

    def softmax(
        self, logits: Tensor, tokens: Tensor, temperature: float, e: Tensor | None, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(log p [n], H [n], sums [n])` of `logits [n, V]` over the temperature, z, and of the `tokens [n]`.

        `e [n, V]` gets exp(z - max z), whose sums they are, and 0 for each token; it may be the logits. `slope [n, V]`
        gets the sums times dH / dz. Both may be None.

        Raises:
            ValueError: the tensors lie otherwise.
        """
        parts = [x for x in (logits, e, slope) if x is not None]
        fits = all(x.is_contiguous() and x.dtype == logits.dtype and x.shape == logits.shape for x in parts)
        if not (fits and tokens.dtype == torch.int64 and len(tokens) == len(logits)):
            raise ValueError("logits or tokens have a layout that the kernel does not read")
        tokens = tokens.contiguous()
        found = torch.empty(3, len(logits), dtype=torch.float32)
        self.library.softmax(
            logits.data_ptr(), *(None if x is None else x.data_ptr() for x in (e, slope)), tokens.data_ptr(),
            *(x.data_ptr() for x in found), *logits.shape, temperature, *ends(logits),
        )  # fmt: skip
        return found[0], found[1], found[2]


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
    return (
        torch.allclose(logprobs, wanted.gather(1, tokens[:, None])[:, 0], atol=1e-4, rtol=1e-5)
        and torch.allclose(entropy, h := -(wanted.exp() * wanted).sum(-1), atol=1e-4, rtol=1e-5)
        and torch.allclose(e.float() / sums[:, None], p, atol=near, rtol=near)
        and torch.allclose(slope.float() / sums[:, None], -wanted.exp() * (wanted + h[:, None]), atol=near, rtol=near)
    )
