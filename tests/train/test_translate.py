"""The translation recipe on made-up pairs and a tiny model, end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSeq2SeqLM

from heeler.data.translation import Pair, split_pairs
from heeler.policies.loading import load_tokenizer
from heeler.recipes import translate
from heeler.recipes.translate import Translate, corpus_figures, fine_tuned

TINY = Translate(
    vocab_size=270, width=32, layers=1, sft_epochs=1.0, updates=2, prompts_per_update=4, max_new_tokens=6, test_pairs=5,
    threads=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(f"{a} {b}", f"{b}e {a}e") for a in ("red", "new", "old", "big", "dry") for b in "abcdefghijklmno"]
    monkeypatch.setenv("HEELER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(translate, "translation_pairs", lambda max_words: split_pairs(pairs, max_words))


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from heeler.cli import main

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items() if value]
    assert main(["ppo", "translate", "--out", str(tmp_path / "run"), *flags]) == 0
    assert "Corpus figures on 5 test pairs" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = {f"{how}/{metric}" for how in ("greedy", "sampled") for metric in ("chrf", "bleu")}
    assert summary["corpus"].keys() == {"before", "after"}
    assert all(figures.keys() == names for figures in summary["corpus"].values())
    assert {"reward", "bleu"} <= summary["eval/after"].keys() and summary["updates"] == 2
    cached = next((tmp_path / "cache").glob("translate-*"))
    assert summary["corpus"]["before"] == corpus_figures(str(cached / "sft"), held_out(), 6, 0)
    assert summary["corpus"]["after"] == corpus_figures(str(tmp_path / "run"), held_out(), 6, 0)
    sources = [
        {json.loads(line)["prompt"] for line in (cached / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "validation", "prompts", "test")
    ]
    assert sources[0] == sources[2] and not sources[0] & (sources[1] | sources[3]) and not sources[1] & sources[3]


def held_out() -> list[Pair]:
    return list(translate.translation_pairs(16)["test"][:5])


def test_fine_tuning_is_done_once_and_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, summary = fine_tuned(TINY, show=False)
    monkeypatch.setattr(translate, "train_sft", None)  # a second call would raise
    assert fine_tuned(TINY, show=False) == (folder, summary)
    (folder / "summary.json").unlink()
    monkeypatch.setattr(
        translate, "resume_sft", lambda run, show: (run / "summary.json").write_text('{"eval/after": {"loss": 1}}')
    )
    assert fine_tuned(TINY, show=False)[1] == {"eval/after": {"loss": 1}}
    monkeypatch.undo()


def test_greedy_is_the_most_likely_token() -> None:
    folder, _ = fine_tuned(replace(TINY, seed=1), show=False)
    pairs = held_out()
    figures = corpus_figures(str(folder), pairs, 6, 0)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "policy").eval()
    tokenizer = load_tokenizer(str(folder))
    texts: list[str] = []
    for pair in pairs:
        ids = model.generate(
            **tokenizer(pair.source, return_tensors="pt", return_token_type_ids=False),
            max_new_tokens=6,
            do_sample=False,
        )
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    from sacrebleu.metrics.chrf import CHRF

    assert figures["greedy/chrf"] == pytest.approx(CHRF().corpus_score(texts, [[p.target for p in pairs]]).score)
    assert corpus_figures(str(folder), pairs, 6, 1)["greedy/chrf"] == figures["greedy/chrf"]
