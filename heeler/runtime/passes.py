"""How many tokens a forward and backward pass has: what suits the device, and fewer where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heeler.types import HeelerError, Result

CPU_BUDGET, GPU_BUDGET = 1536, 8192  # tokens of a pass


def pass_budget(given: int | None, device: torch.device) -> int:
    """Tokens of a forward and backward pass: those given, else what suits the device."""
    if given is not None:
        return given
    return CPU_BUDGET if device.type == "cpu" else GPU_BUDGET


class PassBudget:
    """Tokens of one forward and backward pass: fewer from the moment on when a pass did not fit into the memory.

    Attributes:
        tokens: padded tokens, or steps.
        flag: by which a user chooses them.
    """

    def __init__(self, tokens: int, flag: str = "--ppo.token-budget") -> None:
        self.tokens, self.flag = tokens, flag

    def fit(self, split: Callable[[int], Sequence[Tensor]], run: Callable[[Sequence[Tensor]], Result]) -> Result:
        """`run(split(tokens))`, from its beginning with half as many tokens where the device's memory is full.

        Args:
            split: items into passes of that many tokens.
            run: takes the passes; what it did before it failed may not count twice.

        Raises:
            HeelerError: a single item does not fit.
        """
        while True:
            passes = split(self.tokens)
            full = ""
            try:
                return run(passes)
            except torch.OutOfMemoryError as error:
                full = str(error).partition(". ")[0]
            # here, where the error no longer holds what the pass had computed
            if max(map(len, passes)) <= 1 or self.tokens <= 1:
                raise HeelerError(
                    f"one sequence alone does not fit into the device's memory ({full}): train fewer layers or LoRA"
                    " adapters, take shorter sequences or --activation-checkpointing"
                )
            before, self.tokens = self.tokens, self.tokens // 2
            while len(split(self.tokens)) == len(passes) and self.tokens > 1:
                self.tokens //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(
                f"a pass of {before:,} tokens did not fit into the device's memory: from now on passes have"
                f" {self.tokens:,} ({self.flag} {self.tokens} spares the search)"
            )
