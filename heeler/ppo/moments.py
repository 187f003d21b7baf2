"""Weighted means and variances over all processes, and what is built on them.

    mean = sum(w * x) / sum(w),   var = sum(w * (x - mean)^2) / sum(w)

Both sums are global (`Reduce`), so whitening by N processes equals whitening by one. Two passes, because
E[x^2] - E[x]^2 loses all digits where the mean is large against the spread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from heeler.types import Reduce


def moments(x: Tensor, weights: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Global weighted mean and (population) variance of `x [n]`; both are 0 where the weights sum to 0."""
    x, weights = x.double(), weights.double()
    total = reduce.sum(weights.sum())
    if float(total) == 0.0:
        return total, total
    mean = reduce.sum((weights * x).sum()) / total
    var = reduce.sum((weights * (x - mean) ** 2).sum()) / total
    return mean, var


def whiten(x: Tensor, weights: Tensor, reduce: Reduce, *, keep_mean: bool = False, eps: float = 1e-8) -> Tensor:
    """`x [n]` with global variance 1, and mean 0 unless `keep_mean`."""
    mean, var = moments(x, weights, reduce)
    white = (x.double() - mean) / (var.sqrt() + eps)
    return (white + mean if keep_mean else white).to(x.dtype)


def explained_variance(values: Tensor, returns: Tensor, weights: Tensor, reduce: Reduce) -> Tensor:
    """1 - Var[returns - values] / Var[returns]: 1 is a perfect critic, 0 one no better than a constant.

    NaN where the returns do not vary.
    """
    _, var_returns = moments(returns, weights, reduce)
    _, var_errors = moments(returns - values, weights, reduce)
    if float(var_returns) == 0.0:
        return torch.full_like(var_returns, float("nan"))
    return 1 - var_errors / var_returns


def _nothing() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Mean and variance of everything seen so far, merged batch by batch; of numbers, or of vectors by dimension.

    Source: Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance, 1983, equation 2.1.

    Attributes:
        count: numbers (or vectors) seen.
        mean, var: `[]`, or `[D]` where vectors are merged; float64.
    """

    count: float = 0.0
    mean: Tensor = field(default_factory=_nothing)
    var: Tensor = field(default_factory=_nothing)

    def merge(self, x: Tensor, reduce: Reduce) -> RunningMoments:
        """The moments with the global batch `x [n]` or `[n, D]` added."""
        x = x.double()
        added = float(reduce.sum(torch.tensor(float(len(x)), dtype=torch.float64)))
        if added == 0.0:
            return self
        mean = reduce.sum(x.sum(0)) / added
        var = reduce.sum(((x - mean) ** 2).sum(0)) / added
        total = self.count + added
        delta = mean - self.mean
        squares = self.var * self.count + var * added + delta**2 * self.count * added / total
        return RunningMoments(count=total, mean=self.mean + delta * added / total, var=squares / total)
