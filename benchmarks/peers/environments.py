"""Python environments of the peers, and how their scripts are run.

    python benchmarks/peers/environments.py [NAME ...]

makes the environments (all of them, where no name is given). Each peer has one of its own in the user's cache, with
pinned versions, so that neither Heeler nor another peer decides what is installed for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
TORCH, NUMPY = "torch==2.13.0", "numpy==2.4.6"
MUJOCO = ("gymnasium[mujoco]==1.4.0", "mujoco==3.17.0")  # gymnasium alone would take the newest MuJoCo

# What is asked of pip for each peer; the first name and its version also name the folder.
PACKAGES: dict[str, tuple[str, ...]] = {
    "sb3": (
        "stable-baselines3==2.9.2",
        TORCH,
        NUMPY,
        *MUJOCO,
        "gymnasium[box2d]==1.4.0",
        "box2d==2.3.10",
        "ale-py==0.12.1",
        "opencv-python-headless==5.0.0.93",
    ),
    "cleanrl": (TORCH, NUMPY, *MUJOCO),
    # gymnax 1.0.1 asks for gymnasium below 1.4, and imports six without asking for it
    "jax": (
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "gymnax==1.0.1",
        "optax==0.2.8",
        "flax==0.12.8",
        "gymnasium==1.3.0",
        "six==1.17.0",
        NUMPY,
    ),
}
SCRIPTS = {"sb3": "sb3_control.py", "cleanrl": "cleanrl_method.py", "jax": "jax_ppo.py"}


def cache_folder() -> Path:
    """Where Heeler keeps what it makes: $HEELER_CACHE, or heeler/ in the user's cache."""
    chosen = os.environ.get("HEELER_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heeler"
    return base.absolute()  # the scripts run in another folder


def peer_folder(name: str) -> Path:
    """The folder of a peer's environment, made or not."""
    package, _, version = PACKAGES[name][0].partition("==")
    return cache_folder() / "peers" / (f"{name}-{version}" if package != "torch" else f"{name}-torch-{version}")


def peer_python(name: str) -> Path:
    """The Python of a peer's environment, which is made where it is missing or was made for other versions.

    Args:
        name: a key of PACKAGES.

    Raises:
        SystemExit: pip could not install the packages.
    """
    folder, packages = peer_folder(name), PACKAGES[name]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    mark, wanted = folder / ".installed", "\n".join(packages)
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        print(f"making an environment for {name}: {', '.join(packages)} (once)", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages]
        if subprocess.run(install).returncode != 0:
            raise SystemExit(f"pip could not install the packages of {name}")
        mark.write_text(wanted, encoding="utf-8")
    return python


def run_peer(
    name: str, script: str | Path | None = None, arguments: Sequence[str] = (), threads: int = 1
) -> dict[str, Any]:
    """Run a script with a peer's Python and return what it reports.

    Args:
        name: a key of PACKAGES.
        script: a file of this folder, or a path; by default the one that belongs to the peer.
        arguments: of its command line, without `--out` and `--threads`, which are added here.
        threads: CPU threads of torch, of XLA and of the numerical libraries.

    Returns:
        The script's report, and `wall_seconds`: from the start of the process to its end, seen from outside.

    Raises:
        SystemExit: the script failed; the message is the end of its output.
    """
    python = peer_python(name)
    path = FOLDER / (script or SCRIPTS[name])
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with tempfile.TemporaryDirectory(prefix=f"peer-{name}-") as made:
        result, log = Path(made) / "result.json", Path(made) / "log.txt"
        command = [str(python), str(path), *arguments, "--threads", str(threads), "--out", str(result)]
        with log.open("w", encoding="utf-8") as output:
            start = time.perf_counter()
            status = subprocess.run(
                command, cwd=made, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
            wall_seconds = time.perf_counter() - start
        if status != 0 or not result.exists():
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            raise SystemExit(f"{tail}\n\n{path.name} ended with status {status}")
        return json.loads(result.read_text(encoding="utf-8")) | {"wall_seconds": wall_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)} (all)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in PACKAGES]
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}")
    for name in arguments.names or PACKAGES:
        print(f"{name}: {peer_python(name)}", flush=True)


if __name__ == "__main__":
    main()
