"""Frozen matrices in 4 bits, for adapters (QLoRA, Dettmers et al., 2305.14314), by bitsandbytes.

A weight is one of 16 values (nf4: quantiles of a normal distribution) times a scale for each 64 of them, and the scales
are kept in 8 bits: a little over half a byte a weight. Each pass makes a layer's weights numbers again and forgets
them.

The products are Heeler's own. bitsandbytes' layer takes other kernels where no gradient is asked for: on CPUs with
AVX-512 BF16 it packs the weights for one of bfloat16, whatever the precision is, and passes with gradients fail from
then on. Old and new log-probabilities must come from the same product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heeler.runtime.packages import require_bitsandbytes
from heeler.types import HeelerError


class _Product(torch.autograd.Function):
    """`x W' + b` for a frozen W, which the backward pass makes again from its 4 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Any, dtype: torch.dtype) -> Tensor:  # pyright: ignore
        ctx.weight, ctx.dtype = weight, dtype
        return nn.functional.linear(x.to(dtype), numbers(weight).to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return gradient @ numbers(ctx.weight).to(gradient.dtype), None, None, None


def quantize_linear(model: nn.Module, linear: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Put 4-bit layers in the place of linear ones; biases stay as they are.

    Args:
        model: changed in place.
        linear: layers by their names in `model`.
        dtype: in which products are computed.

    Raises:
        HeelerError: bitsandbytes is missing, or a layer is no `nn.Linear`.
    """
    require_bitsandbytes()
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    class Layer(Linear4bit):
        """What peft adapts as a 4-bit layer, with one product for all passes."""

        def forward(self, x: Tensor) -> Tensor:
            return _Product.apply(x, self.bias, self.weight, dtype).to(x.dtype)  # pyright: ignore

    for name, layer in linear.items():
        if not isinstance(layer, nn.Linear):
            raise HeelerError(
                f"{type(model).__name__} keeps its matrices in {type(layer).__name__}, and 4 bits are for nn.Linear"
                " only: leave --trainable.quantize none"
            )
        weight = layer.weight.data
        made = Layer(layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta")
        made.bias = layer.bias
        rounded: Any = Params4bit(weight, requires_grad=False, quant_type="nf4")  # pyright: ignore[reportCallIssue]
        made.weight = rounded.to(weight.device)  # here it becomes so
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made)
    model.is_loaded_in_4bit = True  # pyright: ignore  # so peft looks for such layers


def numbers(weight: Any) -> Tensor:
    """`[out, in]` a linear layer's weight, whether it is kept in 4 bits or not."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)
