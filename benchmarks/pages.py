"""Sections of a documentation page that scripts write: everything between a section's two marks is replaced."""

from __future__ import annotations

import platform
from pathlib import Path


def replace_section(page: Path, name: str, lines: list[str]) -> None:
    """Put `lines` between `<!-- name -->` and `<!-- /name -->` of the page; at its end where it has no such section."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    body = "\n".join([begin, "", *lines, end])
    if begin in text:
        before, _, rest = text.partition(begin)
        text = before + body + rest.partition(end)[2]
    else:
        text = text.rstrip("\n") + "\n\n" * bool(text) + body + "\n"
    page.write_text(text, encoding="utf-8")


def processor() -> str:
    """The processor's name; with its family and model where the name is of several generations."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = facts.get("model name", platform.processor() or platform.machine())
    if "cpu family" not in facts or any(character.isdigit() for character in name):
        return name
    return f"{name} (family {facts['cpu family']}, model {facts['model']})"


def hardware() -> str:
    """Processor, cores, and whether it multiplies bf16 in hardware."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return processor()
    lines = info.read_text().splitlines()
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    cores = sum(line.startswith("processor") for line in lines)
    features = [f"{'with' if flag in flags else 'without'} {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16")]
    return f"{processor()}, {cores} cores, {', '.join(features)}"
