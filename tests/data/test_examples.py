"""Examples for supervised fine-tuning: what is learnt, and that prompts look as they do in PPO."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from heeler.data.examples import Example, load_examples
from heeler.data.prompts import load_prompts
from heeler.policies.loading import load_tokenizer
from heeler.types import HeelerError

TURNS = "".join(  # ends a turn with the end of sequence and a line break, as ChatML does
    [
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}",
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    ]
)
PLAIN = TURNS.replace("<eos>", "")
FORGETS = TURNS.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '' }}")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + TURNS
HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
MORE = {"role": "user", "content": "more"}
NO = {"role": "assistant", "content": "no"}


@pytest.fixture
def tokenizer(tiny_llama: str) -> Any:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TURNS
    return tokenizer


def one(row: Any, tokenizer: Any, **options: Any) -> Example:
    (example,) = load_examples([row], tokenizer, max_tokens=None, **options)
    assert len(example.tokens) == len(example.is_target)
    return example


def learnt(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode([t for t, target in zip(example.tokens, example.is_target, strict=True) if target])


def test_strings(tokenizer: Any) -> None:
    example = one({"prompt": "ab", "completion": " cd", "other": 1}, tokenizer)
    prompt = load_prompts(["ab"], tokenizer, max_tokens=None).tokens[0]
    assert example.tokens == [*prompt, *tokenizer(" cd")["input_ids"], tokenizer.eos_token_id]
    assert example.is_target == [False] * 2 + [True] * 4
    assert learnt(one({"prompt": "ab", "completion": "cd<eos>"}, tokenizer), tokenizer) == "cd<eos>"
    assert learnt(one({"prompt": "ab", "completion": "cd"}, tokenizer, eos=False), tokenizer) == "cd"
    assert all(one({"text": "ab"}, tokenizer).is_target)
    assert tokenizer.decode(one({"text": "ab"}, tokenizer).tokens) == "ab<eos>"


def test_special_tokens_stand_before_the_prompt_only(tokenizer: Any) -> None:
    from tokenizers import processors

    first = ("<", tokenizer.convert_tokens_to_ids("<"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="< $A", special_tokens=[first])
    example = one({"prompt": "ab", "completion": "cd"}, tokenizer)
    assert tokenizer.decode(example.tokens) == "<abcd<eos>" and learnt(example, tokenizer) == "cd<eos>"
    assert example.tokens[:3] == load_prompts(["ab"], tokenizer, max_tokens=None).tokens[0]
    assert tokenizer.decode(one({"text": "ab"}, tokenizer).tokens) == "<ab<eos>"
    chat = one({"messages": [HI, YO]}, tokenizer)
    assert tokenizer.decode(chat.tokens) == "<user>hi<eos>\n<assistant>yo<eos>"


@pytest.mark.parametrize("completion", ["yo", [YO]])
def test_a_prompt_of_messages(tokenizer: Any, completion: Any) -> None:
    example = one({"prompt": [HI, NO, MORE], "completion": completion}, tokenizer)
    prompt = load_prompts([[HI, NO, MORE]], tokenizer, max_tokens=None).tokens[0]
    assert example.tokens[: len(prompt)] == prompt
    assert tokenizer.decode(example.tokens[len(prompt) :]) == learnt(example, tokenizer) == "yo<eos>"
    assert not any(example.is_target[: len(prompt)])


def test_a_conversation(tokenizer: Any) -> None:
    example = one({"messages": [HI, YO, MORE, NO, HI]}, tokenizer)
    text = "<user>hi<eos>\n<assistant>yo<eos>\n<user>more<eos>\n<assistant>no<eos>"
    assert tokenizer.decode(example.tokens) == text  # nothing after the last turn of the assistant
    assert learnt(example, tokenizer) == "yo<eos>no<eos>"
    completion = one({"prompt": [HI], "completion": [YO, MORE, NO]}, tokenizer)
    assert completion == example
    tokenizer.chat_template = PLAIN
    assert learnt(one({"messages": [HI, YO, MORE, NO]}, tokenizer), tokenizer) == "yo\nno\n<eos>"
    assert learnt(one({"messages": [HI, YO, MORE, NO]}, tokenizer, eos=False), tokenizer) == "yo\nno\n"


def test_a_template_that_forgets(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETS
    assert learnt(one({"prompt": [HI, YO, MORE], "completion": [NO]}, tokenizer), tokenizer) == "no<eos>"
    with pytest.raises(HeelerError, match="row 1: the chat template renders what stands before message 4 anew"):
        one({"messages": [HI, YO, MORE, NO]}, tokenizer)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "the rows: there are no rows in it"),
        (["a"], "row 1: expected an object with named columns, got 'a'"),
        ([{"prompt": "a"}], r'row 1: there is no "completion" \(found prompt\)'),
        ([{"completion": "a", "n": 1}], r'row 1: there is no "prompt" \(found completion, n\)'),
        ([{"question": "a"}], r"row 1: its columns \(question\) are none that examples have"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], 'row 2: it holds a string as prompt, but row 1 .*"text"'),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": [HI], "completion": "b"}],
            "row 2: it holds messages as prompt, but row 1 holds a string as prompt",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], "row 2: the completion is empty"),
        ([{"prompt": " ", "completion": "b"}], "row 1: the prompt is empty"),
        ([{"prompt": "a", "completion": [YO]}], "row 1: its completion is a string"),
        ([{"prompt": [HI], "completion": ""}], "row 1: the assistant's message 2 is empty"),
        ([{"prompt": [HI], "completion": []}], r"row 1: a completion of messages is .* not \[\]"),
        ([{"prompt": [HI], "completion": [MORE, YO]}], 'row 1: its completion begins with role "user"'),
        ([{"prompt": 7, "completion": "a"}], "row 1: a prompt is a string or a list of messages"),
        ([{"text": ""}], "row 1: the text is empty"),
        ([{"text": 7}], "row 1: its text is a string, not 7"),
        ([{"messages": "hi"}], 'row 1: "messages" is a list of messages'),
        ([{"messages": [HI]}], 'row 1: no message has the role "assistant"'),
        ([{"messages": [YO, HI]}], "row 1: the assistant's turn is the first message"),
        ([{"messages": [HI, {**YO, "content": " "}]}], "row 1: the assistant's message 2 is empty"),
        ([{"messages": [{**HI, "role": "system"}, YO]}], r"row 1: .* refuses the messages \(no system, please\)"),
        ([{"text": "ab"}, {"text": "x" * 40}], "row 2: 41 tokens, but .* context holds 40: .*--too-long drop"),
    ],
)
def test_bad_rows(tokenizer: Any, rows: list[Any], says: str) -> None:
    tokenizer.chat_template = REFUSES
    with pytest.raises(HeelerError, match=says) as caught:
        load_examples(rows, tokenizer, max_tokens=40)
    assert "\n" not in str(caught.value)


def test_tokenizers_that_lack_something(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(HeelerError, match=r"row 1: .* the tokenizer has no chat template"):
        one({"messages": [HI, YO]}, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(HeelerError, match=r"no end-of-sequence token .* pass eos=False"):
        one({"text": "a"}, tokenizer)
    assert tokenizer.decode(one({"text": "a"}, tokenizer, eos=False).tokens) == "a"


def test_dropping(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "ab"}, {"text": "x" * 40}, {"text": "x" * 39}]
    with caplog.at_level(logging.WARNING):
        examples = load_examples(rows, tokenizer, max_tokens=40, too_long="drop", name="mine")
    assert [len(e.tokens) for e in examples] == [3, 40]
    assert caplog.messages == ["mine: dropped 1 of 3 rows longer than 40 tokens"]
    with pytest.raises(HeelerError, match="all 3 rows are longer than 2 tokens"):
        load_examples(rows, tokenizer, max_tokens=2, too_long="drop")


def plain_best_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [max_tokens - sum(lengths[j] for j in row) for row in rows]
        fits = [(left[r], r) for r in range(len(rows)) if left[r] >= lengths[i]]
        if fits:
            rows[min(fits)[1]].append(i)
        else:
            rows.append([i])
    return rows
