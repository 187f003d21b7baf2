"""Runs through the public door: the run folder, resume, callbacks, evaluation, and the checks that stop a run."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from heeler import (
    AdaptiveKL,
    CheckFailed,
    Full,
    HeelerError,
    LoRA,
    PPOConfig,
    Sampling,
    SeparateCritic,
    TopLayers,
    ValueHead,
    load_text_run,
    resume_text,
    train_text,
)
from heeler.policies.language_model import LanguageModelPolicy
from heeler.runtime.passes import pass_budget
from heeler.runtime.runs import RunFolder
from heeler.train import text
from heeler.train.ppo import UpdateReport
from heeler.train.text import build_text_run
from heeler.types import RewardOutput, Samples
from tests.runs import interrupted_save, numbers, small
from tests.tiny import save_tiny_model

PROMPTS = ["ab", "c", "defgh", "xyz z"]
CONTRACT = {
    "step", "decisions", "episodes", "seconds", "decisions_per_second", "reward/mean", "reward/std", "kl/ref",
    "kl/old_new", "policy/loss", "policy/clip_fraction", "policy/ratio_max", "policy/entropy", "value/loss",
    "value/explained_variance", "grad_norm", "lr", "completion/length", "completion/truncated_fraction",
    "engine/logprob_gap", "time/rollout", "time/score", "time/update",
}  # fmt: skip


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) + 0.01 * len(text) for text in completions]


def test_the_run_folder_is_the_contract(tiny_llama: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = train_text(
        small(tiny_llama, out), prompts=PROMPTS, eval_prompts=PROMPTS[:2], reward=vowels, show=False,
        extra={"recipe": {"a": 1}},
    )  # fmt: skip
    rows = numbers(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])) >= CONTRACT
    assert rows[-1]["episodes"] == 32 and rows[-1]["decisions"] <= 32 * 6
    assert rows[0]["kl/ref"] == pytest.approx(0, abs=1e-4) and rows[0]["engine/logprob_gap"] < 1e-4

    summary = json.loads((out / "summary.json").read_text())
    wanted = {"reward", "perplexity", "distinct_2", "duplicates", "length", "kl/ref"}
    assert wanted <= summary["eval/before"].keys() and wanted <= summary["eval/after"].keys()
    assert summary["recipe"] == {"a": 1} and summary["reward/mean"] == rows[-1]["reward/mean"]
    assert summary["eval/before"]["kl/ref"] == pytest.approx(0, abs=1e-3)
    assert set(summary["eval/examples"][0]) >= {"prompt", "before", "after"}

    config = json.loads((out / "config.json").read_text())
    assert config["config"]["trainable"] == {"type": "TopLayers", "layers": 1}
    assert config["resolved"]["precision"] == "fp32" and config["resolved"]["threads"] == 1
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert set(samples[0]) == {"update", "prompt", "completion", "reward"} and len(samples) == 16
    assert list(out.glob("events.out.tfevents.*"))
    assert (out / "critic" / "critic.safetensors").exists()

    plain = AutoModelForCausalLM.from_pretrained(out / "policy")
    tokenizer = AutoTokenizer.from_pretrained(out / "policy")
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, run.policy.model(ids).logits)
    assert run.sample("ab", "c") == run.sample("ab", "c")


def test_lora_is_exported_merged_with_the_adapter_beside_it(tiny_llama: str, tmp_path: Path) -> None:
    run = train_text(
        small(tiny_llama, tmp_path / "run", trainable=LoRA(rank=2)), prompts=PROMPTS, reward=vowels, show=False
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        mine = run.policy.model(ids).logits
        torch.testing.assert_close(plain(ids).logits, mine, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits, mine, atol=1e-3)
    assert (tmp_path / "run" / "policy" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("critic", [ValueHead(), SeparateCritic()], ids=str)
def test_the_critic_is_saved_beside_the_policy_and_in_the_checkpoint(
    critic: Any, tiny_llama: str, tmp_path: Path
) -> None:
    run = train_text(small(tiny_llama, tmp_path / "run", critic=critic), prompts=PROMPTS, reward=vowels, show=False)
    trained = run.policy.critic_state()
    fresh = build_text_run(run.config, prompts=PROMPTS, reward=vowels).policy.critic_state()
    assert any(name.startswith("body.") for name in trained) is isinstance(critic, SeparateCritic)
    saved = load_file(tmp_path / "run" / "critic" / "critic.safetensors")
    checkpoint = RunFolder.open(tmp_path / "run").load_checkpoint(4)["weights"]
    assert saved.keys() == trained.keys() == {n.removeprefix("critic.") for n in checkpoint if n.startswith("critic.")}
    for name, weight in trained.items():
        assert torch.equal(saved[name], weight) and torch.equal(checkpoint[f"critic.{name}"], weight), name
    assert any(not torch.equal(fresh[name], weight) for name, weight in trained.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": Full(), "critic": SeparateCritic(), "kl": AdaptiveKL(target=0.5, horizon=50)},
        {"trainable": LoRA(rank=2)},
    ],
    ids=["top", "full", "lora"],
)
def test_resume_equals_uninterrupted(tiny_llama: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = train_text(small(tiny_llama, whole, **changes), prompts=PROMPTS, reward=vowels, show=False)

    def stop(report: UpdateReport) -> None:
        if report.metrics["step"] == 3:  # after the checkpoint of update 2: update 3 is done again
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(small(tiny_llama, parts, **changes), prompts=PROMPTS, reward=vowels, on_update=stop, show=False)
    resumed = resume_text(parts, prompts=PROMPTS, reward=vowels, show=False)
    assert numbers(parts) == numbers(whole)
    for name, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name
    with pytest.raises(HeelerError, match="is complete"):
        resume_text(parts, prompts=PROMPTS, reward=vowels, show=False)
    assert resume_text(parts, prompts=PROMPTS, reward=vowels, updates=5, show=False).state.step == 5


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_llama: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_text(small(tiny_llama, tmp_path / name, seed=seed), prompts=PROMPTS, reward=vowels, show=False)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") != numbers(tmp_path / "c")


def test_engines_and_kept_states_do_not_change_a_run(tiny_llama: str, tmp_path: Path) -> None:
    """The native engine with and without the trunk's states, and transformers' generate, train the same policy."""
    for name, changes in (("kept", {}), ("fresh", {"reuse_trunk_states": False}), ("hf", {"engine": "hf"})):
        train_text(small(tiny_llama, tmp_path / name, updates=2, **changes), prompts=PROMPTS, reward=vowels, show=False)
    kept = numbers(tmp_path / "kept")
    for other in ("fresh", "hf"):
        for a, b in zip(kept, numbers(tmp_path / other), strict=True):
            for key, value in a.items():
                assert b[key] == pytest.approx(value, rel=2e-2, abs=2e-3), (other, key)


def test_the_token_budget_does_not_change_a_run(tiny_llama: str, tmp_path: Path) -> None:
    for name, budget in (("one", 10_000), ("many", 20)):
        ppo = PPOConfig(epochs=2, minibatches=2, token_budget=budget)
        train_text(small(tiny_llama, tmp_path / name, updates=2, ppo=ppo), prompts=PROMPTS, reward=vowels, show=False)
    for a, b in zip(numbers(tmp_path / "one"), numbers(tmp_path / "many"), strict=True):
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-2, abs=1e-3), key


def test_a_run_finds_the_passes_that_fit_its_memory(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scoring, evaluation and update on a device that holds 40 tokens: the numbers of a run that was told so."""
    options: dict[str, Any] = {"updates": 2, "old_logprobs": "trainer", "share_prompts": False}
    for name in ("told", "found"):
        budget = 30 if name == "told" else 10_000
        ppo = PPOConfig(epochs=2, minibatches=2, token_budget=budget)
        if name == "found":
            for method in ("evaluate", "score"):
                whole = getattr(LanguageModelPolicy, method)

                def small_memory(self: Any, inputs: Any, *args: Any, whole: Any = whole, **options: Any) -> Any:
                    if int(inputs.costs.max()) * len(inputs.costs) > 40:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                    return whole(self, inputs, *args, **options)

                monkeypatch.setattr(LanguageModelPolicy, method, small_memory)
        config = small(tiny_llama, tmp_path / name, ppo=ppo, **options)
        run = train_text(config, prompts=PROMPTS, eval_prompts=PROMPTS, reward=vowels, show=False)
    assert run.state.passes.tokens <= 40  # pyright: ignore[reportPossiblyUnboundVariable]
    assert "did not fit into the device's memory: from now on passes have" in capsys.readouterr().out
    for a, b in zip(numbers(tmp_path / "told"), numbers(tmp_path / "found"), strict=True):
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-2, abs=1e-3), key


