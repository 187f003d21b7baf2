"""Bad input gets one sentence and exit status 2, without a traceback, and nothing is lost."""

from __future__ import annotations

import asyncio
import errno
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers import PreTrainedModel

from heeler import cli
from heeler.cli import main
from heeler.data.prompts import load_prompts
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.rewards.functions import FunctionReward
from heeler.runtime.packages import load_function, require
from heeler.runtime.runs import RunFolder
from heeler.types import HeelerError
from tests.tiny import samples_of

REWARDS = """
import math
def good(prompts, completions, **columns): return [float(len(c)) for c in completions]
def short(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [math.nan] * len(prompts)
def text(prompts, completions, **columns): return ["good"] * len(prompts)
def string(prompts, completions, **columns): return "good"
def nothing(prompts, completions, **columns): return None
def raises(prompts, completions, **columns): return [1 / 0 for c in completions]
def strict(prompts, completions): return [0.0] * len(prompts)
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n')
    return tmp_path


def run(
    capsys: pytest.CaptureFixture[str],
    model: str,
    *flags: str,
    prompts: str = "prompts.jsonl",
    reward: str = "my_rewards:good",
) -> str:
    """Run `heeler ppo lm`, which must fail with status 2; returns the sentence."""
    words = [
        "ppo", "lm", "--model", model, "--prompts", prompts, "--reward", reward, "--out", "run", "--updates", "2",
        "--prompts-per-update", "4", "--sampling.max-new-tokens", "4", "--threads", "1", "--precision", "fp32",
        "trainable:top-layers", "--trainable.layers", "1",
    ]  # fmt: skip
    status = main([*words[:20], *flags, *words[20:]])
    error = capsys.readouterr().err
    assert status == 2
    sentences = [line for line in error.splitlines() if line.startswith("heeler: ")]
    assert len(sentences) == 1 and "Traceback" not in error
    return sentences[0]


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("my_rewards:short", "returned 1 values for 4 completions"),
        ("my_rewards:nan", "returned nan for completion 1 of 4"),
        ("my_rewards:text", "returned 'good' for completion 1"),
        ("my_rewards:string", "returned str: it must return a list"),
        ("my_rewards:nothing", "returned NoneType: it must return a list"),
        ("my_rewards:raises", r"raised ZeroDivisionError: division by zero (my_rewards.py, line 9)"),
        ("my_rewards:absent", "has no function 'absent'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("nonsense", "does not name a function"),
        ("", "no reward was given"),
    ],
)
def test_rewards(workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], reward: str, says: str) -> None:
    sentence = run(capsys, tiny_llama, reward=reward)
    assert says in sentence
    if "completion" in says or "raised" in says or "returned" in says:  # the run had begun: it says how to go on
        assert "heeler resume run" in sentence
        assert RunFolder.open("run").last_checkpoint() == 0


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"prompt": "ab"}\n{"prompt": \n', "prompts.jsonl, line 2: broken JSON"),
        ('{"prompt": "ab"}\n\n{"prompt": "  "}\n', "prompt 2: the prompt is empty"),
        ('{"prompt": ""}\n', "prompt 1: the prompt is empty"),
        ('{"text": "ab"}\n', 'there is no "prompt" key (found text)'),
        ('["ab"]\n', "line 1: expected an object"),
        ('{"prompt": "ab", "answer": 1}\n{"prompt": "ab"}\n', "prompt 2: its columns (prompt) differ"),
        ('{"prompt": 7}\n', "a prompt is a string or a list of messages"),
        ('{"prompt": [{"role": "user", "content": "hi"}]}\n', "the tokenizer has no chat template"),
        ("", "no prompts in it"),
        (json.dumps({"prompt": "x" * 70}) + "\n", "70 tokens, but the model's context leaves room for 60"),
    ],
)
def test_prompts(workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], lines: str, says: str) -> None:
    (workplace / "prompts.jsonl").write_text(lines)
    assert says in run(capsys, tiny_llama)
    assert not (workplace / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--prompts-per-update", "0"),
        ("--samples-per-prompt", "0"),
        ("--checkpoint-every", "0"),
        ("--sampling.max-new-tokens", "0"),
        ("--sampling.temperature", "0"),
        ("--ppo.minibatches", "0"),
    ],
)
def test_numbers_below_their_least(
    workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    assert f"{flag} must be at least" in run(capsys, tiny_llama, flag, value)
    assert not (workplace / "run").exists()


def test_temperature_0_and_top_1_sample_the_most_likely_tokens(
    tiny_llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "2"):
        words = ["sample", tiny_llama, "--prompt", "ab", "--max-new-tokens", "5", "--temperature", "0", "--seed", seed]
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main([*words[:6], "--top-k", "1"]) == 0  # of one token, at any temperature
    assert capsys.readouterr().out == texts[0]
    refused = {("--temperature", "-1"): "at least 0", ("--top-k", "-1"): "at least 0", ("--top-p", "0"): "above 0"}
    for (flag, value), says in refused.items():
        assert main(["sample", tiny_llama, "--prompt", "ab", flag, value]) == 2
        assert f"{flag} must be {says}" in capsys.readouterr().err


def test_files_and_models_that_are_not_there(
    workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no file absent.jsonl" in run(capsys, tiny_llama, prompts="absent.jsonl")
    sentence = run(capsys, "./no-such-model")
    assert "cannot load the tokenizer './no-such-model': there is no such folder;" in sentence
    assert "no such model could be had from the hub" in run(capsys, "nobody/no-such-model")
    (workplace / "broken").mkdir()
    (workplace / "broken" / "config.json").write_text("{}")
    assert "the folder exists, but transformers could not read it" in run(capsys, "broken")


def test_a_run_folder_that_exists(workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "run").mkdir()
    (workplace / "run" / "metrics.jsonl").write_text("precious\n")
    assert "run exists already: choose another --out" in run(capsys, tiny_llama)
    assert (workplace / "run" / "metrics.jsonl").read_text() == "precious\n"


def test_verbs_and_recipes(capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    for words, says in (
        (["pop"], "there is no verb 'pop' (did you mean ppo?)"),
        (["ppo", "imbd"], "there is no recipe 'imbd' for heeler ppo (did you mean imdb?)"),
        (["resume", "nowhere"], "nowhere is no run folder"),
        (["resume"], "needs a run folder"),
        (["eval", "nowhere"], "nowhere is no run folder"),
        (["sample", "nowhere", "--prompt", "a"], "cannot load the tokenizer 'nowhere'"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_config_of_another_version(workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "run").mkdir()
    config = {"config": {"type": "TextConfig", "model": tiny_llama, "colour": 3}, "resolved": {"precision": "fp32"}}
    (workplace / "run" / "config.json").write_text(json.dumps(config))
    assert main(["resume", "run"]) == 2
    assert "TextConfig has no setting 'colour'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "words", "says"),
    [
        ("peft", ["ppo", "lm", "--prompts", "prompts.jsonl", "--reward", "my_rewards:good", "trainable:lora"], "lora"),
        ("gymnasium", ["ppo", "gym", "--env", "CartPole-v1"], "control"),
    ],
)
def test_a_package_that_a_command_needs(
    workplace: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    package: str, words: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    model = ["--model", tiny_llama, "--sampling.max-new-tokens", "4"] if words[1] == "lm" else []
    assert main([*words[:2], *model, "--out", "run", *words[2:]]) == 2
    error = capsys.readouterr().err
    wanted = f"heeler: this needs the package {package}, which is not installed: pip install 'heeler[{says}]'\n"
    assert error == wanted and not (workplace / "run").exists()


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heeler.runtime.packages.find_spec", lambda name: None)
    with pytest.raises(HeelerError, match=r"needs the package peft.*pip install 'heeler\[lora\]'"):
        require("peft", "lora")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Call it with a file's name and a number: from that write of the file on, the disk is full."""

    def fill(name: str, good: int) -> None:
        writes = {"left": good}

        def fits(path: Path) -> bool:
            writes["left"] -= path.name == name
            return path.name != name or writes["left"] >= 0

        opened, saved, exported = Path.open, torch.save, PreTrainedModel.save_pretrained

        def open_file(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            if mode in ("w", "a") and not fits(path):
                file.write('{"half')
                file.close()
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return file

        def save(state: Any, path: Path) -> None:
            if not fits(Path(path)):
                Path(path).write_bytes(b"half")
                raise RuntimeError("basic_ios::clear: iostream error")
            saved(state, path)

        def export(model: Any, folder: Path, **options: Any) -> None:
            exported(model, folder, **options)
            if not fits(Path(folder) / "model.safetensors"):
                (Path(folder) / "model.safetensors").write_bytes(b"half")
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(Path, "open", open_file)
        monkeypatch.setattr(torch, "save", save)
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", export)

    return fill


@pytest.mark.parametrize(
    ("name", "good", "what", "kept"),
    [
        ("state.pt", 1, "the checkpoint of update 1 to run/checkpoints", 0),
        ("state.pt", 2, "the checkpoint of update 2 to run/checkpoints", 1),
        ("metrics.jsonl", 1, "run/metrics.jsonl", 1),
        ("samples.jsonl", 0, "run/samples.jsonl", 0),
        ("summary.json.partial", 1, "run/summary.json", 0),  # after the evaluation before training
        ("summary.json.partial", 2, "run/summary.json", 2),  # after the last update
        ("summary.json.partial", 4, "run/summary.json", 2),  # after everything
        ("model.safetensors", 0, "the policy to run", 2),
    ],
)
def test_a_full_disk_is_said_once_and_the_run_goes_on(
    workplace: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    full_disk: Callable[[str, int], None], name: str, good: int, what: str, kept: int,
) -> None:  # fmt: skip
    flags = ("--checkpoint-every", "1", "--eval-prompts", "prompts.jsonl")
    full_disk(name, good)
    sentence = run(capsys, tiny_llama, *flags)
    monkeypatch.undo()  # space is freed
    monkeypatch.chdir(workplace)
    assert sentence.startswith(f"heeler: cannot write {what}: ")
    end = f"; the checkpoint of update {kept} stays; free some space and continue with: heeler resume run"
    assert sentence.endswith(end) and sentence.count("heeler resume") == 1
    assert RunFolder.open("run").last_checkpoint() == kept
    assert not list(workplace.glob("run/**/*.partial"))
    assert main(["resume", "run"]) == 0
    assert [row["step"] for row in RunFolder.open("run").metrics()] == [1, 2]
    load_causal_lm("run/policy")


def test_a_full_disk_that_tensorboard_meets_in_its_thread(
    workplace: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(writer: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", full)
    sentence = run(capsys, tiny_llama)
    assert sentence.startswith("heeler: cannot write the TensorBoard events in run: No space left on device; ")
    assert threading.excepthook is before


def test_a_disk_that_is_full_from_the_beginning(
    workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], full_disk: Callable[[str, int], None]
) -> None:
    full_disk("state.pt", 0)
    assert "there is no earlier checkpoint; free some space, delete run and start again" in run(capsys, tiny_llama)


def test_what_stopped_a_run_is_told_also_where_the_disk_is_full(
    workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], full_disk: Callable[[str, int], None]
) -> None:
    full_disk("summary.json.partial", 1)
    assert "returned nan for completion 1 of 4" in run(capsys, tiny_llama, reward="my_rewards:nan")


def test_a_full_disk_outside_a_run_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(words: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "prompts.jsonl")

    monkeypatch.setattr(cli, "_dispatch", full)
    assert main(["ppo", "imdb"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("heeler: cannot write prompts.jsonl: No space left on device; free") and said.count("\n") == 1
    )

    def other(words: list[str]) -> int:
        raise OSError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "_dispatch", other)
    with pytest.raises(BrokenPipeError):
        main(["ppo", "imdb"])


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.save_checkpoint(1, {"weights": {"w": torch.ones(3)}})

    def full(state: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(HeelerError, match="No space left on device; the checkpoint of update 1 stays; free some"):
            folder.save_checkpoint(2, {"weights": {}})
    assert folder.checkpoint_steps() == [1]
    assert torch.equal(folder.load_checkpoint(1)["weights"]["w"], torch.ones(3))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    folder.save_checkpoint(3, {"weights": {}})
    assert folder.checkpoint_steps() == [3]


def test_a_checkpoint_cut_in_half(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    path = folder.save_checkpoint(1, {"weights": {"w": torch.ones(1000)}}) / "state.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(HeelerError, match="cannot be read"):
        folder.load_checkpoint(1)


def test_a_tokenizer_whose_pad_is_its_end(tiny_llama: str) -> None:
    """pad == eos must not hide the real end: Heeler never looks at pads."""
    tokenizer = load_tokenizer(tiny_llama)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    prompts = load_prompts(["abc"], tokenizer, max_tokens=None)
    assert prompts.tokens == [tokenizer("abc")["input_ids"]]


def test_reward_functions_of_trl_run_unchanged() -> None:
    """Keywords, columns as lists, **kwargs, chat completions as messages, a list of ints or a tensor as answer."""
    seen: dict[str, Any] = {}

    def reward_func(completions: Any, answer: Any, **kwargs: Any) -> Any:
        seen.update(completions=completions, answer=answer, others=sorted(kwargs))
        return [1, 0]

    chat = [{"role": "user", "content": "2 + 2?"}]
    output = FunctionReward(reward_func, "f")(samples_of(["a", chat], ["b", "4"], answer=["x", "4"], level=[1, 2]))
    assert output.scores.tolist() == [1.0, 0.0]
    assert seen["completions"] == ["b", [{"role": "assistant", "content": "4"}]]
    assert seen["answer"] == ["x", "4"] and seen["others"] == ["completion_ids", "level", "prompts", "truncated"]
    tensor = FunctionReward(lambda prompts, completions: torch.tensor([0.5]), "g")
    assert tensor(samples_of(["a"], ["b"])).scores.tolist() == [0.5]

    async def later(prompts: Any, completions: Any, truncated: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(cut) for cut in truncated]

    assert FunctionReward(later, "h")(samples_of(["a", "b"], ["c", "d"], [True, False])).scores.tolist() == [1.0, 0.0]


def test_a_module_that_cannot_be_imported(workplace: Path) -> None:
    (workplace / "crooked.py").write_text("x = 1 / 0\n")
    (workplace / "needy.py").write_text("import not_a_package\n")
    with pytest.raises(HeelerError, match=r"'crooked' cannot be imported: ZeroDivisionError: .*crooked.py, line 1"):
        load_function("crooked:f")
    with pytest.raises(HeelerError, match="'needy' needs 'not_a_package', which is not installed"):
        load_function("needy:f")


@pytest.mark.parametrize(
    "verb, words, said",
    [
        ("sft", ["eval", "RUN"], "is one of heeler sft: its held-out figures are in"),
        ("reward", ["eval", "RUN"], "is one of heeler reward: its held-out figures are in"),
        ("reward", ["export", "RUN", "--onnx", "x.onnx"], "is a reward model: its folder model/ is the export"),
        ("sft", ["export", "RUN", "--onnx", "x.onnx"], "is a language model: its folder policy/ is the export"),
    ],
)
def test_runs_of_another_kind_are_told_as_what_they_are(
    verb: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"verb": verb, "config": {}, "resolved": {}}))
    assert main([str(run) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
