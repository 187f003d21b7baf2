"""What a decoding step does between its products, compiled: kernels.c, built by the machine's C compiler when needed.

torch's attention and its small products take 1.5 to 4 times as long for single tokens over short and middling
rows (docs/benchmarks/decoding_parts.md), and read the columns before a row's first token too. Prompts, whose tokens see
one column more each, are read by it as well, whatever their lengths, without padding. Norms, rotations and gates are
several operations of torch each, most of whose time is the calls. Compiling takes a second;
the result is kept in the cache, by source, compiler and processor. It is used on Linux where a compiler is found, the
threads are torch's own, and its answers to a first question are right; elsewhere `attend` of policies/attention.py is,
and a run says so. HEELER_KERNELS=off leaves it out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heeler.policies.attention import attend
from heeler.runtime.cache import cache_folder
from heeler.runtime.products import processor_line

SOURCE = Path(__file__).with_name("kernels.c")
WIDTHS = (8, 16, 32, 64, 80, 96, 128, 256)  # of a head, that are built
TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Seen:
    """What each of `[N]` tokens sees: a row of keys and values, from its column `first` to before `end`; all int32."""

    row: Tensor
    first: Tensor
    end: Tensor
    longest: int  # columns that any of them sees, at least


class Kernels:
    """The loaded kernels; `for_head` gives them only where they can be used."""

    def __init__(self, library: Path) -> None:
        self.library: Any = ctypes.CDLL(str(library))
        pointer, number, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        ends = [number, number]  # whether bf16, threads
        self.library.attend.argtypes = [*[pointer] * 7, *[number] * 5, *[stride] * 3, ctypes.c_float, *ends]
        self.library.norm.argtypes = [*[pointer] * 3, number, number, ctypes.c_float, *ends]
        self.library.turn.argtypes = [*[pointer] * 4, *[number] * 3, stride, *ends]
        self.library.gate.argtypes = [*[pointer] * 3, number, number, stride, *ends]

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # code, which a copied engine shares

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float) -> Tensor:
        """`[N, heads, D]`: what each token attends to.

        Args:
            query: `[N, heads, D]`, tokens in any distance.
            key, value: `[B, groups, n, D]`, of equal strides; a column's D numbers lie side by side.
            seen: the columns of each token, at least one.
            scale: of the logits.

        Raises:
            ValueError: the tensors lie otherwise.
        """
        count, heads, width = query.shape
        groups = key.shape[1]
        side_by_side = query.stride()[1:] == (width, 1) and key.stride()[2:] == (width, 1)
        places = (seen.row, seen.first, seen.end)
        whole = all(x.dtype == torch.int32 and len(x) == count and x.is_contiguous() for x in places)
        if not (side_by_side and whole) or key.stride() != value.stride():
            raise ValueError("queries, keys, values or columns have a layout that the kernel does not read")
        said = query.new_empty(count, heads, width)
        failed = self.library.attend(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), said.data_ptr(), *(x.data_ptr() for x in places),
            count, groups, heads // groups, width, seen.longest, query.stride(0), key.stride(0), key.stride(1), scale,
            *_ends(query),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the attention of {count} tokens over {seen.longest} columns")
        return said

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`[N, H]`: `x [N, H]` over its root mean square, times `weight [H]`."""
        if not x.is_contiguous() or weight.dtype != x.dtype:
            raise ValueError("states or weights of a norm have a layout that the kernel does not read")
        y = torch.empty_like(x)
        self.library.norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), len(x), x.shape[1], eps, *_ends(x))
        return y

    def turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[N, h, D]`: `heads [N, h, D]`, tokens in any distance, rotated by `cos`, `sin` `[N, 1, D]`."""
        whole = heads.stride()[1:] == (heads.shape[2], 1) and cos.is_contiguous() and sin.is_contiguous()
        if not whole or cos.dtype != heads.dtype or sin.dtype != heads.dtype:
            raise ValueError("heads or rotations have a layout that the kernel does not read")
        y = heads.new_empty(heads.shape)
        self.library.turn(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), *heads.shape, heads.stride(0), *_ends(heads)
        )
        return y

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """`[N, F]`: silu(`gate [N, F]`) * `up [N, F]`, tokens in one distance."""
        if gate.stride() != up.stride() or gate.stride(1) != 1:
            raise ValueError("gates have a layout that the kernel does not read")
        y = gate.new_empty(gate.shape)
        self.library.gate(gate.data_ptr(), up.data_ptr(), y.data_ptr(), *gate.shape, gate.stride(0), *_ends(gate))
        return y


def _ends(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def for_head(width: int, weight: Tensor) -> Kernels | None:
    """The kernel for heads of this width and products of this type and place, or None."""
    fits = weight.device.type == "cpu" and weight.dtype in TYPES and width in WIDTHS
    return loaded()[0] if fits else None


@lru_cache(maxsize=1)
def loaded() -> tuple[Kernels | None, str]:
    """The kernel, or None and why there is none."""
    if os.environ.get("HEELER_KERNELS") == "off":
        return None, "HEELER_KERNELS is off"
    if not sys.platform.startswith("linux"):
        return None, "it is built on Linux only"
    compiler = next((found for name in ("gcc", "cc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "there is no C compiler (gcc, cc or clang)"
    try:
        kernel = Kernels(_built(compiler))
        wrong = not all(_is_right(kernel, dtype) for dtype in TYPES)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return None, f"{compiler} did not build it ({said[0] if said else type(error).__name__})"
    return (None, f"what {compiler} built answers wrongly") if wrong else (kernel, "")


def _built(compiler: str) -> Path:
    """The shared library, compiled where the cache has none for this source, compiler and processor."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "amd64") else []
    flags = ["-O3", "-march=native", *wide, "-ffast-math", "-fopenmp", "-fPIC"]
    known = [
        SOURCE.read_text(encoding="utf-8"),
        compiler,
        str(os.stat(compiler).st_mtime),
        *flags,
        processor_line("flags", "Features"),
    ]
    key = hashlib.blake2b("\n".join(known).encode(), digest_size=8).hexdigest()
    library = cache_folder() / "kernels" / f"kernels-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            compiled, linked = f"{folder}/kernels.o", f"{folder}/kernels.so"
            # OpenMP is not linked: its functions are found in what torch has loaded, so the threads are torch's
            for command in ([*flags, "-c", str(SOURCE), "-o", compiled], ["-shared", compiled, "-o", linked]):
                subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=60)
            os.replace(linked, library)
    return library


def _is_right(kernel: Kernels, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    spoken = torch.randn(5, 10, 64, generator=generator).to(dtype)
    key, value = (torch.randn(5, 2, 90, 64, generator=generator).to(dtype)[:, :, :77] for _ in range(2))
    first = torch.tensor([0, 3, 76, 40, 11], dtype=torch.int32)
    seen = Seen(torch.arange(5, dtype=torch.int32), first, torch.full_like(first, 77), 77)
    mask = torch.zeros(5, 1, 1, 77).masked_fill(torch.arange(77) < first[:, None, None, None], -torch.inf)
    found = kernel.attend(spoken[:, :8], key, value, seen, 0.125)
    wanted = attend(spoken[:, :8].float(), key.float(), value.float(), mask, 0.125)
    flat, (cos, sin) = spoken.flatten(1), torch.randn(2, 5, 1, 64, generator=generator).to(dtype)
    x, gate, up = (part.float() for part in (spoken, spoken[:, 0], spoken[:, 1]))
    turned = x * cos.float() + torch.cat([-x[..., 32:], x[..., :32]], -1) * sin.float()
    normed = torch.nn.functional.rms_norm(flat.float(), (640,), flat[0].float(), 1e-5)
    pairs = (
        (found, wanted),
        (kernel.norm(flat, flat[0].contiguous(), 1e-5), normed),
        (kernel.turn(spoken, cos, sin), turned),
        (kernel.gate(spoken[:, 0], spoken[:, 1]), torch.nn.functional.silu(gate) * up),
    )
    near = 1e-5 if dtype == torch.float32 else 2e-2
    return all(torch.allclose(mine.float(), other, atol=near, rtol=near) for mine, other in pairs)
