"""Closed-book questions: capitals, regions and demonyms (package `countryinfo`), and trivia (`chatterbot-corpus`).

Countries are split, not the questions about them, into three parts: fine-tuning learns from the answers of one, PPO
asks about those of another, and the last is held out. So PPO's questions are as new to the fine-tuned model as the
held-out ones, and the figures show what the model knew and learned to say, and not what it learned by heart. Trivia
have nothing in common, and are split one by one.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any, Literal

from heeler.data.reviews import package_folder

Part = Literal["sft", "ppo", "held_out"]

RELATIONS = {
    "capital": ("What is the capital of {}?", "The capital of {} is the city of"),
    "region": ("On which continent is {}?", "{} lies in the continent"),
    "demonym": ("What are people from {} called?", "Someone from {} is called"),
}


@lru_cache(maxsize=1)
def countries() -> list[dict[str, Any]]:
    """Name, capital, region and demonym of every country that has all of them, by name."""
    folder = package_folder("countryinfo") / "data"
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            country = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # a few files of the package hold no JSON
        if all(isinstance(country.get(key), str) and country[key].strip() for key in ("name", *RELATIONS)):
            found[country["name"]] = country
    return [found[name] for name in sorted(found)]


def part_of(name: str) -> Part:
    """The part of a country or of a trivia question: its hash decides (30 % held out, the rest in halves)."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "held_out" if place < 0.3 else "ppo" if place < 0.65 else "sft"


def country_questions(part: Part) -> list[dict[str, Any]]:
    """Rows `{"prompt", "answer", "relation", "country"}`: every country of the part, every relation, every phrasing."""
    rows: list[dict[str, Any]] = []
    for country in countries():
        name = country["name"]
        if part_of(name) != part:
            continue
        for relation, phrasings in RELATIONS.items():
            for phrasing in phrasings:
                asked = phrasing.format(name) + ("\nAnswer:" if phrasing.endswith("?") else "")
                answer = country[relation].strip()
                rows.append({"prompt": asked, "answer": answer, "relation": relation, "country": name})
    return rows


@lru_cache(maxsize=1)
def trivia() -> list[tuple[str, str]]:
    """Questions and their answers of at most six words, in the order of the package."""
    import yaml

    file = package_folder("chatterbot_corpus") / "data" / "english" / "trivia.yml"
    turns: list[Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    pairs: list[list[str]] = [turn for turn in turns if isinstance(turn, list)]  # one entry of the package is no pair
    found = {" ".join(asked.split()): " ".join(answer.split()).rstrip(".") for asked, answer in pairs}
    return [(asked, answer) for asked, answer in found.items() if len(answer.split()) <= 6]


def trivia_questions(part: Part) -> list[dict[str, Any]]:
    """Rows `{"prompt", "answer"}` of one part of the trivia."""
    return [{"prompt": f"{q}\nAnswer:", "answer": answer} for q, answer in trivia() if part_of(q) == part]
