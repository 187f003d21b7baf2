"""Messages that are no text get one sentence, with file and row, whatever reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heeler.cli import main
from heeler.data.examples import load_examples
from heeler.data.preferences import load_preferences
from heeler.data.prompts import load_prompts
from heeler.policies.loading import load_tokenizer
from heeler.types import HeelerError

TEMPLATE = "".join(
    [
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if m['content'] is not none else '' }}",
        "{% if m['tool_calls'] %}call {{ m['tool_calls'][0]['name'] }}{% endif %}{% endfor %}",
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    ]
)
HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
NO = {"role": "assistant", "content": "no"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
READERS: dict[str, tuple[Any, dict[str, Any]]] = {  # what reads a row, and the row, in which ... stands for messages
    "prompts": (load_prompts, {"prompt": ...}),
    "examples, prompt": (load_examples, {"prompt": ..., "completion": "yo"}),
    "examples, completion": (load_examples, {"prompt": [HI], "completion": ...}),
    "examples, messages": (load_examples, {"messages": ...}),
    "preferences, prompt": (load_preferences, {"prompt": ..., "chosen": "yo", "rejected": "no"}),
    "preferences, side": (load_preferences, {"prompt": [HI], "chosen": ..., "rejected": [NO]}),
    "preferences, conversations": (load_preferences, {"chosen": [HI, NO], "rejected": ...}),
}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": None}, "the content of message 2 is null: give it one, or drop the row"),
        ({"role": "user"}, "the content of message 2 is missing: give it one, or drop the row"),
        ({"content": "hi"}, "the role of message 2 is missing: give it one"),
        ({"role": None, "content": "hi", "tool_calls": [{}]}, "the role of message 2 is null: give it one"),
        ({"role": 7, "content": "hi"}, "the role of message 2 is 7: make it a string"),
        ({"role": "user", "content": [{"type": "text", "text": "hi"}]}, "2 is a list of parts: join their texts into"),
        (CALL, 'the content of message 2 is null: give it a string, "" where it only calls a tool'),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_faults(tiny_llama: str, tmp_path: Path, reader: str, message: Any, says: str) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    read, row = READERS[reader]
    first = YO if reader == "examples, completion" else HI
    given = [[first, YO], [first, message]]
    rows = [{key: messages if value is ... else value for key, value in row.items()} for messages in given]
    file = write(tmp_path / "rows.jsonl", rows)
    if message is CALL and read is load_examples:
        (_, example) = read(file, tokenizer, max_tokens=None)  # the template knows what to do with it
        assert "call f" in tokenizer.decode(example.tokens)
        return
    with pytest.raises(HeelerError) as caught:
        read(file, tokenizer, max_tokens=None)
    where, sentence = str(caught.value).split(": ", 1)
    assert where == f"{file}, {'prompt' if read is load_prompts else 'row'} 2"
    assert says in sentence and "\n" not in sentence


@pytest.mark.parametrize("verb", ["ppo", "sft", "reward"])
def test_commands_say_it_and_leave_nothing(
    verb: str, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    null = [{"role": "user", "content": None}]
    rows = {
        "ppo": {"prompt": null},
        "sft": {"prompt": null, "completion": "yo"},
        "reward": {"prompt": null, "chosen": "yo", "rejected": "no"},
    }
    data = write(Path("rows.jsonl"), [rows[verb]])
    words = {"ppo": ["ppo", "lm", "--reward", "length", "--prompts"], "sft": ["sft", "--data"]}
    words["reward"] = ["reward", "--data"]
    assert main([*words[verb], data, "--model", tiny_llama, "--out", "run", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("heeler: rows.jsonl, ") and "the content of message 1 is null" in error
    assert "Traceback" not in error and not Path("run").exists()
