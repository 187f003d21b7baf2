"""Where things are kept that are made once: converted models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$HEELER_CACHE, or heeler/ in the user's cache; it is made where it is missing."""
    chosen = os.environ.get("HEELER_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heeler"
    base.mkdir(parents=True, exist_ok=True)
    return base
