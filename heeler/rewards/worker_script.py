"""Verifiers whose work may never end, in a process of their own: questions as JSON lines on standard input, answers on
standard output.

Started by `heeler.rewards.worker.Worker` as a script, with the verifier's name. It keeps no time: who asks kills it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed")
NUMBER_OR_PROSE = re.compile(r"[-+\d\s.,/%]*|[^\\]*[A-Za-z]{2}[^\\]*")
ANSWER_TAGS = r"<answer>(.*?)</answer>"


def parse_gold(gold: str) -> list[Any]:
    """What math-verify makes of an accepted answer; one without marks that is no number and no prose is LaTeX."""
    from math_verify import parse

    formula = not MARKED.search(gold) and not NUMBER_OR_PROSE.fullmatch(gold)
    return parse(f"${gold}$" if formula else gold, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def math(question: dict[str, Any]) -> dict[str, Any]:
    """Whether the completion equals one of the golds, and the golds that cannot be parsed."""
    from math_verify import parse, verify

    golds = {gold: parse_gold(gold) for gold in question["golds"]}
    given = parse(question["completion"], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return {
        "equal": any(verify(parsed, given, timeout_seconds=None) for parsed in golds.values()),
        "unparsable": [gold for gold, parsed in golds.items() if not parsed],
    }


def extract_answer(completion: str, pattern: str | None) -> str | None:
    """The first group of the pattern's last match, or the match itself where it has no group; None without a match.

    Without a pattern, what stands between the last answer tags, or else the whole completion.
    """
    matches = list(re.finditer(pattern or ANSWER_TAGS, completion, re.DOTALL))
    if matches:
        last = matches[-1]
        return (last[1] or "" if last.re.groups else last[0]).strip()
    return None if pattern else completion.strip()


@cache
def gym_scorer(task: str, config: str) -> Callable[[str, Any], float]:
    """The `score_answer` of a task with its configuration, given as JSON."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, **json.loads(config)).score_answer


def reasoning_gym(question: dict[str, Any]) -> dict[str, Any]:
    """The score of the completion's answer, or why the entry's own answer cannot be scored.

    The entry's own answer is scored where the completion is None; a question without an entry makes the task ready.
    """
    try:
        scorer = gym_scorer(question["task"], question["config"])
        if "entry" not in question:
            return {}
        entry, completion = question["entry"], question["completion"]
        answer = entry["answer"] if completion is None else extract_answer(completion, question["extract"])
        if answer is None:
            return {"score": 0.0}
        try:
            return {"score": float(scorer(answer, entry))}
        except Exception:
            scorer(entry["answer"], entry)  # a sound entry takes its own answer: then the completion is at fault
            return {"score": 0.0}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {"failed": f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"}


def regex(question: dict[str, Any]) -> dict[str, Any]:
    """Whether the pattern is found anywhere in the completion."""
    return {"found": re.search(question["pattern"], question["completion"]) is not None}


ANSWERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "math": math,
    "reasoning-gym": reasoning_gym,
    "regex": regex,
}


def main() -> None:
    logging.disable(logging.CRITICAL)
    answer = ANSWERS[sys.argv[1]]
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what is evaluated may read and print
    os.dup2(2, 1)
    for line in questions:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
