"""Random draws that belong to a request, not to a batch.

Every token is chosen by one uniform number u of its request: the first token whose cumulative probability exceeds
u. Batch composition, engine and resume therefore do not change what is sampled (up to rounding at the edges).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heeler.types import Sampling

GREEDY = 1e-4  # temperature at which a draw is the most likely token, unless two are within a few of these in logit


def draw_seed(*key: int) -> int:
    """A 63-bit seed from integers such as (seed, update, prompt, sample)."""
    words = np.random.SeedSequence([k & 0xFFFFFFFFFFFFFFFF for k in key]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """`[len(seeds), count]` float32 in [0, 1)."""
    rows = [np.random.default_rng(seed).random(count, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count)


def cut(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """`logits [B, V]` with -inf for what top-k, then top-p (nucleus sampling, Holtzman et al., 1904.09751), leaves out.

    Tokens as likely as the last one that is kept are kept too.
    """
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered = logits.sort(descending=True).values
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the tokens that are more likely
        last = (before < top_p).sum(-1, keepdim=True) - 1
        logits = logits.masked_fill(logits < ordered.gather(1, last.clamp_(min=0)), -torch.inf)
    return logits


def sample(logits: Tensor, u: Tensor, sampling: Sampling, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens `[B]` drawn by `u [B]`, and their log-probabilities `[B]` under the distribution they were drawn from.

    That is softmax((logits + bias) / temperature) of `logits [B, V]`, after top-k and top-p where `sampling` has them.
    """
    logits = logits.float()
    if bias is not None:
        logits = logits + bias
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    logits = cut(logits, sampling.top_k, sampling.top_p)
    top = logits.amax(-1, keepdim=True)
    weights = torch.sub(logits, top).exp_()
    lse = top + weights.sum(-1, keepdim=True).log_()
    cumulative = weights.cumsum_(-1)
    threshold = (u.to(logits.device) * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], (logits.gather(1, tokens) - lse)[:, 0]
