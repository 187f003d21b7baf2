"""Closed-book questions about countries, from the package `countryinfo`: capitals, regions and demonyms.

Countries are split, not questions, into three parts: fine-tuning learns from the answers of one, PPO asks about those
of another, and the last is held out. So PPO's questions are as new to the fine-tuned model as the held-out ones, and
the figures show what the model knew and learned to say, and not what it learned by heart.
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


def part_of(country: str) -> Part:
    """The part that a country belongs to: a hash of its name decides (30 % held out, the rest in halves)."""
    digest = hashlib.blake2b(country.encode(), digest_size=8).digest()
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
