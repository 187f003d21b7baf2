"""Conversations and reward models: training, PPO and a server read the same tokens, in the reward model's template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler import RewardConfig, RewardTask, train_reward, train_text
from heeler.data.preferences import load_preferences, split_by_prompt
from heeler.policies import loading
from heeler.policies.loading import load_tokenizer
from heeler.rewards.specs import load_reward
from heeler.train.reward import PreferencePairs
from heeler.types import HeelerError
from tests.runs import small
from tests.tiny import samples_of, save_tiny_model

WORDS = ["good", "fine", "bad", "poor", "film", "the", "a", "<s>", "user", "assistant", "."]
TEMPLATE = "".join(
    [
        "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}",
        "{% if add_generation_prompt %}assistant {% endif %}",
    ]
)
THE = {"role": "user", "content": "the film"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
RENDERED = "<s> user the film . assistant good ."
PAIRS = [
    ([{"role": "user", "content": about}], f"{good} film", f"{bad} film")
    for about in ("film", "a", "the", "film film", "a a", "the a")
    for good in ("good", "fine")
    for bad in ("bad", "poor")
]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FORMS = {
    "strings": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS],
    "messages": [{"prompt": p, "chosen": [answer(c)], "rejected": [answer(r)]} for p, c, r in PAIRS],
    "implicit": [{"chosen": [*p, answer(c)], "rejected": [*p, answer(r)]} for p, c, r in PAIRS],
}


def base_model(folder: Path, template: str | None = TEMPLATE) -> str:
    """A causal model whose tokenizer puts <s> before a text, as its chat template does itself."""
    from tokenizers import processors

    save_tiny_model(folder, words=WORDS, std=0.1)
    tokenizer = load_tokenizer(str(folder))
    start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def classifier(folder: Path, template: str | None = TEMPLATE) -> str:
    """The same with a head: a classifier that nobody trained."""
    model = loading.load_classifier(base_model(folder, template), num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return str(folder)


def logit(folder: str, text: str) -> float:
    """Of the words of a text, each of which is a token."""
    ids = torch.tensor([load_tokenizer(folder).convert_tokens_to_ids(text.split())])
    with torch.no_grad():
        return float(loading.load_classifier(folder)(input_ids=ids).logits[0, 0])


def task_of(model: str, out: Path, **changes: Any) -> RewardTask:
    training = RewardConfig(model=model, tokens=500, lr=3e-3, head_lr=3e-3, threads=1, precision="fp32", **changes)
    return RewardTask(training=training, out=str(out), eval_share=0.3)


def test_a_reward_model_reads_its_own_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one <s>, and a string beside it as a string: with one <s> too."""
    folder = classifier(tmp_path / "rm")
    scores = load_reward(folder)(samples_of([[THE], "the ", [THE, BAD, THE]], ["good", "film", "fine"])).scores
    texts = [RENDERED, "<s> the film", "<s> user the film . assistant bad . user the film . assistant fine ."]
    assert scores.tolist() == pytest.approx([logit(folder, text) for text in texts], abs=1e-5)
    assert len(set(scores.tolist())) == 3 and "template" not in capsys.readouterr().out
    refuses = "{{ raise_exception('no chats, please') }}"
    with pytest.raises(HeelerError, match=r"the reward model .*other: .* refuses the messages \(no chats, please\)"):
        load_reward(classifier(tmp_path / "other", refuses))(samples_of([[THE]], ["good"]))


def test_without_a_template_contents_are_joined_and_it_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = classifier(tmp_path / "rm", template=None)
    reward = load_reward(folder)
    reward(samples_of(["the "], ["film"]))
    assert not capsys.readouterr().out
    for _ in range(2):
        scores = reward(samples_of([[THE]], ["good"])).scores
    assert scores.tolist() == pytest.approx([logit(folder, "<s> the film good")], abs=1e-5)
    says = "has no chat template: it reads conversations as their contents, joined by line ends, without roles"
    assert capsys.readouterr().out == f"the reward model {folder} {says}\n"
    train_reward(task_of(base_model(tmp_path / "base", None), tmp_path / "run"), data=FORMS["strings"])
    assert capsys.readouterr().out.count(f"the model {tmp_path}/base {says}\n") == 1


