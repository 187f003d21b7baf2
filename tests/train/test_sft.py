"""Supervised fine-tuning: it learns, equals plain cross-entropy, resumes, and PPO starts from its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from heeler import Full, HeelerError, LoRA, SFTConfig, TopLayers, resume_sft, train_sft, train_text
from heeler.data.examples import load_examples
from heeler.policies.language_model import LanguageModelPolicy, ValueHead
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.ppo.schedules import Schedule
from heeler.runtime.passes import PassBudget
from heeler.train import sft
from heeler.train.sft import as_inputs, build_sft_run, held_out_figures, sft_gradients
from tests.runs import interrupted_save, numbers, small
from tests.tiny import save_tiny_model, save_tiny_seq2seq
from tests.train.test_text import vowels

ROWS = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}."} for a in "abcd" for b in "efgh"]


def config_of(model: str, out: Path, **changes: Any) -> SFTConfig:
    base = SFTConfig(
        model=model, out=str(out), updates=12, examples_per_update=4, eval_share=0.25, lr=3e-3, threads=1,
        precision="fp32", checkpoint_every=5, eval_every=4, sample_tokens=6, lr_schedule=Schedule(),
    )  # fmt: skip
    return replace(base, **changes)


def plain_loss(model: Any, tokenizer: Any) -> torch.Tensor:
    """Cross-entropy of transformers on the completions, one example at a time; nats a target token."""
    total, count = torch.zeros(()), 0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        targets = len(ids) - len(prompt)
        total = total + model(input_ids=torch.tensor([ids]), labels=labels).loss * targets
        count += targets
    return total / count


@pytest.mark.parametrize(("given", "pack", "budget"), [(None, False, 1536), (None, True, 4096), (99, True, 99)])
def test_the_token_budget(tiny_llama: str, tmp_path: Path, given: int | None, pack: bool, budget: int) -> None:
    config = config_of(tiny_llama, tmp_path / "run", token_budget=given, pack=pack)
    assert build_sft_run(config, data=ROWS).passes.tokens == budget


def test_passes_that_do_not_fit_are_made_smaller(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=Full(), critic=ValueHead())
    inputs = as_inputs(load_examples(ROWS, load_tokenizer(tiny_llama), max_tokens=64), policy.device)

    def gradients(passes: PassBudget) -> list[Any]:
        loss, _ = sft_gradients(policy, inputs, passes, pack=False)
        return [loss, *(p.grad.clone() for p in policy.model.parameters() if p.grad is not None)]

    expected, whole = gradients(PassBudget(4096)), LanguageModelPolicy.evaluate

    def small_memory(self: Any, part: Any, pack_tokens: int | None = None) -> Any:
        output = whole(self, part, pack_tokens)
        if len(part.lengths) > 1:
            output.logprobs.sum().backward()  # half of a backward pass
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return output

    monkeypatch.setattr(LanguageModelPolicy, "evaluate", small_memory)
    passes = PassBudget(4096, "--token-budget")
    found = gradients(passes)
    assert passes.tokens < 40 and found[0] == pytest.approx(expected[0], rel=1e-6)
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("token_budget", [12, 4096])
def test_the_gradient_is_that_of_cross_entropy_on_completions(tiny_llama: str, pack: bool, token_budget: int) -> None:
    tokenizer, model = load_tokenizer(tiny_llama), load_causal_lm(tiny_llama)
    policy = LanguageModelPolicy(model, trainable=TopLayers(layers=2), critic=ValueHead())
    inputs = as_inputs(load_examples(ROWS, tokenizer, max_tokens=64), policy.device)
    loss, targets = sft_gradients(policy, inputs, PassBudget(token_budget), pack)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine = [p.grad.clone() for p in parameters if p.grad is not None]
    plain = plain_loss(model, tokenizer)
    assert targets == 4 * len(ROWS) and loss == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(mine, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("way", [Full(), LoRA(rank=8), TopLayers(layers=2)], ids=lambda w: type(w).__name__)
def test_it_learns_its_examples_by_heart(tiny_llama: str, tmp_path: Path, way: Any) -> None:
    config = config_of(tiny_llama, tmp_path / "run", trainable=way, updates=60, eval_share=0.0, examples_per_update=16)
    run = train_sft(replace(config, lr=3e-3 if way == Full() else 1e-2), data=ROWS, show=False)
    assert numbers(tmp_path / "run")[-1]["loss"] < 0.1 < numbers(tmp_path / "run")[0]["loss"]
    example = run.summary["examples"][0]
    assert example["completion"] == example["expected"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert plain_loss(plain, load_tokenizer(str(tmp_path / "run"))).item() < 0.1


def test_the_folder_and_ppo_from_it(tiny_llama: str, tmp_path: Path) -> None:
    train_sft(config_of(tiny_llama, tmp_path / "sft"), data=ROWS, show=False, extra={"stage": 1})
    summary = json.loads((tmp_path / "sft" / "summary.json").read_text())
    assert summary["eval/after"]["loss"] < summary["eval/before"]["loss"] and summary["stage"] == 1
    assert json.loads((tmp_path / "sft" / "config.json").read_text())["verb"] == "sft"
    assert "eval/loss" in numbers(tmp_path / "sft")[3] and "eval/loss" not in numbers(tmp_path / "sft")[4]
    run = train_text(
        small(str(tmp_path / "sft"), tmp_path / "ppo", updates=1), prompts=["ab"], reward=vowels, show=False
    )
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "policy").state_dict()
    trunk = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(run.policy.model.state_dict()[trunk], mine[trunk])
    with pytest.raises(HeelerError, match="has no model yet"):
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "summary.json").write_text("{}")
        load_causal_lm(str(tmp_path / "half"))


def test_the_best_weights_are_exported(tiny_llama: str, tmp_path: Path) -> None:
    """Held-out examples that contradict the others: learning helps at first (where to stop), then it hurts."""
    config = config_of(tiny_llama, tmp_path / "run", updates=30, eval_every=1, examples_per_update=16)
    held_out = [{"prompt": f"+{row['prompt']}", "completion": row["prompt"].replace("=", ".")} for row in ROWS]
    run = train_sft(config, data=ROWS, eval_data=held_out, show=False)
    losses = [row["eval/loss"] for row in numbers(tmp_path / "run")]
    assert run.best is not None and run.best["step"] == 1 + losses.index(min(losses)) < 30
    fresh = LanguageModelPolicy(load_causal_lm(str(tmp_path / "run")), trainable=Full(), critic=ValueHead())
    exported = held_out_figures(fresh, run.held_out, PassBudget(4096))["loss"]
    assert exported == pytest.approx(min(losses), rel=1e-4) == pytest.approx(run.summary["eval/after"]["loss"])


@pytest.mark.parametrize("way", [Full(), LoRA(rank=2)], ids=lambda w: type(w).__name__)
def test_resume_equals_uninterrupted(tiny_llama: str, tmp_path: Path, way: Any) -> None:
    whole = train_sft(config_of(tiny_llama, tmp_path / "whole", trainable=way), data=ROWS, show=False)

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 7:  # after the checkpoint of update 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(config_of(tiny_llama, tmp_path / "parts", trainable=way), data=ROWS, on_update=stop, show=False)
    resumed = resume_sft(tmp_path / "parts", data=ROWS, show=False)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, resumed.weights()[name]), name
    assert resumed.summary["eval/after"] == whole.summary["eval/after"]
    with pytest.raises(HeelerError, match="is complete"):
        resume_sft(tmp_path / "parts", data=ROWS, show=False)


def test_an_interrupted_export_is_made_again(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"data": ROWS, "show": False}
    config = config_of(tiny_llama, run, updates=2)
    train_sft(replace(config, out=str(tmp_path / "whole")), **options)
    for updates in (2, 3):  # the second time an earlier policy is there
        before = {f.name: f.read_bytes() for f in (run / "policy").glob("*")}
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "save_pretrained", interrupted_save)
            with pytest.raises(KeyboardInterrupt):
                if updates == 2:
                    train_sft(config, **options)
                else:
                    resume_sft(run, updates=updates, **options)
        assert {f.name: f.read_bytes() for f in (run / "policy").glob("*")} == before
        assert not list(run.rglob("*.partial"))
        assert resume_sft(run, **options).step == updates
        with pytest.raises(HeelerError, match="is complete"):
            resume_sft(run, **options)
    whole = resume_sft(tmp_path / "whole", updates=3, **options)
    assert whole.step == 3
    for file in ("model.safetensors", "config.json"):
        assert (run / "policy" / file).read_bytes() == (tmp_path / "whole" / "policy" / file).read_bytes()


def test_the_command_line(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from heeler.cli import main

    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--updates", "2", "--threads", "1", "--examples-per-update", "4"]
    assert main(["sft", "--model", tiny_llama, "--data", "data.jsonl", "--out", "run", *flags]) == 0
    told = capsys.readouterr().out
    assert "wrote:" in told and "heeler ppo lm --model run" in told
    assert main(["resume", "run", "--updates", "3"]) == 0 and len(numbers(Path("run"))) == 3
    assert main(["sample", "run", "--prompt", "ae=", "--max-new-tokens", "4"]) == 0
    for words, says in [
        ([], "no examples were given"),
        (["--data", "data.jsonl", "--eval-share", "1.0"], "--eval-share is 1.0"),
        (["--data", "data.jsonl", "--eval-share", "0.99"], "are too few to hold out 99%"),
        (["--data", "data.jsonl", "--max-tokens", "3"], "data.jsonl, row 1: 7 tokens"),
        (["--data", "data.jsonl", "--max-tokens", "3"], "drop what is too long (--too-long drop)"),
        (["--data", "gone.jsonl"], "there is no file gone.jsonl"),
        (["--data", "data.jsonl", "--examples-per-update", "0"], "--examples-per-update must be at least 1, not 0"),
        (["--data", "data.jsonl", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1, not 0"),
        (["--data", "data.jsonl", "--sample-tokens", "-1"], "--sample-tokens must be at least 0, not -1"),
    ]:
        assert main(["sft", "--model", tiny_llama, "--out", "bad", *words]) == 2
        assert says in capsys.readouterr().err and not Path("bad").exists()


def test_prompts_are_held_out_with_all_their_completions(tiny_llama: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n % 8}", "completion": f"c{n}"} for n in range(32)]
    run = build_sft_run(config_of(tiny_llama, tmp_path, eval_share=0.25), data=rows)
    prompts = [{tuple(e.tokens[:2]) for e in part} for part in (run.train, run.held_out)]
    assert len(run.held_out) == 8 and len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    with pytest.raises(HeelerError, match="1 prompts are among those that are trained on too, for instance 'p3'"):
        build_sft_run(config_of(tiny_llama, tmp_path), data=rows, eval_data=rows[3:4])
    with pytest.raises(HeelerError, match="4 examples of 1 prompts are too few to hold out 25%"):
        build_sft_run(config_of(tiny_llama, tmp_path), data=rows[::8])


def test_a_loss_that_is_not_finite_stops_the_run(tiny_llama: str, tmp_path: Path) -> None:
    config = config_of(tiny_llama, tmp_path / "run", lr=float("inf"))
    with pytest.raises(HeelerError, match=r"the loss became (nan|inf) at update 2: .* holds update 0, continue with"):
        train_sft(config, data=ROWS, show=False)
    assert (tmp_path / "run" / "checkpoints" / "step-000000").is_dir()


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_samples_end_where_the_models_positions_end(tmp_path: Path) -> None:
    """GPT-2 with 64 positions: a prompt of 59 leaves 5 of the 30 tokens, one of 2 leaves all."""
    model = save_tiny_model(tmp_path / "gpt2", "gpt2")
    rows = [{"prompt": "x" * 60, "completion": "y"}, {"prompt": "abc", "completion": "d"}] * 2
    config = config_of(model, tmp_path / "run", updates=1, sample_tokens=30)
    run = train_sft(config, data=rows, eval_data=[{**row, "prompt": row["prompt"][1:]} for row in rows], show=False)
    for sample, room in zip(run.summary["examples"], (5, 30, 5, 30), strict=True):
        assert len(sample["completion"]) <= room  # a token is a byte
    assert [len(sample["prompt"]) for sample in samples_of(tmp_path / "run")] == [59, 2, 59, 2]
    assert len({sample["completion"] for sample in run.summary["examples"][:2]}) == 2
    bart = save_tiny_seq2seq(tmp_path / "bart", "bart")  # its decoder has 64 positions too
    train_sft(config_of(bart, tmp_path / "translated", updates=1, sample_tokens=99), data=rows[1:2] * 4 + rows[:1],
              show=False)  # fmt: skip
    assert samples_of(tmp_path / "translated")


def test_texts_are_continued_from_their_beginnings(tiny_llama: str, tmp_path: Path) -> None:
    rows = [{"text": f"{letter * 12}, and so on"} for letter in "abcdefgh"] + [{"text": "xyz"}]
    config = config_of(tiny_llama, tmp_path / "run", updates=1, eval_share=0.0, sample_prompts=9)
    train_sft(config, data=rows, show=False)
    samples = sorted(samples_of(tmp_path / "run"), key=lambda sample: sample["prompt"])
    assert [s["prompt"] for s in samples] == [*[letter * 8 for letter in "abcdefgh"], "xy"]
    assert [s["prompt"] + s["expected"] for s in samples] == [row["text"] for row in rows]
    assert any(s["completion"] for s in samples)


@pytest.mark.parametrize("where", ["held_out_figures", "_sample"])
def test_a_stop_at_the_end_says_how_to_go_on(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = config_of(tiny_llama, tmp_path / "run", updates=1, eval_every=0)
    whole, calls = getattr(sft, where), 0

    def stop(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if where == "_sample" or calls == 2:  # the first evaluation is the one before training
            raise KeyboardInterrupt
        return whole(*given)

    with monkeypatch.context() as patched:
        patched.setattr(sft, where, stop)
        with pytest.raises(KeyboardInterrupt, match=f"interrupted; continue with: heeler resume {tmp_path / 'run'}"):
            train_sft(config, data=ROWS, show=False)
    assert "eval/after" in resume_sft(tmp_path / "run", data=ROWS, show=False).summary
