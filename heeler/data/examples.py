"""Examples for supervised fine-tuning: token sequences, and which of their tokens the model learns.

A row is one of four kinds, recognised by its columns in this order; all rows of a source are of one kind:

| columns | the loss is on |
|---|---|
| `prompt` (string), `completion` (string) | the completion |
| `prompt` (messages), `completion` (string or messages) | the assistant's turns of the completion |
| `messages` | every turn of the assistant |
| `text` | everything |

An encoder-decoder model reads the prompt in its encoder and learns the completion, so its rows are of the first two
kinds, with one turn to learn.

The tokens of a prompt are those that PPO feeds later (`tokenize_prompt`). What the model learns is tokenised apart
from what stands before it, as it is sampled apart from it, so no token straddles the two.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from heeler.data.prompts import A_PROMPT, apply_template, check_messages, tokenize_messages, tokenize_prompt
from heeler.data.tables import named_rows
from heeler.types import HeelerError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
        tokens: ids, `[T]`.
        is_target: `[T]`, whether the loss counts the prediction of the token at this place. The first token has
            nothing before it that could predict it, whatever stands here.
    """

    tokens: list[int]
    is_target: list[bool]


def load_examples(
    source: str | Sequence[Any],
    tokenizer: Any,
    *,
    max_tokens: int | None,
    name: str | None = None,
    eos: bool = True,
    too_long: Literal["error", "drop"] = "error",
    seq2seq: bool = False,
) -> list[Example]:
    """Read and tokenise examples.

    Args:
        source: what `read_rows` reads, or a list of rows.
        tokenizer: of the model; its chat template is applied to messages.
        max_tokens: the most tokens a sequence may have (the model's context); None checks nothing.
        name: what to call the rows in messages.
        eos: end each sequence with the end of sequence, where it does not end so already; it is a target.
        too_long: what to do with longer sequences; "drop" logs how many there were.
        seq2seq: the model is an encoder-decoder: completions are tokenised as the tokenizer's targets, and `max_tokens`
            limits prompt and completion each.

    Raises:
        HeelerError: no rows, missing columns, rows of different kinds, nothing to learn in a row, a sequence too
            long, a chat template whose renderings do not continue each other; with `seq2seq`, a row that is not one
            prompt and one completion.
    """
    rows, name = named_rows(source, name)
    if eos and tokenizer.eos_token_id is None:
        raise HeelerError(
            f"{name}: the tokenizer has no end-of-sequence token to end its examples with: pass eos=False"
        )
    first_kind = _kind(rows[0], f"{name}, row 1")
    examples: list[Example] = []
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        kind = _kind(row, where)
        if kind != first_kind:
            raise HeelerError(f"{where}: it holds {kind}, but row 1 holds {first_kind}: make all rows of one kind")
        example = _example(row, tokenizer, where, eos, seq2seq)
        length = len(example.tokens)
        if seq2seq:
            sources = example.is_target.index(True)
            if sources == 0 or not all(example.is_target[sources:]):
                raise HeelerError(
                    f"{where}: it holds {kind}, but an encoder-decoder model learns one completion of one prompt: give"
                    ' rows with "prompt" and "completion"'
                )
            length = max(sources, length - sources)
        if max_tokens is None or length <= max_tokens:
            examples.append(example)
        elif too_long == "error":
            raise HeelerError(
                f"{where}: {length} tokens, but the model's context holds {max_tokens}: shorten it or drop what is"
                " too long (--too-long drop)"
            )
    dropped = len(rows) - len(examples)
    if not examples:
        raise HeelerError(f"{name}: all {dropped} rows are longer than {max_tokens} tokens: shorten them")
    if dropped:
        logger.warning("%s: dropped %d of %d rows longer than %d tokens", name, dropped, len(rows), max_tokens)
    return examples


def _kind(row: Mapping[str, Any], where: str) -> str:
    given = {key for key, value in row.items() if value is not None}
    if {"prompt", "completion"} <= given:
        return "a string as prompt" if isinstance(row["prompt"], str) else "messages as prompt"
    for kind in ("messages", "text"):
        if kind in given:
            return f'"{kind}"'
    found = ", ".join(row) or "nothing"
    if "prompt" in given or "completion" in given:
        missing = "completion" if "prompt" in given else "prompt"
        raise HeelerError(f'{where}: there is no "{missing}" (found {found}): an example has "prompt" and "completion"')
    raise HeelerError(
        f'{where}: its columns ({found}) are none that examples have: name them "prompt" and "completion", "messages",'
        ' or "text"'
    )


