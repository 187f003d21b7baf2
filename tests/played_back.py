"""Recordings like CUDA graphs, on the CPU: the operations of one call, repeated on the same tensors.

Like a graph, a recording knows only tensors and numbers: what Python decided while it was made is not decided again. It
refuses what a GPU cannot record: whatever makes the host wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        said = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, said))
        return said

    def play(self) -> None:
        for func, args, kwargs, said in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(said), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)  # where the first call's result lay; onto itself where it is a view


class Recorder:
    """Stands for `CudaGraphs`.

    Args:
        waits: counts what made the host wait, of the pretend GPU.

    Attributes:
        made, played: recordings, and how often one was played.
    """

    def __init__(self, waits: Counter[str]) -> None:
        self.waits, self.made, self.played = waits, 0, 0

    def __call__(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        step()  # as `CudaGraphs` does: what this call remembers must not be what the recording goes by
        before = self.waits.total()
        recording = _Recording()
        with recording:
            said = step()
        if self.waits.total() != before:
            raise RuntimeError(f"operation not permitted when stream is capturing: {dict(self.waits)}")
        self.made += 1
        for part in said:
            if part is not None:
                part.fill_(torch.nan)  # a graph has computed nothing before it is played

        def play() -> None:
            self.played += 1
            recording.play()

        return play, said
