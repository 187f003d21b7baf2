"""Matrix products by the library that is fast on this processor.

torch multiplies float32 matrices with MKL, whose fastest code runs on Intel's processors only. On AMD's, oneDNN, which
torch brings as well, takes half the time or less (docs/benchmarks/training_step.md). Both round alike.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Library = Literal["mkl", "onednn"]


def processor_line(*names: str) -> str:
    """The first line of the system's description of the processor that begins with one of these names."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    return next((line for line in lines if line.startswith(names)), platform.processor())


@lru_cache(maxsize=1)
def _maker() -> str:
    """What the system says of the processor's maker: it holds "GenuineIntel", "AuthenticAMD", ..."""
    return processor_line("vendor_id")


def library_for(weight: Tensor) -> Library | None:
    """Whose products with such a weight are the fastest; None where this torch and this machine have none for it."""
    if weight.device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    if weight.dtype == torch.float32 and "GenuineIntel" in _maker():
        return "mkl" if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear") else None
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if weight.dtype == torch.bfloat16:
        return "onednn" if known and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return "onednn" if known and weight.dtype == torch.float32 else None


@lru_cache(maxsize=1)
def _onednn_for_float32() -> bool:
    return library_for(torch.zeros(1)) == "onednn"


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x [..., i]` times `weight [o, i]` transposed: `[..., o]`.

    Both may be views. Where a gradient is recorded the product is torch's own: oneDNN's operator records none.
    """
    single = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if single and not graph and x.numel() > 0 and _onednn_for_float32():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.matmul(x, weight.t())
