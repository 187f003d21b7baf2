"""English and French texts of JupyterLab's menus, dialogs and settings, split so that nothing leaks.

They come from the package `jupyterlab-language-pack-fr-FR` (BSD), compiled gettext files read with polib. A pair
belongs to exactly one part, decided by a hash of words: pairs are on one side if their sources, or their translations,
differ in case, spaces, punctuation, numbers or plurals only.

| part | share | used for |
|---|---|---|
| train | 80 % | supervised fine-tuning, and the sources of PPO's rollouts |
| validation | 8 % | choosing the weights of the fine-tuning |
| test | 12 % | held-out figures |
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from heeler.data.reviews import package_folder
from heeler.runtime.packages import require
from heeler.types import HeelerError

Part = Literal["train", "validation", "test"]
_EDGES: tuple[tuple[Part, float], ...] = (("train", 0.80), ("validation", 0.88), ("test", 1.0))
PACKAGE = "jupyterlab_language_pack_fr_FR"
PAD, EOS = "<pad>", "</s>"


@dataclass(frozen=True)
class Pair:
    """A text and its translation, both with single spaces."""

    source: str
    target: str


def words_of(text: str) -> str:
    """The words of a text in lower case, without numbers and punctuation: what decides a pair's part."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def _stems_of(text: str) -> str:
    """The words of a text without the s and x of plurals: what pairs of one side may share."""
    return " ".join(re.sub("[sx]$", "", word) for word in words_of(text).split())


def split_pairs(pairs: Sequence[Pair], max_words: int) -> dict[Part, list[Pair]]:
    """Drop what is no translation, and split the rest.

    Dropped are pairs with an empty side, without words, with a source longer than `max_words` words, equal on both
    sides (names, file types), and sources that differ from an earlier one in case, numbers or punctuation only.
    """
    kept: list[Pair] = []
    seen: set[str] = set()
    for pair in pairs:
        source, target = " ".join(pair.source.split()), " ".join(pair.target.split())
        key = words_of(source)
        if key and target and source != target and len(source.split()) <= max_words and key not in seen:
            seen.add(key)
            kept.append(Pair(source, target))
    parts: dict[Part, list[Pair]] = {part: [] for part, _ in _EDGES}
    for group in _alike(kept):
        parts[_part(min(_stems_of(pair.source) for pair in group))] += group
    for chosen in parts.values():  # the files go subject by subject
        chosen.sort(key=lambda pair: _hash(pair.source, b"order"))
    return parts


def _alike(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in groups: those that share a source or a translation but for their plurals, directly or by others."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for pair in pairs:
        parent[root(("source", _stems_of(pair.source)))] = root(("target", _stems_of(pair.target)))
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(root(("source", _stems_of(pair.source))), []).append(pair)
    return list(groups.values())


def _part(key: str) -> Part:
    x = _hash(key, b"part") / 2**64
    return next(part for part, edge in _EDGES if x < edge)


def _hash(text: str, purpose: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest(), "big")


@lru_cache(maxsize=4)
def translation_pairs(max_words: int = 16) -> Mapping[Part, Sequence[Pair]]:
    """The parts of the package's pairs, in a fixed shuffled order.

    Raises:
        HeelerError: the package or polib is not installed.
    """
    require("polib", "translate")
    import polib

    files = sorted(package_folder(PACKAGE).glob("locale/fr_FR/LC_MESSAGES/*.mo"))
    pairs: list[Pair] = []
    for file in files:
        for entry in polib.mofile(str(file)):
            pairs.append(Pair(entry.msgid, entry.msgstr or entry.msgstr_plural.get(0, "")))
            if entry.msgid_plural:
                pairs.append(Pair(entry.msgid_plural, entry.msgstr_plural.get(1, "")))
    if not pairs:
        raise HeelerError(f"the package {PACKAGE} holds no translations: install the version in requirements/")
    return split_pairs(pairs, max_words)


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer learnt on `texts`; it ends what it encodes with the end of sequence, as T5's does.

    Bytes are its alphabet, so nothing is unknown; `vocab_size` counts the 256 of them and the two special tokens.
    """
    require("tokenizers", "lm")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
