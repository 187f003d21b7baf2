"""The verbs from the outside: train, evaluate, sample, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from heeler import cli
from heeler.cli import main

REWARD = "def score(prompts, completions, answer, **_): return [float(len(c)) for c in answer]"


def test_a_full_device_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(words: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(cli, "_dispatch", full)
    assert main(["ppo", "lm"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("heeler: the device's memory is full (CUDA out of memory): ") and said.count("\n") == 1

    def other(words: list[str]) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(cli, "_dispatch", other)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["ppo", "lm"])


def test_a_users_own_task(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task.py").write_text(REWARD + "\n")
    rows = [{"prompt": "ab", "answer": "x"}, {"prompt": "cde", "answer": "yz"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = main(
        ["ppo", "lm", "--model", tiny_llama, "--prompts", "prompts.jsonl", "--reward", "own_task:score",
         "--eval-prompts", "prompts.jsonl", "--judges", "chars=own_task:score", "--updates", "2",
         "--prompts-per-update", "4", "--sampling.max-new-tokens", "5", "--threads", "1", "--out", "run",
         "trainable:lora", "--trainable.rank", "2", "critic:value-head", "kl:adaptive-kl", "--kl.target", "3"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0
    for wanted in ("Held-out prompts: 2", "before", "after", "reward", "chars", "heeler sample run"):
        assert wanted in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["trainable"]["type"] == "LoRA" and config["kl"] == {
        "type": "AdaptiveKL", "coef": 0.05, "target": 3.0, "horizon": 10_000.0,
    }  # fmt: skip

    assert main(["eval", "run"]) == 0
    assert "after update 2" in capsys.readouterr().out
    evaluated = json.loads((tmp_path / "run" / "eval.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert evaluated["reward"] == pytest.approx(summary["eval/after"]["reward"])
    assert evaluated["kl/ref"] == pytest.approx(summary["eval/after"]["kl/ref"], abs=1e-3)

    assert main(["sample", "run", "--prompt", "ab", "--prompt", "c", "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ab") for line in lines) and any(line.startswith("c") for line in lines)

    assert main(["resume", "run"]) == 2
    assert "is complete" in capsys.readouterr().err
    assert main(["resume", "run", "--updates", "3"]) == 0
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["ppo", "--help"], ["ppo", "lm", "--help"], ["ppo", "imdb", "--help"], ["reward", "imdb", "--help"],
                  ["resume", "--help"], ["eval", "--help"], ["sample", "--help"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert "heeler" in capsys.readouterr().out
    assert main(["--version"]) == 0 and "heeler 0." in capsys.readouterr().out
