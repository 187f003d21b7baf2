"""A user's own files in the recipes: read and checked before anything is trained, and a part of them held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from heeler.data.tables import named_rows
from heeler.data.translation import Pair
from heeler.policies import loading
from heeler.policies.language_model import TopLayers
from heeler.types import HeelerError

SHARE, MOST = 0.2, 256  # of the questions are held out where no file holds them, and at most so many
Row = TypeVar("Row")


@dataclass(frozen=True)
class Start:
    """What a recipe must know of the model that it starts from, without its weights."""

    path: str
    tokenizer: Any
    config: Any

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def context(self) -> int | None:
        """Tokens of the longest sequence, None where nothing says."""
        return loading.context_length(SimpleNamespace(config=self.config))

    def room(self, max_new_tokens: int) -> int | None:
        """Tokens of the longest prompt, None where nothing limits it."""
        return loading.prompt_room(SimpleNamespace(config=self.config), max_new_tokens)

    def top(self, layers: int) -> TopLayers:
        """The top layers, or all where the model has fewer."""
        return TopLayers(layers=min(layers, self.layers))


def start_of(path: str, seq2seq: bool = False) -> Start:
    """The tokenizer and the config of a model.

    Raises:
        HeelerError: there is none, or it is of the other kind than `seq2seq` says.
    """
    tokenizer = loading.load_tokenizer(path)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(loading.model_folder(path))
    except (OSError, ValueError) as error:
        raise HeelerError(f"{path} has a tokenizer, but no config of a model: give a model's folder or id") from error
    if loading.is_seq2seq(path) != seq2seq:
        found, wanted = ("a causal", "an encoder-decoder") if seq2seq else ("an encoder-decoder", "a causal")
        raise HeelerError(f"{path} is {found} model: this recipe trains {wanted} one")
    if not seq2seq and not getattr(config.get_text_config(decoder=True), "num_hidden_layers", None):
        raise HeelerError(f"the config of {path} does not say how many layers it has, so the top ones cannot be chosen")
    return Start(path, tokenizer, config)


def digest(*sources: Any) -> str:
    """Of rows: a recipe that goes on tells by it that a file has changed."""
    return hashlib.blake2b(json.dumps(sources, default=str).encode(), digest_size=8).hexdigest()


def key_of(prompt: Any) -> str:
    """What makes two prompts, strings or messages, the same."""
    return json.dumps(prompt, sort_keys=True, default=str)


def hold_out(
    rows: Sequence[Row], keys: Sequence[str], seed: int, name: str, share: float = SHARE, most: int = MOST
) -> tuple[list[Row], list[Row]]:
    """`(held out, the rest)`: the rows of `share` of the different keys, drawn by the seed, and of at most `most`.

    Raises:
        HeelerError: the keys are fewer than two.
    """
    different = list(dict.fromkeys(keys))
    if len(different) < 2:
        raise HeelerError(f"{name}: all its rows have one prompt, so none can be held out: give more")
    random.Random(seed).shuffle(different)
    chosen = set(different[: min(most, max(1, round(share * len(different))))])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, key in zip(rows, keys, strict=True):
        parts[key not in chosen].append(row)
    return parts


def asked(question: str) -> str:
    """A question as a prompt."""
    return question if question.endswith("=") else f"{question.strip()}\nAnswer:"


def read_questions(source: str) -> list[dict[str, Any]]:
    """Rows `{"prompt", "answer"}`, every question once, the answer a list of all that are accepted.

    A row has a `question`, or a `prompt` that is taken as it is, and an `answer`: a string, a number or a list of them.
    """
    rows, name = named_rows(source, None)
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        column, question = _first(row, ("question", "prompt"), where)
        if column == "question":
            if not isinstance(question, str) or not question.strip():
                raise HeelerError(f"{where}: a question is a string that is not empty, not {repr(question)[:60]}")
            question = asked(question)
        _, answer = _first(row, ("answer",), where)
        answers = answer if isinstance(answer, list) else [answer]
        texts = [str(a).strip() for a in answers if isinstance(a, str | int | float) and not isinstance(a, bool)]
        if not texts or len(texts) < len(answers) or not all(texts):
            raise HeelerError(
                f"{where}: the answer is {repr(answer)[:60]}: write a string, a number or a list of these, none empty"
            )
        known = found.setdefault(key_of(question), {"prompt": question, "answer": []})["answer"]
        known += [text for text in dict.fromkeys(texts) if text not in known]
    return list(found.values())


def read_pairs(source: str) -> list[Pair]:
    """Translations: rows with `source` and `target`, or with `prompt` and `completion` as fine-tuning reads them."""
    rows, name = named_rows(source, None)
    pairs: list[Pair] = []
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        sides = [_first(row, columns, where) for columns in (("source", "prompt"), ("target", "completion"))]
        for column, text in sides:
            if not isinstance(text, str):
                raise HeelerError(f"{where}: its {column} is a string, not {repr(text)[:60]}")
        pairs.append(Pair(sides[0][1], sides[1][1]))
    return pairs


def _first(row: Mapping[str, Any], columns: Sequence[str], where: str) -> tuple[str, Any]:
    """The first of these columns that the row has, and its value."""
    for column in columns:
        if row.get(column) is not None:
            return column, row[column]
    wanted = " or ".join(f'"{column}"' for column in columns)
    raise HeelerError(f"{where}: there is no {wanted} (found {', '.join(row) or 'nothing'}): name the column so")
