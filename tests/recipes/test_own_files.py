"""Recipes of several stages on a user's own files, through the command line: each form, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from heeler.cli import main
from heeler.policies.loading import load_tokenizer
from heeler.recipes import stages
from heeler.recipes.own import hold_out, read_questions
from heeler.recipes.rlhf_lm import without
from heeler.runtime.runs import read_json
from heeler.types import HeelerError
from tests.tiny import save_tiny_model, save_tiny_seq2seq

QUESTIONS = [{"question": f"{a}{b}?", "answer": [a.upper(), a]} for a in "abcde" for b in "fgh"]
SUMS = [{"question": f"{a} + {b} =", "answer": a + b} for a in range(4) for b in range(4)]
PAIRS = [
    {"source": f"{a} {b}", "target": f"{b}e {a}e"} for a in ("red", "new", "old", "big") for b in "abcdefghijklmno"
]
DEMONSTRATIONS = [{"prompt": f"{a}{b}", "completion": f" {b}{a}."} for a in "abcd" for b in "efg"]
PREFERENCES = [{"prompt": f"{a}{b}", "chosen": f" {b}!", "rejected": f" {a}?"} for a in "abcd" for b in "efg"]
PROMPTS = [{"prompt": f"{a}{b}", "about": a} for a in "abcd" for b in "hij"]
HELD_OUT = [{"prompt": f"{a}k", "about": a} for a in "abcd"]


def write(file: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A file of rows in the current folder, in the format that its ending says."""
    if file.endswith(".csv"):
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), file)
    else:
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prompts_of(name: str) -> list[Any]:
    return [json.loads(line)["prompt"] for line in Path(f"run/data/{name}.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> str:
    """The one sentence that a command which cannot be done says."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("heeler: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("recipe", "file", "rows", "figures"),
    [
        ("qa", "own.jsonl", QUESTIONS, {"reward", "exact", "reward/greedy", "exact/greedy", "length", "kl/ref"}),
        ("arithmetic", "own.csv", SUMS, {"reward", "reward/greedy", "length", "kl/ref"}),
    ],
)
def test_questions(
    tiny_llama: str, capsys: pytest.CaptureFixture[str], recipe: str, file: str, rows: Any, figures: set[str]
) -> None:
    """Three parts without a question in common, a table, and a folder that goes on and belongs to its data."""
    write(file, [*rows, rows[0]])  # a question that is repeated counts once
    words = ["ppo", recipe, "--data", file, "--model", tiny_llama, "--updates", "1", "--threads", "1", "--out", "run"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    parts = [set(prompts_of(name)) for name in ("solved", "prompts", "held_out")]
    assert [len(part) for part in parts] == [6, 6, 3] if recipe == "qa" else [6, 7, 3]
    assert len(set.union(*parts)) == len(rows)
    assert f"{len(rows)} different questions: 6 for fine-tuning, {len(parts[1])} for PPO, 3 held out" in printed
    assert "SFT+PPO" in printed and "heeler sample run/ppo" in printed
    summary = read_json(Path("run/summary.json"))
    assert list(summary["stages"]) == ["base", "SFT", "SFT+PPO"] and figures <= summary["stages"]["SFT+PPO"].keys()
    said = read_json(Path("run/recipe.json"))
    assert {"recipe": recipe, "data": file, "model": tiny_llama, "updates": 1}.items() <= said.items()
    config = read_json(Path("run/ppo/config.json"))["config"]
    assert config["trainable"] == {"type": "TopLayers", "layers": 3}  # the tiny model has no more
    assert config["sampling"]["max_new_tokens"] == 3  # " A" and the end; " 6" and the end

    trained = Path("run/ppo/metrics.jsonl").read_text()
    assert main(words) == 0 and Path("run/ppo/metrics.jsonl").read_text() == trained
    assert "was begun with seed 1, not 2" in refused(capsys, [*words, "--seed", "2"])
    write(file, rows[1:])
    assert "was begun with data_digest" in refused(capsys, words)


def test_held_out_questions_of_their_own(tiny_llama: str) -> None:
    """Prompts are asked as they are; an own file is held out whole."""
    rows = [{"prompt": f"the {a} is", "answer": a} for a in "abcdefg"]
    words = ["--data", write("own.jsonl", rows[:4]), "--eval-data", write("held_out.jsonl", rows[4:])]
    assert main(["ppo", "qa", *words, "--model", tiny_llama, "--updates", "1", "--threads", "1", "--out", "run"]) == 0
    assert prompts_of("held_out") == [row["prompt"] for row in rows[4:]]
    assert sorted([*prompts_of("solved"), *prompts_of("prompts")]) == [row["prompt"] for row in rows[:4]]


def test_questions_as_chats(tmp_path: Path) -> None:
    """They go through the model's template, and an answer stands alone in its turn."""
    model = save_tiny_model(tmp_path / "model", "qwen2")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(model)
    rows = [{"prompt": [{"role": "user", "content": f"{a}?"}], "answer": a} for a in "abcde"]
    words = ["--data", write("own.jsonl", rows), "--model", model, "--updates", "1", "--threads", "1", "--out", "run"]
    assert main(["ppo", "qa", *words]) == 0
    solved = [json.loads(line) for line in Path("run/data/solved.jsonl").read_text().splitlines()]
    assert len(solved) == 2 and all(row["prompt"][0]["content"] == f"{row['completion']}?" for row in solved)


def test_answers_of_one_question_are_all_accepted() -> None:
    rows = [{"question": "Who?", "answer": ["she", "her"]}, {"question": "Who ?", "answer": ["no"]}]
    for file in ("own.jsonl", "own.parquet"):
        read = read_questions(write(file, [*rows, {"question": " Who?", "answer": ["Ann", "she"]}]))
        assert read[0] == {"prompt": "Who?\nAnswer:", "answer": ["she", "her", "Ann"]} and len(read) == 2
    assert read_questions(write("sums.csv", SUMS[:2])) == [
        {"prompt": "0 + 0 =", "answer": ["0"]}, {"prompt": "0 + 1 =", "answer": ["1"]}
    ]  # fmt: skip


def test_some_rows_are_held_out_with_all_their_prompts() -> None:
    rows = [f"{a}{i}" for a in "abcdefghij" for i in range(3)]
    held_out, rest = hold_out(rows, [row[0] for row in rows], seed=1, name="f", share=0.3)
    assert len(held_out) == 9 and sorted(held_out + rest) == rows
    assert not {row[0] for row in held_out} & {row[0] for row in rest}
    assert hold_out(rows, [row[0] for row in rows], seed=1, name="f", share=0.3)[0] == held_out
    assert hold_out(rows, [row[0] for row in rows], seed=2, name="f", share=0.3)[0] != held_out
    assert len(hold_out(rows, rows, seed=1, name="f", share=0.3, most=2)[0]) == 2
    with pytest.raises(HeelerError, match="f: all its rows have one prompt, so none can be held out"):
        hold_out(rows[:3], ["a"] * 3, seed=1, name="f")


TRANSLATE = [
    "ppo", "translate", "--vocab-size", "270", "--width", "32", "--layers", "1", "--sft-epochs", "1", "--updates", "1",
    "--prompts-per-update", "4", "--max-new-tokens", "6", "--threads", "1", "--out", "run",
]  # fmt: skip


def test_translations(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRANSLATE, "--data", write("own.csv", [*PAIRS, {"source": "a " * 20, "target": "b"}])]
    assert main(words) == 0
    printed = capsys.readouterr().out
    parts = [set(prompts_of(name)) for name in ("train", "validation", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(PAIRS) and parts[0] == set(prompts_of("prompts"))
    counts = (
        f"61 pairs: {len(parts[0])} for train, {len(parts[1])} for validation, {len(parts[2])} for test; 1 left out"
    )
    assert counts in printed and "greedy/bleu" in printed
    trained = Path("run/ppo/metrics.jsonl").read_text()
    assert main(words) == 0 and Path("run/ppo/metrics.jsonl").read_text() == trained
    write("own.csv", PAIRS[1:])
    assert "was begun with data_digest" in refused(capsys, words)


def test_translations_by_a_model_of_ones_own(tmp_path: Path) -> None:
    """The columns of `heeler sft` do too, and held-out pairs may have a file."""
    rows = [{"prompt": pair["source"], "completion": pair["target"]} for pair in PAIRS]
    model = save_tiny_seq2seq(tmp_path / "model")
    files = ["--data", write("own.jsonl", rows[4:]), "--eval-data", write("held_out.jsonl", rows[:4])]
    assert main([*TRANSLATE, *files, "--model", model, "--sft-lr", "1e-3"]) == 0
    assert not Path("run/start").exists() and read_json(Path("run/sft/config.json"))["config"]["model"] == model
    assert sorted(prompts_of("test")) == sorted(row["prompt"] for row in rows[:4])
    assert sorted([*prompts_of("train"), *prompts_of("validation")]) == sorted(row["prompt"] for row in rows[4:])


def rlhf(model: str, **files: Any) -> list[str]:
    """`heeler rlhf lm` on these files, in place of or beside the usual ones."""
    given: dict[str, Any] = {"demonstrations": DEMONSTRATIONS, "preferences": PREFERENCES, "prompts": PROMPTS, **files}
    flags = [word for name, rows in given.items() for word in (f"--{name}", write(f"{name}.jsonl", rows))]
    return [
        "rlhf", "lm", "--model", model, *flags, "--updates", "2", "--prompts-per-update", "4", "--max-new-tokens", "4",
        "--layers", "2", "--threads", "1", "--out", "run",
    ]  # fmt: skip


def test_rlhf(tiny_llama: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The three stages; a demonstration of a held-out prompt is left out; stopped in PPO, the same command goes on."""
    words = [*rlhf(tiny_llama, demonstrations=[*DEMONSTRATIONS, *PROMPTS_ANSWERED]), "--judges", "long=length(0, -1)"]
    train_text = stages.train_text

    def interrupt(config: Any, **options: Any) -> Any:
        def stop(report: Any) -> None:
            raise KeyboardInterrupt

        return train_text(config, on_update=stop, **options)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "train_text", interrupt)
        assert main(words) == 130
    assert "go on with the same command and --out run" in capsys.readouterr().err
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "left out 2 demonstrations of held-out prompts" in printed and "run/reward is complete" in printed
    assert "22 demonstrations; 11 preferences or labels, 1 more held out; 10 prompts, 2 more held out" in printed
    assert not set(prompts_of("held_out")) & ({*prompts_of("demonstrations"), *prompts_of("prompts")})
    assert not set(prompts_of("preferences")) & set(prompts_of("preferences-held-out"))
    summary = read_json(Path("run/summary.json"))
    assert list(summary["stages"]) == ["base", "SFT", "SFT+PPO"] and 0 <= summary["reward_model"]["accuracy"] <= 1
    for name in ("long", "reward", "distinct_2", "duplicates", "length", "truncated_fraction", "kl/ref"):
        assert name in summary["stages"]["SFT+PPO"] and f"\n{name} " in printed
    assert [json.loads(line)["step"] for line in Path("run/ppo/metrics.jsonl").read_text().splitlines()] == [1, 2]
    reward = read_json(Path("run/reward/config.json"))["config"]["training"]
    assert Path(reward["model"]) == Path("run/sft") and reward["frozen_layers"] == 1
    assert main(words) == 0  # nothing is done twice
    assert "was begun with kl_coef 0.05, not 0.1" in refused(capsys, [*words, "--kl-coef", "0.1"])
    write("preferences.jsonl", PREFERENCES[1:])
    assert "was begun with data_digest" in refused(capsys, words)


PROMPTS_ANSWERED = [{"prompt": row["prompt"], "completion": " yes"} for row in PROMPTS]


def test_a_demonstration_of_a_held_out_prompt_is_known_in_each_form() -> None:
    chat = [{"role": "user", "content": "a?"}]
    answer = {"role": "assistant", "content": "b"}
    rows = [{"prompt": chat, "completion": "b"}, {"messages": [*chat, answer]}, {"text": "a? b"}]
    held_out = [{"prompt": [{"content": "a?", "role": "user"}]}]
    assert without(rows, held_out, "f", strict=False, show=False) == rows[2:]
    assert without(rows, [{"prompt": "a?"}], "f", strict=True, show=False) == rows
    with pytest.raises(HeelerError, match="f: 2 of 2 demonstrations are of held-out prompts: give more"):
        without(rows[:2], held_out, "f", strict=False, show=False)


def test_rlhf_on_labels_and_held_out_prompts_of_their_own(tiny_llama: str) -> None:
    labels = [{"text": f"{a}{b}{c}", "label": c == "!"} for a in "abcd" for b in "efghi" for c in "!?"]
    words = rlhf(tiny_llama, demonstrations=[{"text": "abc."}], preferences=labels, **{"eval-prompts": HELD_OUT})
    assert main([*words, "--reward-model", tiny_llama]) == 0
    assert prompts_of("held_out") == [row["prompt"] for row in HELD_OUT] and len(prompts_of("prompts")) == len(PROMPTS)
    assert read_json(Path("run/reward/summary.json"))["pairs_or_texts"] == {"train": 36, "held_out": 4}
    assert read_json(Path("run/reward/config.json"))["config"]["training"]["model"] == tiny_llama


QA = ("ppo", "qa", "--out", "run", "--data")
ARITHMETIC = ("ppo", "arithmetic", "--out", "run", "--data")
PAIRS_OF = (*TRANSLATE, "--data")


@pytest.mark.parametrize(
    ("words", "rows", "says"),
    [
        (QA, None, "there is no file own.jsonl"),
        (QA, [], "own.jsonl: there are no rows in it"),
        (QA, [{"question": "a?", "reply": "b"}], 'own.jsonl, row 1: there is no "answer" (found question, reply)'),
        (QA, [{"text": "a?", "answer": "b"}], 'row 1: there is no "question" or "prompt" (found text, answer)'),
        (QA, [*QUESTIONS, {"question": " ", "answer": "b"}], "row 16: a question is a string that is not empty"),
        (QA, [{"question": "a?", "answer": []}], "row 1: the answer is []: write a string, a number or a list"),
        (QA, [{"question": "a?", "answer": ["b", " "]}], "row 1: the answer is ['b', ' ']: write a string"),
        (QA, [{"question": "a?", "answer": True}], "row 1: the answer is True: write a string"),
        (QA, QUESTIONS[:1], "own.jsonl: all its rows have one prompt, so none can be held out"),
        (QA, QUESTIONS[:2], "own.jsonl: too few questions: 1 beside those that are held out"),
        (QA, [*QUESTIONS, {"question": "a" * 60, "answer": "b"}], "own.jsonl, prompt 16: 68 tokens, but the model's"),
        ((*QA[:-1], "--updates", "0", "--data"), QUESTIONS, "--updates must be at least 1, not 0"),
        ((*QA[:-1], "--questions", "trivia", "--data"), QUESTIONS, "--questions names questions that come along"),
        ((*QA[:-1], "--eval-data"), QUESTIONS, "--eval-data is held out of your own questions"),
        ((*ARITHMETIC[:-1], "--task", "aiw", "--data"), SUMS, "--task names questions that come along, and --data"),
        (
            (*ARITHMETIC[:-1], "--examples", "13", "--data"),
            SUMS,
            "too few questions: 13 beside those that are",
        ),
        (ARITHMETIC, [{"question": "a?", "answer": "Tuesday"}], "verifier math cannot read the answer 'Tuesday' of"),
        (ARITHMETIC, [*SUMS, {"question": "?", "answer": "x+1"}], "math-verify does not read 1 of 17 answers"),
        (PAIRS_OF, [{"source": "a", "french": "b"}], 'there is no "target" or "completion" (found source, french)'),
        (PAIRS_OF, [{"source": "a", "target": ["b"]}], "row 1: its target is a string, not ['b']"),
        (PAIRS_OF, PAIRS[:1], "own.jsonl: no pair is left for the part"),
        ((*TRANSLATE, "--eval-data"), PAIRS, "--eval-data is held out of your own pairs"),
        ((*TRANSLATE, "--updates", "0", "--data"), PAIRS, "--updates must be at least 1, not 0"),
    ],
)
def test_bad_questions_and_pairs(
    tiny_llama: str, capsys: pytest.CaptureFixture[str], words: Sequence[str], rows: Any, says: str
) -> None:
    if rows is not None:
        write("own.jsonl", rows)
    model = [] if "translate" in words else ["--model", tiny_llama]
    assert says in refused(capsys, [*words, "own.jsonl", *model])
    assert not Path("run").exists()


def test_the_same_in_both_files(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a model of the wrong kind."""
    questions = ["--data", write("own.jsonl", QUESTIONS), "--eval-data", write("held_out.jsonl", QUESTIONS[:2])]
    said = refused(capsys, [*QA[:-1], *questions, "--model", tiny_llama])
    assert (
        "15 prompts of '--data'" in said or "2 of the 15 prompts of '--data' are among the 2 of '--eval-data'" in said
    )
    pairs = ["--data", write("pairs.jsonl", PAIRS), "--eval-data", write("few.jsonl", PAIRS[:1])]
    assert "1 of the 60 prompts of '--data' are among the 1 of '--eval-data'" in refused(capsys, [*TRANSLATE, *pairs])
    said = refused(capsys, [*TRANSLATE, *pairs[:2], "--model", tiny_llama])
    assert "is a causal model: this recipe trains an encoder-decoder one" in said
    t5 = save_tiny_seq2seq(tmp_path / "t5")
    said = refused(capsys, [*QA[:-1], *questions[:2], "--model", t5])
    assert "is an encoder-decoder model: this recipe trains a causal one" in said
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"demonstrations": []}, "demonstrations.jsonl: there are no rows in it"),
        ({"demonstrations": [{"prompt": "a"}]}, 'demonstrations.jsonl, row 1: there is no "completion"'),
        ({"demonstrations": [{"text": "a" * 70}]}, "demonstrations.jsonl, row 1: 71 tokens, but the model's context"),
        ({"preferences": [{"prompt": "a", "chosen": "b"}]}, 'preferences.jsonl, row 1: there is no "rejected"'),
        (
            {"preferences": [{"prompt": "a", "better": "b"}]},
            "its columns (prompt, better) are neither those of",
        ),
        ({"preferences": PREFERENCES[:1]}, "preferences.jsonl: all its rows have one prompt"),
        (
            {"preferences": [{"text": "a", "label": 0}, {"text": "b", "label": 1}]},
            "preferences.jsonl, of which the reward model learns from 1: all 1 labels are",
        ),
        ({"prompts": [{"question": "a"}]}, 'prompts.jsonl, prompt 1: there is no "prompt" key'),
        (
            {"prompts": [{"prompt": "a" * 70}]},
            "prompts.jsonl, prompt 1: 70 tokens, but the model's context leaves room",
        ),
        ({"prompts": PROMPTS[:1]}, "prompts.jsonl: all its rows have one prompt"),
        ({"eval-prompts": []}, "eval-prompts.jsonl: there are no rows in it"),
        ({"eval-prompts": PROMPTS[:2]}, "2 of the 12 prompts of '--prompts' are among the 2 of '--eval-prompts' too"),
        (
            {"eval-prompts": [{"prompt": "ae"}]},
            "demonstrations.jsonl: 1 of 12 demonstrations are of held-out prompts: take them out of one of the two",
        ),
    ],
)
def test_bad_files_of_rlhf(
    tiny_llama: str, capsys: pytest.CaptureFixture[str], files: dict[str, Any], says: str
) -> None:
    assert says in refused(capsys, rlhf(tiny_llama, **files))
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda words: [*words, "--reward-model", "./nothing"], "cannot load the tokenizer './nothing'"),
        (lambda words: [*words, "--judges", "nonsense"], "'nonsense' does not name a function"),
        (lambda words: [*words, "--layers", "0"], "--layers must be at least 1, not 0"),
        (lambda words: [w if w != "prompts.jsonl" else "none.jsonl" for w in words], "there is no file none.jsonl"),
    ],
)
def test_bad_options_of_rlhf(
    tiny_llama: str, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]], says: str
) -> None:
    assert says in refused(capsys, change(rlhf(tiny_llama)))
    assert not Path("run").exists()


def test_the_folder_of_another_run_is_not_taken(tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/notes").write_text("mine")
    assert "run holds something else than a recipe's stages" in refused(capsys, rlhf(tiny_llama))
    assert [file.name for file in Path("run").iterdir()] == ["notes"]