def test_passes_are_small_on_a_cpu_unless_the_user_says_so() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pass_budget(None, cpu) < pass_budget(None, gpu)
    assert pass_budget(77, cpu) == pass_budget(77, gpu) == 77


@pytest.mark.parametrize("architecture, written_out", [("llama", True), ("qwen3", True), ("gpt2", False)])
def test_sampling_through_transformers_is_said_once(architecture: str, written_out: bool, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", architecture)
    run = build_text_run(small(model, tmp_path / "run"), prompts=PROMPTS, reward=vowels)
    assert sum("samples" in note and "through transformers" in note for note in run.notes) == (not written_out)


def test_the_config_names_the_kernels_that_were_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "library_for", lambda weight: "mkl" if weight.dtype == torch.float32 else None)
    written = {}
    for name, architecture, changes in (
        ("llama", "llama", {}),
        ("gpt_neox", "gpt_neox", {}),
        ("lora", "llama", {"trainable": LoRA(rank=2)}),
        ("hf", "llama", {"engine": "hf"}),
        ("bf16", "llama", {"precision": "bf16"}),
    ):
        model = save_tiny_model(tmp_path / "models" / name, architecture)
        config = small(model, tmp_path / name, updates=1, **changes)
        train_text(config, prompts=PROMPTS, reward=vowels, show=False)
        resolved = json.loads((tmp_path / name / "config.json").read_text())["resolved"]
        names = ("attention", "packing", "layers_written_out", "steps_written_out")
        written[name] = [resolved[key] for key in names]
    assert written == {
        "llama": ["heeler", "mkl", True, True],
        "gpt_neox": ["heeler", "mkl", False, False],
        "lora": ["heeler", "mkl", False, True],  # adapters stand in the layers; the engine's weights are merged
        "hf": ["heeler", "none", True, False],
        "bf16": ["heeler", "none", True, True],
    }


