"""Long work has a bar, and the bar reaches its total."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tqdm

from heeler import Sampling, train_text
from heeler.policies.loading import convert_gguf, load_causal_lm, load_tokenizer
from heeler.runtime.progress import progress
from heeler.train import reward
from heeler.train.reward import LabelledTexts
from heeler.train.text import load_text_run
from tests.policies.test_gguf import write_gguf
from tests.runs import small
from tests.tiny import save_tiny_model

Bars = list[tuple[str, str, float, float]]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    """Label, unit, count and total of every bar that was shown, in the order of their ends."""
    closed: Bars = []

    class Watched(tqdm.tqdm):  # pyright: ignore[reportMissingTypeArgument]
        def close(self) -> None:
            if not self.disable:  # which a bar is once it is closed
                closed.append((self.desc, self.unit, self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Watched)
    return closed


def test_a_bar_has_a_rate_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, "working", "piece") as bar:
        bar.mininterval = 0
        bar.update(2)
        bar.refresh()
    line = next(line for line in capsys.readouterr().err.splitlines() if " 2/4 " in line)
    assert line.startswith("working:  50%") and re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*piece/s\]", line)


def test_the_conversion_of_a_gguf_file(tmp_path: Path, bars: Bars, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny_model(tmp_path / "source", "llama")
    model = load_causal_lm(source)
    (tmp_path / "gguf").mkdir()
    write_gguf(model, load_tokenizer(source), tmp_path / "gguf" / "tiny.gguf")
    bars.clear()
    capsys.readouterr()
    convert_gguf(tmp_path / "gguf", "tiny.gguf", tmp_path / "plain", show=True)
    tensors = len(model.state_dict()) - 1  # the output layer is the embeddings
    assert bars == [("converting", "tensor", 3 * tensors, 3 * tensors)]
    assert "GGUF tensors" not in capsys.readouterr().err  # transformers' own bar is not drawn beside it
    bars.clear()
    convert_gguf(tmp_path / "gguf", "tiny.gguf", tmp_path / "again")
    assert bars == []


def test_tokenising_in_pieces(tiny_llama: str, bars: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, tokenizer = [f"text {i}" * i for i in range(7)], load_tokenizer(tiny_llama)
    whole = LabelledTexts(texts, [True, False] * 3 + [True], tokenizer)
    monkeypatch.setattr(reward, "TEXTS_AT_ONCE", 3)
    pieces = LabelledTexts(texts, [True, False] * 3 + [True], tokenizer, show=True)
    assert pieces.texts.ids == whole.texts.ids == [tokenizer(text)["input_ids"] for text in texts]
    assert bars == [("tokenising", "text", 7, 7)]


def test_an_evaluation_samples_and_then_judges(tiny_llama: str, tmp_path: Path, bars: Bars) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cde"}\n{"prompt": "f"}\n')
    config = small(
        tiny_llama, tmp_path / "run", updates=1, sampling=Sampling(max_new_tokens=6), judges=("a=vader", "b=vader"),
        prompts=str(tmp_path / "prompts.jsonl"), eval_prompts=str(tmp_path / "prompts.jsonl"),
    )  # fmt: skip

    def ended(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    train_text(config, reward=ended)
    judged = [("evaluating", "token", 18, 18), ("judging", "text", 12, 12)]  # reward, perplexity and both judges
    assert bars == [*judged, ("PPO", "update", 1, 1), *judged]
    bars.clear()
    run = load_text_run(tmp_path / "run", reward=ended)
    run.engine.eos_ids = run.engine.eos_ids.new_tensor(range(0, 250))  # pyright: ignore[reportAttributeAccessIssue]
    figures = run.evaluate(show=True).figures
    assert figures["length"] < 6 and bars == judged  # also where completions end before the length cap
