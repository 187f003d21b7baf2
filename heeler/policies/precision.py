"""Weights that autocast would round to bf16 at every call, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether it is a product with a matrix: `nn.Linear`, or GPT-2's Conv1D, which has the matrix transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def round_linear(model: Any) -> None:
    """Keep the weights of a frozen model's linear layers in bf16, in place.

    Under autocast nothing changes but the time and half of the memory: it rounds these weights for every pass, and
    remembers none of them without gradients. Embeddings, an output layer that is tied to them, and norms stay, since
    autocast leaves them as they are.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if is_linear(module) and id(module.weight) not in looked_up:
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.data = parameter.data.to(torch.bfloat16)
