"""Prompt sets: files, data sets or Python lists, strings or chat messages, tokenised and checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heeler.data.tables import read_rows
from heeler.types import HeelerError

Message = Mapping[str, str]


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


def texts_of(prompts: Sequence[Any], completions: Sequence[str]) -> list[str]:
    """What a reader sees: the prompt and its continuation (for chats, the conversation's contents)."""
    texts: list[str] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            texts.append(prompt + completion)
        else:
            texts.append("\n".join([*(message["content"] for message in prompt), completion]))
    return texts


def tokenize_prompt(prompt: Any, tokenizer: Any, where: str) -> list[int]:
    """The ids that a model reads before it completes a prompt.

    A string gets the tokenizer's special tokens; messages get the chat template, up to where the answer begins.

    Raises:
        HeelerError: an empty prompt, messages without a chat template or that it refuses, anything else.
    """
    if isinstance(prompt, str):
        ids: list[int] = list(tokenizer(prompt)["input_ids"])
        if not prompt.strip() or not ids:
            raise HeelerError(f"{where}: the prompt is empty")
        return ids
    if is_chat(prompt):
        encoded = apply_template(prompt, tokenizer, where, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])
    raise HeelerError(
        f'{where}: a prompt is a string or a list of messages with "role" and "content", not {repr(prompt)[:60]}'
    )


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
