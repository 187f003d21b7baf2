"""Rewards by name: what `--reward` and `--judges` take.

    SPEC = TERM, or [WEIGHT*][NAME=]TERM + [WEIGHT*][NAME=]TERM + ...

| TERM | is |
|---|---|
| the folder of a sequence classifier, or `model:ID` with a hub id or a folder | `ClassifierReward` |
| `module:function` | `FunctionReward` |
| `http://HOST:PORT`, `http://HOST:PORT(timeout=120, retries=10)` | `HTTPReward`, a server that must answer now |
| `exact-match`, `f1(column=answers)`, `regex(^yes)`, `json-schema(file.json)`, `math`, `reasoning-gym` | verifiers |
| `chrf(column=answer)`, `bleu(column=answer)` | sentence scores of translations |
| `eos-penalty(1.0)`, `length(free=32, per-token=0.01)`, `repetition(3)`, `overlong(limit=64, buffer=16)` | shaping |
| `vader` | the judge |

" + " separates terms outside brackets only. A bracket that does not open or close a group is escaped or stands in a
character class, as Python's regular expressions want it. Arguments stand in their order or by name; the only argument
of a reward is taken as it is, commas included.

A server gets the environment variable `HEELER_REWARD_TOKEN`, where it is set, as `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heeler.rewards import judges
from heeler.rewards.classifier import ClassifierReward
from heeler.rewards.functions import FunctionReward
from heeler.rewards.http import HTTPReward
from heeler.rewards.shaping import EOSPenalty, LengthReward, Overlong, Repetition
from heeler.rewards.verifiers import (
    BLEU,
    ChrF,
    ExactMatch,
    JSONSchema,
    MathAnswer,
    ReasoningGym,
    Regex,
    TokenF1,
)
from heeler.rewards.weighted import WeightedSum
from heeler.runtime.packages import did_you_mean, load_function, require
from heeler.types import HeelerError, Reward

NAMED = re.compile(r"\s*([\w.-]+)=(.*)", re.DOTALL)
TOKEN = "HEELER_REWARD_TOKEN"


def _vader() -> Reward:
    require("vaderSentiment", "demo")
    return FunctionReward(judges.vader, "vader")


SERVER: dict[str, type] = {"timeout": float, "retries": int, "batch_size": int, "backoff": float}
BUILT_IN: dict[str, tuple[Callable[..., Reward], dict[str, type]]] = {  # with the types of its arguments, in order
    "exact-match": (ExactMatch, {"column": str}),
    "f1": (TokenF1, {"column": str}),
    "chrf": (ChrF, {"column": str}),
    "bleu": (BLEU, {"column": str}),
    "regex": (Regex, {"pattern": str}),
    "json-schema": (JSONSchema, {"schema": str}),
    "math": (MathAnswer, {"column": str, "timeout": float}),
    "reasoning-gym": (ReasoningGym, {"extract": str}),
    "vader": (_vader, {}),
    "eos-penalty": (EOSPenalty, {"penalty": float}),
    "length": (LengthReward, {"free": int, "per_token": float}),
    "repetition": (Repetition, {"n": int}),
    "overlong": (Overlong, {"limit": int, "buffer": int}),
}


def load_reward(spec: str, device: str = "cpu", precision: Literal["fp32", "bf16"] = "fp32") -> Reward:
    """The reward that `spec` names, in the grammar of this module; a single plain term is that reward itself.

    Args:
        spec: the reward.
        device: where classifiers run.
        precision: that they compute in.

    Raises:
        HeelerError: no spec, an unknown name, an argument or a weight that is none, two terms of one name.
    """
    if not spec.strip():
        raise HeelerError(
            "no reward was given: --reward module:function, the folder of a sequence classifier,"
            f" http://HOST:PORT, or one of"
            f" {', '.join(BUILT_IN)}"
        )
    if _is_classifier(spec):
        return ClassifierReward(spec, device=device, precision=precision)
    terms = [_parse(text) for text in _split(spec)]
    if len(terms) == 1 and terms[0].weight == 1 and terms[0].name is None:
        return _load(terms[0].text, device, precision)
    weighted: dict[str, tuple[float, Reward]] = {}
    for term in terms:
        name = term.name or _default_name(term.text)
        if name in weighted:
            raise HeelerError(f"two terms of the reward {spec!r} are called {name!r}: name them, as in a={term.text}")
        weighted[name] = (term.weight, _load(term.text, device, precision))
    return WeightedSum(weighted)


def load_judges(specs: Sequence[str]) -> dict[str, Reward]:
    """Judges by name, each `[NAME=]SPEC`; without a name, a judge of one term is called by its function or reward.

    Raises:
        HeelerError: as `load_reward`; two judges of one name; a sum without a name.
    """
    loaded: dict[str, Reward] = {}
    for spec in specs:
        named = None if _is_classifier(spec) else NAMED.fullmatch(spec)
        name, text = (named[1], named[2]) if named else (None, spec)
        if name is None:
            terms = [_parse(term) for term in _split(spec)]
            if len(terms) > 1:
                raise HeelerError(f"the judge {spec!r} is a sum without a name: write it as NAME={spec}")
            name = _default_name(terms[0].text)
        if name in loaded:
            raise HeelerError(f"two judges are called {name!r}: name them, as in a={text}")
        loaded[name] = load_reward(text)
    return loaded


@dataclass(frozen=True, kw_only=True)
class _Term:
    weight: float
    name: str | None
    text: str


def _split(spec: str) -> list[str]:
    """The terms of a spec: its parts between the " + " that stand outside brackets."""
    parts, start, depth, index = [], 0, 0, 0
    while index < len(spec):
        character = spec[index]
        if depth and character == "\\":
            index += 1
        elif depth and character == "[":
            first = index + (2 if spec.startswith("[^", index) else 1)
            index = _class_end(spec, first)
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        elif depth == 0 and spec.startswith(" + ", index):
            parts.append(spec[start:index])
            start, index = index + 3, index + 2
        index += 1
    if depth != 0:
        raise HeelerError(
            f"the brackets of the reward {spec!r} do not match: close each, and escape those that a regex shall find"
        )
    parts.append(spec[start:])
    return [part.strip() for part in parts]


def _class_end(spec: str, index: int) -> int:
    """Where the character class whose first character is at `index` ends; that character may be a bracket itself."""
    start = index
    while index < len(spec) and (spec[index] != "]" or index == start):
        index += 2 if spec[index] == "\\" else 1
    return index


def _parse(text: str) -> _Term:
    weight, name = 1.0, None
    before, star, after = text.partition("*")
    if star and "(" not in before:
        try:
            weight = float(before)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise HeelerError(f"the weight {before.strip()!r} of {after.strip()!r} is not a finite number")
        text = after.strip()
    if not _is_classifier(text) and (named := NAMED.fullmatch(text)):
        name, text = named[1], named[2].strip()
    return _Term(weight=weight, name=name, text=text)


def _default_name(term: str) -> str:
    """The built-in's name, the function's, or the last part of a model's path."""
    if _is_classifier(term):
        return Path(term).resolve().name
    return re.split(r"[:/]", term.partition("(")[0].rstrip("/"))[-1].strip() or term


