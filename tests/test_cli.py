"""The verbs from the outside: train, evaluate, sample, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler import cli, load_text_run
from heeler.cli import main
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.rollout.engines.native import NativeEngine
from heeler.runtime.runs import RunFolder
from tests.tiny import save_tiny_model

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


STOPPING = """
import signal
calls = 0
def score(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == {at}:
        signal.raise_signal(signal.SIGINT)
        {again}
    return [float(len(c)) for c in completions]
"""


@pytest.mark.parametrize(
    ("again", "trainable", "step", "says"),
    [
        ("pass", ["trainable:lora", "--trainable.rank", "2"], 2, "stopped after update 2; continue with: "),
        ("signal.raise_signal(signal.SIGINT)", ["trainable:full"], 1, "stopped at once: "),
    ],
    ids=["once", "twice"],
)
def test_ctrl_c_and_what_can_be_done_with_the_run_then(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    again: str, trainable: list[str], step: int, says: str,
) -> None:  # fmt: skip
    """Status 130 and how to go on; the last checkpoint is sampled as the finished policy would be; resume finishes."""
    monkeypatch.chdir(tmp_path)
    module = f"stopping_{step}"
    (tmp_path / f"{module}.py").write_text(STOPPING.format(at=2, again=again))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cde"}\n')
    words = [
        "ppo", "lm", "--model", tiny_llama, "--prompts", "prompts.jsonl", "--reward", f"{module}:score", "--updates",
        "3", "--prompts-per-update", "4", "--sampling.max-new-tokens", "5", "--threads", "1", "--precision", "fp32",
        "--checkpoint-every", "1", "--lr", "0.05", "--out", "run", *trainable,
    ]  # fmt: skip
    assert main(words) == 130
    error = capsys.readouterr().err
    sentence = error.splitlines()[-1]
    assert sentence.startswith(f"heeler: {says}") and sentence.endswith("heeler resume run")
    assert "Traceback" not in error

    sample = ["--prompt", "ab", "--prompt", "c", "--max-new-tokens", "12", "--seed", "3"]
    assert main(["sample", "run", *sample]) == 0
    note, *stopped = capsys.readouterr().out.splitlines()
    assert note == f"run was stopped after update {step} of 3: its last checkpoint samples"
    load_text_run("run").export(tmp_path / "by_hand")
    assert main(["sample", "by_hand/policy", *sample]) == 0
    assert capsys.readouterr().out.splitlines() == stopped
    assert main(["sample", tiny_llama, *sample]) == 0
    assert capsys.readouterr().out.splitlines() != stopped  # it has learned something

    assert main(["resume", "run"]) == 0
    capsys.readouterr()
    assert main(["sample", "run", *sample]) == 0
    assert "was stopped" not in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_a_run_of_other_architectures(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model", architecture)
    (tmp_path / "long_texts.py").write_text(
        "def score(completions, **_): return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cde"}\n')
    assert main(
        ["ppo", "lm", "--model", model, "--prompts", "prompts.jsonl", "--reward", "long_texts:score",
         "--eval-prompts", "prompts.jsonl", "--updates", "2", "--prompts-per-update", "4", "--samples-per-prompt", "2",
         "--sampling.max-new-tokens", "5", "--threads", "1", "--out", "run", "trainable:top-layers",
         "--trainable.layers", "1"]
    ) == 0  # fmt: skip
    assert [row["step"] for row in RunFolder.open("run").metrics()] == [1, 2]
    before, after = load_causal_lm(model), load_causal_lm("run/policy")
    assert type(after) is type(before) and not equal_weights(before, after)
    assert main(["sample", "run", "--prompt", "ab", "--max-new-tokens", "4"]) == 0


def equal_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_run_on_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages go through the model's own template; rewards get messages, and `--chat` samples in the same form."""
    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model", "qwen2")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(model)
    (tmp_path / "chat_reward.py").write_text(
        "import json\n"
        "from pathlib import Path\n"
        "def score(prompts, completions, **_):\n"
        "    Path('seen.json').write_text(json.dumps([prompts, completions]))\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": chat}) + "\n")
    read: list[list[int]] = []
    generate = NativeEngine.generate

    def watched(engine: Any, requests: Any, sampling: Any) -> Any:
        read.extend(list(request.prompt) for request in requests)
        return generate(engine, requests, sampling)

    monkeypatch.setattr(NativeEngine, "generate", watched)
    assert main(
        ["ppo", "lm", "--model", model, "--prompts", "prompts.jsonl", "--reward", "chat_reward:score",
         "--eval-prompts", "prompts.jsonl", "--updates", "1", "--prompts-per-update", "4",
         "--sampling.max-new-tokens", "5", "--threads", "1", "--out", "run", "trainable:full"]
    ) == 0  # fmt: skip
    prompts, completions = json.loads((tmp_path / "seen.json").read_text())
    assert prompts[0] == chat and completions[0][0]["role"] == "assistant"
    assert {tokenizer.decode(prompt) for prompt in read} == {"s:be;u:hi;a:"}
    read.clear()
    assert main(["sample", "run", "--prompt", "hi", "--chat", "--max-new-tokens", "4"]) == 0
    assert [tokenizer.decode(prompt) for prompt in read] == ["u:hi;a:"]  # the template was exported too


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["ppo", "--help"], ["ppo", "lm", "--help"], ["ppo", "imdb", "--help"], ["reward", "imdb", "--help"],
                  ["resume", "--help"], ["eval", "--help"], ["sample", "--help"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert "heeler" in capsys.readouterr().out
    assert main(["--version"]) == 0 and "heeler 0." in capsys.readouterr().out
