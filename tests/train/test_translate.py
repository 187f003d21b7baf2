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
from heeler.recipes.translate import Translate, corpus_figures, run_translate

TINY = Translate(
    vocab_size=270, width=32, layers=1, sft_epochs=1.0, updates=2, prompts_per_update=4, max_new_tokens=6, test_pairs=5,
    threads=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(f"{a} {b}", f"{b}e {a}e") for a in ("red", "new", "old", "big", "dry") for b in "abcdefghijklmno"]
    monkeypatch.setattr(translate, "translation_pairs", lambda max_words: split_pairs(pairs, max_words))


def test_the_recipe(tmp_path: Path, capsys: Any) -> None:
    from heeler.cli import main

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items() if value]
    out = tmp_path / "run"
    assert main(["ppo", "translate", "--out", str(out), *flags]) == 0
    assert "greedy/bleu" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    names = {f"{how}/{metric}" for how in ("greedy", "sampled") for metric in ("chrf", "bleu")}
    for stage, folder in (("SFT", "sft"), ("SFT+PPO", "ppo")):
        figures = summary["stages"][stage]
        assert names | {"reward", "reward/chrf", "reward/bleu"} <= figures.keys()
        assert {name: figures[name] for name in names} == corpus_figures(str(out / folder), held_out(), 6, 0)
    assert summary["stages"]["SFT"] != summary["stages"]["SFT+PPO"]
    sources = [
        {json.loads(line)["prompt"] for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "validation", "prompts", "test")
    ]
    assert sources[0] == sources[2] and not sources[0] & (sources[1] | sources[3]) and not sources[1] & sources[3]
    trained = (out / "ppo" / "metrics.jsonl").read_text()
    assert main(["ppo", "translate", "--out", str(out), *flags]) == 0  # nothing is done twice
    assert (out / "ppo" / "metrics.jsonl").read_text() == trained


def held_out() -> list[Pair]:
    return list(translate.translation_pairs(16)["test"][:5])


def test_greedy_is_the_most_likely_token(tmp_path: Path) -> None:
    folder = run_translate(replace(TINY, seed=1, out=str(tmp_path / "run")), show=False) / "sft"
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
