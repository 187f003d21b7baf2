"""Closed-book questions about countries, from the package `countryinfo`: capitals, regions and demonyms.

Countries are split, not questions: what is held out asks about countries that no training question names, so the
figures show what the model knew and learned to say, and not what it learned by heart.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

from heeler.data.reviews import package_folder

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


def is_held_out(country: str, share: float = 0.3) -> bool:
    """Whether a country belongs to the held-out part: a hash of its name decides."""
    digest = hashlib.blake2b(country.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def country_questions(held_out: bool) -> list[dict[str, Any]]:
    """Rows `{"prompt", "answer", "relation", "country"}`: every country of the part, every relation, every phrasing."""
    rows: list[dict[str, Any]] = []
    for country in countries():
        name = country["name"]
        if is_held_out(name) != held_out:
            continue
        for relation, phrasings in RELATIONS.items():
            for phrasing in phrasings:
                asked = phrasing.format(name) + ("\nAnswer:" if phrasing.endswith("?") else "")
                answer = country[relation].strip()
                rows.append({"prompt": asked, "answer": answer, "relation": relation, "country": name})
    return rows
