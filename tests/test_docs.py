"""What the pages promise: links to code that is there, and an example that runs."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from tests.tiny import save_tiny_model

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\[\]]+)\]\((\.\./[^()#]+)\)")  # of docs/algorithm.md, to a file of this repository
LINK_LINES = runpy.run_path(str(ROOT / "docs" / "link_lines.py"))
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


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_links_to_this_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def details_rows() -> list[tuple[str, list[str]]]:
    """Section and cells of each row of docs/details.md."""
    rows: list[tuple[str, list[str]]] = []
    section = ""
    for line in (ROOT / "docs" / "details.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith(("| detail |", "| defect |")):
            rows.append((section, [cell.strip() for cell in line.strip("| ").split(" | ")]))
    return rows


def test_every_detail_links_its_line_and_its_test() -> None:
    """Or stands under Open, with the reason."""
    link = LINK_LINES["LINK"]
    rows = details_rows()
    assert len(rows) > 120
    for section, cells in rows:
        if section == "Open":
            assert len(cells) == 2 and len(cells[1]) > 20, cells
            continue
        assert len(cells) == 4, cells
        where, tests = link.findall(cells[2]), link.findall(cells[3])
        assert where and all(path.startswith("../heeler/") for _, path in where), cells
        assert tests and all(path.startswith("../tests/") and name.startswith("test_") for name, path in tests), cells
        for cell, found in ((cells[2], where), (cells[3], tests)):
            assert cell.count("](") == len(found), f"a link without a name of the code: {cell}"
    details = [cells[0] for _, cells in rows]
    assert len(details) == len(set(details))


def test_the_lines_of_the_details_are_where_they_say() -> None:
    page = ROOT / "docs" / "details.md"
    text = page.read_text(encoding="utf-8")
    try:
        expected = LINK_LINES["with_lines"](text, page.parent)
    except ValueError as error:
        pytest.fail(f"docs/details.md: {error}; correct the links there, then run: make links")
    link = LINK_LINES["LINK"]
    moved = [a[0] for a, b in zip(link.finditer(text), link.finditer(expected), strict=True) if a[0] != b[0]]
    assert not moved, f"{len(moved)} lines moved, such as {moved[0]}; run: make links"


def test_line_anchors_follow_names(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text(
        "import re\n\nLIMIT = 3\nKNOWN: int = 4\n\n\nclass Box:\n    size: int = 1\n\n    @property\n"
        "    def volume(self) -> int:\n        return 1\n\n\n@wrapped\nasync def fill() -> None: ...\n"
    )
    lines = {"LIMIT": 3, "KNOWN": 4, "Box": 7, "Box.size": 8, "Box.volume": 11, "fill": 16}
    text = ", ".join(f"[`{name}`](../code.py{'' if name == 'LIMIT' else '#L99'})" for name in lines)
    expected = ", ".join(f"[`{name}`](../code.py#L{line})" for name, line in lines.items())
    with_lines = LINK_LINES["with_lines"]
    assert with_lines(text, tmp_path / "docs") == with_lines(expected, tmp_path / "docs") == expected
    plain = "[`volume`](../code.py), [`Box.depth`](../code.py#L3), [`Box`](../gone.py), [code](../code.py#L1)"
    with pytest.raises(ValueError, match=r"code.py defines no `volume`; .*no `Box.depth`; ../gone.py defines no `Box`"):
        with_lines(plain, tmp_path / "docs")


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
