"""Reward-model training on a tiny encoder: it overfits one batch, its folder loads, and it serves as a reward."""

from __future__ import annotations

import json
import math
import random
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from heeler import RewardConfig, RewardTask, resume_reward, train_reward
from heeler.data.preferences import load_preferences, split_by_prompt
from heeler.policies import loading
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy, SeparateCritic, TopLayers
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.rewards.classifier import ClassifierReward
from heeler.rewards.specs import load_reward
from heeler.runtime import machine
from heeler.runtime.passes import PassBudget
from heeler.runtime.runs import RunFolder
from heeler.train import reward as reward_training
from heeler.train.reward import (
    LabelledTexts,
    PreferencePairs,
    accuracy,
    calibration_error,
    reward_gradients,
    train_reward_model,
)
from heeler.train.text import build_text_run
from heeler.types import HeelerError
from tests.runs import small
from tests.tiny import samples_of, save_tiny_model

WORDS = ["good", "fine", "bad", "poor", "film", "the", "a"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


TEXTS = ["the good film", "a fine film", "the bad film", "a poor film"] * 4
LABELS = [True, True, False, False] * 4


def test_it_learns_loads_and_rewards(encoder: str, tmp_path: Path) -> None:
    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(model=encoder, tokens=12000, lr=3e-3, head_lr=3e-3, frozen_layers=0, lengths=(8,), threads=1)
    report = train_reward_model(config, data, {"test": (data, 8)}, tmp_path / "rm", show=False)
    assert report["figures"]["test"]["accuracy"] == 1.0
    assert json.loads((tmp_path / "rm" / "heeler.json").read_text())["figures"] == report["figures"]
    reward = ClassifierReward(str(tmp_path / "rm"), batch_tokens=16)
    output = reward(samples_of(["the", "the"], [" good film", " poor film"]))
    assert output.components["probability"][0] > 0.9 > 0.1 > output.components["probability"][1]
    torch.testing.assert_close(output.scores.sigmoid(), output.components["probability"])
    assert accuracy(reward.model, data, 8)["accuracy"] == 1.0


def test_batching_by_length_changes_nothing(encoder: str, tmp_path: Path) -> None:
    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(model=encoder, tokens=200, frozen_layers=1, lengths=(8,), threads=1)
    train_reward_model(config, data, {}, tmp_path / "rm", show=False)
    texts = ["good", "the bad film the good a poor film", "a film", "fine fine fine"]
    one = ClassifierReward(str(tmp_path / "rm"), batch_tokens=1).logits(texts)
    torch.testing.assert_close(ClassifierReward(str(tmp_path / "rm")).logits(texts), one, atol=1e-5, rtol=1e-5)
    rounded = ClassifierReward(str(tmp_path / "rm"), precision="bf16").logits(texts)
    torch.testing.assert_close(rounded, one, atol=0.05, rtol=0.05)
    assert not torch.equal(rounded, one)


def test_a_classifier_computes_in_the_runs_precision(encoder: str, tiny_llama: str, tmp_path: Path) -> None:
    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(model=encoder, tokens=200, lengths=(8,), threads=1)
    train_reward_model(config, data, {}, tmp_path / "rm", show=False)
    for precision in ("fp32", "bf16"):
        run = build_text_run(small(tiny_llama, tmp_path / "run", reward=str(tmp_path / "rm"), precision=precision))
        assert isinstance(run.reward, ClassifierReward) and run.reward.precision == precision


MIXED = ["good", "the bad film the good a poor film", "a film", "fine fine fine", "bad", "the a the a the poor"]


@pytest.mark.parametrize("kind", ["labels", "preferences"])
def test_passes_do_not_change_the_gradient(encoder: str, kind: str) -> None:
    """Rows of mixed length: item by item, in passes of 24 tokens and all at once in the order that was drawn."""
    tokenizer = load_tokenizer(encoder)
    pairs = [{"prompt": "the", "chosen": text, "rejected": f"{text} a bad", "margin": 0.1 * i} for i, text in
             enumerate(MIXED)]  # fmt: skip
    data = (
        LabelledTexts(MIXED, [True, False] * 3, tokenizer)
        if kind == "labels"
        else PreferencePairs(load_preferences(pairs, max_tokens=None), tokenizer)
    )
    model = loading.load_classifier(encoder, num_labels=1)
    config, items = RewardConfig(model=encoder, centring=0.1), [3, 1, 5, 0, 4]
    rows = data.draw(items, config, random.Random(0))
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    expected = data.loss(items, model(**batch).logits[:, 0], config)
    expected.backward()
    gradients = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > 10
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_hook(count)
    for budget, least in ((1, 5), (24, 2), (10_000, 1)):
        passes = 0
        model.zero_grad()
        loss = reward_gradients(model, data, items, rows, config, PassBudget(budget), nullcontext())
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        assert (passes == least) if budget != 24 else least <= passes < 5
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def stop_at(step: int) -> Any:
    def on_step(metrics: dict[str, float]) -> None:
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return on_step


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_resume_equals_uninterrupted(encoder: str, tmp_path: Path) -> None:
    """Crops, order and moments are those of a training that nobody stopped; other settings and data are refused."""
    data = LabelledTexts(MIXED, [True, False] * 3, load_tokenizer(encoder))
    config = RewardConfig(model=encoder, tokens=900, lr=1e-2, batch_size=4, lengths=(4, 8), threads=1, precision="fp32")
    whole = train_reward_model(config, data, {"test": (data, 8)}, tmp_path / "whole", show=False)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after .* of 900 tokens; to continue, give the same command"):
        train_reward_model(config, data, {}, tmp_path / "rm", show=False, on_step=stop_at(5))
    assert not (tmp_path / "rm").exists()
    steps: list[int] = []

    def train(config: RewardConfig, **more: Any) -> dict[str, Any]:
        return train_reward_model(
            config, data, {"test": (data, 8)}, tmp_path / "rm", show=False,
            on_start=lambda step, resolved: steps.append(step), **more,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        train(replace(config, token_budget=16), on_step=stop_at(8))
    again = train(config)
    assert steps == [5, 8] and again["steps"] == whole["steps"] > 10 and again["figures"] == whole["figures"]
    for name, tensor in weights_of(tmp_path / "whole").items():
        torch.testing.assert_close(weights_of(tmp_path / "rm")[name], tensor, atol=1e-3, rtol=1e-3)
    steps.clear()
    train(config)  # the state is there until who called needs it no more: nothing is left but the tests
    assert steps == [whole["steps"]]

    other = LabelledTexts(MIXED, [False, True] * 3, load_tokenizer(encoder))
    with pytest.raises(HeelerError, match=r"rm.training is the state of .* with other lr: give .* or delete it"):
        train(replace(config, lr=2e-2))
    with pytest.raises(HeelerError, match="a training with other data"):
        train_reward_model(config, other, {}, tmp_path / "rm", show=False)
    (tmp_path / "rm.training" / "training.pt").write_bytes(b"half")
    with pytest.raises(HeelerError, match=r"training.pt cannot be read .*: delete .*rm.training to begin anew"):
        train(config)


def test_resume_takes_the_path_that_was_chosen(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision and threads are those of the beginning, whatever a measurement would say now."""
    data = LabelledTexts(MIXED, [True, False] * 3, load_tokenizer(encoder))
    config = RewardConfig(model=encoder, tokens=300, batch_size=4, lengths=(8,))
    chosen: list[dict[str, Any]] = []

    def train(**more: Any) -> dict[str, Any]:
        return train_reward_model(
            config, data, {}, tmp_path / "rm", show=False, on_start=lambda _, resolved: chosen.append(resolved), **more
        )

    before = torch.get_num_threads()
    try:
        for cores, ratio in ((1, 9.0), (2, 0.1)):
            speed = {torch.float32: ratio, torch.bfloat16: 1.0}
            monkeypatch.setattr(machine, "usable_cores", lambda cores=cores: (cores, ""))
            monkeypatch.setattr(machine, "_seconds_per_product", lambda dtype, speed=speed: speed[dtype])
            if not chosen:
                with pytest.raises(KeyboardInterrupt):
                    train(on_step=stop_at(2))
        assert train()["precision"] == "bf16"
        assert chosen[0] == chosen[1] == {"precision": "bf16", "threads": 1, "device": "cpu"}
    finally:
        torch.set_num_threads(before)


def test_resume_of_a_run_folder(encoder: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Stopped by Ctrl-C after step 4, or killed after it with the state of step 3: the lines of metrics.jsonl agree."""
    from heeler.cli import main

    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    task = replace(task_of(encoder, tmp_path / "whole", tokens=1500), data=str(tmp_path / "pairs.jsonl"))
    train_reward(task, show=False)

    def lines(run: str) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    saved = reward_training._Training.save  # pyright: ignore[reportPrivateUsage]
    log = RunFolder.log
    for run, last_saved in (("stopped", 4), ("killed", 3)):

        def save(training: Any, *given: Any, keep: int = last_saved) -> None:
            if training.step <= keep:
                saved(training, *given)

        def stop(folder: RunFolder, metrics: Any) -> None:
            log(folder, metrics)
            if metrics["step"] == 4:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patched:
            patched.setattr(reward_training, "SAVE_EVERY", 0.0)
            patched.setattr(reward_training._Training, "save", save)  # pyright: ignore[reportPrivateUsage]
            patched.setattr(RunFolder, "log", stop)
            with pytest.raises(KeyboardInterrupt, match=f"to continue, run: heeler resume {tmp_path / run}"):
                train_reward(replace(task, out=str(tmp_path / run)), show=False)
        assert len(lines(run)) == 4
        assert main(["resume", str(tmp_path / run), "--updates", "9"]) == 2
        assert "leave --updates out" in capsys.readouterr().err
        assert main(["resume", str(tmp_path / run)]) == 0
        assert "continuing the reward model after" in capsys.readouterr().out
        assert lines(run) == lines("whole") and (tmp_path / run / "scores.png").exists()
        assert not (tmp_path / run / "model.training").exists()
        assert json.loads((tmp_path / run / "config.json").read_text())["resolved"]["precision"] == "fp32"
    assert main(["resume", str(tmp_path / "whole")]) == 2
    assert "whole is complete" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("where", ["pair_scores", "second"])
def test_a_stop_outside_of_the_steps(encoder: str, tmp_path: Path, monkeypatch: Any, where: str) -> None:
    """While testing, and by a second Ctrl-C: it is said how to go on, and nothing is trained twice."""
    task = task_of(encoder, tmp_path / "run", tokens=600)

    def stop(*_: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        if where == "pair_scores":
            patched.setattr(reward_training, "pair_scores", stop)
            says = "interrupted; to continue, run: heeler resume"
        else:
            patched.setattr(RunFolder, "log", stop)
            says = "stopped at once: nothing was kept yet; to go on, run: heeler resume"
        with pytest.raises(KeyboardInterrupt, match=says):
            train_reward(task, data=PAIRS, show=False)
    logged = (tmp_path / "run" / "metrics.jsonl").read_text() if where == "pair_scores" else ""
    with pytest.raises(HeelerError, match="rows given from Python are given again to resume_reward"):
        resume_reward(tmp_path / "run")
    summary = resume_reward(tmp_path / "run", data=PAIRS, show=False)
    assert summary["eval/after"]["accuracy"] > 0 and (tmp_path / "run" / "metrics.jsonl").read_text().startswith(logged)


def test_a_full_disk_keeps_what_was_kept(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(model=encoder, tokens=600, lengths=(8,), batch_size=4, threads=1, precision="fp32")
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(config, data, {}, tmp_path / "rm", show=False, on_step=stop_at(2))

    def full(*_: Any) -> None:
        (tmp_path / "rm.training" / "training.pt.new").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(HeelerError, match=r"cannot keep the reward model's training in .*No space left.*free some"):
            train_reward_model(config, data, {}, tmp_path / "rm", show=False, on_step=stop_at(4))
    assert [file.name for file in (tmp_path / "rm.training").iterdir()] == ["training.pt"]
    steps: list[int] = []
    train_reward_model(config, data, {}, tmp_path / "rm", show=False, on_start=lambda step, _: steps.append(step))
    assert steps == [2]


def test_labels_of_one_class_are_refused(encoder: str) -> None:
    with pytest.raises(HeelerError, match="needs both classes"):
        LabelledTexts(["a", "b"], [True, True], load_tokenizer(encoder))


def test_bf16_learns_and_is_tested_too(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []

    def score(*given: Any, **options: Any) -> Any:
        scored.append(torch.is_autocast_enabled("cpu"))
        return score_rows(*given, **options)

    score_rows = reward_training.score_rows
    monkeypatch.setattr(reward_training, "score_rows", score)
    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(
        model=encoder, tokens=6000, lr=3e-3, head_lr=3e-3, frozen_layers=0, lengths=(8,), threads=1, precision="bf16"
    )
    report = train_reward_model(config, data, {"test": (data, 8)}, tmp_path / "rm", show=False)
    assert report["precision"] == "bf16" and report["figures"]["test"]["accuracy"] == 1.0
    assert scored == [True] and not torch.is_autocast_enabled("cpu")


PAIRS = [
    {"prompt": f"the {a}", "chosen": f" {good} film", "rejected": f" {bad} film"}
    for a in ("film", "a", "the", "film film", "a a", "the a")
    for good in ("good", "fine")
    for bad in ("bad", "poor")
]


def task_of(model: str, out: Path, **changes: Any) -> RewardTask:
    training = RewardConfig(model=model, tokens=6000, lr=3e-3, head_lr=3e-3, threads=1, precision="fp32")
    return RewardTask(training=replace(training, **changes), out=str(out), eval_share=0.3)


def test_the_losses_equal_plain_loops(encoder: str) -> None:
    tokenizer = load_tokenizer(encoder)
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(PAIRS)]
    data = PreferencePairs(load_preferences(rows, max_tokens=None), tokenizer)
    config = RewardConfig(model=encoder, centring=0.3)
    items, scores = [4, 0, 9], torch.tensor([0.5, -1.0, 2.0, 2.5, 0.0, 0.3])
    expected = 0.0
    for k, i in enumerate(items):
        chosen, rejected = scores[2 * k].item(), scores[2 * k + 1].item()
        expected += math.log(1 + math.exp(-(chosen - rejected - 0.1 * i))) + 0.3 * (chosen + rejected) ** 2
    assert data.loss(items, scores, config).item() == pytest.approx(expected / 3, rel=1e-5)
    drawn = data.draw(items, config, random.Random(0))
    assert tokenizer.decode(drawn[0]) == f"[CLS] {rows[4]['prompt']}{rows[4]['chosen']} [SEP]"
    assert tokenizer.decode(drawn[3]) == f"[CLS] {rows[0]['prompt']}{rows[0]['rejected']} [SEP]"
    smooth = data.loss(items, scores, replace(config, centring=0.0, label_smoothing=1.0)).item()
    turned = data.loss(items, -scores, replace(config, centring=0.0)).item()
    assert smooth != pytest.approx(turned)  # the margin stays with the pair's order
    data.margins.zero_()
    assert data.loss(items, scores, replace(config, centring=0.0, label_smoothing=1.0)).item() == pytest.approx(
        data.loss(items, -scores, replace(config, centring=0.0)).item(), rel=1e-6
    )


@pytest.mark.parametrize("base", ["encoder", "causal"])
def test_a_model_of_preferences(encoder: str, tmp_path: Path, base: str) -> None:
    """Of an encoder or a causal model: it orders held-out pairs, its scores are normalised, and it is a reward."""
    model = encoder if base == "encoder" else save_tiny_model(tmp_path / "llama", words=WORDS, std=0.1)
    summary = train_reward(task_of(model, tmp_path / "run"), data=PAIRS, show=False)
    assert summary["eval/after"]["accuracy"] == 1.0 and summary["kind"] == "preferences"
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["eval/after"] == summary["eval/after"] and (tmp_path / "run" / "scores.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["step"] == len(rows) == summary["updates"]

    reward = load_reward(str(tmp_path / "run"))
    assert isinstance(reward, ClassifierReward)
    prompts = [row["prompt"] for row in PAIRS]
    chosen = reward(samples_of(prompts, [row["chosen"] for row in PAIRS]))
    rejected = reward(samples_of(prompts, [row["rejected"] for row in PAIRS]))
    assert bool((chosen.scores > rejected.scores).all()) and not chosen.components

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    ids = torch.tensor([tokenizer(PAIRS[0]["prompt"] + PAIRS[0]["chosen"])["input_ids"]])
    with torch.no_grad():
        logit = plain(input_ids=ids).logits[0, 0].item()
    score = plain.config.heeler_score
    assert chosen.scores[0].item() == pytest.approx(logit * score["scale"] + score["shift"], abs=1e-3)


def test_normalised_scores_of_chosen_texts(encoder: str, tmp_path: Path) -> None:
    """Mean 0 and deviation 1 on what it was trained on."""
    train_reward(task_of(encoder, tmp_path / "run", tokens=500), data=PAIRS, show=False)
    pairs = split_by_prompt(load_preferences(PAIRS, max_tokens=None), {"train": 0.7, "held_out": 0.3}, seed=0)["train"]
    reward = load_reward(str(tmp_path / "run"))
    scores = reward(samples_of([""] * len(pairs), [pair.chosen for pair in pairs])).scores
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_a_large_set_is_normalised_on_a_drawn_part(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file sorted by its completions: the part that is drawn holds all kinds of them."""
    monkeypatch.setattr(reward_training, "NORMALIZED_ON", 8)
    rows = [
        {"prompt": "the", "chosen": f" {good}{' film' * i}", "rejected": " bad"}
        for good in ("good", "fine", "a")
        for i in range(12)
    ]
    pairs = load_preferences(rows, max_tokens=None)
    data = PreferencePairs(pairs, load_tokenizer(encoder))
    scored: list[list[list[int]]] = []
    score_rows = reward_training.score_rows

    def score(model: Any, tokenizer: Any, texts: Any, **options: Any) -> torch.Tensor:
        scored.append(texts)
        return score_rows(model, tokenizer, texts, **options)

    monkeypatch.setattr(reward_training, "score_rows", score)
    config = RewardConfig(model=encoder, tokens=100, threads=1, precision="fp32")
    for out in ("one", "two"):
        train_reward_model(config, data, {}, tmp_path / out, show=False)
    assert scored[0] == scored[1] and len(scored[0]) == 8
    chosen = [data.texts.row(2 * i) for i in range(len(rows))]
    assert {chosen.index(row) // 12 for row in scored[0]} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["bert", "roberta", "tokenizer"])
def test_long_texts_are_cut_to_what_the_model_reads(encoder: str, tmp_path: Path, capsys: Any, kind: str) -> None:
    """32 positions, of which RoBERTa reads 30, or a tokenizer that says 20: one row in four is longer."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = load_tokenizer(encoder)
    model, reads = encoder, 32
    if kind == "roberta":
        sizes: dict[str, Any] = {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64
        }  # fmt: skip
        config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=1, **sizes)
        model, reads = str(tmp_path / "roberta"), 30
        RobertaModel(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
    elif kind == "tokenizer":
        model, reads = str(tmp_path / "short"), 20
        loading.load_classifier(encoder, num_labels=1).save_pretrained(model)
        tokenizer.model_max_length = 20
        tokenizer.save_pretrained(model)
    assert reward_training.most_tokens(model, load_tokenizer(model)) == reads
    rows = [{**row, "prompt": "the " * 50 + row["prompt"]} if i % 4 == 0 else row for i, row in enumerate(PAIRS)]
    task = task_of(model, tmp_path / "run", tokens=0)
    train_reward(task, data=rows)
    assert f"12 of the 48 texts lose their beginning: they have more than {reads - 2} tokens" in capsys.readouterr().out
    train_reward(task_of(model, tmp_path / "shorter", tokens=100, max_tokens=10), data=rows)
    assert "they have more than 8 tokens" in capsys.readouterr().out


def test_labels_from_a_file_and_the_command_line(encoder: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from heeler.cli import main

    monkeypatch.chdir(tmp_path)
    rows = [f"{text} {extra},{'pos' if y else 'neg'}" for extra in ("", "a", "the", "film") for text, y in zip(
        TEXTS[:4], LABELS[:4], strict=True)]  # fmt: skip
    Path("reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    flags = ["--model", encoder, "--tokens", "12000", "--lr", "3e-3", "--head-lr", "3e-3", "--threads", "1"]
    assert main(["reward", *flags, "--data", "reviews.csv", "--eval-share", "0.4", "--out", "rm"]) == 0
    told = capsys.readouterr().out
    assert "held out: accuracy 100.0%" in told and "labels to train on" in told
    assert "probability" in load_reward("rm")(samples_of(["the"], [" good film"])).components
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "the", "chosen": " good", "rejected": " good"}) + "\n")
    Path("other.csv").write_text("text,label\nthe good film,1\na,1\n")
    Path("three.csv").write_text("text,label\nbad,0\n" + "".join(f"the {i},1\n" for i in range(12)))
    for words, says in [
        (["--data", "pairs.jsonl"], "pairs.jsonl, row 1"),
        (["--data", "other.csv"], "needs both classes"),
        (["--data", "reviews.csv", "--eval-data", "reviews.csv"], "16 of the 16 prompts of 'train'"),
        (["--data", "reviews.csv", "--eval-share", "0"], "--eval-share is 0"),
        (["--data", "reviews.csv", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--data", "reviews.csv", "--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
        (["--data", "three.csv", "--eval-share", "0.3"], "three.csv: after the split all "),
        ([], "no data were given"),
    ]:
        assert main(["reward", *flags, *words, "--out", "bad"]) == 2
        assert says in capsys.readouterr().err and not Path("bad").exists()
    assert main(["reward", "imbd"]) == 2 and "did you mean imdb" in capsys.readouterr().err


def test_calibration_error() -> None:
    """Two bins: predicted .25 of which all happened, and .75 of which half did."""
    predicted = torch.tensor([0.25, 0.25, 0.75, 0.75])
    happened = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert calibration_error(predicted, happened) == pytest.approx((2 * 0.75 + 2 * 0.25) / 4)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0.0


def test_long_pairs_are_compared_by_their_ends(encoder: str) -> None:
    tokenizer = load_tokenizer(encoder)
    long = [{"prompt": "the " * 20, "chosen": "good film", "rejected": "bad film"}]
    data = PreferencePairs(load_preferences(long, max_tokens=None), tokenizer, max_tokens=6)
    assert tokenizer.decode(data.texts.row(0)) == "[CLS] the the good film [SEP]"
    same = [{"prompt": "the ", "chosen": "good a film the", "rejected": "bad a film the"}]
    cut = [long[0], {**long[0], "rejected": "bad film the bad film the"}, *same]
    with pytest.raises(HeelerError, match=r"mine, row 3: the last 3 tokens of .* equal .* larger --max-tokens"):
        PreferencePairs(load_preferences(cut, max_tokens=None, name="mine"), tokenizer, max_tokens=5)
    spaces = [long[0], {"prompt": "the", "chosen": " good", "rejected": " good "}]
    with pytest.raises(HeelerError, match=r"mine, row 2: chosen and rejected have the same tokens .*: drop the row"):
        PreferencePairs(load_preferences(spaces, max_tokens=None, name="mine"), tokenizer)
    assert PreferencePairs(load_preferences(long, max_tokens=None), tokenizer, max_tokens=4).texts.num_cut == 2
    for labels in (True, False):
        with pytest.raises(HeelerError, match=r"--max-tokens 2 leaves no room .* 2 special tokens: give at least 3"):
            if labels:
                LabelledTexts(TEXTS, LABELS, tokenizer, max_tokens=2)
            else:
                PreferencePairs(load_preferences(long, max_tokens=None), tokenizer, max_tokens=2)


def test_a_critic_starts_from_the_reward_models_score(tmp_path: Path) -> None:
    """Before training its value after the last token is the reward, normalisation included; and it is trained."""
    policy = save_tiny_model(tmp_path / "policy", words=WORDS)
    train_reward(task_of(policy, tmp_path / "rm", tokens=500), data=PAIRS, show=False)
    lm = LanguageModelPolicy(
        load_causal_lm(policy), trainable=TopLayers(layers=1), critic=SeparateCritic(model=str(tmp_path / "rm"))
    )
    tokenizer = load_tokenizer(policy)
    texts = ["the good film", "a bad poor film the"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    inputs = TokenInputs(
        tokens=torch.tensor([*ids[0], *ids[1]]),
        lengths=torch.tensor([len(row) for row in ids]),
        is_decision=torch.tensor([False, True, True, False, False, True, True, True]),
    )
    _, _, after = lm.score(inputs, last_values=True)
    scores = load_reward(str(tmp_path / "rm"))(samples_of(["", ""], texts)).scores
    torch.testing.assert_close(after, scores, atol=1e-4, rtol=1e-4)
    lm.evaluate(inputs).values.sum().backward()
    critic = lm.parameter_groups()[1]["params"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic[-2:])
