"""Preferences, labels and splits for reward models."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.data.preferences import Preference, check_disjoint, load_labels, load_preferences, split_by_prompt
from heeler.data.prompts import texts_of
from heeler.policies.loading import load_tokenizer
from heeler.types import HeelerError

HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
NO = {"role": "assistant", "content": "no"}


def load(*rows: Any, **options: Any) -> list[Preference]:
    return load_preferences(list(rows), max_tokens=None, **options)


def test_forms() -> None:
    (strings,) = load({"prompt": "a", "chosen": " b", "rejected": "", "margin": "0.5"} | {"rejected": " c"})
    assert strings == Preference(prompt="a", chosen="a b", rejected="a c", margin=0.5)
    chosen, rejected = texts_of([[HI], [HI]], ["yo", "no"])  # what the classifier reads in PPO
    chat = Preference(prompt=[HI], chosen=chosen, rejected=rejected)
    assert load(
        {"prompt": [HI], "chosen": "yo", "rejected": "no"},
        {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
        {"chosen": [HI, YO], "rejected": [HI, NO], "prompt": None, "margin": None},
        {"chosen": [HI, YO], "rejected": [HI, NO], "prompt": "hi"},
    ) == [chat, chat, chat, chat]
    (long,) = load({"chosen": [HI, YO, HI, YO], "rejected": [HI, YO, HI, NO]})
    assert long.prompt == [HI, YO, HI] and long.rejected == "hi\nyo\nhi\nno"
    (turns,) = load({"chosen": [HI, YO, HI, NO], "rejected": [HI, NO]})
    assert turns.prompt == [HI] and turns.chosen == "hi\nyo\nhi\nno" and turns.margin == 0.0


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,chosen,rejected,margin\na, b, c,-1\n")
    (read,) = load_preferences(str(file), max_tokens=None)
    assert read.margin == -1.0 and read.where == f"{file}, row 1"
    file.write_text("prompt,chosen,rejected\na, b, c\na,x,x\n")
    with pytest.raises(HeelerError, match=r"p\.csv, row 2: chosen and rejected are equal"):
        load_preferences(str(file), max_tokens=None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chosen": None}, 'there is no "chosen" key'),
        ({"rejected": None}, 'there is no "rejected" key'),
        ({"chosen": " "}, "the chosen side is empty"),
        ({"rejected": ""}, "the rejected side is empty"),
        ({"rejected": []}, "the rejected side is empty"),
        ({"rejected": "b"}, "chosen and rejected are equal"),
        ({"chosen": 7}, "the chosen side is a string or messages .* not 7"),
        ({"chosen": [YO]}, "one side is a string and the other messages"),
        ({"chosen": [YO], "rejected": [NO]}, "do not begin alike, and it has no prompt of messages"),
        ({"chosen": [HI, YO], "rejected": [HI]}, "the rejected side is empty"),
        (
            {"chosen": [HI, {**YO, "content": None}], "rejected": [HI, NO]},
            "the content of message 2 is null: give it one",
        ),
        ({"prompt": [7]}, "a prompt is a string or a list of messages"),
        ({"margin": math.inf}, "the margin inf is no finite number"),
        ({"margin": "nan"}, "the margin 'nan' is no finite number"),
        ({"margin": "much"}, "the margin 'much' is no finite number"),
    ],
)
def test_bad_rows(change: dict[str, Any], says: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(HeelerError, match=f"mine, row 2: .*{says}") as caught:
        load(row, row | change, name="mine")
    assert "\n" not in str(caught.value)


def test_long_sides(tiny_llama: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * 9}, {"prompt": "a", "chosen": "b", "rejected": "c" * 10}]
    with pytest.raises(HeelerError, match="row 2: 11 tokens, but the reward model reads 10"):
        load_preferences(rows, tokenizer, max_tokens=10)
    with caplog.at_level(logging.WARNING):
        assert len(load_preferences(rows, tokenizer, max_tokens=10, too_long="drop")) == 1
    assert "dropped 1 of 2 rows" in caplog.text
    with pytest.raises(HeelerError, match="all 2 rows are longer"):
        load_preferences(rows, tokenizer, max_tokens=3, too_long="drop")


@pytest.mark.parametrize(
    "labels", [(True, False), (1, 0), (1.0, 0), ("1", "0"), ("pos", "neg"), ("true", "false"), ("good", "bad")]
)
def test_labels(labels: tuple[Any, Any]) -> None:
    rows = [{"text": "a", "label": labels[0]}, {"text": "b", "label": labels[1]}, {"text": "c", "label": labels[0]}]
    texts, read = load_labels(rows)
    assert texts == ["a", "b", "c"] and read == [True, False, True]
    assert all(type(label) is bool for label in read)


def test_a_named_positive_class() -> None:
    rows = [{"text": "a", "label": "ham"}, {"text": "b", "label": "spam"}]
    assert load_labels(rows, positive="ham")[1] == [True, False]
    with pytest.raises(HeelerError, match="no label is 'eggs': the positive class is one of 'ham', 'spam'"):
        load_labels(rows, positive="eggs")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1, 1], "all 2 labels are 1: a reward model needs both classes"),
        (["a", "a"], "all 2 labels are 'a'"),
        ([0, 1, 2], r"there are 3 classes \(0, 1, 2\)"),
        (list("abcdef"), r"there are 6 classes \('a', 'b', 'c', 'd', 'e', ...\)"),
        ([1, 2], "the labels are 1, 2: make them 0 and 1"),
        ([1, "a"], "row 2: the label is 'a', while the first is 1"),
        ([1, None], 'row 2: there is no "label" key'),
        ([1, [0]], r"row 2: the label is \[0\]"),
    ],
)
def test_bad_labels(labels: list[Any], says: str) -> None:
    with pytest.raises(HeelerError, match=says):
        load_labels([{"text": "a", "label": label} for label in labels])


def test_bad_texts() -> None:
    with pytest.raises(HeelerError, match="row 2: the text is a string that is not empty, not ' '"):
        load_labels([{"text": "a", "label": 1}, {"text": " ", "label": 0}])


def test_disjoint_parts() -> None:
    check_disjoint({"train": ["a", "b", "a"], "test": ["c"], "more": [[HI]]})
    with pytest.raises(HeelerError, match=r"1 of the 2 prompts of 'train' are among the 2 of 'test' too.*'b'"):
        check_disjoint({"train": ["a", "b", "a"], "other": ["x"], "test": ["b", "c"]})
    with pytest.raises(HeelerError, match="'one' are among"):
        check_disjoint({"one": [[HI]], "two": [[{"content": "hi", "role": "user"}]]})


SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


@given(st.lists(st.integers(0, 40).map(str), max_size=50), st.integers(0, 3), st.integers(0, 9))
def test_splits(prompts: list[str], seed: int, shuffle: int) -> None:
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate(prompts)]
    parts = split_by_prompt(rows, SHARES, seed)
    assert list(parts) == list(SHARES)
    assert sorted(row["n"] for part in parts.values() for row in part) == list(range(len(rows)))
    assert all([row["n"] for row in part] == sorted(row["n"] for row in part) for part in parts.values())
    check_disjoint({name: [row["prompt"] for row in part] for name, part in parts.items()})
    shuffled = random.Random(shuffle).sample(rows, len(rows))
    again = split_by_prompt(shuffled[: len(rows) // 2], SHARES, seed)
    assert all(row in parts[name] for name, part in again.items() for row in part)


def test_shares_and_seeds() -> None:
    prompts = [f"prompt {i}" for i in range(4000)]
    parts = split_by_prompt(prompts, SHARES)
    for name, share in SHARES.items():
        assert len(parts[name]) / 4000 == pytest.approx(share, abs=0.03)
    assert parts != split_by_prompt(prompts, SHARES, seed=1)
    preferences = [Preference(prompt=[HI], chosen="a", rejected="b"), Preference(prompt=[HI], chosen="c", rejected="d")]
    assert [len(part) for part in split_by_prompt(preferences, SHARES).values() if part] == [2]
    lengths = split_by_prompt(["a", "b", "cc"], {"one": 0.5, "two": 0.5}, prompt=lambda row: str(len(row)))
    assert any({"a", "b"} <= set(part) for part in lengths.values())
    for shares in ({}, {"a": 1.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(HeelerError, match="must be positive and together 1"):
            split_by_prompt(prompts, shares)


@pytest.mark.parametrize("row", [{}, {"prompt": ""}, {"prompt": None}])
def test_whole_texts_need_no_prompt(row: dict[str, Any]) -> None:
    preference = load_preferences([{**row, "chosen": "a good film", "rejected": "a bad film"}], max_tokens=None)[0]
    assert (preference.prompt, preference.chosen, preference.rejected) == ("", "a good film", "a bad film")