@pytest.mark.parametrize("form", FORMS)
def test_training_reads_what_the_reward_reads(tmp_path: Path, form: str) -> None:
    """The scores of the training set's chosen texts, as PPO would ask for them, have mean 0 and deviation 1."""
    model = base_model(tmp_path / "base")
    tokenizer = load_tokenizer(model)
    (pair,) = load_preferences([{"prompt": [THE], "chosen": "good", "rejected": "bad"}], tokenizer, max_tokens=8)
    assert (pair.chosen.split(), pair.templated) == (RENDERED.split(), True)
    with pytest.raises(HeelerError, match="row 1: 8 tokens, but the reward model reads 7"):
        load_preferences([{"chosen": [THE, GOOD], "rejected": [THE, BAD]}], tokenizer, max_tokens=7)
    assert tokenizer.convert_ids_to_tokens(PreferencePairs([pair], tokenizer).texts.row(0)) == RENDERED.split()

    train_reward(task_of(model, tmp_path / "run"), data=FORMS[form], show=False)
    pairs = load_preferences(FORMS[form], tokenizer, max_tokens=None)
    train = split_by_prompt(list(zip(pairs, PAIRS, strict=True)), {"train": 0.7, "held_out": 0.3}, prompt=lambda row:
        row[0].prompt)["train"]  # fmt: skip
    assert 0 < len(train) < len(PAIRS)
    reward = load_reward(str(tmp_path / "run"))
    scores = reward(samples_of([prompt for _, (prompt, _, _) in train], [chosen for _, (_, chosen, _) in train])).scores
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_long_conversations_lose_their_beginning(tmp_path: Path) -> None:
    """Nothing is put before what is left; beside a string, whose <s> stays."""
    tokenizer = load_tokenizer(base_model(tmp_path / "base"))
    rows = [
        {"prompt": [THE], "chosen": "good", "rejected": "bad"},
        {"prompt": "the film a ", "chosen": "good film", "rejected": "bad film"},
    ]
    texts = PreferencePairs(load_preferences(rows, tokenizer, max_tokens=None), tokenizer, max_tokens=4).texts
    words = [tokenizer.convert_ids_to_tokens(texts.row(i)) for i in (0, 2)]
    assert words == [[".", "assistant", "good", "."], ["<s>", "a", "good", "film"]]
    assert texts.num_tokens == 16 and texts.num_cut == 4


def test_ppo_is_paid_for_the_template(tmp_path: Path) -> None:
    """The policy has a template of its own."""
    rm = classifier(tmp_path / "rm")
    policy = base_model(tmp_path / "policy", TEMPLATE.replace("user", "a"))
    prompts = [[{"role": "user", "content": text}] for text in ("the film", "a", "the a film")]
    changes = {"reward": rm, "updates": 1, "samples_logged": 8}
    train_text(small(policy, tmp_path / "run", **changes), prompts=prompts, eval_prompts=prompts, show=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        text = f"<s> user {row['prompt'][0]['content']} . assistant {row['completion']} ."
        assert row["reward"] == pytest.approx(logit(rm, text), abs=1e-4)


def test_an_implicit_prompt_lies_in_one_part(tmp_path: Path) -> None:
    model = base_model(tmp_path / "base")
    with pytest.raises(HeelerError, match=r"1 of the 6 prompts of 'train' are among the 1 of 'held_out' too"):
        train_reward(
            task_of(model, tmp_path / "run"), data=FORMS["implicit"],
            eval_data=[{"chosen": [*PAIRS[0][0], answer("the")], "rejected": [*PAIRS[0][0], answer("a")]}],
        )  # fmt: skip


def test_raw_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--no-normalize stores a gain of 1 and a bias of 0, and PPO is paid what the model says."""
    from heeler.cli import main

    monkeypatch.chdir(tmp_path)
    model = base_model(tmp_path / "base")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORMS["strings"]))
    flags = ["--model", model, "--data", "pairs.jsonl", "--tokens", "500", "--threads", "1", "--precision", "fp32"]
    for out, more in (("raw", ["--no-normalize"]), ("normalised", [])):
        assert main(["reward", *flags, "--eval-share", "0.3", "--out", out, *more]) == 0
    scores = {out: json.loads(Path(out, "model", "config.json").read_text())["heeler_score"] for out in
              ("raw", "normalised")}  # fmt: skip
    assert scores["raw"] == {"kind": "preferences", "scale": 1.0, "shift": 0.0}
    assert scores["normalised"]["scale"] != 1.0 and scores["normalised"]["shift"] != 0.0
    assert json.loads(Path("raw", "summary.json").read_text())["score"] == scores["raw"]
    output = load_reward("raw")(samples_of([[THE]], ["good"]))
    assert output.scores.tolist() == pytest.approx([logit("raw", RENDERED)], abs=1e-5) and not output.components

    run = train_text(small(model, tmp_path / "run", reward="raw", updates=1), prompts=[[THE]], show=False)
    sample = json.loads(Path("run", "samples.jsonl").read_text().splitlines()[0])
    text = RENDERED.replace("good", sample["completion"])
    assert run.state.step == 1 and sample["reward"] == pytest.approx(logit("raw", text), abs=1e-4)
