"""Random draws that belong to a request, not to a batch.

Every token is chosen by one uniform number u of its request: the first token whose cumulative probability exceeds
u. Batch composition, engine and resume therefore do not change what is sampled (up to rounding at the edges).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GREEDY = 1e-4  # temperature at which a draw is the most likely token, unless two are within a few of these in logit


def draw_seed(*key: int) -> int:
    """A 63-bit seed from integers such as (seed, update, prompt, sample)."""
    words = np.random.SeedSequence([k & 0xFFFFFFFFFFFFFFFF for k in key]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """`[len(seeds), count]` float32 in [0, 1)."""
    rows = [np.random.default_rng(seed).random(count, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count)


def sample(logits: Tensor, u: Tensor, temperature: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens `[B]` drawn from softmax((logits + bias) / temperature) by `u [B]`, and their log-probabilities `[B]`."""
    logits = logits.float()
    if bias is not None:
        logits = logits + bias
    if temperature != 1.0:
        logits = logits / temperature
    top = logits.amax(-1, keepdim=True)
    weights = torch.sub(logits, top).exp_()
    lse = top + weights.sum(-1, keepdim=True).log_()
    cumulative = weights.cumsum_(-1)
    threshold = (u.to(logits.device) * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], (logits.gather(1, tokens) - lse)[:, 0]
