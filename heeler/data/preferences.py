"""Preferences and labels for reward models, and splits in which no prompt lies on two sides.

Texts stay texts: a reward model has its own tokenizer, and reads prompt and completion as one text (`texts_of`),
conversations in its own chat template.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, TypeVar

from heeler.data.prompts import A_PROMPT, check_messages, has_template, is_chat, texts_of
from heeler.data.tables import named_rows
from heeler.types import HeelerError

logger = logging.getLogger(__name__)
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two completions of one prompt, one of them better.

    Attributes:
        prompt: a string, or a list of chat messages.
        chosen, rejected: the texts that a reader sees, prompt included.
        margin: how much better, in units of the reward; 0 where the source does not say.
        templated: whether the texts are in the reward model's chat template, special tokens included.
        where: source and row, for messages.
    """

    prompt: Any
    chosen: str
    rejected: str
    margin: float = 0.0
    templated: bool = False
    where: str = field(default="", compare=False, repr=False)


def load_preferences(
    source: str | Sequence[Any],
    tokenizer: Any = None,
    *,
    max_tokens: int | None,
    name: str | None = None,
    too_long: Literal["error", "drop"] = "error",
) -> list[Preference]:
    """Read preferences.

    A row has `chosen`, `rejected`, perhaps `margin`, and a `prompt` where the sides do not hold it already. The sides
    continue a prompt of either kind as strings, a prompt of messages also as messages. Without a prompt of messages the
    sides may be whole conversations: the messages that both begin with are then the prompt (and a `prompt` string is
    passed over).

    Args:
        source: what `read_rows` reads, or a list of rows.
        tokenizer: of the reward model: its chat template, where it has one, is applied to conversations, and it counts
            tokens; None joins conversations by line ends, and counts nothing.
        max_tokens: the most tokens a side may have with its prompt; None checks nothing.
        name: what to call the rows in messages.
        too_long: what to do with rows whose longer side is longer; "drop" logs how many there were.

    Raises:
        HeelerError: no rows, a missing column, an empty side, sides that are equal, messages without a text each or
            that the chat template refuses, a margin that is not finite, a side too long.
    """
    rows, name = named_rows(source, name)
    preferences: list[Preference] = []
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        preference = _preference(row, tokenizer, where)
        length = 0
        if tokenizer is not None and max_tokens is not None:
            sides, special = (preference.chosen, preference.rejected), not preference.templated
            length = max(len(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in sides)
        if max_tokens is None or length <= max_tokens:
            preferences.append(preference)
        elif too_long == "error":
            raise HeelerError(
                f"{where}: {length} tokens, but the reward model reads {max_tokens}: shorten it or drop what is too"
                ' long (too_long="drop")'
            )
    dropped = len(rows) - len(preferences)
    if not preferences:
        raise HeelerError(f"{name}: all {dropped} rows are longer than {max_tokens} tokens: shorten them")
    if dropped:
        logger.warning("%s: dropped %d of %d rows longer than %d tokens", name, dropped, len(rows), max_tokens)
    return preferences


def load_labels(
    source: str | Sequence[Any], *, name: str | None = None, positive: str | None = None
) -> tuple[list[str], list[bool]]:
    """Read labelled texts: rows with `text` and `label`.

    Args:
        source: what `read_rows` reads, or a list of rows.
        name: what to call the rows in messages.
        positive: the string that means True, where labels are strings; None takes the later one in alphabetical
            order ("positive" after "negative", "1" after "0", "true" after "false").

    Returns:
        texts and labels, one each a row.

    Raises:
        HeelerError: no rows, a missing column, an empty text, labels that are neither bools, nor 0 and 1, nor two
            strings, labels all of one class.
    """
    rows, name = named_rows(source, name)
    texts: list[str] = []
    labels: list[Any] = []
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        for column in ("text", "label"):
            _need(row, column, where)
        text, label = row["text"], row["label"]
        if not isinstance(text, str) or not text.strip():
            raise HeelerError(f"{where}: the text is a string that is not empty, not {repr(text)[:60]}: drop the row")
        if not isinstance(label, str | int | float) or isinstance(label, str) != isinstance(rows[0]["label"], str):
            raise HeelerError(
                f"{where}: the label is {label!r:.60}, while the first is {rows[0]['label']!r:.60}: label all rows with"
                " true and false, 0 and 1, or two strings"
            )
        texts.append(text)
        labels.append(label)
    classes = sorted(set(labels))
    told = ", ".join(repr(c) for c in classes[:5])
    if len(classes) == 1:
        raise HeelerError(f"{name}: all {len(rows)} labels are {told}: a reward model needs both classes")
    if len(classes) > 2:
        raise HeelerError(
            f"{name}: there are {len(classes)} classes ({told}{', ...' if len(classes) > 5 else ''}): a reward model"
            " takes two"
        )
    if isinstance(classes[0], str):
        if positive is not None and positive not in classes:
            raise HeelerError(f"{name}: no label is {positive!r}: the positive class is one of {told}")
        return texts, [label == (positive or classes[1]) for label in labels]
    if classes != [0, 1]:
        raise HeelerError(f"{name}: the labels are {told}: make them 0 and 1")
    return texts, [bool(label) for label in labels]


def prompt_of(row: Any) -> Any:
    """The prompt of a preference or of an object with a `prompt`; anything else is a prompt itself."""
    return row["prompt"] if isinstance(row, Mapping) else getattr(row, "prompt", row)


def check_disjoint(parts: Mapping[str, Sequence[Any]]) -> None:
    """Raise a sentence where a prompt lies in more than one part.

    Args:
        parts: prompts (strings or lists of messages) by the name of their part; equal means equal to the letter.
    """
    keys = {part: {_key(prompt): prompt for prompt in prompts} for part, prompts in parts.items()}
    names = list(keys)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = [key for key in keys[one] if key in keys[other]]
            if shared:
                raise HeelerError(
                    f"{len(shared)} of the {len(keys[one])} prompts of {one!r} are among the {len(keys[other])} of"
                    f" {other!r} too, for instance {repr(keys[one][shared[0]])[:80]}: take them out of one of the two"
                )


def split_by_prompt(
    rows: Sequence[Row], shares: Mapping[str, float], seed: int = 0, prompt: Callable[[Row], Any] = prompt_of
) -> dict[str, list[Row]]:
    """Split rows so that all rows of a prompt lie in one part.

    A hash of the prompt decides, so a prompt's part depends on nothing else: neither on the order nor on the other
    rows. Shares are met in expectation, and a part of few rows can be empty.

    Args:
        rows: preferences, objects with a `prompt`, or prompts.
        shares: share of each part by its name; together 1.
        seed: another seed, another split.
        prompt: what a row's prompt is.

    Returns:
        the rows of each part, in their order.

    Raises:
        HeelerError: shares that are not positive, or do not make 1.
    """
    if not shares or min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise HeelerError(f"the shares {dict(shares)} must be positive and together 1")
    names, edges = list(shares), list(accumulate(shares.values()))
    parts: dict[str, list[Row]] = {part: [] for part in names}
    salt = f"{seed}\n".encode()
    for row in rows:
        digest = hashlib.blake2b(salt + _key(prompt(row)).encode(), digest_size=8).digest()
        x = int.from_bytes(digest, "big") / 2**64
        parts[names[min(bisect_right(edges, x), len(names) - 1)]].append(row)  # rounding: the last edge may miss 1
    return parts


def _key(prompt: Any) -> str:
    plain = [dict(message) for message in prompt] if is_chat(prompt) else prompt
    return json.dumps(plain, sort_keys=True, default=str)


def _need(row: Mapping[str, Any], column: str, where: str) -> None:
    if row.get(column) is None:
        raise HeelerError(f'{where}: there is no "{column}" key (found {", ".join(row) or "nothing"}): add it')


def _preference(row: Mapping[str, Any], tokenizer: Any, where: str) -> Preference:
    for side in ("chosen", "rejected"):
        _need(row, side, where)
        if not row[side]:
            raise HeelerError(f"{where}: the {side} side is empty: drop the row")
        if not isinstance(row[side], str):
            check_messages(row[side], where, f"the {side} side is a string or")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise HeelerError(f"{where}: one side is a string and the other messages: make both of one kind")
    if chosen == rejected:
        raise HeelerError(f"{where}: chosen and rejected are equal: drop the row")
    if isinstance(chosen, str):
        prompt = "" if prompt is None else prompt
    elif not is_chat(prompt):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0:
            raise HeelerError(
                f"{where}: its sides are messages that do not begin alike, and it has no prompt of messages: add the"
                ' prompt as messages under "prompt"'
            )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not isinstance(prompt, str):
        check_messages(prompt, where, A_PROMPT)
    margin = row.get("margin")
    try:
        margin = 0.0 if margin is None else float(margin)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise HeelerError(f"{where}: the margin {row['margin']!r} is no finite number: correct it or leave it out")
    return Preference(
        prompt=prompt,
        chosen=_text(prompt, chosen, "chosen", tokenizer, where),
        rejected=_text(prompt, rejected, "rejected", tokenizer, where),
        margin=margin,
        templated=has_template(prompt, tokenizer),
        where=where,
    )


def _text(prompt: Any, side: Any, which: str, tokenizer: Any, where: str) -> str:
    said = side if isinstance(side, str) else "".join(message["content"] for message in side)
    if not said.strip():
        raise HeelerError(f"{where}: the {which} side is empty: drop the row")
    return texts_of([prompt], [side], tokenizer, where)[0]
