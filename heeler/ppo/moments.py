"""Weighted means and variances over all processes, and what is built on them.

    mean = sum(w * x) / sum(w),   var = sum(w * (x - mean)^2) / sum(w)

Both sums are global (`Reduce`), so whitening by N processes equals whitening by one. Two passes, because
E[x^2] - E[x]^2 loses all digits where the mean is large against the spread.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class RunningMoments:
    """Mean and variance of everything seen so far, merged batch by batch.

    Source: Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance, 1983, equation 2.1.
    """

    count: float = 0.0
    mean: float = 0.0
    var: float = 0.0

    def merge(self, x: Tensor, reduce: Reduce) -> RunningMoments:
        """The moments with the global batch `x [n]` added."""
        mean_tensor, var_tensor = moments(x, torch.ones_like(x), reduce)
        added = float(reduce.sum(torch.tensor(float(x.numel()), dtype=torch.float64)))
        if added == 0.0:
            return self
        mean, var, total = float(mean_tensor), float(var_tensor), self.count + added
        delta = mean - self.mean
        squares = self.var * self.count + var * added + delta**2 * self.count * added / total
        return RunningMoments(count=total, mean=self.mean + delta * added / total, var=squares / total)
