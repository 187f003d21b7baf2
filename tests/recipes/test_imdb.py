"""How much the demo does on which machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heeler.ppo.kl import FixedKL
from heeler.recipes import imdb
from heeler.runtime import machine


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """The machine's rate, to be set; the cache is empty."""
    found = {"rate": 0.0}
    monkeypatch.setattr(machine, "product_rate", lambda precision: found["rate"])
    monkeypatch.setattr(machine, "choose_device", lambda wanted: "cpu")
    monkeypatch.setattr(imdb, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(imdb, "package_folder", lambda name: tmp_path)
    monkeypatch.setattr(imdb, "effort", imdb.effort.__wrapped__)  # nothing is remembered
    return found


def test_faster_machines_do_more(rate: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imdb, "write_prompts", lambda *_: "prompts.jsonl")
    chosen: list[tuple[int, int, float]] = []
    for rate["rate"] in (150e9, 400e9, 2000e9):
        config = imdb.text_config(imdb.IMDB(), Path("model"), Path("reward"), "out", 400_000)
        chosen.append((imdb.reward_config().tokens, config.updates, config.lr))
        asked = imdb.text_config(imdb.IMDB(updates=7), Path("model"), Path("reward"), "out", 400_000)
        assert (asked.updates, asked.lr) == (7, 2e-4)
    tokens, updates, rates = zip(*chosen, strict=True)
    assert tokens == (400_000, 700_000, 1_200_000) and updates == (14, 24, 36) and rates == (3e-4, 2.5e-4, 2e-4)


@pytest.mark.parametrize("tokens, coef", [(9_000_000, 0.15), (1_200_000, 0.15), (700_000, 0.12), (1000, 0.12)])
def test_the_penalty_is_that_of_the_reward_model_and_not_of_the_machine(
    tokens: int, coef: float, rate: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imdb, "write_prompts", lambda *_: "prompts.jsonl")
    for rate["rate"] in (150e9, 2000e9):
        config = imdb.text_config(imdb.IMDB(), Path("model"), Path("reward"), "out", tokens)
        assert config.kl == FixedKL(coef=coef)


def test_a_cached_reward_model_is_taken(
    rate: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rate["rate"] = 2000e9
    folder = imdb._reward_folder(imdb.reward_config(), full=False)  # pyright: ignore[reportPrivateUsage]
    folder.mkdir()
    (folder / "heeler.json").write_text(json.dumps({"seconds": 1.0, "figures": {"reviews_128": {"accuracy": 0.85}}}))
    rate["rate"] = 100e9  # the machine is busy now
    assert imdb.imdb_reward_model()[0] == folder
    assert "85.0% reviews of 128 tokens" in capsys.readouterr().out.replace("\n", " ")
    trained: list[Path] = []

    def train(config: object, train: object, tests: object, folder: Path, show: bool) -> None:
        trained.append(folder)
        folder.mkdir(exist_ok=True)
        (folder / "heeler.json").write_text(json.dumps({"seconds": 1.0, "figures": {}}))

    monkeypatch.setattr(imdb, "train_reward_model", train)
    monkeypatch.setattr(imdb, "reviews", lambda *_: [])
    monkeypatch.setattr(imdb, "load_tokenizer", lambda path: None)
    shown: list[bool] = []
    monkeypatch.setattr(imdb, "LabelledTexts", lambda *_, show: shown.append(show))
    assert imdb.imdb_reward_model(retrain=True)[0] == trained[0] != folder
    assert shown == [True, False, False]  # a bar where it takes long
    assert imdb.imdb_reward_model(seed=1)[0] == trained[1] not in (folder, trained[0])


def test_the_rate_is_that_of_a_product() -> None:
    assert 1e8 < machine.product_rate("fp32") < 1e14
