"""Sums over the processes of a run: nothing to do in one process, `torch.distributed` in several.

Both classes meet `heeler.types.Reduce`. The algorithm never asks which of the two it was given.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from heeler.types import HeelerError


class LocalReduce:
    """One process: every method returns its argument, and gradients stay as they are."""

    @property
    def world_size(self) -> int:
        return 1

    @property
    def rank(self) -> int:
        return 0

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def gradients(self, parameters: Iterable[Tensor]) -> None:
        pass


class DistributedReduce:
    """The default process group of `torch.distributed`.

    Every call is a collective: all processes make the same calls in the same order, with tensors of the same
    shape and dtype. The group needs a backend for each device that tensors come from; the statistics of the
    algorithm may lie on the CPU, so with GPUs start it as `init_process_group("cpu:gloo,cuda:nccl")`.

    Raises:
        HeelerError: there is no process group yet.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            raise HeelerError(
                "there is no process group to reduce over: call torch.distributed.init_process_group first,"
                " or use LocalReduce in one process"
            )

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over processes, in a new tensor."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over processes, in a new tensor."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum each `.grad` over the processes, in place.

        A missing gradient counts as zeros where another process has one; a parameter that no process has a
        gradient for keeps None, so that an optimiser with weight decay or momentum leaves it alone, as it would
        in one process. Gradients of one dtype and device travel together, in one message.
        """
        parameters = list(parameters)
        if not parameters or self.world_size == 1:
            return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        anywhere = self.max(present).tolist()
        buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter, has_gradient in zip(parameters, anywhere, strict=True):
            if has_gradient:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                buckets.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
        for gradients in buckets.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat, dist.ReduceOp.SUM)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def _reduced(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, operation)
        return result
