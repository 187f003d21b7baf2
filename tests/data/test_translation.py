"""The translation pairs: what is kept, no leak between the parts, and the tokenizer."""

from __future__ import annotations

import pytest

from heeler.data.translation import Pair, _stems_of, build_tokenizer, split_pairs, translation_pairs, words_of
from heeler.types import HeelerError


def test_what_is_no_translation_is_dropped() -> None:
    pairs = [
        Pair("Open  the\nfile", "Ouvrir le fichier"),
        Pair("open the file 2…", "Ouvrir le fichier 2…"),  # a source's words decide, not its numbers
        Pair("JupyterLab", "JupyterLab"),
        Pair("%1", "%2"),
        Pair("Close", ""),
        Pair("one two three four five", "un deux trois quatre cinq"),
    ]
    kept = [pair for part in split_pairs(pairs, max_words=4).values() for pair in part]
    assert kept == [Pair("Open the file", "Ouvrir le fichier")]


def test_a_pair_stays_on_its_side_whatever_else_is_there() -> None:
    pairs = [Pair(f"{a} {b}", f"{b} {a}!") for a in "abcdefghijkl" for b in "mnopqrstuvwxyz"]
    whole, half = split_pairs(pairs, 16), split_pairs(pairs[::-2], 16)
    assert [len(part) for part in whole.values()] == pytest.approx([134, 13, 20], abs=12)
    sides = {pair: name for name, part in whole.items() for pair in part}
    assert len(sides) == len(pairs)
    assert all(sides[pair] == name for name, part in half.items() for pair in part)


def test_plurals_and_shared_translations_are_on_one_side() -> None:
    chain = [
        Pair("%1 cell hidden", "%1 cellule masquée"),
        Pair("%1 cells hidden", "%1 cellules masquées"),
        Pair("Proceed", "Continuer"),
        Pair("Continue", "Continuer"),
        Pair("Go on", "continuer"),
    ]
    for tail in "abcdefghijklmnop":  # whatever the hashes say
        parts = split_pairs([Pair(f"{pair.source} {tail}q", f"{pair.target} {tail}q") for pair in chain], 9)
        sides = {pair.source[:-3]: name for name, part in parts.items() for pair in part}
        assert sides["%1 cell hidden"] == sides["%1 cells hidden"]
        assert sides["Proceed"] == sides["Continue"] == sides["Go on"]


def test_the_tokenizer_says_everything_and_ends_what_it_encodes() -> None:
    tokenizer = build_tokenizer(["Ouvrir le fichier", "Open the file"] * 5, 270)
    assert len(tokenizer) == 270 and tokenizer.pad_token_id == 0
    text = "Où est l’été ? 日本"
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("Open the file", add_special_tokens=False)["input_ids"] != tokenizer("Open the file")["input_ids"]


def test_the_pairs_of_the_package() -> None:
    try:
        parts = translation_pairs(16)
    except HeelerError as error:
        assert "pip install" in str(error)
        pytest.skip(str(error))
    assert sum(len(part) for part in parts.values()) > 2000
    seen = {words_of(pair.source): name for name, part in parts.items() for pair in part}
    assert len(seen) == sum(len(part) for part in parts.values())
    for side in ("source", "target"):
        stems = [{_stems_of(getattr(pair, side)) for pair in part} for part in parts.values()]
        assert sum(map(len, stems)) == len(set().union(*stems))
