"""Linear layers whose weights are laid out once for all products of a sampling run.

MKL copies a weight matrix into blocks of its own at every product. With few rows that copy takes longer than the
product. Sampling multiplies the same weights by the same number of rows at every step, so the blocks are made once,
kept while a pool of that many rows is sampled, and dropped with it: new weights cannot meet old blocks.
Measured: docs/benchmarks/decoding_parts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WORTH_STEPS = 8  # making the blocks costs about as much as three to five steps gain
MOST_ROWS = 256  # beyond, the copy hardly counts


class _Packed:
    """A layer that has blocks of its weight for inputs of `rows` rows, and is an ordinary layer for all others."""

    blocks: Tensor | None = None
    rows: int = 0
    weight: Tensor
    bias: Tensor | None

    def matrix(self) -> Tensor:
        """The weight as `[outputs, inputs]`."""
        return self.weight.detach()

    def pack(self, rows: int) -> None:
        self.blocks, self.rows = torch.ops.mkl._mkl_reorder_linear_weight(self.matrix().contiguous(), rows), rows

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix()
        if self.blocks is None or x.numel() != self.rows * matrix.shape[1]:
            return super().forward(x)  # pyright: ignore
        return torch.ops.mkl._mkl_linear(x, self.blocks, matrix, self.bias, self.rows)


class PackedLinear(_Packed, nn.Linear):  # pyright: ignore
    pass


class PackedConv1D(_Packed, Conv1D):
    """GPT-2's layer, whose weight is `[inputs, outputs]`."""

    def matrix(self) -> Tensor:
        return self.weight.detach().t()


PACKED: dict[type, type[_Packed]] = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}


def can_pack(weight: Tensor) -> bool:
    """Whether this torch has MKL's packed products, and they are for such a weight."""
    has = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
    return has and weight.device.type == "cpu" and weight.dtype == torch.float32


class Joined:
    """Linear layers that read the same input: one product where their blocks are packed, else one each.

    Args:
        layers: their outputs stand side by side, in this order.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers = layers
        self.blocks: Tensor | None = None
        self.bias: Tensor | None = None
        self.rows = 0
        self.outputs = [layer.out_features for layer in layers]
        # The packed product asks a weight for its size only.
        self.shape = layers[0].weight.new_full((1,), torch.nan).expand(sum(self.outputs), layers[0].in_features)

    def pack(self, rows: int) -> None:
        weights = [layer.weight.detach() for layer in self.layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
        self.blocks, self.rows = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows), rows
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
                  for layer in self.layers]  # fmt: skip
        self.bias = torch.cat(biases) if any(layer.bias is not None for layer in self.layers) else None

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, outputs of all]` from `[rows, inputs]`."""
        if self.blocks is not None and len(x) == self.rows:
            return torch.ops.mkl._mkl_linear(x, self.blocks, self.shape, self.bias, self.rows)
        parts = self.each(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def each(self, x: Tensor) -> list[Tensor]:
        """`[rows, outputs]` of each layer: views of the packed product, or plain products that nobody joins."""
        if self.blocks is not None and len(x) == self.rows:
            return list(self(x).split(self.outputs, dim=-1))
        return [nn.functional.linear(x, layer.weight, layer.bias) for layer in self.layers]


def packed_layers(model: nn.Module) -> list[_Packed]:
    """A model's linear layers, made packed ones in place; those that cannot be packed stay as they are."""
    layers: list[_Packed] = []
    for module in model.modules():
        layer: Any = module
        if type(layer) in PACKED and can_pack(layer.weight):
            layer.__class__ = PACKED[type(layer)]
        if isinstance(layer, _Packed):
            layers.append(layer)
    return layers


class Packing:
    """The blocks of what multiplies the rows of a step; they live inside a `with` block at most.

    Attributes:
        layers: that are packed; all can be.
        rows: for which they are packed, or 0.
    """

    def __init__(self) -> None:
        self.layers: Sequence[_Packed | Joined] = []
        self.rows = 0

    def fit(self, rows: int, steps: int) -> None:
        """Have blocks for products of `rows` rows where the `steps` to come are worth it, else none."""
        if rows == self.rows:
            return
        self.release()
        if steps >= WORTH_STEPS and 2 < rows <= MOST_ROWS and self.layers:
            for layer in self.layers:
                layer.pack(rows)
            self.rows = rows

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Drop the blocks."""
        for layer in self.layers:
            layer.blocks, layer.rows = None, 0
        self.rows = 0
