"""The grammar of --reward and --judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heeler.cli import main
from heeler.rewards.classifier import ClassifierReward
from heeler.rewards.functions import FunctionReward
from heeler.rewards.shaping import EOSPenalty, LengthReward, Overlong, Repetition
from heeler.rewards.specs import BUILT_IN, load_judges, load_reward
from heeler.rewards.verifiers import BLEU, ChrF, ExactMatch, JSONSchema, MathAnswer, ReasoningGym, Regex, TokenF1
from heeler.rewards.weighted import WeightedSum
from heeler.types import HeelerError
from tests.tiny import samples_of, save_tiny_model


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec_rewards.py").write_text("def one(prompts, completions, **_): return [1.0] * len(completions)\n")
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    return tmp_path


def save_classifier(folder: Path) -> str:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    save_tiny_model(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return str(folder)


def test_every_built_in_by_its_name(workplace: Path) -> None:
    specs = {
        "exact-match": ExactMatch, "f1(column=answers)": TokenF1, "regex(^yes)": Regex,
        "json-schema(schema.json)": JSONSchema, "math(answer, timeout=2)": MathAnswer, "reasoning-gym": ReasoningGym,
        "vader": FunctionReward, "eos-penalty(1.0)": EOSPenalty, "length(free=32, per-token=0.01)": LengthReward,
        "repetition(3)": Repetition, "overlong(limit=64, buffer=16)": Overlong, "chrf": ChrF,
        "bleu(column=answer)": BLEU,
    }  # fmt: skip
    assert {spec.partition("(")[0] for spec in specs} == set(BUILT_IN)
    loaded = {spec: load_reward(spec) for spec in specs}
    assert {spec: type(reward) for spec, reward in loaded.items()} == specs
    assert vars(loaded["length(free=32, per-token=0.01)"]) == {"free": 32, "per_token": 0.01}
    assert vars(loaded["overlong(limit=64, buffer=16)"]) == vars(load_reward("overlong( 64 ,16)"))
    assert vars(loaded["f1(column=answers)"]) == {"column": "answers"} == vars(load_reward("f1(answers)"))
    assert load_reward("eos-penalty").penalty == 1.0  # pyright: ignore
    assert isinstance(load_reward("spec_rewards:one"), FunctionReward)
    assert isinstance(load_reward("1*repetition"), Repetition)


def test_classifiers(workplace: Path) -> None:
    folder = save_classifier(workplace / "runs" / "rm=1")
    assert isinstance(load_reward(folder), ClassifierReward) and isinstance(load_reward("runs/rm=1"), ClassifierReward)
    summed = load_reward(f"0.5*{folder} + good=model:{folder}")
    assert isinstance(summed, WeightedSum)
    output = summed(samples_of(["ab"], ["cd"]))
    assert set(output.components) == {"rm=1", "rm=1/probability", "good", "good/probability"}
    assert output.scores.tolist() == pytest.approx([1.5 * output.components["good"].item()])
    with pytest.raises(HeelerError, match="cannot load the tokenizer 'nobody/nothing'"):
        load_reward("model:nobody/nothing")


def test_a_language_model_is_no_reward(workplace: Path) -> None:
    """Its head would be made up."""
    save_tiny_model(workplace / "run" / "policy")
    (workplace / "run" / "summary.json").write_text("{}")
    for spec in ("run/policy", "model:run/policy", "model:run", "2*good=run/policy + repetition"):
        with pytest.raises(HeelerError, match=r"'run/policy' is not a trained .* have no score.weight, so .* random"):
            load_reward(spec)


def test_sums(workplace: Path) -> None:
    reward = load_reward("2*spec_rewards:one + -0.5*long=length(0, 1) + repetition(1)")
    output = reward(samples_of(["p"], ["a a"]))
    assert {name: x.tolist() for name, x in output.components.items()} == {
        "one": [1.0], "long": [-2.0], "repetition": [-0.5],
    }  # fmt: skip
    assert output.scores.tolist() == [2.0 + 1.0 - 0.5]
    assert load_reward("2*repetition(1)")(samples_of(["p"], ["a a"])).scores.tolist() == [-1.0]
    named = load_reward("brief=length")
    assert isinstance(named, WeightedSum) and named.terms["brief"][0] == 1.0


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a + b", "aa  b"), (r"\(", "("), ("[)]", ")"), ("[])(]x", "(x"), ("[^]) + ]y", "zy"), ("(a|b) + (c)", "a  c"),
        (r"[\])]{2,3}", "])"), ("x=1", "x=1"), ("2*3", "223"), (r"\\", "\\"),
    ],
)  # fmt: skip
def test_patterns_may_hold_anything(pattern: str, text: str) -> None:
    alone = load_reward(f"regex({pattern})")
    assert isinstance(alone, Regex) and alone.pattern.pattern == pattern
    output = load_reward(f"2*hit=regex({pattern}) + regex(never)")(samples_of(["p", "p"], [text, "-"]))
    assert output.scores.tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "no reward was given"),
        ("  ", "no reward was given"),
        ("repitition(3)", r"'repitition\(3\)' does not name a function.*did you mean repetition"),
        ("x" * 5000, "does not name a function"),
        ("math + ", "'' does not name a function"),
        ("a lot*math", "the weight 'a lot' of 'math' is not a finite number"),
        ("nan*math", "the weight 'nan' of 'math' is not a finite number"),
        ("regex((a)", "the brackets of the reward .* do not match"),
        ("regex(a)) + math", "the brackets of the reward .* do not match"),
        ("repetition(3)x", r"goes on after its brackets"),
        ("overlong(4)", r"the reward overlong needs buffer: write overlong\(limit, buffer\)"),
        ("overlong(limit=x, buffer=2)", "limit of the reward overlong must be a whole number, not 'x'"),
        ("length(fre=3)", "the reward length takes free, per-token: 'fre=3' does not fit there"),
        ("length(1, free=3)", "'free=3' does not fit there"),
        ("length(1, 2, 3)", "'3' does not fit there"),
        ("vader(2)", "the reward vader takes no arguments: '2' does not fit there"),
        ("math + math(gold)", r"two terms of the reward .* are called 'math': name them, as in a=math\(gold\)"),
        ("std=math + vader", "cannot be called 'std'"),
        ("regex([)", "brackets of the reward"),
        ("regex(*)", r"'\*' is not a regular expression: nothing to repeat"),
    ],
)
def test_specs_that_cannot_be(spec: str, says: str) -> None:
    with pytest.raises(HeelerError, match=says):
        load_reward(spec)


def test_judges_and_their_names(workplace: Path) -> None:
    judges = load_judges(["vader", "spec_rewards:one", "chars=spec_rewards:one", "f1(column=gold)", "sum=math + vader"])
    assert list(judges) == ["vader", "one", "chars", "f1", "sum"]
    assert isinstance(judges["f1"], TokenF1) and judges["f1"].column == "gold"
    assert isinstance(judges["sum"], WeightedSum)
    with pytest.raises(HeelerError, match="two judges are called 'vader'"):
        load_judges(["vader", "vader"])
    with pytest.raises(HeelerError, match="is a sum without a name: write it as NAME=math"):
        load_judges(["math + vader"])


def test_a_run_logs_the_terms(tiny_llama: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "ab", "answer": "x"}, {"prompt": "cde", "answer": "yz"}]
    (workplace / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    top = ["trainable:top-layers", "--trainable.layers", "1"]
    words = [
        "ppo", "lm", "--model", tiny_llama, "--prompts", "prompts.jsonl", "--updates", "1", "--prompts-per-update", "4",
        "--sampling.max-new-tokens", "4", "--threads", "1", "--precision", "fp32",
    ]  # fmt: skip
    assert main([*words, "--out", "run", "--reward", "exact-match + 0.5*end=eos-penalty(2)", *top]) == 0
    metrics = json.loads((workplace / "run" / "metrics.jsonl").read_text())
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/exact-match"] + 0.5 * metrics["reward/end"])
    assert metrics["reward/end"] == pytest.approx(-2 * metrics["completion/truncated_fraction"])
    capsys.readouterr()
    assert main([*words, "--out", "other", "--reward", "exact-match(gold)", *top]) == 2
    assert "reads the column 'gold', which the prompts do not have (found answer)" in capsys.readouterr().err
