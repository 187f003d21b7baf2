"""Verifiers: right and wrong answers, and answers that cannot be checked."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from heeler.data.reasoning import reasoning_gym_prompts
from heeler.rewards.verifiers import BLEU, ChrF, ExactMatch, JSONSchema, MathAnswer, ReasoningGym, Regex, TokenF1
from heeler.rewards.worker_script import extract_answer
from heeler.types import HeelerError, Reward, RewardOutput
from tests.tiny import samples_of


def scores(reward: Reward, completions: list[str], **columns: list[Any]) -> list[float]:
    return reward(samples_of(["p"] * len(completions), completions, **columns)).scores.tolist()


def test_exact_match_normalises() -> None:
    texts = ["The  Cat's\nhat!", "cats hats", " a dog ", "", "42", "theatre"]
    golds = ["cats hat", "cats hat", ["cat", "dog"], "the", 42, "atre"]
    assert scores(ExactMatch(), texts, answer=golds) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert scores(ExactMatch("gold"), ["x"], gold=["X."], answer=["y"]) == [1.0]


@pytest.mark.parametrize("verifier", [ExactMatch(), TokenF1()])
def test_numbers_and_single_articles_are_answers(verifier: Reward) -> None:
    right = [
        ("-4", -4),
        ("$1,000.", 1000),
        ("2.5", 2.5),
        ("a", "A"),
        ("A.", "a"),
        ("(-4)", "-4"),
        ("COVID-19", "covid19"),
    ]
    wrong = [("4", -4), ("25", 2.5), ("", "A"), ("The", "A"), (".", "A"), ("1.000", 1)]
    for pairs, score in ((right, 1.0), (wrong, 0.0)):
        texts, golds = zip(*pairs, strict=True)
        assert scores(verifier, list(texts), answer=list(golds)) == [score] * len(pairs)


def test_f1_is_the_overlap_of_bags_of_words() -> None:
    texts = ["the cat sat", "cat cat cat", "dog", "", "!", "a b c d", "mat", "cat cat"]
    golds = ["a cat sat down", "cat", "cat", "cat", "", ["x", "c d e"], ["cat", "mat"], "cat cat dog"]
    wanted = [
        2 * 2 / (2 + 3),
        2 * 1 / (3 + 1),
        0,
        0,
        1,
        2 * 2 / (3 + 3),
        1,
        2 * 2 / (2 + 3),
    ]  # "a" is an article, on both sides
    assert scores(TokenF1(), texts, answer=golds) == pytest.approx(wanted)


def plain_chrf(text: str, gold: str) -> float:
    """chrF with n = 1 to 6 and beta = 2 from its definition, for texts that have n-grams of every order."""
    precisions, recalls = [], []
    given, wanted = text.replace(" ", ""), gold.replace(" ", "")
    for n in range(1, 7):
        mine, theirs = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (given, wanted))
        precisions.append((mine & theirs).total() / mine.total())
        recalls.append((mine & theirs).total() / theirs.total())
    p, r = sum(precisions) / 6, sum(recalls) / 6
    return 5 * p * r / (4 * p + r)


def test_chrf_and_bleu_are_shares() -> None:
    right, near, wrong = "Ouvrir le fichier", "Ouvre le fichier", "zzzzzzz"
    chrf = scores(ChrF(), [right, near, wrong, ""], answer=[right] * 4)
    assert chrf[0] == 1.0 and chrf[2:] == [0.0, 0.0]
    assert chrf[1] == pytest.approx(plain_chrf(near, right), abs=1e-5)
    assert scores(ChrF("gold"), [near], gold=[[wrong, near]]) == [1.0]
    bleu = scores(BLEU(), [right, near, ""], answer=[right] * 3)
    assert bleu[0] == pytest.approx(1.0) and bleu[2] == 0.0
    # precisions 2/3 and 1/2, and no trigram in common, which exponential smoothing counts as half a match
    assert bleu[1] == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), abs=1e-5)


@pytest.mark.parametrize("reward", [ExactMatch(), TokenF1(), MathAnswer(), ChrF(), BLEU()])
def test_columns_that_hold_no_answers(reward: Reward) -> None:
    names = {ExactMatch: "exact-match", TokenF1: "f1", MathAnswer: "math", ChrF: "chrf", BLEU: "bleu"}
    name = names[type(reward)]
    with pytest.raises(HeelerError, match=f"verifier {name} reads the column 'answer', which .*mean answers"):
        scores(reward, ["a"], answers=["a"])
    for nothing in (None, [], [None], {"a": 1}, True):
        with pytest.raises(HeelerError, match=f"verifier {name} finds .* in the column 'answer' of sample 2"):
            scores(reward, ["a", "b"], answer=["1", nothing])


def test_regex() -> None:
    assert scores(Regex(r"^yes\b"), ["yes, so", "oh yes", "Yes", "yesterday"]) == [1.0, 0.0, 0.0, 0.0]
    assert scores(Regex(r"(?i)^yes$"), ["YES"]) == [1.0]
    with pytest.raises(HeelerError, match=r"'\(a' is not a regular expression: missing \), unterminated"):
        Regex("(a")


def test_a_search_that_never_ends_scores_0_and_the_next_sample_is_read() -> None:
    start = time.monotonic()
    output = Regex("(a+)+$", timeout=0.5)(samples_of(["p"] * 3, ["a" * 60 + "b", "a" * 60, "b"]))
    assert output.scores.tolist() == [0.0, 1.0, 0.0]
    assert output.components["timeout"].tolist() == [1.0, 0.0, 0.0]
    assert time.monotonic() - start < 30
    assert scores(Regex("^\ud800$"), ["\ud800", "\n"]) == [1.0, 0.0]  # half a surrogate pair reaches the process


def test_json_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}
    texts = ['{"n": 3}', ' {"n": 0}\n', '{"n": -1}', "{}", '{"n": 3', 'so: {"n": 3}', "[" * 100_000, '{"n": NaN}']
    output = JSONSchema(schema)(samples_of(["p"] * 8, texts))
    assert output.scores.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert output.components["parses"].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert scores(JSONSchema(tmp_path / "s.json"), texts) == output.scores.tolist()


def test_schemas_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HeelerError, match="the schema is not a JSON schema: 'objekt' is not valid"):
        JSONSchema({"type": "objekt"})
    with pytest.raises(HeelerError, match=r"there is no file absent.json that can be read"):
        JSONSchema("absent.json")
    for content, says in (("{", "is not JSON"), ("[1]", "is not a JSON schema: it holds a list")):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(HeelerError, match=says):
            JSONSchema(str(tmp_path / "s.json"))


def test_references_of_a_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *request, **_: fetched.append(request))
    nowhere: list[tuple[dict[str, Any], str]] = [
        ({"$ref": "http://127.0.0.1:9/schema"}, "http://127.0.0.1:9/schema"),
        ({"items": {"anyOf": [{}, {"$ref": "#/$defs/b"}]}, "$defs": {"a": {}}}, "#/$defs/b"),
        ({"$ref": "#/parts/a", "parts": {"a": {"not": {"$ref": "#absent"}}}}, "#absent"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "items": {"$ref": "#/definitions/a"}},
            "#/definitions/a",
        ),
        ({"$dynamicRef": "#absent"}, "#absent"),
    ]
    for schema, reference in nowhere:
        with pytest.raises(HeelerError, match=f"the schema refers to '{re.escape(reference)}', which is not in it"):
            JSONSchema(schema)
    assert not fetched
    address = "https://example.org/list"
    parts = {"leaf": {"$ref": "list#number"}, "number": {"$anchor": "number", "type": "number"}}
    tree = {"$id": address, "items": {"$ref": f"{address}#/$defs/leaf"}, "$defs": parts}
    assert scores(JSONSchema(tree), ["[1, 2]", '["1"]']) == [1.0, 0.0]
    itself = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert scores(JSONSchema(itself), ['{"type": "string"}', '{"type": 3}']) == [1.0, 0.0]


def test_a_value_too_deep_for_a_schema_scores_0() -> None:
    lists = {"type": "array", "items": {"$ref": "#"}}
    output = JSONSchema(lists)(samples_of(["p"] * 3, ["[" * 400 + "]" * 400, "[[]]", "[3]"]))
    assert output.scores.tolist() == [0.0, 1.0, 0.0]
    assert output.components["parses"].tolist() == [1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def math() -> MathAnswer:
    return MathAnswer()


def test_math_compares_values_not_letters(math: MathAnswer) -> None:
    pairs: list[tuple[str, Any, float]] = [
        ("So it is $\\frac{2}{4}$.", "1/2", 1), ("The answer is 0.5", "$\\frac{1}{2}$", 1), ("1,000", 1000, 1),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2", 1), ("first 3, then 4", "3", 0), ("first 3, then 4", 4, 1),
        ("dunno", "7", 0), ("", "7", 0), ("2", ["1", "2"], 1), ("$(1, 3)$", "(1, 2)", 0), ("$(1, 2)$", "(1, 2)", 1),
        ("\\boxed{72}", "48 and 24 make 72 clips. #### 72", 1), ("$\\sqrt{8}$", "2\\sqrt{2}", 1), ("-3", "3", 0),
    ]  # fmt: skip
    texts, golds, wanted = zip(*pairs, strict=True)
    assert scores(math, list(texts), answer=list(golds)) == list(wanted)


def test_math_works_off_the_main_thread(math: MathAnswer) -> None:
    seen: list[list[float]] = []
    thread = threading.Thread(target=lambda: seen.append(scores(math, ["2/4", "3"], answer=["1/2", "1/2"])))
    thread.start()
    thread.join()
    assert seen == [[1.0, 0.0]]


def test_math_that_never_ends_scores_0_and_the_next_sample_is_read() -> None:
    start = time.monotonic()
    output = MathAnswer(timeout=1.5)(samples_of(["p"] * 3, ["9**9**9**9", "42", "41"], answer=["42"] * 3))
    assert output.scores.tolist() == [0.0, 1.0, 0.0]
    assert output.components["timeout"].tolist() == [1.0, 0.0, 0.0]
    assert time.monotonic() - start < 60  # most of it is the process, started twice


def test_math_answers_that_cannot_be_read(math: MathAnswer) -> None:
    says = "the verifier math cannot read the answer 'a cat' of sample 2, prompt 'Who sat there[?]': write a number"
    with pytest.raises(HeelerError, match=says):
        math(samples_of(["1 + 1?", "Who sat there?"], ["2", "2"], answer=["2", ["2", "a cat"]]))
    with pytest.raises(HeelerError, match="must be above 0 seconds, not 0"):
        MathAnswer(timeout=0)


gym_reward = cache(ReasoningGym)  # its process takes seconds to start


def gym(rows: list[dict[str, Any]], completions: list[str], reward: ReasoningGym | None = None) -> RewardOutput:
    """Scores of completions of rows that went through a JSONL file."""
    reward = reward or gym_reward()
    rows = [json.loads(json.dumps(row)) for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("answer", "task", "entry")}
    return reward(samples_of([row["prompt"] for row in rows], completions, **columns))


@pytest.mark.parametrize(
    ("task", "config", "wrong"),
    [
        ("chain_sum", {"min_terms": 2, "max_terms": 3}, "88888"),
        ("gsm_symbolic", {}, "none"),
        ("knights_knaves", {"n_people": 3}, "Nobody is a knight."),
        ("zebra_puzzles", {}, "Nobody"),
        ("decimal_arithmetic", {"max_num_decimal_places": 3}, "123456789"),  # its score_answer reads the configuration
    ],
)
def test_reasoning_gym_tasks_survive_a_file(task: str, config: dict[str, Any], wrong: str) -> None:
    rows = reasoning_gym_prompts(task, size=36, seed=7, **config)[-4:]  # the last of gsm_symbolic holds a fraction
    assert rows == reasoning_gym_prompts(task, size=36, seed=7, **config)[-4:] == json.loads(json.dumps(rows))
    assert [list(row) for row in rows] == [["prompt", "answer", "task", "entry"]] * 4
    answers = [row["answer"] for row in rows]
    output = gym(rows, answers)
    assert output.scores.tolist() == [1.0] * 4 == output.components["solved"].tolist()
    assert (
        gym(rows, [f"Hm, 5.\n<answer>1</answer> no,\n<answer>{a} </answer>." for a in answers]).scores.tolist()
        == [1.0] * 4
    )
    output = gym(rows, [wrong] * 4)
    assert output.scores.tolist() == [0.0] * 4 == output.components["solved"].tolist()
    assert gym(rows, ["88888"] * 4).components["solved"].tolist() == [0.0] * 4


def test_partial_credit_stays_and_counts_as_unsolved() -> None:
    rows = reasoning_gym_prompts("chain_sum", size=1, seed=0)
    answer = rows[0]["answer"]
    output = gym(rows, [f"It is {answer}"])  # the task pays the share of the text that is the answer
    assert output.scores.tolist() == pytest.approx([len(answer) / (6 + len(answer))])
    assert output.components["solved"].tolist() == [0.0]


def test_where_the_answer_is() -> None:
    for text, extract, wanted in (
        (" 42\n", None, "42"),
        ("It is 42", None, "It is 42"),
        ("It is 42", r"is (\S+)", "42"),
        ("Is 1. is 42", r"is \S+", "is 42"),
        ("0 42", r"-?\d+", "42"),
        ("42", r"Answer: (.*)", None),
        ("<answer>\n42\n</answer>", None, "42"),
        ("<answer>1</answer> <answer> 42</answer>", None, "42"),
    ):
        assert extract_answer(text, extract) == wanted, (text, extract)
    row = reasoning_gym_prompts("chain_sum", size=1, seed=0)[0]
    texts = [f"It is {row['answer']}", f"It was {row['answer']}"]
    assert gym([row] * 2, texts, ReasoningGym(r"is (\S+)")).scores.tolist() == [1.0, 0.0]
    with pytest.raises(HeelerError, match="is not a regular expression"):
        ReasoningGym("(")


def test_the_completions_fault_and_the_entrys() -> None:
    rows = reasoning_gym_prompts("prime_factorization", size=2, seed=0)
    assert gym(rows, ["zzz", rows[1]["answer"]]).scores.tolist() == [0.0, 1.0]  # its score_answer raises on zzz
    broken = [rows[0], {**rows[1], "task": "chain_sum", "entry": {"question": "?"}}]
    with pytest.raises(HeelerError, match="the verifier reasoning-gym failed on sample 2: KeyError: 'answer'"):
        gym(broken, ["2", "2"])
    with pytest.raises(HeelerError, match="failed on sample 2: AttributeError"):
        gym([rows[0], {**rows[1], "entry": None}], ["2", "2"])
    with pytest.raises(HeelerError, match="reads the column 'task', which the prompts do not have"):
        scores(ReasoningGym(), ["2"], entry=[rows[0]["entry"]])


def test_gym_answers_that_never_end_score_0_and_the_next_sample_is_read() -> None:
    rows = reasoning_gym_prompts("countdown", size=3, seed=0)
    output = gym(rows, ["9**9**9**9", rows[1]["answer"], "1"], ReasoningGym(timeout=1.5))
    assert output.scores.tolist() == [0.0, 1.0, pytest.approx(0.05)]
    assert output.components["timeout"].tolist() == [1.0, 0.0, 0.0]
    output = gym(rows[:2], ["a" * 60 + "b", rows[1]["answer"]], ReasoningGym(r"(?:a+)+$|.*\d.*", timeout=1.5))
    assert output.scores.tolist() == [0.0, 1.0] and output.components["timeout"].tolist() == [1.0, 0.0]


def test_an_entry_whose_own_answer_never_ends() -> None:
    rows = reasoning_gym_prompts("countdown", size=1, seed=0)
    rows[0]["entry"]["answer"] = "9**9**9**9"
    says = "the task countdown takes more than 1 seconds to score the own answer of sample 1, prompt 'Calculate"
    with pytest.raises(HeelerError, match=says):
        gym(rows, ["9**9**9**9"], ReasoningGym(timeout=1))


def test_what_a_task_evaluates_stays_out_of_the_run() -> None:
    rows = reasoning_gym_prompts("string_insertion", size=2, seed=0)
    here = "[str(setattr(__import__('sys'), 'scored_here', 1))]"
    talks = "[print('{}', flush=True), __import__('os').system('echo {}'), input()]"  # no answer, no next question
    output = gym([rows[0], rows[0], rows[1]], [here, talks, rows[1]["answer"]])
    assert output.scores.tolist() == [0.0, 0.0, 1.0] and output.components["timeout"].tolist() == [0.0] * 3
    assert not hasattr(sys, "scored_here")


def test_tasks_that_cannot_be() -> None:
    row = reasoning_gym_prompts("chain_sum", size=1, seed=0)[0]
    with pytest.raises(HeelerError, match=r"Reasoning Gym has no task 'chain_sums'.*did you mean chain_sum"):
        gym([{**row, "task": "chain_sums"}], ["2"])
    with pytest.raises(HeelerError, match=r"Reasoning Gym has no task 'chain_sums'.*did you mean chain_sum"):
        reasoning_gym_prompts("chain_sums", size=1, seed=0)
    with pytest.raises(HeelerError, match=r"the task chain_sum does not take .*'colour'"):
        reasoning_gym_prompts("chain_sum", size=1, seed=0, colour=3)
    with pytest.raises(HeelerError, match=r"entry 1 of the task rearc scores 1, but 0.05 once it was written as JSON"):
        reasoning_gym_prompts("rearc", size=1, seed=1)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heeler.runtime.packages.find_spec", lambda name: None)
    for build, package in (
        (MathAnswer, "math_verify"),
        (ReasoningGym, "reasoning_gym"),
        (lambda: JSONSchema({}), "jsonschema"),
    ):
        with pytest.raises(HeelerError, match=rf"needs the package {package}.*heeler\[verifiers\]"):
            build()
