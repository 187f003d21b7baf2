"""Random draws that belong to a request, not to a batch.

Every token is chosen by one uniform number u of its request: the first token whose cumulative probability exceeds
u. Batch composition, engine and resume therefore do not change what is sampled (up to rounding at the edges).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heeler.rollout.engines.kernels import kernels_for
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
    kernels = kernels_for(logits)
    if kernels is not None and sampling.top_k == 0 and sampling.top_p == 1.0:
        return kernels.draw(logits.contiguous(), u.contiguous(), sampling.temperature, bias)
    given, logits = logits, logits.float()
    if bias is not None:
        logits = logits + bias
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    logits = cut(logits, sampling.top_k, sampling.top_p)
    top = logits.amax(-1, keepdim=True)
    own = logits is not given  # a copy, which may be changed
    weights = (logits.sub_(top) if own else logits - top).exp_()
    tokens, total = first_beyond(weights, u.to(logits.device)[:, None])
    return tokens[:, 0], (weights.gather(1, tokens).log_() - total.log_())[:, 0]


BLOCK = 256  # weights whose sums are searched first


def first_beyond(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The first `[B, 1]` whose cumulative sum exceeds u times the whole, of `weights [B, V]`; and the whole `[B, 1]`.

    The sums of blocks are searched first, then the one block: two reads of the weights and no cumulative sum of them.
    """
    rows, columns = weights.shape
    whole_blocks = columns // BLOCK
    sums = weights[:, : whole_blocks * BLOCK].view(rows, whole_blocks, BLOCK).sum(-1)
    if whole_blocks * BLOCK < columns:
        sums = torch.cat([sums, weights[:, whole_blocks * BLOCK :].sum(-1, keepdim=True)], dim=1)
    up_to = sums.cumsum(-1)
    total = up_to[:, -1:].clone()
    threshold = u * total
    block = _first(up_to, threshold)
    before = up_to.gather(1, block) - sums.gather(1, block)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)  # [B, BLOCK]
    inside = weights.gather(1, places.clamp(max=columns - 1)).masked_fill_(places >= columns, 0.0).cumsum_(-1)
    return block * BLOCK + _first(inside, (threshold - before).clamp_(min=0.0)), total


def _first(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """The first column beyond the threshold; where rounding leaves none, the last one that adds anything."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, threshold, right=True), last)
