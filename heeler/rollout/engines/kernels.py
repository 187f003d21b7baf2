"""What a decoding step does between its products, compiled: kernels.c, built by the machine's C compiler when needed.

torch's attention and its small products take 1.5 to 4 times as long for single tokens over short and middling
rows (docs/benchmarks/decoding_parts.md), and read the columns before a row's first token too. Prompts, whose tokens see
one column more each, are read by it as well, whatever their lengths, without padding. Norms, rotations and gates are
several operations of torch each, most of whose time is the calls. Compiling takes a second;
the result is kept in the cache, by source, compiler and processor. It is used on Linux where a compiler is found, the
threads are torch's own, and its answers to a first question are right; elsewhere torch is (plain.py), and a run says
so. HEELER_KERNELS=off leaves it out.
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
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from heeler.rollout.engines.plain import Plain, Tokens
from heeler.runtime.cache import cache_folder
from heeler.runtime.products import processor_line

SOURCE = Path(__file__).with_name("kernels.c")
WIDTHS = (8, 16, 32, 64, 80, 96, 128, 256)  # of a head, that are built
TYPES = (torch.float32, torch.bfloat16)


class Kernels:
    """The loaded kernels; `for_model` gives them only where they can be used. The slow twin is `Plain`."""

    def __init__(self, library: Path) -> None:
        self.library: Any = ctypes.CDLL(str(library))
        pointer, number, real, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
        ends = [number, number]  # whether bf16, threads
        places = [*[pointer] * 5, *[number] * 5]
        self.library.attend.argtypes = [*[pointer] * 5, real, *places, stride, stride, real, *ends]
        self.library.add_norm.argtypes = [*[pointer] * 4, number, number, real, *ends]
        self.library.gate.argtypes = [*[pointer] * 2, number, number, *ends]

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # code, which a copied engine shares

    def attend(
        self, spoken: Tensor, turn: tuple[Tensor, Tensor], norms: Any, keys: Tensor, values: Tensor, tokens: Tokens,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """`[N, heads * D]`: what each token attends to, once all have joined their rows.

        Args:
            spoken: `[N, (heads + 2 groups) * D]` queries, keys and values; what lies there may be lost.
            turn: `[N, D]` cosines and sines by which queries and keys are rotated.
            norms: of queries and of keys, before that; or None.
            keys, values: `[rows, groups, columns, D]`, which the tokens join.
            tokens: where each belongs.
            scale: of the logits.

        Raises:
            ValueError: the tensors lie otherwise.
        """
        groups, width = keys.shape[1], keys.shape[3]
        count, heads = len(spoken), spoken.shape[1] // width - 2 * groups
        rows, positions = tokens.rows, tokens.positions
        weights = [] if norms is None else [norm.weight for norm in norms]
        fits = (
            spoken.is_contiguous()
            and keys.stride() == values.stride()
            and keys.stride()[2:] == (width, 1)
            and rows.dtype == torch.int32
            and positions.dtype == torch.int64
            and all(x.is_contiguous() and len(x) == count for x in (rows, positions, *turn))
            and all(x.dtype == spoken.dtype for x in (keys, values, *turn, *weights))
        )
        if not fits:
            raise ValueError("what was spoken, keys, values or places have a layout that the kernel does not read")
        said = spoken.new_empty(count, heads * width)
        qk = [weight.data_ptr() for weight in weights] or [None, None]
        failed = self.library.attend(
            spoken.data_ptr(), *(x.data_ptr() for x in turn), *qk, norms[0].variance_epsilon if norms else 0.0,
            *(x.data_ptr() for x in (keys, values, said, rows, positions)), count, groups, heads // groups, width,
            tokens.longest, keys.stride(0), keys.stride(1), scale, *_ends(spoken),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the attention of {count} tokens over {tokens.longest} columns")
        return said

    def add_norm(self, x: Tensor, added: Tensor | None, norm: Any) -> Tensor:
        """`[N, H]`: the norm of `x [N, H]`, to which `added [N, H]` is added first, in place, where there is some."""
        weight = norm.weight
        parts = (x,) if added is None else (x, added)
        if not all(part.is_contiguous() and part.dtype == weight.dtype for part in parts):
            raise ValueError("states or weights of a norm have a layout that the kernel does not read")
        y = torch.empty_like(x)
        self.library.add_norm(
            x.data_ptr(), None if added is None else added.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape,
            norm.variance_epsilon, *_ends(x),
        )  # fmt: skip
        return y

    def gate(self, gates: Tensor, act: Any) -> Tensor:
        """`[N, F]`: silu(the first half of `gates [N, 2 F]`) times the second; `act` is that silu."""
        if not gates.is_contiguous():
            raise ValueError("gates have a layout that the kernel does not read")
        y = gates.new_empty(len(gates), gates.shape[1] // 2)
        self.library.gate(gates.data_ptr(), y.data_ptr(), *y.shape, *_ends(gates))
        return y


def _ends(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def for_model(model: Any) -> Kernels | None:
    """The kernels for a model that `can_decode`, or None: for another type or place, width of a head or activation."""
    weight, layers = model.lm_head.weight, model.model.layers
    fits = (
        weight.device.type == "cpu"
        and weight.dtype in TYPES
        and layers[0].self_attn.head_dim in WIDTHS
        and all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in layers)
        and all(p.dtype == weight.dtype for name, p in model.named_parameters() if "norm" in name)
    )
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
    """Whether it answers a first question as `Plain` does."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    spoken, keys, values = random(5, 10 * 64), random(5, 2, 90, 64), random(5, 2, 90, 64)
    turn, positions = (random(5, 64), random(5, 64)), torch.tensor([76, 3, 0, 40, 11])
    norms = [SimpleNamespace(weight=random(64), variance_epsilon=1e-5) for _ in range(2)]
    wide = SimpleNamespace(weight=random(640), variance_epsilon=1e-5)
    tokens = Tokens(positions, positions, torch.arange(5, dtype=torch.int32), 77)
    answers: list[list[Tensor]] = []
    for ways in (kernel, Plain()):
        x, gates, k, v = spoken.clone(), spoken.clone(), keys.clone(), values.clone()
        attended = ways.attend(spoken.clone(), turn, norms, k, v, tokens, 0.125)
        answers.append([attended, k, v, ways.add_norm(x, gates, wide), x, ways.gate(gates, torch.nn.functional.silu)])
    near = 1e-5 if dtype == torch.float32 else 3e-2
    pairs = zip(*answers, strict=True)
    return all(torch.allclose(mine.float(), other.float(), atol=near, rtol=near) for mine, other in pairs)
