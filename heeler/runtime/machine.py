"""What the machine is good at: threads, precision, memory allocation. Chosen at start, written into config.json."""

from __future__ import annotations

import ctypes
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from heeler.types import HeelerError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks: giving them back and faulting them in again costs a training step a third.

    Returns False where the C library has no mallopt (macOS, Windows, musl).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1) and mallopt(m_top_pad, 64 << 20))


def _seconds_per_product(dtype: Any, size: int = 512, repeats: int = 3) -> float:
    import torch

    from heeler.runtime.products import product

    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    product(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - start)
    return best


def type_of(precision: str) -> torch.dtype:
    """The type of matrix products in "bf16" or "fp32"."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def product_rate(precision: Literal["fp32", "bf16"]) -> float:
    """Operations a second of a product of 1024 x 1024 matrices on the CPU, with torch's threads."""

    size = 1024
    return 2.0 * size**3 / _seconds_per_product(type_of(precision), size, 5)


def choose_precision(wanted: Precision, device: str) -> tuple[Literal["fp32", "bf16"], str]:
    """The precision to compute in, and one sentence that says why.

    "auto" measures one matrix product on the CPU: bf16 is an advantage only where the machine has instructions
    for it (AMX), and several times slower elsewhere.
    """
    import torch

    if wanted != "auto":
        return wanted, f"{wanted}, as asked"
    if device.startswith("cuda"):
        good = torch.cuda.is_bf16_supported()
        return ("bf16", "bf16: the GPU has it") if good else ("fp32", "fp32: the GPU has no bf16")
    if not device.startswith("cpu"):
        return "fp32", f"fp32: whether bf16 is worth it on {device} is not known, try --precision bf16"
    ratio = _seconds_per_product(torch.float32) / _seconds_per_product(torch.bfloat16)
    if ratio > 1.5:
        return "bf16", f"bf16: matrix products are {ratio:.1f} times as fast as in fp32 here"
    return "fp32", f"fp32: bf16 products run at {ratio:.2f} times its speed here"


def choose_device(wanted: str) -> str:
    """The device to train on: "auto" takes a GPU where there is one."""
    import torch

    if wanted != "auto":
        try:
            torch.empty(1, device=wanted)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise HeelerError(f"there is no device {wanted!r} here ({reason}): use --device cpu, or auto") from error
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def fused_adam(device: str) -> bool | None:
    """`fused` of torch's Adam: one pass over the weights a step where it is known to work; None: torch chooses."""
    return True if device.partition(":")[0] in ("cpu", "cuda") else None


def usable_cores(root: Path = Path("/")) -> tuple[int, str]:
    """Cores that this process has for itself, and why they are fewer than the processors that the system shows ("").

    Matrix products gain nothing from a second thread on a core, and threads beyond a container's share of the time stop
    each other, so both are left out. `root` is where /proc and /sys are.
    """
    count = os.cpu_count() or 1
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(count))
    siblings = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in allowed)
    cores = len({_first_line(file) or str(file) for file in siblings})
    shares = [(cores, f"{cores} cores have {len(allowed)} hardware threads" if cores < len(allowed) else "")]
    quota = _quota(root)
    if quota is not None:
        shares.append((max(int(quota), 1), f"the control group may use {quota:g} of {len(allowed)} processors"))
    return min(shares, key=lambda share: share[0])


def _quota(root: Path) -> float | None:
    """Processors' worth of time that the control groups (version 1 or 2) of this process leave it; None: no limit."""
    groups = root / "sys/fs/cgroup"
    quotas: list[float] = []
    for line in (_read(root / "proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = groups / controllers
        for group in (base / path.lstrip("/"), *(base / path.lstrip("/")).parents):
            if not group.is_relative_to(base):
                break
            if controllers:
                limit, period = (_first_line(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            else:
                limit, _, period = _first_line(group / "cpu.max").partition(" ")
            if limit not in ("", "max", "-1") and period:
                quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _first_line(file: Path) -> str:
    return _read(file).partition("\n")[0].strip()


def set_threads(threads: int | None) -> int:
    """Set torch's threads; None takes all cores that this process may use."""
    import torch

    count = threads or usable_cores()[0]
    torch.set_num_threads(count)
    return count


def say_threads() -> str:
    """torch's threads in words, and why they are not as many as the system shows processors."""
    import torch

    count, (cores, why) = torch.get_num_threads(), usable_cores()
    return f"{count} thread{'s' if count > 1 else ''}" + (f" ({why})" if why and count == cores else "")


def peak_memory_gib() -> float:
    """The most resident memory this process has had, in GiB."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform != "darwin" else peak / 2**30


def seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The state of every global random generator."""
    import numpy as np
    import torch

    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    import numpy as np
    import torch

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
