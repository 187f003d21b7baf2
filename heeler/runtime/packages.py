"""Optional packages: a missing one is named together with the extra that brings it."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from heeler.types import HeelerError


def require(package: str, extra: str) -> None:
    """Raise a sentence that names the extra, where a package is missing."""
    if find_spec(package) is None:
        raise HeelerError(f"this needs the package {package}, which is not installed: pip install 'heeler[{extra}]'")


def quiet_transformers() -> None:
    """Leave transformers' progress bars and advice out of Heeler's output; errors still show."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
