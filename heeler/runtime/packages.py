"""Optional packages: a missing one is named together with the extra that brings it."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def require_bitsandbytes() -> None:
    """Raise a sentence where bitsandbytes is missing; it may not warn of kernels that nothing here needs."""
    require("bitsandbytes", "bnb")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def find_modules_here() -> None:
    """Let modules of the current directory be imported."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def load_function(spec: str, what: str = "function", example: str = "my_rewards:score") -> Callable[..., Any]:
    """The function or class that `module:name` names; modules of the current directory are found too."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise HeelerError(f"{spec!r} does not name a {what}: write it as module:{what}, for instance {example}")
    find_modules_here()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise HeelerError(
                f"there is no module {module_name!r} in {Path.cwd()} or among the installed packages"
            ) from error
        raise HeelerError(f"the module {module_name!r} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise HeelerError(f"the module {module_name!r} cannot be imported: {where_raised(error)}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise HeelerError(f"the module {module_name!r} has no {what} {name!r}")
    return function


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """ " (did you mean A or B?)", or nothing where no choice is close; case does not matter."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = [by_lower[name] for name in get_close_matches(word.lower(), list(by_lower), n=3, cutoff=0.55)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def where_raised(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
