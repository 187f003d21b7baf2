"""Write the line anchors of docs/details.md anew: `python docs/link_lines.py`, or `make links`.

A link [`name`](../path.py#L12) leads to the line where path.py defines `name`: a function, a class, a member of a class
(`Class.member`), a constant of the module, a test. Only the number is written; the names and paths are the author's.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "details.md"
LINK = re.compile(r"\[`([^`\]]+)`\]\((\.\./[^()#\s]+\.py)(?:#L\d+)?\)")


def defined_lines(source: str) -> dict[str, int]:
    """The line of every name that a module defines; of a property with a setter, the getter's."""
    found: dict[str, int] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            names: list[str] = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                found.setdefault(prefix + name, node.lineno)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse(source).body, "")
    return found


def with_lines(text: str, folder: Path) -> str:
    """The page `text`, which lies in `folder`, with the line of each link as it is now.

    Raises:
        ValueError: a link's file or name is not there; every one is told.
    """
    known: dict[str, dict[str, int]] = {}
    missing: list[str] = []

    def linked(match: re.Match[str]) -> str:
        name, path = match.groups()
        if path not in known:
            file = folder / path
            known[path] = defined_lines(file.read_text(encoding="utf-8")) if file.is_file() else {}
        line = known[path].get(name)
        if line is None:
            missing.append(f"{path} defines no `{name}`")
            return match.group()
        return f"[`{name}`]({path}#L{line})"

    written = LINK.sub(linked, text)
    if missing:
        raise ValueError("; ".join(missing))
    return written


def main() -> None:
    before = PAGE.read_text(encoding="utf-8")
    try:
        after = with_lines(before, PAGE.parent)
    except ValueError as error:
        sys.exit(f"{PAGE.name}: {error}")
    PAGE.write_text(after, encoding="utf-8")
    moved = sum(a[0] != b[0] for a, b in zip(LINK.finditer(before), LINK.finditer(after), strict=True))
    print(f"{PAGE.name}: {len(LINK.findall(after))} links, of which {moved} moved")


if __name__ == "__main__":
    main()
