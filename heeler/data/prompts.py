"""Prompt sets: JSONL files or Python lists, strings or chat messages, tokenised and checked once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_jsonl(path: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped, a broken line is named by its number."""
    file = Path(path)
    if not file.is_file():
        raise HeelerError(f"there is no file {path}: give a JSONL file with one object a line")
    rows: list[dict[str, Any]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise HeelerError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise HeelerError(f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise HeelerError(
                f'{path}, line {number}: expected an object such as {{"prompt": ...}}, got {line.strip()[:40]}'
            )
        rows.append(row)
    return rows


def load_prompts(
    source: str | Sequence[Any], tokenizer: Any, *, max_tokens: int | None, name: str | None = None
) -> PromptSet:
    """Read and tokenise prompts.

    Args:
        source: path of a JSONL file with a `prompt` column, or a list of strings, of message lists, or of
            objects with a `prompt` key.
        tokenizer: of the policy; its chat template is applied to messages.
        max_tokens: the most tokens a prompt may have (context minus completion); None checks nothing.
        name: what to call the prompts in messages.

    Raises:
        HeelerError: no prompts, an empty one, one too long, a row without `prompt`, columns that differ.
    """
    if isinstance(source, str):
        rows, name = read_jsonl(source), name or source
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
        ids = _tokenize(row["prompt"], tokenizer, where)
        if max_tokens is not None and len(ids) > max_tokens:
            raise HeelerError(
                f"{where}: {len(ids)} tokens, but the model's context leaves room for {max_tokens} before the"
                " completion: shorten the prompt or allow fewer new tokens"
            )
        prompts.append(row["prompt"])
        tokens.append(ids)
    columns = {column: [row[column] for row in rows] for column in names if column != "prompt"}
    return PromptSet(prompts=prompts, tokens=tokens, columns=columns, name=name)


def _tokenize(prompt: Any, tokenizer: Any, where: str) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = list(tokenizer(prompt)["input_ids"])
        if not prompt.strip() or not ids:
            raise HeelerError(f"{where}: the prompt is empty")
        return ids
    if isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) and "content" in m for m in prompt):
        if tokenizer.chat_template is None:
            raise HeelerError(
                f"{where}: it is a list of messages, but the tokenizer has no chat template: use a string"
            )
        encoded = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])
    raise HeelerError(
        f'{where}: a prompt is a string or a list of messages with "role" and "content", not {json.dumps(prompt)[:60]}'
    )
