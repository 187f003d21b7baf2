"""Weighted moments against plain loops, and over processes."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from heeler.ppo.moments import RunningMoments, explained_variance, moments, whiten
from heeler.runtime.reduce import LocalReduce

from .toy import in_processes

DOUBLE = torch.float64
HERE = LocalReduce()
reals = st.floats(-100, 100, width=32)
weights = st.floats(0, 3, width=16)
weighted = st.lists(st.tuples(reals, weights), min_size=1, max_size=20)


def moments_loop(xs, ws):
    total = sum(ws)
    if total == 0:
        return 0.0, 0.0
    mean = sum(w * x for x, w in zip(xs, ws, strict=True)) / total
    return mean, sum(w * (x - mean) ** 2 for x, w in zip(xs, ws, strict=True)) / total


def unzip(rows):
    return [row[0] for row in rows], [row[1] for row in rows]


def double(x):
    return torch.tensor(x, dtype=DOUBLE)


@given(weighted)
def test_moments_equal_their_plain_loop(rows):
    xs, ws = unzip(rows)
    mean, var = moments(double(xs), double(ws), HERE)
    assert (float(mean), float(var)) == pytest.approx(moments_loop(xs, ws), rel=1e-9, abs=1e-9)


@given(weighted, st.booleans())
def test_whiten_equals_its_plain_loop(rows, keep_mean):
    xs, ws = unzip(rows)
    mean, var = moments_loop(xs, ws)
    assume(var > 1e-6)
    expected = [(x - mean) / math.sqrt(var) + (mean if keep_mean else 0) for x in xs]
    white = whiten(double(xs), double(ws), HERE, keep_mean=keep_mean)
    torch.testing.assert_close(white, double(expected), rtol=1e-4, atol=1e-6)


@given(weighted, st.integers(0, 20))
def test_two_processes_have_the_moments_of_one(rows, cut):
    xs, ws = map(double, unzip(rows))
    parts = [(xs[:cut], ws[:cut]), (xs[cut:], ws[cut:])]  # one of them may be empty
    mean, var = moments(xs, ws, HERE)
    for rank_mean, rank_var in in_processes(2, lambda reduce: moments(*parts[reduce.rank], reduce)):
        torch.testing.assert_close(rank_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rank_var, var, rtol=1e-9, atol=1e-9)


def test_two_processes_whiten_as_one():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(10, generator=generator, dtype=DOUBLE) + 5, torch.rand(10, generator=generator, dtype=DOUBLE)
    parts = [(x[:3], w[:3]), (x[3:], w[3:])]
    white = torch.cat(in_processes(2, lambda reduce: whiten(*parts[reduce.rank], reduce)))
    torch.testing.assert_close(white, whiten(x, w, HERE), rtol=1e-12, atol=1e-12)
    alone = torch.cat([whiten(*part, HERE) for part in parts])
    assert float((white - alone).abs().max()) > 0.01  # so the parts alone would not do


def test_weight_0_drops_an_entry():
    mean, var = moments(double([1.0, 3.0, 1e6]), double([1.0, 1.0, 0.0]), HERE)
    assert (float(mean), float(var)) == (2.0, 1.0)


def test_no_weight_at_all_gives_zeros():
    mean, var = moments(double([1.0, 2.0]), double([0.0, 0.0]), HERE)
    assert (float(mean), float(var)) == (0.0, 0.0)
    assert moments(double([]), double([]), HERE)[0] == 0.0


def test_a_large_mean_does_not_swallow_the_variance():
    """E[x^2] - E[x]^2 would have no digit left here."""
    _, var = moments(double([1e9, 1e9 + 1, 1e9 + 2]), torch.ones(3), HERE)
    assert float(var) == pytest.approx(2 / 3, rel=1e-6)


def test_float32_is_summed_in_float64():
    """In float32 each 1 would vanish beside 2^24."""
    mean, var = moments(torch.tensor([2.0**24, 1, 1, 1, 1]), torch.ones(5), HERE)
    assert mean.dtype == var.dtype == DOUBLE
    assert float(mean) == (2**24 + 4) / 5


def test_whiten_keeps_the_dtype_and_survives_constants():
    white = whiten(torch.full((4,), 0.1), torch.ones(4), HERE)
    assert white.dtype == torch.float32
    assert white.abs().max() < 1e-5


def test_explained_variance():
    returns, ones = double([1.0, 2.0, 3.0, 6.0]), torch.ones(4)
    assert float(explained_variance(returns, returns, ones, HERE)) == 1.0
    assert float(explained_variance(torch.full((4,), 5.0), returns, ones, HERE)) == pytest.approx(0.0)
    assert float(explained_variance(-returns, returns, ones, HERE)) == pytest.approx(1 - 4)
    assert float(explained_variance(returns / 2, returns, ones, HERE)) == pytest.approx(0.75)
    assert math.isnan(float(explained_variance(returns, torch.ones(4), ones, HERE)))


@given(st.lists(st.lists(reals, max_size=8), max_size=6))
def test_running_moments_equal_those_of_everything_seen(batches):
    running = RunningMoments()
    for batch in batches:
        running = running.merge(double(batch), HERE)
    seen = [x for batch in batches for x in batch]
    assert running.count == len(seen)
    expected = moments_loop(seen, [1.0] * len(seen))
    assert (float(running.mean), float(running.var)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_running_moments_of_vectors_are_those_of_each_dimension():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE) * double([1.0, 10.0, 0.1])
    together = RunningMoments().merge(x[:5], HERE).merge(x[5:], HERE)
    for d in range(3):
        alone = RunningMoments().merge(x[:, d], HERE)
        assert float(together.mean[d]) == pytest.approx(float(alone.mean), rel=1e-12)
        assert float(together.var[d]) == pytest.approx(float(alone.var), rel=1e-12)


def test_running_moments_over_two_processes():
    x = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    start = RunningMoments(count=4.0, mean=double(10.0), var=double(2.0))
    expected = start.merge(x, HERE)
    parts = [x[:2], x[2:]]
    for merged in in_processes(2, lambda reduce: start.merge(parts[reduce.rank], reduce)):
        assert merged.count == 13.0
        assert float(merged.mean) == pytest.approx(float(expected.mean), rel=1e-12)
        assert float(merged.var) == pytest.approx(float(expected.var), rel=1e-12)