def _example(row: Mapping[str, Any], tokenizer: Any, where: str, eos: bool, seq2seq: bool) -> Example:
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, str):
            check_messages(prompt, where, A_PROMPT, calls=True)
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            check_messages(answer, where, "a completion of messages is a string or", calls=True)
            return _conversation([*prompt, *answer], len(prompt), tokenizer, where, eos)
        ids = tokenize_prompt(prompt, tokenizer, where)
        learnt = _checked_text(completion, "completion", where)
        text = {"text_target" if seq2seq else "text": learnt}  # Marian's targets have a vocabulary of their own
        return _with_eos(ids, tokenizer(**text, add_special_tokens=False)["input_ids"], tokenizer, eos)
    if row.get("messages") is not None:
        check_messages(row["messages"], where, '"messages" is a list of', calls=True)
        return _conversation(row["messages"], 0, tokenizer, where, eos)
    return _with_eos([], tokenizer(_checked_text(row["text"], "text", where))["input_ids"], tokenizer, eos)


def _checked_text(text: Any, column: str, where: str) -> str:
    if not isinstance(text, str):
        raise HeelerError(f"{where}: its {column} is a string, not {repr(text)[:60]}")
    if not text.strip():
        raise HeelerError(f"{where}: the {column} is empty: drop the row")
    return text


def _with_eos(given: Sequence[int], learnt: Sequence[int], tokenizer: Any, eos: bool) -> Example:
    learnt = list(learnt)
    if eos and learnt[-1:] != [tokenizer.eos_token_id]:
        learnt.append(tokenizer.eos_token_id)
    return Example([*given, *learnt], [False] * len(given) + [True] * len(learnt))


def _conversation(messages: Sequence[Mapping[str, Any]], start: int, tokenizer: Any, where: str, eos: bool) -> Example:
    """The conversation up to the assistant's last turn; its turns from message `start` on are targets.

    A turn is what the template adds to the messages before it and the generation prompt, up to the end of sequence
    where the template writes one (Qwen's writes a line break after it, which no sampled turn has).
    """
    turns = [i for i in range(start, len(messages)) if messages[i]["role"] == "assistant"]
    if not turns:
        raise HeelerError(f'{where}: no message has the role "assistant": there is nothing to learn')
    if start and turns[0] != start:
        raise HeelerError(
            f'{where}: its completion begins with role "{messages[start]["role"]}": begin it with "assistant"'
        )
    if turns[0] == 0:
        raise HeelerError(f"{where}: the assistant's turn is the first message: put a message before it")
    tokens: list[int] = []
    is_target: list[bool] = []
    done = ""
    for turn in turns:
        content = messages[turn]["content"]
        if not (content or "").strip() and not messages[turn].get("tool_calls"):
            raise HeelerError(f"{where}: the assistant's message {turn + 1} is empty: drop the row")
        before = apply_template(messages[:turn], tokenizer, where, tokenize=False)
        after = apply_template(messages[: turn + 1], tokenizer, where, tokenize=False, add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise HeelerError(
                f"{where}: the chat template renders what stands before message {turn + 1} anew once that message is"
                " there, so the assistant's turns cannot be told apart: make each turn a row of its own, with"
                ' "prompt" and "completion"'
            )
        if turn == turns[0]:
            given = tokenize_messages(messages[:turn], tokenizer, where)
        else:
            given = tokenizer(before[len(done) :], add_special_tokens=False)["input_ids"]
        learnt = list(tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"])
        ends = [i for i, token in enumerate(learnt, start=1) if token == tokenizer.eos_token_id]
        num_targets = ends[-1] if ends else len(learnt)
        tokens += [*given, *learnt]
        is_target += [False] * len(given) + [i < num_targets for i in range(len(learnt))]
        done = after
    last_target = len(is_target) - is_target[::-1].index(True)
    ended = Example(tokens[:last_target], is_target[:last_target])
    if eos and ended.tokens[-1] != tokenizer.eos_token_id:
        return Example([*ended.tokens, tokenizer.eos_token_id], [*ended.is_target, True])
    return ended
