"""Verifiers: rewards that check an answer against the prompt set's columns, a pattern or a schema.

A verifier reads the whole completion, as it is, unless it says otherwise. A column of accepted answers holds a string,
a number or a list of these for each prompt; one match is enough.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heeler.data.reasoning import reasoning_gym_dataset
from heeler.rewards.worker import Worker
from heeler.runtime.packages import did_you_mean, require, where_raised
from heeler.types import HeelerError, RewardOutput, Samples

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER_OR_PUNCTUATION = re.compile(rf"((?:(?<!\w)-)?\d+(?:\.\d+)?)|[{re.escape(string.punctuation)}]")


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (SQuAD, Rajpurkar et al., 1606.05250).

    Unlike there, a number keeps its sign and its decimal point, and articles stay where nothing else would be left.
    """
    words = NUMBER_OR_PUNCTUATION.sub(lambda match: match[1] or "", text.lower()).split()
    return " ".join([word for word in words if not ARTICLES.fullmatch(word)] or words)


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words of two normalised texts, counted as bags.

    1 where both have no words, 0 where one has none (SQuAD 2.0, Rajpurkar et al., 1806.03822).
    """
    given, wanted = normalize(answer).split(), normalize(gold).split()
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


def exact_match(answer: str, gold: str) -> float:
    """1 where both texts are equal after `normalize`, else 0."""
    return float(normalize(answer) == normalize(gold))


class Answers:
    """The best figure of the completion with an accepted answer.

    Args:
        column: of the prompt set, with the accepted answers.
    """

    verifier = ""

    def __init__(self, column: str = "answer") -> None:
        self.column = column

    def figure(self, answer: str, gold: str) -> float:
        raise NotImplementedError

    def __call__(self, samples: Samples) -> RewardOutput:
        golds = _accepted(samples, self.column, self.verifier)

        def score(index: int) -> float:
            return max(self.figure(samples.completions[index], gold) for gold in golds[index])

        return _output(_each(self.verifier, len(samples), score))


class ExactMatch(Answers):
    """1 where the completion equals an accepted answer after `normalize`, else 0."""

    verifier = "exact-match"

    def figure(self, answer: str, gold: str) -> float:
        return exact_match(answer, gold)


class TokenF1(Answers):
    """The best `token_f1` of the completion with an accepted answer, 0 to 1."""

    verifier = "f1"

    def figure(self, answer: str, gold: str) -> float:
        return token_f1(answer, gold)


class ChrF:
    """sacrebleu's sentence chrF2 (Popović, W15-3049) of the completion with the accepted answers, 0 to 1.

    Args:
        column: of the prompt set, with the accepted answers: the references.

    Raises:
        HeelerError: sacrebleu is not installed.
    """

    def __init__(self, column: str = "answer") -> None:
        require("sacrebleu", "translate")
        from sacrebleu.metrics.chrf import CHRF

        self.column, self.metric = column, CHRF()

    def __call__(self, samples: Samples) -> RewardOutput:
        return _sentence_scores(self.metric, samples, self.column, "chrf")


class BLEU:
    """sacrebleu's sentence BLEU of the completion with the accepted answers, 0 to 1.

    With its defaults for sentences: tokeniser 13a, exponential smoothing, and only the n-gram orders that the
    completion has (`effective_order`).

    Args:
        column: of the prompt set, with the accepted answers: the references.

    Raises:
        HeelerError: sacrebleu is not installed.
    """

    def __init__(self, column: str = "answer") -> None:
        require("sacrebleu", "translate")
        from sacrebleu.metrics.bleu import BLEU as Metric

        self.column, self.metric = column, Metric(effective_order=True)

    def __call__(self, samples: Samples) -> RewardOutput:
        return _sentence_scores(self.metric, samples, self.column, "bleu")


def _sentence_scores(metric: Any, samples: Samples, column: str, verifier: str) -> RewardOutput:
    golds = _accepted(samples, column, verifier)

    def score(index: int) -> float:
        return min(metric.sentence_score(samples.completions[index], golds[index]).score / 100, 1.0)

    return _output(_each(verifier, len(samples), score))


class Regex:
    """1 where the pattern is found anywhere in the completion (`re.search`), else 0.

    Some patterns, such as `(a+)+$`, take time that doubles with each character of some texts. So the search runs in a
    process of its own, which is killed at the time limit.

    Args:
        pattern: a regular expression of Python's `re`; flags are written into it, such as `(?i)`.
        timeout: seconds for one completion; one that takes longer scores 0 and counts in the component `timeout`.

    Raises:
        HeelerError: the pattern is none.
    """

    def __init__(self, pattern: str, timeout: float = 1.0) -> None:
        self.pattern = _compile(pattern)
        self.worker = Worker("regex", timeout, {"pattern": "a", "completion": "a"}, {"found": True})

    def __call__(self, samples: Samples) -> RewardOutput:
        late = [0.0] * len(samples)

        def score(index: int) -> float:
            answer = self.worker.ask({"pattern": self.pattern.pattern, "completion": samples.completions[index]})
            if answer is None:
                late[index] = 1.0
                return 0.0
            return float(answer["found"])

        return _output(_each("regex", len(samples), score), timeout=late)


class JSONSchema:
    """1 where the completion is one JSON value that a schema accepts, else 0; the component `parses` says it is JSON.

    JSON as RFC 8259 has it: `NaN` and `Infinity`, which Python reads, do not parse. Spaces around the value are
    allowed, other text is not. A value that is nested too deeply for Python to check scores 0. References to other
    addresses are not fetched.

    Args:
        schema: the schema, or the path of a JSON file with it.

    Raises:
        HeelerError: the file is missing or broken, what it holds is no schema, or a reference in it leads nowhere.
    """

    def __init__(self, schema: str | Path | Mapping[str, Any]) -> None:
        require("jsonschema", "verifiers")
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from jsonschema_specifications import REGISTRY
        from referencing.jsonschema import specification_with

        name = "the schema" if isinstance(schema, Mapping) else str(schema)
        content: Any = schema if isinstance(schema, Mapping) else _read_schema(schema)
        validator = validator_for(content)
        try:
            validator.check_schema(content)
        except SchemaError as error:
            raise HeelerError(f"{name} is not a JSON schema: {error.message} (at {error.json_path})") from error
        self.validator = validator(content, registry=REGISTRY)
        dialect = specification_with(validator.META_SCHEMA["$schema"])
        resolver = REGISTRY.resolver_with_root(dialect.create_resource(content))
        broken = _broken_reference(content, dialect, resolver, set())
        if broken is not None:
            raise HeelerError(
                f"{name} refers to {broken!r}, which is not in it: write what it refers to under $defs; other addresses"
                " are not fetched"
            )

    def __call__(self, samples: Samples) -> RewardOutput:
        parses = [0.0] * len(samples)

        def score(index: int) -> float:
            try:
                value = json.loads(samples.completions[index], parse_constant=_no_constant)
            except (ValueError, RecursionError):
                return 0.0
            parses[index] = 1.0
            try:
                return float(self.validator.is_valid(value))
            except RecursionError:  # too deep to be checked
                return 0.0

        return _output(_each("json-schema", len(samples), score), parses=parses)


class MathAnswer:
    """1 where the completion's last mathematical expression equals an accepted answer by math-verify, else 0.

    A completion without an expression scores 0. An answer is read as math-verify reads text: a number, or LaTeX
    between dollars or in `\\boxed{}`. One without these marks that is neither a number nor prose is read as LaTeX.

    math-verify's own time limits need the main thread and cannot stop a long operation in C, and a policy does write
    towers of powers. So it runs in a process of its own, which is killed at the time limit; this works from any thread.

    Args:
        column: of the prompt set, with the accepted answers.
        timeout: seconds for one completion; one that takes longer, or breaks math-verify, scores 0 and counts in the
            component `timeout`.

    Raises:
        HeelerError: an accepted answer holds no mathematics, or takes too long.
    """

    def __init__(self, column: str = "answer", timeout: float = 5.0) -> None:
        require("math_verify", "verifiers")
        self.column = column
        self.worker = Worker("math", timeout, {"golds": ["1"], "completion": "1"}, {"equal": True, "unparsable": []})

    def __call__(self, samples: Samples) -> RewardOutput:
        golds = _accepted(samples, self.column, "math")
        late = [0.0] * len(samples)

        def score(index: int) -> float:
            answer = self.worker.ask({"golds": golds[index], "completion": samples.completions[index]})
            if answer is None:
                late[index] = 1.0  # and is it the accepted answer that takes so long?
                answer = self.worker.ask({"golds": golds[index], "completion": ""})
            if answer is None or answer["unparsable"]:
                culprit = (golds[index] if answer is None else answer["unparsable"])[0]
                raise HeelerError(
                    f"the verifier math cannot read the answer {culprit!r} of sample {index + 1}, prompt"
                    f" {_shown(samples.prompts[index])}: write a number, or LaTeX such as $\\frac{{1}}{{2}}$"
                )
            return float(answer["equal"])

        return _output(_each("math", len(samples), score), timeout=late)


class ReasoningGym:
    """What the task's own `score_answer` of Reasoning Gym says of the answer, 0 to 1 (Stojanovski et al., 2505.24760).

    The prompts are those of `heeler.data.reasoning.reasoning_gym_prompts`: their columns `task` and `entry` say what
    is asked. Many tasks give 0.01 for any answer at all; scores up to that become 0. Other partial credit stays. The
    component `solved` is 1 where the score is 1.

    The answer is the text between the last `<answer>` and `</answer>`, or, where there is no such pair, the whole
    completion; spaces at both ends are dropped.

    Some tasks evaluate the answer, which may take for ever. So they run in a process of its own, as math-verify does.

    Args:
        extract: a regular expression in place of the tags (`.` matches line ends too): the answer is the first group
            of its last match, or the match itself where it has no group; a completion without a match scores 0.
        timeout: seconds for one completion; one that takes longer scores 0 and counts in the component `timeout`.

    Raises:
        HeelerError: a column is missing, there is no such task, or its `score_answer` fails on the entry's own answer
            or takes too long for it. Where it fails on the completion's answer only, the score is 0.
    """

    def __init__(self, extract: str | None = None, timeout: float = 5.0) -> None:
        require("reasoning_gym", "verifiers")
        self.extract = None if extract is None else _compile(extract, re.DOTALL).pattern
        self.worker = Worker("reasoning-gym", timeout, {"task": "chain_sum", "config": "{}"}, {})

    def __call__(self, samples: Samples) -> RewardOutput:
        tasks: Sequence[Any] = _column(samples, "task", "reasoning-gym")
        entries: Sequence[Any] = _column(samples, "entry", "reasoning-gym")
        late = [0.0] * len(samples)

        def score(index: int) -> float:
            entry = entries[index]
            config = entry.get("config", {})
            task = {"task": tasks[index], "config": json.dumps(config, sort_keys=True)}
            question = {**task, "entry": entry, "extract": self.extract}
            answer = self.worker.ask({**question, "completion": samples.completions[index]}, first=task)
            if answer is None:
                late[index] = 1.0  # and does the entry's own answer take so long?
                answer = self.worker.ask({**question, "completion": None}, first=task)
                if answer is None:
                    raise HeelerError(
                        f"the task {tasks[index]} takes more than {self.worker.timeout:g} seconds to score the own"
                        f" answer of sample {index + 1}, prompt {_shown(samples.prompts[index])}: leave that prompt out"
                    )
            if "failed" in answer:
                reasoning_gym_dataset(tasks[index], **config)  # raises where task or configuration are none
                raise HeelerError(f"the verifier reasoning-gym failed on sample {index + 1}: {answer['failed']}")
            value = 0.0 if late[index] else answer["score"]
            return value if value > 0.01 else 0.0

        scores = _each("reasoning-gym", len(samples), score)
        return _output(scores, solved=[float(value == 1) for value in scores], timeout=late)


def _broken_reference(schema: Any, dialect: Any, resolver: Any, seen: set[int]) -> str | None:
    """The first reference that leads nowhere, in a schema or in what it refers to; None where there is none.

    Args:
        schema: a schema, or a part of one.
        dialect: the `referencing.Specification` that it is written in.
        resolver: of the references in it.
        seen: what was looked at already, by `id`.
    """
    from referencing.exceptions import Unresolvable

    if id(schema) in seen:
        return None
    seen.add(id(schema))
    parts = [(part, resolver.in_subresource(dialect.create_resource(part))) for part in dialect.subresources_of(schema)]
    for key in ("$ref", "$dynamicRef") if isinstance(schema, Mapping) else ():
        if isinstance(schema.get(key), str):
            try:
                found = resolver.lookup(schema[key])
            except Unresolvable:
                return schema[key]
            parts.append((found.contents, found.resolver))
    broken = (_broken_reference(part, dialect, inner, seen) for part, inner in parts)
    return next((reference for reference in broken if reference is not None), None)


def _compile(pattern: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise HeelerError(f"{pattern!r} is not a regular expression: {error}") from error


def _read_schema(path: str | Path) -> Any:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise HeelerError(f"there is no file {path} that can be read: give a JSON schema") from error
    except ValueError as error:
        raise HeelerError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, (dict, bool)):
        raise HeelerError(f"{path} is not a JSON schema: it holds a {type(content).__name__}, not an object")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _column(samples: Samples, column: str, verifier: str) -> Sequence[object]:
    if column not in samples.columns:
        raise HeelerError(
            f"the verifier {verifier} reads the column {column!r}, which the prompts do not have (found"
            f" {', '.join(samples.columns) or 'none beside the prompt'}){did_you_mean(column, samples.columns)}"
        )
    return samples.columns[column]


def _accepted(samples: Samples, column: str, verifier: str) -> list[list[str]]:
    """The accepted answers of each sample, as texts."""
    accepted: list[list[str]] = []
    for index, value in enumerate(_column(samples, column, verifier)):
        answers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not answers or not all(isinstance(a, (str, int, float)) and not isinstance(a, bool) for a in answers):
            raise HeelerError(
                f"the verifier {verifier} finds {value!r} in the column {column!r} of sample {index + 1}: write a"
                " string, a number or a list of these"
            )
        accepted.append([str(answer) for answer in answers])
    return accepted


def _each(verifier: str, count: int, score: Callable[[int], float]) -> list[float]:
    """The score of each sample; what goes wrong is told with the sample's number, counted from 1."""
    scores: list[float] = []
    for index in range(count):
        try:
            scores.append(score(index))
        except HeelerError:
            raise
        except Exception as error:
            raise HeelerError(f"the verifier {verifier} failed on sample {index + 1}: {where_raised(error)}") from error
    return scores


def _shown(prompt: object) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _output(scores: Sequence[float], **components: Sequence[float]) -> RewardOutput:
    parts: dict[str, Tensor] = {name: torch.tensor(values) for name, values in components.items()}
    return RewardOutput(scores=torch.tensor(scores, dtype=torch.float32), token_rewards=None, components=parts)
