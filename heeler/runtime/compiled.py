"""C sources of Heeler, built by the machine's C compiler when they are first needed.

Compiling takes a second; the result is kept in the cache, by source, compiler and processor. Only on Linux, and
HEELER_KERNELS=off leaves it out: nothing needs it, everything that is compiled has a slow twin by torch.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heeler.runtime.cache import cache_folder
from heeler.runtime.products import processor_line

HEADER = Path(__file__).with_name("numbers.h")
TYPES = (torch.float32, torch.bfloat16)  # of the numbers in memory


def compiled(source: Path) -> tuple[Any, str]:
    """The library of a C source, or None and why there is none."""
    if os.environ.get("HEELER_KERNELS") == "off":
        return None, "HEELER_KERNELS is off"
    if not sys.platform.startswith("linux"):
        return None, "it is built on Linux only"
    compiler = next((found for name in ("gcc", "cc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, "there is no C compiler (gcc, cc or clang)"
    try:
        return ctypes.CDLL(str(_built(source, compiler))), ""
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # without a home there is no cache
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return None, f"{compiler} did not build it ({said[0] if said else type(error).__name__})"


def ends(x: Tensor) -> tuple[bool, int]:
    """The last arguments of every function: whether its numbers are bf16, and the threads."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _built(source: Path, compiler: str) -> Path:
    """The shared library, compiled where the cache has none for this source, compiler and processor."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "amd64") else []
    clang = "clang" in os.path.realpath(compiler)
    threads = [] if clang else ["-fopenmp"]  # clang's are not those that torch's wheels bring
    flags = ["-O3", "-march=native", *wide, "-ffast-math", *threads, "-fPIC"]
    known = [
        HEADER.read_text(encoding="utf-8"),
        source.read_text(encoding="utf-8"),
        compiler,
        str(os.stat(compiler).st_mtime),
        *flags,
        processor_line("flags", "Features"),
    ]
    key = hashlib.blake2b("\n".join(known).encode(), digest_size=8).hexdigest()
    library = cache_folder() / "kernels" / f"{source.stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            done, linked = f"{folder}/{source.stem}.o", f"{folder}/{source.stem}.so"
            # OpenMP is not linked: its functions are found in what torch has loaded, so the threads are torch's
            compile_it = [*flags, f"-I{HEADER.parent}", "-c", str(source), "-o", done]
            for command in (compile_it, ["-shared", done, "-lm", "-o", linked]):
                subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=60)
            os.replace(linked, library)
    return library
