"""The publish transaction that in-process engines share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from heeler.types import HeelerError


class WeightReceiver:
    """Holds a model of its own and takes new weights by Hugging Face names: begin, load buckets, commit."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.version = 0
        self._open = False
        self._parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))

    def begin(self) -> None:
        self._open = True

    @torch.no_grad()
    def load(self, bucket: Iterable[tuple[str, Tensor]]) -> None:
        if not self._open:
            raise HeelerError("weights were sent to the engine outside a publish: call begin first")
        for name, tensor in bucket:
            if name not in self._parameters or self._parameters[name].shape != tensor.shape:
                raise HeelerError(
                    f"the engine has no weight {name} of shape {tuple(tensor.shape)}: is it another model?"
                )
            self._parameters[name].copy_(tensor)

    def commit(self, version: int) -> None:
        self.version, self._open = version, False

    def check_ready(self) -> None:
        if self._open:
            raise HeelerError("the engine was asked to sample in the middle of a publish: commit the weights first")
