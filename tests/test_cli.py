"""The verbs from the outside: train, evaluate, sample, resume."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler import cli, load_text_run
from heeler.cli import main
from heeler.policies.loading import load_causal_lm, load_classifier, load_tokenizer
from heeler.rewards.classifier import ClassifierReward
from heeler.rollout.engines.native import NativeEngine
from heeler.runtime.runs import RunFolder, read_json
from heeler.train.text import build_text_run
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


@pytest.mark.parametrize(
    ("words", "function", "options"),
    [
        ("ppo qa --questions trivia --epochs 2 --updates 3", "tasks.run_qa", {"questions": "trivia", "epochs": 2.0}),
        ("ppo qa --data F --eval-data G --updates 3", "tasks.run_qa", {"data": "F", "eval_data": "G"}),
        ("ppo arithmetic --task syllogism --updates 3", "tasks.run_arithmetic", {"task": "syllogism", "data": None}),
        ("ppo arithmetic --data F --model M --updates 3", "tasks.run_arithmetic", {"task": None, "model": "M"}),
        ("ppo calculator --examples 5 --updates 3", "calculator.run_calculator", {"examples": 5, "eval_prompts": 256}),
        ("ppo translate --data F --width 64 --updates 3", "translate.run_translate", {"data": "F", "width": 64}),
        ("rlhf imdb --pairs 50 --words 4 --updates 3", "rlhf.run_rlhf", {"pairs": 50, "words": 4}),
        (
            "rlhf lm --model M --demonstrations D --preferences F --prompts P --judges vader words=m:f --updates 3",
            "rlhf_lm.run_rlhf_lm",
            {"demonstrations": "D", "preferences": "F", "prompts": "P", "judges": ("vader", "words=m:f")},
        ),
    ],
)
def test_recipes_are_dispatched_with_their_options(
    words: str, function: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(f"heeler.recipes.{function}", called.append)
    assert main([*words.split(), "--seed", "7", "--threads", "1", "--out", "run"]) == 0
    (recipe,) = called
    common = {"seed": 7, "threads": 1, "out": "run", "updates": 3}
    assert {**options, **common}.items() <= vars(recipe).items()


def test_each_stage_starts_from_the_one_before(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`heeler sft`, `heeler reward` and `heeler ppo lm` by their run folders alone: the weights and the scores are
    those of the stage before."""
    monkeypatch.chdir(tmp_path)
    couples = [(a, b) for a in "abcd" for b in "efg"]
    files = {
        "demonstrations": [{"prompt": a + b, "completion": f" {b}{a}."} for a, b in couples],
        "preferences": [{"prompt": a + b, "chosen": f" {b}!", "rejected": f" {a}?"} for a, b in couples],
        "prompts": [{"prompt": f"{a}{b}x"} for a, b in couples],
        "held_out": [{"prompt": f"{a}{b}y"} for a, b in couples],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = ["--threads", "1", "--precision", "fp32"]
    assert main(["sft", "--model", tiny_llama, "--data", "demonstrations.jsonl", "--out", "runs/sft", "--updates", "4",
                 "--lr", "0.01", *usual, "trainable:full"]) == 0  # fmt: skip
    assert main(["reward", "--model", "runs/sft", "--data", "preferences.jsonl", "--eval-share", "0.3",
                 "--out", "runs/rm", *usual]) == 0  # fmt: skip
    assert main(["ppo", "lm", "--model", "runs/sft", "--reward", "runs/rm", "--prompts", "prompts.jsonl",
                 "--eval-prompts", "held_out.jsonl", "--updates", "2", "--prompts-per-update", "4", "--lr", "0.01",
                 "--sampling.max-new-tokens", "4", "--out", "runs/lm", *usual, "trainable:full"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "a reward: heeler ppo lm --reward runs/rm" in printed and "Held-out prompts: 12" in printed
    base, tuned, trained = (load_causal_lm(path) for path in (tiny_llama, "runs/sft", "runs/lm"))
    assert not equal_weights(base, tuned) and not equal_weights(tuned, trained)
    scorer = load_classifier("runs/rm").base_model
    assert distance(scorer, tuned.base_model) < 0.5 * distance(scorer, base.base_model)
    run = load_text_run("runs/lm")
    examples = read_json(tmp_path / "runs/lm/summary.json")["eval/examples"]
    for model in ("runs/sft/policy", tiny_llama):  # what PPO began with wrote the texts before, and no other model
        evaluated = build_text_run(replace(run.config, model=model, prompts="")).evaluate()
        wrote = evaluated.completions[:8] == [example["before"] for example in examples]
        assert wrote == (model != tiny_llama)
    texts = [example["prompt"] + example["after"] for example in examples]
    reward = ClassifierReward("runs/rm")
    scores = reward.scale * reward.logits(texts) + reward.shift
    assert scores.tolist() == pytest.approx([example["reward/after"] for example in examples], abs=1e-3)


@torch.no_grad()
def distance(a: Any, b: Any) -> float:
    return sum(float((x - y).square().sum()) for x, y in zip(a.parameters(), b.parameters(), strict=True)) ** 0.5


ROOT = Path(__file__).parent.parent


def test_what_gives_trls_defaults_is_a_run(tiny_llama: str, tmp_path: Path) -> None:
    """The last column of the table in docs/from_trl.md, as one command."""
    page = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    given = re.findall("`([^`]+)`", " ".join(row[2] for row in rows[1:] if len(row) == 3))
    flags = [part for part in given if part.startswith("--")]
    choices = [part for kind in ("trainable:", "critic:", "kl:") for part in given if part.startswith(kind)]
    assert len(flags) == 11 and choices == ["trainable:full", "critic:separate-critic", "kl:fixed-kl --kl.coef 0.05"]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    own = ["--model", tiny_llama, "--prompts", str(prompts), "--reward", "length", "--out", str(out), "--updates", "1"]
    words = [word for part in (*flags, *choices) for word in part.split()]
    assert main(["ppo", "lm", *own, "--prompts-per-update", "2", "--precision", "fp32", "--threads", "1", *words]) == 0
    config = read_json(out / "config.json")["config"]
    assert config["trainable"]["type"] == "Full" and config["adam_betas"] == [0.9, 0.999]
    assert config["ppo"]["epochs"] == 4 and config["ppo"]["value_clip"] == 0.2 and config["lr"] == 3e-6


VERBS = ["ppo", "ppo lm", "ppo gym", "ppo dialogue", "ppo imdb", "ppo qa", "ppo arithmetic", "ppo translate",
         "ppo calculator", "ppo lunarlander", "ppo lm trainable:lora", "ppo lm trainable:top-layers",
         "ppo lm critic:separate-critic", "ppo lm kl:adaptive-kl", "ppo lm tokens:only-tokens",
         "ppo gym network:custom", "ppo gym network:mlp", "ppo gym network:nature-cnn",
         "ppo gym exploration:state-dependent",
         "ppo gym env.backend:atari", "ppo gym env.backend:env-pool",
         "rlhf imdb", "rlhf lm", "sft", "reward", "reward imdb", "serve-reward", "resume", "eval", "sample",
         "export"]  # fmt: skip


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?:\.[a-z0-9-]+)*(?![a-z0-9-]|\.`)")
PAGES = ("settings", "from_trl", "rlhf", "rewards", "data", "engines", "dialogue", "translation", "control")
OF_OTHERS = {"--help", "--version", "--no-deps", "--env-kwargs"}  # the last one is read before the others


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """It comes, and says of every flag what it is for; the pages name flags that there are."""
    flags: set[str] = set()
    for words in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([*words.split(), "--help"])
        assert stop.value.code == 0
        text = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
        assert "heeler" in text
        lines = [line.strip("│ ") for line in text.splitlines()]
        bare = [
            flag
            for flag, after in itertools.pairwise(lines)
            if flag.startswith("--") and "  " not in flag and after.startswith(("(default", "(required"))
        ]
        assert not bare, f"heeler {words} --help says nothing of {bare}"
        flags |= set(FLAG.findall(text))
    for page in [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES)]:
        named = set(FLAG.findall(page.read_text(encoding="utf-8")))
        assert sorted(named - flags - OF_OTHERS) == [], page.name
    assert main(["--version"]) == 0 and "heeler 0." in capsys.readouterr().out
