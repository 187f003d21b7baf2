"""What the pages promise: links to code that is there, and an example that runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.tiny import save_tiny_model

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\[\]]+)\]\((\.\./[^()#]+)\)")  # of docs/algorithm.md, to a file of this repository
COMPUTED = {
    r"\delta_t =": ["gae"],
    r"A_t = \sum": ["gae"],
    r"\rho_t =": ["ratio"],
    r"L^{\mathrm{clip}} =": ["clipped_surrogate"],
    r"L^V =": ["value_loss"],
    r"L = ": ["loss_gradients"],
    r"\beta \leftarrow": ["next_kl_coef"],
    r"\frac{\pi_\theta}{\pi_{\mathrm{behavior}}} =": ["ratio", "estimate_advantages"],
}  # how each displayed formula that is computed begins, and where


def links(text: str) -> list[tuple[list[str], Path]]:
    """The names in backticks of each link, and its file."""
    return [(re.findall("`([^`]+)`", label), ROOT / "docs" / target) for label, target in LINK.findall(text)]


def defined(file: Path) -> set[str]:
    """Functions and classes of a module, methods too."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def test_the_functions_that_the_derivation_names_are_where_it_says() -> None:
    found = links((ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8"))
    assert len(found) > 30
    for names, file in found:
        assert file.exists(), file
        for name in names:
            if name.isidentifier():  # else a path
                assert name in defined(file), (name, file)


def test_every_formula_that_is_computed_is_followed_by_its_function() -> None:
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    displayed = re.findall(r"^\$\$(.+)\$\$\n\n(.*)$", page, re.MULTILINE)
    code = {formula: line for formula, line in displayed if line.startswith("Code: ")}
    assert len(code) == len(COMPUTED)
    for begins, names in COMPUTED.items():
        (line,) = (line for formula, line in code.items() if formula.startswith(begins))
        assert [name for of, _ in links(line) for name in of] == names


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_example_from_python_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "PATH_OR_HUB_ID" in block)
    lines = example.splitlines()
    assert len(lines) <= 10 and lines[0].startswith("from heeler import") and lines[-1].startswith("print(")
    model = save_tiny_model(tmp_path / "model", layers=5)  # more than the layers that are trained unless one says
    monkeypatch.chdir(tmp_path)
    exec(example.replace("PATH_OR_HUB_ID", model).replace("updates=20", "updates=1"), {})
    assert re.search(r"^\['.*'\]$|^\[\".*\"\]$", capsys.readouterr().out, re.MULTILINE)  # what it samples at the end
    assert (tmp_path / "runs" / "lm" / "policy").is_dir()
