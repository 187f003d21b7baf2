"""Functions of tensors, made a few kernels each by torch.compile, where a user asked for it.

A GPU reads and writes its memory for each operation of torch; between a layer's products there are dozens. Compiled
together they are one to three. That costs seconds when a run starts, or at its first pass of another kind of numbers,
so it is a choice (`--fuse-layers`). On a CPU the kernels of policies/kernels.c do the same in less time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

_devices: set[str] = set()  # types of devices on which functions are fused


def fuse_on(device: torch.device, on: bool = True) -> None:
    """From here on functions are fused on devices of this type, or not."""
    (_devices.add if on else _devices.discard)(device.type)


def fuses_on(device: torch.device) -> bool:
    """Whether functions are fused on this device."""
    return device.type in _devices


def call_fused(function: Callable[..., Any], *given: Any) -> Any:
    """What `function(*given)` gives; one compiled function takes `[B, L, ...]` of any B and L, `[B, n]` of any B."""
    parts = [x.detach() if isinstance(x, Tensor) else x for x in given]  # gradients are the caller's matter
    for x in parts:
        if isinstance(x, Tensor) and x.dim() > 1:
            torch._dynamo.maybe_mark_dynamic(x, [0, 1] if x.dim() > 2 else [0])  # pyright: ignore
    return _fused(function)(*parts)


@lru_cache(maxsize=64)
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, **_LIMIT)


# kinds of numbers, single rows, single tokens: more than the 8 that torch allows a function before it gives up on it
_LIMIT: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
