"""Prompt sets: files, data sets or Python lists, strings or chat messages, tokenised and checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heeler.data.tables import read_rows
from heeler.types import HeelerError

Message = Mapping[str, str]
A_PROMPT = "a prompt is a string or a list of"


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts with their tokens and the other columns of their file.

    Attributes:
        prompts: strings, or lists of chat messages (`{"role": ..., "content": ...}`).
        tokens: ids of each prompt, chat template applied.
        columns: every other column, one value a prompt.
        name: where they came from, for messages.
    """

    prompts: Sequence[Any]
    tokens: Sequence[list[int]]
    columns: Mapping[str, Sequence[Any]]
    name: str

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(
    source: str | Sequence[Any], tokenizer: Any, *, max_tokens: int | None, name: str | None = None
) -> PromptSet:
    """Read and tokenise prompts.

    Args:
        source: what `read_rows` reads (a file, or the id of a data set) with a `prompt` column, or a list of
            strings, of message lists, or of objects with a `prompt` key.
        tokenizer: of the policy; its chat template is applied to messages.
        max_tokens: the most tokens a prompt may have (context minus completion); None checks nothing.
        name: what to call the prompts in messages.

    Raises:
        HeelerError: no prompts, an empty one, one too long, a row without `prompt`, columns that differ.
    """
    if isinstance(source, str):
        rows, name = read_rows(source), name or source
    else:
        rows = [dict(row) if isinstance(row, Mapping) else {"prompt": row} for row in source]
        name = name or "the prompts"
    if not rows:
        raise HeelerError(f"{name}: no prompts in it")
    names = rows[0].keys()
    prompts: list[Any] = []
    tokens: list[list[int]] = []
    for number, row in enumerate(rows, start=1):
        where = f"{name}, prompt {number}"
        if "prompt" not in row:
            raise HeelerError(f'{where}: there is no "prompt" key (found {", ".join(row) or "nothing"})')
        if row.keys() != names:
            raise HeelerError(
                f"{where}: its columns ({', '.join(row)}) differ from the first prompt's ({', '.join(names)})"
            )
        ids = tokenize_prompt(row["prompt"], tokenizer, where)
        if max_tokens is not None and len(ids) > max_tokens:
            raise HeelerError(
                f"{where}: {len(ids)} tokens, but the model's context leaves room for {max_tokens} before the"
                " completion: shorten the prompt or allow fewer new tokens"
            )
        prompts.append(row["prompt"])
        tokens.append(ids)
    columns = {column: [row[column] for row in rows] for column in names if column != "prompt"}
    return PromptSet(prompts=prompts, tokens=tokens, columns=columns, name=name)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages, at least one."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)
    )


def check_messages(value: Any, where: str, what: str, *, calls: bool = False) -> None:
    """Raise a sentence where a value is no list of chat messages with a text each.

    Args:
        value: anything but a string.
        where: source and row.
        what: the sentence up to "messages", as in "a prompt is a string or a list of".
        calls: a message with tool calls may have null as content, for the template to render.
    """
    messages: Sequence[Any] = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise HeelerError(f'{where}: {what} messages with "role" and "content", not {repr(value)[:60]}')
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            given, calling = message.get(key), key == "content" and message.get("tool_calls")
            if isinstance(given, str) or (calls and calling and given is None and key in message):
                continue
            found, cure = repr(given)[:60], "make it a string"
            if given is None:
                found = "null" if key in message else "missing"
                cure = 'give it a string, "" where it only calls a tool' if calling else "give it one, or drop the row"
            elif isinstance(given, Sequence):
                found, cure = "a list of parts", "join their texts into one string"
            raise HeelerError(
                f"{where}: {what} messages with strings as role and content, but the {key} of message {number} is"
                f" {found}: {cure}"
            )


def has_template(prompt: Any, tokenizer: Any) -> bool:
    """Whether a reward model with this tokenizer (or None) reads what follows `prompt` in its chat template.

    A text of the template holds its special tokens already: it is tokenised without any more.
    """
    return not isinstance(prompt, str) and getattr(tokenizer, "chat_template", None) is not None


def texts_of(prompts: Sequence[Any], completions: Sequence[Any], tokenizer: Any = None, where: str = "") -> list[str]:
    """What a reader sees: the prompt and its continuation.

    A conversation is in the chat template of the reader, where it has one, up to the end of the answer; else its
    contents are joined by line ends.

    Args:
        prompts: strings, or lists of messages.
        completions: strings, or lists of messages where the prompt is one.
        tokenizer: of the reader; None where it has none.
        where: who reads what, for messages.

    Raises:
        HeelerError: the template refuses a conversation.
    """
    texts: list[str] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            texts.append(prompt + completion)
            continue
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        messages = [*prompt, *answer]
        if has_template(prompt, tokenizer):
            texts.append(apply_template(messages, tokenizer, where, add_generation_prompt=False, tokenize=False))
        else:
            texts.append("\n".join(message["content"] for message in messages))
    return texts


def without_template(name: str) -> str:
    """What is said once where a reward model without a chat template reads conversations."""
    return f"{name} has no chat template: it reads conversations as their contents, joined by line ends, without roles"


def tokenize_prompt(prompt: Any, tokenizer: Any, where: str) -> list[int]:
    """The ids that a model reads before it completes a prompt.

    A string gets the tokenizer's special tokens; messages get the chat template, up to where the answer begins.

    Raises:
        HeelerError: an empty prompt, messages without a text each, without a chat template or that it refuses,
            anything else.
    """
    if isinstance(prompt, str):
        ids: list[int] = list(tokenizer(prompt)["input_ids"])
        if not prompt.strip() or not ids:
            raise HeelerError(f"{where}: the prompt is empty")
        return ids
    check_messages(prompt, where, A_PROMPT)
    return tokenize_messages(prompt, tokenizer, where)


def tokenize_messages(messages: Sequence[Message], tokenizer: Any, where: str) -> list[int]:
    """The ids of messages in the chat template, up to where the answer begins."""
    return list(apply_template(messages, tokenizer, where, tokenize=True, return_dict=True)["input_ids"])


def apply_template(
    messages: Sequence[Message], tokenizer: Any, where: str, *, add_generation_prompt: bool = True, **options: Any
) -> Any:
    """What the tokenizer's chat template makes of messages; `options` as for `apply_chat_template`."""
    if tokenizer.chat_template is None:
        raise HeelerError(f"{where}: it is a list of messages, but the tokenizer has no chat template: use a string")
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # templates raise what they like, for instance where roles do not alternate
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HeelerError(
            f"{where}: the tokenizer's chat template refuses the messages ({reason.rstrip('.')}): change them to what"
            " it expects"
        ) from error
