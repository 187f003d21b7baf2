from __future__ import annotations

from pathlib import Path

from heeler.data.prompts import load_prompts
from heeler.policies.loading import load_tokenizer

TEMPLATE = "".join(
    [
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
        "{% if add_generation_prompt %}<bot>{% endif %}",
    ]
)


def test_chat_prompts_take_the_template(tiny_llama: str) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    loaded = load_prompts(
        [messages, [*messages, {"role": "bot", "content": "yo"}, *messages]], tokenizer, max_tokens=None
    )
    assert tokenizer.decode(loaded.tokens[0]) == "<user>hi<bot>"
    assert tokenizer.decode(loaded.tokens[1]) == "<user>hi<bot>yo<user>hi<bot>"
    assert loaded.prompts[0] == messages


def test_columns_and_blank_lines(tiny_llama: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "é", "n": 1}\n\n{"n": 2, "prompt": "b"}\n', encoding="utf-8")
    loaded = load_prompts(str(file), load_tokenizer(tiny_llama), max_tokens=10)
    assert loaded.prompts == ["é", "b"] and loaded.columns == {"n": [1, 2]} and len(loaded) == 2
    assert [len(t) for t in loaded.tokens] == [2, 1]  # the tokenizer reads bytes