def _is_classifier(term: str) -> bool:
    return bool(term) and os.path.isfile(Path(term) / "config.json")  # a long term is no error here, as in pathlib


def _load(term: str, device: str, precision: Literal["fp32", "bf16"]) -> Reward:
    if _is_classifier(term):
        return ClassifierReward(term, device=device, precision=precision)
    if term.startswith("model:"):
        return ClassifierReward(term.removeprefix("model:"), device=device, precision=precision)
    if term.startswith(("http://", "https://")):
        url, arguments = _opened(term)
        server = HTTPReward(url, **_arguments(f"at {url}", SERVER, arguments), headers=_authorization())
        server.check()
        return server
    name = term.partition("(")[0]
    if name.strip() in BUILT_IN:
        return _built_in(name.strip(), _opened(term)[1])
    if ":" in name:
        return FunctionReward(load_function(term), term)
    raise HeelerError(
        f"{term!r} does not name a function (module:function), a sequence classifier (a folder, or model:ID), a"
        f" server (http://HOST:PORT) or one of"
        f" {', '.join(BUILT_IN)}{did_you_mean(name.strip(), BUILT_IN)}"
    )


def _opened(term: str) -> tuple[str, str]:
    """What stands before the brackets of a term, and in them."""
    before, bracket, rest = term.partition("(")
    if bracket and not rest.endswith(")"):
        raise HeelerError(f"{term!r} goes on after its brackets: join terms by ' + ', with spaces")
    return before, rest[:-1]


def _authorization() -> dict[str, str]:
    token = os.environ.get(TOKEN, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise HeelerError(f"{TOKEN} holds a character that no header can carry: set it to the token alone")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _built_in(name: str, arguments: str) -> Reward:
    build, types = BUILT_IN[name]
    given = _arguments(name, types, arguments)
    missing = [
        key
        for key, parameter in inspect.signature(build).parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in given
    ]
    if missing:
        raise HeelerError(f"the reward {name} needs {' and '.join(missing)}: write {name}({', '.join(types)})")
    return build(**given)


def _arguments(name: str, types: Mapping[str, type], arguments: str) -> dict[str, Any]:
    """The arguments of the reward `name`, given as in `free=32, 0.01`."""
    given: dict[str, Any] = {}
    texts = arguments.split(",") if len(types) > 1 else [arguments]
    for position, text in enumerate(texts if arguments.strip() else []):
        keyed = NAMED.fullmatch(text)
        if keyed and (len(types) > 1 or keyed[1] in types):
            key, value = keyed[1].replace("-", "_"), keyed[2]
        else:
            key, value = (list(types)[position] if position < len(types) else ""), text
        if key not in types or key in given:
            takes = f"takes {', '.join(types).replace('_', '-')}" if types else "takes no arguments"
            raise HeelerError(f"the reward {name} {takes}: {text.strip()!r} does not fit there")
        try:
            given[key] = types[key](value if len(types) == 1 else value.strip())
        except ValueError as error:
            kind = "a whole number" if types[key] is int else "a number"
            raise HeelerError(
                f"{key.replace('_', '-')} of the reward {name} must be {kind}, not {value.strip()!r}"
            ) from error
    return given
