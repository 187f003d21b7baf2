"""Activation checkpointing: a layer keeps its input, and is computed again in the backward pass.

Without it a layer keeps every intermediate result until the backward pass. With it the memory of a forward pass is one
hidden state a layer and the inside of a single layer, for one more forward pass [Chen et al., 1604.06174, section 4].
transformers has a switch for it that works in training mode only; Heeler's models stay in evaluation mode, so that
dropout cannot make a policy differ from the one that was sampled from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(body: nn.Module) -> int:
    """Let every layer that transformers marks for it be computed again in the backward pass; how many there are."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(again_in_backward, layer.forward)
    return len(layers)


def is_checkpointed(module: nn.Module) -> bool:
    """Whether a layer is computed again in the backward pass."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is again_in_backward


def again_in_backward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward(...)`, of which nothing but its arguments is kept."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # no dropout: no draws
