"""Linear layers whose weights are laid out once for all products of a sampling run.

A library of matrix products copies a weight matrix into blocks of its own at every product. With few rows that copy
takes longer than the product. Sampling multiplies the same weights at every step, so the blocks are made once and
dropped when it ends: new weights cannot meet old blocks. MKL is the fastest in float32 on Intel's processors and slower
than no blocks at all on AMD's; its blocks fit one number of rows, so they are made anew when rows leave. oneDNN takes
bf16, and float32 elsewhere; its blocks fit any number of rows, those of prompts too. Measured:
docs/benchmarks/decoding_parts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from heeler.runtime.products import library_for

WORTH_STEPS = 8  # making the blocks costs about as much as three to five steps gain
MOST_ROWS = 256  # beyond, MKL's copy hardly counts


class Blocks:
    """A weight laid out for products.

    Args:
        weight: `[outputs, inputs]`, contiguous.
        bias: `[outputs]` or None.
        rows: of the inputs, where the library asks for it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.library, self.bias, self.rows = library_for(weight), bias, rows
        if self.library == "mkl":
            self.blocks = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            self.shape = weight.new_full((1,), torch.nan).expand(weight.shape)  # MKL asks it for its size only
        else:
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def take(self, x: Tensor) -> bool:
        """Whether they fit the rows of `x [..., inputs]`."""
        return self.library == "onednn" or x.numel() == self.rows * x.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., outputs]` from `[..., inputs]`."""
        if self.library == "mkl":
            return torch.ops.mkl._mkl_linear(x, self.blocks, self.shape, self.bias, self.rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")


class _Packed:
    """A layer that has blocks of its weight, and is an ordinary layer for inputs that they do not fit."""

    blocks: Blocks | None = None
    weight: Tensor
    bias: Tensor | None

    def matrix(self) -> Tensor:
        """The weight as `[outputs, inputs]`."""
        return self.weight.detach()

    def pack(self, rows: int) -> None:
        self.blocks = Blocks(self.matrix().contiguous(), self.bias, rows)

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks is None or not self.blocks.take(x):
            return super().forward(x)  # pyright: ignore
        return self.blocks(x)


class PackedLinear(_Packed, nn.Linear):  # pyright: ignore
    pass


class PackedConv1D(_Packed, Conv1D):
    """GPT-2's layer, whose weight is `[inputs, outputs]`."""

    def matrix(self) -> Tensor:
        return self.weight.detach().t()


PACKED: dict[type, type[_Packed]] = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}


def can_pack(weight: Tensor) -> bool:
    """Whether there are packed products for such a weight here."""
    return library_for(weight) is not None


class Joined:
    """Linear layers that read the same input: one product where their blocks are packed, else one each.

    Args:
        layers: their outputs stand side by side, in this order.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers = layers
        self.blocks: Blocks | None = None
        self.outputs = [layer.out_features for layer in layers]

    def matrix(self) -> Tensor:
        """The first layer's weight."""
        return self.layers[0].weight.detach()

    def pack(self, rows: int) -> None:
        weights = [layer.weight.detach() for layer in self.layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
                  for layer in self.layers]  # fmt: skip
        bias = torch.cat(biases) if any(layer.bias is not None for layer in self.layers) else None
        self.blocks = Blocks(weight, bias, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, outputs of all]` from `[rows, inputs]`."""
        if self.blocks is not None and self.blocks.take(x):
            return self.blocks(x)
        parts = self.each(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def each(self, x: Tensor) -> list[Tensor]:
        """`[rows, outputs]` of each layer: views of the packed product, or plain products that nobody joins."""
        if self.blocks is not None and self.blocks.take(x):
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
        layers: that are packed; all can be, by one library.
        rows: for which they are packed, or 0.
    """

    def __init__(self) -> None:
        self.layers: Sequence[_Packed | Joined] = []
        self.rows = 0

    @property
    def fits_any(self) -> bool:
        """Whether blocks fit any number of rows."""
        return bool(self.layers) and library_for(self.layers[0].matrix()) == "onednn"

    def fit(self, rows: int, steps: int) -> None:
        """Have blocks for products of `rows` rows where the `steps` to come are worth it, else none."""
        if rows == self.rows or (self.rows and self.fits_any):
            return
        self.release()
        if steps >= WORTH_STEPS and rows > 2 and (rows <= MOST_ROWS or self.fits_any) and self.layers:
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
            layer.blocks = None
        self.rows = 0
