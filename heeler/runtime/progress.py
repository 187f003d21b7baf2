"""Progress bars with a rate and the time left; in a log file, a line now and then."""

from __future__ import annotations

import sys
from typing import Any


def progress(total: float, label: str, unit: str, *, done: float = 0, show: bool = True) -> Any:
    """A tqdm bar on standard error. Where that is no terminal, it prints a line at most every 10 seconds."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=unit,
        disable=not show,
        mininterval=0.2 if terminal else 10.0,
        maxinterval=1.0 if terminal else 60.0,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        smoothing=0.1,
        file=sys.stderr if terminal else _Lines(),
    )


class _Lines:
    """Turns a bar's carriage returns into lines, for logs."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def say(text: str, show: bool = True) -> None:
    """Print a line without tearing a bar."""
    if not show:
        return
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()
