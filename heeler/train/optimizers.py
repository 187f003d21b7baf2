"""AdamW for the weights of language models, its moments in 32 bits or in 8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from heeler.runtime import machine
from heeler.runtime.packages import require_bitsandbytes
from heeler.types import HeelerError

AdamW = Literal["adamw", "adamw8bit"]


def check_installed(kind: AdamW) -> None:
    """Raise a sentence, before anything is loaded, where the optimiser's package is missing."""
    if kind == "adamw8bit":
        require_bitsandbytes()


def make_adamw(
    kind: AdamW,
    groups: list[dict[str, Any]],
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
            weights stay in 32 bits, and so do embeddings, whose gradients 8 bits follow badly (section 2.3 there).
        groups: as torch takes them, each with its own rate.
        models: whose embeddings are meant.
        device: where the weights are.
        betas, weight_decay: of all groups.

    Raises:
        HeelerError: bitsandbytes is missing, or does not know the device.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=machine.fused_adam(device))
    check_installed(kind)
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise HeelerError(f"--optimizer adamw8bit runs on cpu and cuda, not on {device}: use --optimizer adamw")
    from bitsandbytes.optim.adamw import AdamW8bit

    embeddings = [m.weight for model in models for m in model.modules() if isinstance(m, nn.Embedding)]

    class Optimizer(AdamW8bit):
        """AdamW8bit with embeddings in 32 bits.

        Its own way of saying so is a table of the whole process, by the addresses of weights, that forgets none.
        """

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            weight = self.param_groups[gindex]["params"][pindex]
            bits = 32 if any(weight is embedding for embedding in embeddings) else 8
            return {**super().get_config(gindex, pindex, group), "optim_bits": bits}

    return Optimizer(groups, betas=betas, weight_decay=weight_decay)