def test_the_critics_rate_is_its_own(tiny_llama: str, tmp_path: Path) -> None:
    """With a rate of 0 the policy stays as it is, in every bit, and the critic moves; and the other way round."""
    for name, rates in (("critic", {"lr": 0.0, "critic_lr": 1e-2}), ("policy", {"lr": 1e-2, "critic_lr": 0.0})):
        config = small(tiny_llama, tmp_path / name, trainable=Full(), updates=2, **rates)
        begun = build_text_run(config, prompts=PROMPTS, reward=vowels).policy.state_dict()
        begun = {key: weights.clone() for key, weights in begun.items()}
        ended = train_text(config, prompts=PROMPTS, reward=vowels, show=False).policy.state_dict()
        moved = {key.partition(".")[0] for key in begun if not torch.equal(begun[key], ended[key])}
        assert moved == {name}


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap", "drop"])
def test_truncation(tiny_llama: str, tmp_path: Path, truncation: Any) -> None:
    """Nearly every completion is cut at six tokens; with `drop` there is then hardly anything to learn from."""
    config = small(tiny_llama, tmp_path / "run", truncation=truncation, updates=1)
    scored: list[UpdateReport] = []
    train_text(config, prompts=PROMPTS, reward=vowels, on_update=scored.append, show=False)
    rollout, result = scored[0].scored.rollout, scored[0].scored
    cut = rollout.truncated
    assert bool(cut.any())
    last = result.rewards[rollout.offsets[1:] - 1]
    if truncation == "bootstrap":
        torch.testing.assert_close(last[cut], torch.zeros_like(last[cut]), atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(last, result.scores, atol=1e-4, rtol=0)
        assert float(result.bootstrap.abs().max()) == 0
    dropped = torch.repeat_interleave(cut, rollout.offsets.diff())
    assert bool((result.policy_weights[dropped] == (0 if truncation == "drop" else 1)).all())


def test_callbacks_periodic_evaluation_and_the_best_policy(tiny_llama: str, tmp_path: Path) -> None:
    seen: list[float] = []
    run = train_text(
        small(tiny_llama, tmp_path / "run", eval_every=1), prompts=PROMPTS, eval_prompts=PROMPTS, reward=vowels,
        on_update=lambda report: seen.append(report.metrics["reward/mean"]), show=False,
    )  # fmt: skip
    rows = numbers(tmp_path / "run")
    evaluated = {row["step"]: row["eval/reward"] for row in rows if "eval/reward" in row}
    assert len(seen) == 4 and len(evaluated) == 4
    best = run.summary["best"]
    assert best["reward"] == max(evaluated.values()) and evaluated[best["step"]] == best["reward"]
    assert (tmp_path / "run" / "best" / "policy" / "config.json").exists()
    assert best["step"] in [int(p.name.split("-")[1]) for p in (tmp_path / "run" / "checkpoints").iterdir()]


def test_per_token_rewards_and_columns_arrive(tiny_llama: str, tmp_path: Path) -> None:
    got: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[list[float]]:
        got.update(answer=answer, prompts=prompts, **columns)
        return [[1.0] * 6 for _ in completions]

    rows = [{"prompt": p, "answer": p.upper(), "level": i} for i, p in enumerate(PROMPTS)]
    config = small(tiny_llama, tmp_path / "run", updates=1, sampling=Sampling(max_new_tokens=6, temperature=1.0))
    try:
        run = train_text(config, prompts=rows, reward=reward, show=False)
        assert numbers(tmp_path / "run")[0]["reward/mean"] == pytest.approx(6.0)
        assert run.state.step == 1
    except HeelerError as error:  # a completion ended early: then the sentence must say which and how long it is
        assert "token rewards for completion" in str(error)
    assert got["answer"] == [p.upper() for p in got["prompts"]] and len(got["level"]) == 8


@pytest.mark.parametrize("fails_at", [3, 4], ids=["a rollout", "an evaluation"])
def test_a_reward_that_raises_loses_nothing(fails_at: int, tiny_llama: str, tmp_path: Path) -> None:
    """Calls: evaluation, update 1, update 2, update 3, evaluation of update 3."""
    config = small(tiny_llama, tmp_path / "run", checkpoint_every=100, eval_every=3)
    given: dict[str, Any] = {"prompts": PROMPTS, "eval_prompts": PROMPTS[:2], "show": False}
    calls = 0

    def broken(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise ValueError("no such row")
        return vowels(prompts, completions)

    done = fails_at - 1
    said = rf"no such row.*\[after update {done}; .* holds update {done}, continue it with"
    with pytest.raises(HeelerError, match=said):
        train_text(config, reward=broken, **given)
    resume_text(tmp_path / "run", reward=vowels, **given)
    whole = replace(config, out=str(tmp_path / "whole"))
    train_text(whole, reward=vowels, **given)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


class Longer:
    """A reward function with something to remember; called with keywords."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return [float(len(text) > self.least) for text in completions]


def test_rewards_are_functions_of_any_make(tiny_llama: str, tmp_path: Path) -> None:
    for name, reward in {"vowels": partial(vowels, answer=None), "Longer": Longer(3)}.items():
        run = train_text(small(tiny_llama, tmp_path / name, updates=1), prompts=PROMPTS, reward=reward, show=False)
        assert run.reward.name == name


def test_what_is_trained_chooses_the_best_policy(tiny_llama: str, tmp_path: Path) -> None:
    """Here the probability falls while the score rises."""

    def reward(samples: Samples) -> RewardOutput:
        scores = torch.tensor([float(len(text)) for text in samples.completions]) + next(later)
        return RewardOutput(scores=scores, token_rewards=None, components={"probability": torch.sigmoid(-scores)})

    later = count(0, 10)
    run = train_text(
        small(tiny_llama, tmp_path / "run", eval_every=1, updates=2), prompts=PROMPTS, eval_prompts=PROMPTS[:2],
        reward=reward, show=False,
    )  # fmt: skip
    assert run.summary["best"]["step"] == 2


def test_prompts_of_training_among_those_of_evaluation_are_said(tiny_llama: str, tmp_path: Path) -> None:
    run = train_text(
        small(tiny_llama, tmp_path / "run", updates=1), prompts=PROMPTS, eval_prompts=[PROMPTS[1], "new"],
        reward=vowels, show=False,
    )  # fmt: skip
    assert any("1 of the evaluation prompts are trained on too" in note for note in run.notes)


def test_ctrl_c_saves_and_says_how_to_resume(tiny_llama: str, tmp_path: Path) -> None:
    def interrupt(report: UpdateReport) -> None:
        if report.metrics["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="heeler resume"):
        train_text(small(tiny_llama, tmp_path / "run"), prompts=PROMPTS, reward=vowels, on_update=interrupt, show=False)
    assert load_text_run(tmp_path / "run", prompts=PROMPTS, reward=vowels).state.step == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 1


def test_an_interrupted_export_leaves_nothing_half_written_and_is_made_again(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run has no evaluation, and where an earlier policy is there: of fewer updates."""
    options: dict[str, Any] = {"prompts": PROMPTS, "reward": vowels, "show": False}
    run, before = tmp_path / "run", b""
    train_text(small(tiny_llama, tmp_path / "whole", updates=2), **options)
    for updates in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", interrupted_save)
            with pytest.raises(KeyboardInterrupt, match="continue with: heeler resume"):
                if updates == 1:
                    train_text(small(tiny_llama, run, updates=1), **options)
                else:
                    resume_text(run, updates=2, **options)
        assert load_text_run(run, prompts=PROMPTS, reward=vowels).state.step == updates
        assert not list(run.rglob("*.partial"))
        weights = run / "policy" / "model.safetensors"
        assert (weights.read_bytes() if weights.exists() else b"") == before  # as it was
        assert resume_text(run, **options).state.step == updates
        before = weights.read_bytes()
        with pytest.raises(HeelerError, match="is complete"):
            resume_text(run, **options)
    assert before == (tmp_path / "whole" / "policy" / "model.safetensors").read_bytes()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the policy's passes without gradient, as they come."""
    seen: list[str] = []
    for method in ("_logprobs", "_values"):
        original = getattr(LanguageModelPolicy, method)

        def counted(*args: Any, _original: Any = original, _method: str = method, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                seen.append(_method)
            return _original(*args, **options)

        monkeypatch.setattr(LanguageModelPolicy, method, counted)
    return seen


@pytest.mark.parametrize("trainable", [Full(), TopLayers(layers=1)], ids=str)
@pytest.mark.parametrize("critic", [ValueHead(), SeparateCritic()], ids=str)
def test_the_engines_logprobs_are_the_trainers(
    tiny_llama: str, tmp_path: Path, trainable: Any, critic: Any, passes: list[str]
) -> None:
    """The same run with the old policy's log-probabilities from either: a pass less, the same numbers."""
    for name in ("engine", "trainer", "auto"):
        passes.clear()
        # a small rate: Adam makes steps of full length of rounding errors, and what is then drawn drifts apart
        config = small(tiny_llama, tmp_path / name, trainable=trainable, critic=critic, old_logprobs=name, lr=1e-4)
        train_text(config, prompts=PROMPTS, reward=vowels, show=False)
        # in each of 4 updates: the reference; what the trainer computes itself; and the probe, unless the trainer
        # has computed everything from the tokens
        whole = name == "trainer" and isinstance(trainable, Full)
        assert passes.count("_logprobs") == 4 * (1 + (name == "trainer") + (not whole))
        assert passes.count("_values") == (4 if name == "trainer" or isinstance(critic, SeparateCritic) else 0)
        resolved = json.loads((tmp_path / name / "config.json").read_text())["resolved"]
        assert resolved["old_logprobs"] == ("trainer" if name == "trainer" else "engine")
    assert numbers(tmp_path / "auto") == numbers(tmp_path / "engine")
    for a, b in zip(numbers(tmp_path / "engine"), numbers(tmp_path / "trainer"), strict=True):
        for key in ("reward/mean", "kl/ref", "policy/loss", "value/loss", "policy/entropy", "completion/length"):
            assert a[key] == pytest.approx(b[key], rel=2e-2, abs=1e-3), key


def test_a_stale_engine_stops_the_run(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heeler.rollout.engines.weights import WeightReceiver

    monkeypatch.setattr(WeightReceiver, "load", lambda self, bucket: None)
    with pytest.raises(CheckFailed, match="engine and trainer differ"):
        train_text(small(tiny_llama, tmp_path / "run"), prompts=PROMPTS, reward=vowels, show=False)


@pytest.mark.parametrize("source", ["engine", "trainer"])
def test_an_engine_with_another_trunk_stops_the_run(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """The trainer takes the trunk's states from the engine, so policy and reference would both be wrong alike."""
    from heeler.rollout.engines.decoder import Decoder

    original = Decoder.__init__

    def off(self: Any, *args: Any) -> None:
        original(self, *args)
        down = self.layers[0].down
        self.layers[0] = replace(self.layers[0], down=lambda x: down(x) + 1.0)

    monkeypatch.setattr(Decoder, "__init__", off)
    config = small(tiny_llama, tmp_path / "run", trainable=TopLayers(layers=1), old_logprobs=source)
    with pytest.raises(CheckFailed, match="engine and trainer differ"):
        train_text(config, prompts=PROMPTS, reward=vowels, show=False)


def test_a_reference_that_is_another_model_stops_the_run(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any, **kwargs: Any) -> Any:
        run = build_text_run(*args, **kwargs)
        with torch.no_grad():
            for parameter in run.policy.reference_top.layers.parameters():
                parameter += 0.05
        return run

    monkeypatch.setattr(text, "build_text_run", build)
    with pytest.raises(CheckFailed, match="policy and reference differ"):
        train_text(small(tiny_llama, tmp_path / "run"), prompts=PROMPTS, reward=vowels, show=False)


def test_a_nan_in_the_weights_stops_the_run(tiny_llama: str, tmp_path: Path) -> None:
    def poison(report: UpdateReport) -> None:
        with torch.no_grad():
            run_policy["policy"].parameter_groups()[0]["params"][-1].fill_(float("nan"))

    run_policy: dict[str, Any] = {}
    original = build_text_run

    def build(*args: Any, **kwargs: Any) -> Any:
        run = original(*args, **kwargs)
        run_policy["policy"] = run.policy
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "build_text_run", build)
        with pytest.raises(CheckFailed, match=r"not finite|differ by nan"):
            train_text(
                small(tiny_llama, tmp_path / "run"), prompts=PROMPTS, reward=vowels, on_update=poison, show=False
            )
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize("trainable", [TopLayers(layers=1), Full(), LoRA(rank=2)], ids=str)
def test_bf16_runs_and_starts_at_ratio_one(tiny_llama: str, tmp_path: Path, trainable: Any) -> None:
    """Frozen weights and the engine in bf16, trained weights in fp32: within the tolerances that bf16 explains."""
    config = small(tiny_llama, tmp_path / "run", precision="bf16", trainable=trainable, updates=2)
    train_text(config, prompts=PROMPTS, reward=vowels, show=False)
    rows = numbers(tmp_path / "run")
    assert len(rows) == 2 and rows[0]["engine/logprob_gap"] < 0.1
    assert rows[0]["kl/ref"] == pytest.approx(0, abs=0.5)
