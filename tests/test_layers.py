"""The import rules: one way only, siblings apart, the algorithm free of everything but torch and the types."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import heeler

ROOT = Path(heeler.__file__).parent
LAYERS = [
    ["types"],
    ["ppo", "runtime"],
    ["policies", "envs", "data"],
    ["rollout", "rewards"],
    ["train"],
    ["recipes"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(file: Path) -> set[str]:
    """Packages of heeler that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("heeler"):
            names = [node.module] if "." in node.module else [f"heeler.{a.name}" for a in node.names]
            found |= {name.split(".")[1] for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("heeler.")}
    return found - {"__version__"}


def test_imports_run_one_way() -> None:
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in imports(file) - {own}:
            assert LEVEL[other] < LEVEL[own], f"{file.relative_to(ROOT)} imports heeler.{other}"


def test_the_algorithm_imports_torch_and_types_only() -> None:
    for file in (ROOT / "ppo").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top = str(module).split(".")[0]
                assert top in {"torch", *sys.stdlib_module_names} or str(module).startswith(
                    ("heeler.ppo", "heeler.types")
                )


def test_help_answers_without_torch() -> None:
    code = "import sys, heeler.cli; heeler.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "heeler ppo imdb" in done.stdout


def test_the_algorithm_can_be_read_in_one_sitting() -> None:
    files = [ROOT / "types.py", *(ROOT / "ppo").glob("*.py"), ROOT / "train" / "ppo.py"]
    assert sum(len(f.read_text().splitlines()) for f in files) < 1500
