"""AdamW for the weights of language models, its moments in 32 bits or in 8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from heeler.runtime import machine
from heeler.runtime.packages import require
from heeler.types import HeelerError

AdamW = Literal["adamw", "adamw8bit"]


def make_adamw(
    kind: AdamW,
    groups: Sequence[Mapping[str, Any]],
    models: Iterable[nn.Module],
    *,
    device: str,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser of parameter groups.

    Args:
        kind: "adamw" is torch's, fused where it can be. "adamw8bit" keeps both moments in 8 bits with a scale for each
            256 of them (Dettmers et al., 2110.02861): 2 bytes a weight in place of 8. Tensors of fewer than 4,096
            weights stay in 32 bits, and so do word embeddings, whose gradients 8 bits follow badly (section 2.3 there).
        groups: as torch takes them, each with its own rate.
        models: whose embeddings are meant.
        device: where the weights are.
        betas, weight_decay: of all groups.

    Raises:
        HeelerError: bitsandbytes is missing, or does not know the device.
    """
    if kind == "adamw":
        return torch.optim.AdamW(
            [dict(group) for group in groups],
            betas=betas,
            weight_decay=weight_decay,
            fused=machine.fused_adam(device),
        )
    require("bitsandbytes", "bnb")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise HeelerError(f"--optimizer adamw8bit runs on cpu and cuda, not on {device}: use --optimizer adamw")
    from bitsandbytes.optim.adamw import AdamW8bit

    optimizer = AdamW8bit([dict(group) for group in groups], betas=betas, weight_decay=weight_decay)
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                optimizer.mng.override_config(module.weight, "optim_bits", 32)
    return optimizer
