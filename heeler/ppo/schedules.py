"""Numbers that change over a run: learning rates, clip ranges, entropy coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor between 0 and 1 that multiplies a base number.

    Attributes:
        shape: what happens after the warm-up.
        warmup: updates over which the factor rises linearly to 1 (the first update is at 1 / warmup).
        end: the factor that the last update approaches.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    end: float = 0.0

    def factor(self, step: int, total: int) -> float:
        """The factor for update `step` (0, 1, ... `total` - 1)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        progress = min((step - self.warmup) / max(total - self.warmup, 1), 1.0)
        fall = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1 - (1 - self.end) * fall
