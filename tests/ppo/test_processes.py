"""Real processes: `DistributedReduce` over two of them, and an update that is the one of a single process.

The two start once for the whole file; starting them costs more than all that they compute.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from heeler.ppo.moments import RunningMoments, whiten
from heeler.ppo.update import PPOConfig
from heeler.runtime.reduce import DistributedReduce, LocalReduce
from heeler.types import HeelerError

from .toy import TablePolicy, flat, make_batch, select_batch, updated

CONFIG = PPOConfig(epochs=3, value_clip=0.3, entropy_coef=0.01, max_grad_norm=0.5, target_kl=1.0)
SHARES = [[0, 1, 2], [3, 4, 5, 6, 7]]


def numbers():
    return torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 5


def work(rank, folder):
    """What each process computes; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    reduce = DistributedReduce()
    results: dict[str, Any] = {"rank": reduce.rank, "world_size": reduce.world_size}

    x = torch.tensor([1.0, 10.0]) * (rank + 1)
    results["sum"], results["max"], results["x"] = reduce.sum(x), reduce.max(-x), x

    ours, theirs, nobodys = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3))
    ours.grad = torch.full((3, 2), rank + 1.0).T  # not contiguous
    if rank == 1:
        theirs.grad = torch.full((2, 3), 7.0)
    reduce.gradients(p for p in (ours, theirs, nobodys))
    results["gradients"] = [ours.grad, theirs.grad, nobodys.grad]

    share = numbers()[:3] if rank == 0 else numbers()[3:]
    results["white"] = whiten(share, torch.ones_like(share), reduce)
    merged = RunningMoments().merge(share, reduce)
    results["running"] = (merged.count, float(merged.mean), float(merged.var))

    policy = TablePolicy()
    batch = select_batch(make_batch(policy), SHARES[rank])
    policy, results["metrics"] = updated(policy, batch, CONFIG, reduce=reduce, optimizer=torch.optim.Adam, lr=0.05)
    results["parameters"] = flat(policy)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_ranks(processes):
    assert [(p["rank"], p["world_size"]) for p in processes] == [(0, 2), (1, 2)]


def test_sum_and_max_leave_their_argument(processes):
    for rank, p in enumerate(processes):
        assert p["sum"].tolist() == [3.0, 30.0]
        assert p["max"].tolist() == [-1.0, -10.0]
        assert p["x"].tolist() == [rank + 1, 10 * (rank + 1)]


def test_gradients_are_summed_and_a_missing_one_counts_as_zeros(processes):
    for p in processes:
        ours, theirs, nobodys = p["gradients"]
        assert torch.equal(ours, torch.full((2, 3), 3.0))
        assert torch.equal(theirs, torch.full((2, 3), 7.0))
        assert nobodys is None


def test_whitening_by_two_processes_is_whitening_by_one(processes):
    expected = whiten(numbers(), torch.ones(10), LocalReduce())
    torch.testing.assert_close(torch.cat([p["white"] for p in processes]), expected, rtol=1e-12, atol=1e-12)


def test_running_moments_of_two_processes_are_those_of_one(processes):
    expected = RunningMoments().merge(numbers(), LocalReduce())
    for p in processes:
        assert p["running"] == pytest.approx((10.0, float(expected.mean), float(expected.var)), rel=1e-12)


def test_an_update_by_two_processes_is_the_update_by_one(processes):
    policy = TablePolicy()
    alone, metrics = updated(policy, make_batch(policy), CONFIG, optimizer=torch.optim.Adam, lr=0.05)
    assert float((flat(alone) - flat(policy)).abs().max()) > 0.05
    for p in processes:
        torch.testing.assert_close(p["parameters"], flat(alone), rtol=1e-9, atol=1e-10)
        assert p["metrics"] == pytest.approx(metrics, rel=1e-9)


def test_one_process_returns_its_argument():
    reduce, x = LocalReduce(), torch.ones(2)
    assert (reduce.world_size, reduce.rank) == (1, 0)
    assert reduce.sum(x) is x and reduce.max(x) is x


def test_a_missing_process_group_is_named():
    with pytest.raises(HeelerError, match="process group"):
        DistributedReduce()
