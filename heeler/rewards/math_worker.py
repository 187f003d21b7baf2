"""math-verify in a process of its own: questions as JSON lines on standard input, answers on standard output.

Started by `heeler.rewards.verifiers.MathAnswer` as a script. It keeps no time: whoever asks kills it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed")
NUMBER_OR_PROSE = re.compile(r"[-+\d\s.,/%]*|[^\\]*[A-Za-z]{2}[^\\]*")


def parse_gold(gold: str) -> list[Any]:
    """What math-verify makes of an accepted answer; one without marks that is no number and no prose is LaTeX."""
    from math_verify import parse

    formula = not MARKED.search(gold) and not NUMBER_OR_PROSE.fullmatch(gold)
    return parse(f"${gold}$" if formula else gold, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Whether the completion equals one of the golds, and the golds that cannot be parsed."""
    from math_verify import parse, verify

    golds = {gold: parse_gold(gold) for gold in question["golds"]}
    given = parse(question["completion"], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return {
        "equal": any(verify(parsed, given, timeout_seconds=None) for parsed in golds.values()),
        "unparsable": [gold for gold, parsed in golds.items() if not parsed],
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
