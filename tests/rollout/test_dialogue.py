"""Episodes of several turns: what is packed, where rewards lie, when episodes end, and what GAE never sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heeler.data.prompts import PromptSet, load_prompts
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy, TopLayers, ValueHead
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.ppo.advantages import AdvantageConfig, estimate_advantages
from heeler.ppo.shaping import segment_sums
from heeler.rollout.dialogue import Dialogue, DialogueCollector, DialogueRollout, dialogue_rollout, play
from heeler.rollout.engines.draws import draw_seed
from heeler.rollout.engines.native import NativeEngine
from heeler.runtime.reduce import LocalReduce
from heeler.types import CheckFailed, Completion, HeelerError, Request, Sampling, ScoredRollout
from tests.tiny import byte_tokenizer
from tests.toy_dialogues import Broken, Scripted, Vowels

TOKENIZER = byte_tokenizer()
EOS = 0
CPU = torch.device("cpu")


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


class Script:
    """An engine that says `turns[prompt]`, one after the other, to the episode whose prompt begins with that letter.

    A turn is closed by a stop string in it, where it ends with "..." by the cap, and else by an end of sequence.
    """

    def __init__(self, turns: dict[str, Sequence[str]]) -> None:
        self.turns, self.said = {ids(letter)[0]: said for letter, said in turns.items()}, Counter[int]()
        self.calls: list[list[Request]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls.append(list(requests))
        completions: list[Completion] = []
        for request in requests:
            episode = request.prompt[0]
            text = self.turns[episode][self.said[episode]]
            self.said[episode] += 1
            stop = next((s for s in sampling.stop if s in text), None)
            cut = text.endswith("...")
            tokens = ids(text) + ([] if stop or cut else [EOS])
            completions.append(
                Completion(
                    tokens=tokens,
                    logprobs=-0.01 * torch.tensor(tokens, dtype=torch.float32),
                    finish_reason="length" if cut else "stop",
                    version=3,
                    stop_string=stop,
                )
            )
        return completions

    def begin(self) -> None: ...
    def load(self, bucket: Iterable[tuple[str, Tensor]]) -> None: ...
    def commit(self, version: int) -> None: ...


def scripted(*rows: dict[str, Any]) -> PromptSet:
    """Prompts for `Scripted`: "a", "b", ... with the columns given, the same ones in each row."""
    prompts = [{"prompt": letter, **row} for letter, row in zip("abcdefgh", rows, strict=False)]
    return load_prompts(prompts, TOKENIZER, max_tokens=None)


def dialogue(environment: Any = Scripted, **changes: Any) -> Dialogue:
    base = Dialogue(environment=environment, name="my_envs:Mine", sampling=Sampling(max_new_tokens=8), max_turns=9)
    return replace(base, **changes)


def roll(engine: Any, prompts: PromptSet, how: Dialogue | None = None) -> DialogueRollout:
    n = len(prompts)
    seeds = [draw_seed(5, 0, i, 0) for i in range(n)]
    return dialogue_rollout(engine, TOKENIZER, prompts, range(n), [0] * n, seeds, how or dialogue(), CPU)


texts = st.text(alphabet="xyz ", max_size=5)
turns = st.lists(st.tuples(texts.filter(bool), texts, st.floats(-2, 2, width=32)), min_size=1, max_size=4)


@given(st.lists(st.tuples(texts, turns), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_packing_equals_a_plain_loop(episodes: list[Any]) -> None:
    prompts = scripted(
        *({"first": first, "observations": [o for _, o, _ in said], "rewards": [r for _, _, r in said]}
          for first, said in episodes)
    )  # fmt: skip
    said = {letter: [t for t, _, _ in episode[1]] for letter, episode in zip("abcdefgh", episodes, strict=False)}
    rollout = roll(Script(said), prompts)

    tokens: list[int] = []
    decisions: list[int] = []
    positions: list[int] = []
    rewards: list[float] = []
    lengths: list[int] = []
    offsets = [0]
    for letter, (first, spoken) in zip("abcdefgh", episodes, strict=False):
        start = len(tokens)
        tokens += ids(letter) + ids(first)
        for t, (text, observation, reward) in enumerate(spoken):
            for token in [*ids(text), EOS]:
                positions.append(len(tokens))
                tokens.append(token)
                decisions.append(token)
                rewards.append(0.0)
            rewards[-1] = reward
            if t + 1 < len(spoken):
                tokens += ids(observation)
        lengths.append(len(tokens) - start)
        offsets.append(len(decisions))
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs)
    assert inputs.tokens.tolist() == tokens and inputs.lengths.tolist() == lengths
    assert inputs.is_decision.nonzero()[:, 0].tolist() == positions
    assert rollout.actions.tolist() == decisions and rollout.offsets.tolist() == offsets
    assert inputs.decision_counts.tolist() == rollout.offsets.diff().tolist()
    torch.testing.assert_close(rollout.step_rewards, torch.tensor(rewards))
    torch.testing.assert_close(rollout.behavior_logprobs, -0.01 * torch.tensor(decisions, dtype=torch.float32))
    assert rollout.policy_versions.tolist() == [3] * len(decisions)
    assert rollout.turns.tolist() == [len(spoken) for _, spoken in episodes]
    assert bool(rollout.terminated.all()) and not bool(rollout.truncated.any())


def test_inserted_observations_leave_the_advantages_unchanged() -> None:
    """The same decisions, values and rewards: nothing that a tool inserts between them may be seen."""
    found: list[tuple[int, list[int], Tensor, Tensor, int]] = []
    for inserted in (0, 10, 100):
        row = {"observations": ["o" * inserted] * 3, "rewards": [0.25, 0.0, 1.0]}
        rollout = roll(Script({"a": ["xy", "z", "yes"], "b": ["x", "zz", "no"]}), scripted(row, row))
        n = len(rollout.actions)
        values = torch.linspace(-1, 1, n)
        scored = ScoredRollout(
            rollout=rollout, scores=torch.zeros(2), rewards=rollout.step_rewards,
            old_logprobs=rollout.behavior_logprobs, ref_logprobs=rollout.behavior_logprobs, values=values,
            bootstrap=torch.zeros(2), policy_weights=torch.ones(n), value_weights=torch.ones(n), components={},
        )  # fmt: skip
        batch = estimate_advantages(scored, AdvantageConfig(gamma=0.99, lam=0.9), LocalReduce())
        inputs = rollout.inputs
        assert isinstance(inputs, TokenInputs)
        found.append((n, rollout.offsets.tolist(), batch.advantages, batch.returns, len(inputs.tokens)))
    for n, offsets, advantages, returns, _ in found[1:]:
        assert n == found[0][0] and offsets == found[0][1]
        assert torch.equal(advantages, found[0][2]) and torch.equal(returns, found[0][3])
    assert [length - found[0][4] for *_, length in found] == [0, 40, 400]  # they were there: two between three turns


def test_a_turn_continues_the_very_tokens_before_it() -> None:
    """Token ids are never made again from text, also where the text would be read as other tokens."""

    class Odd(Script):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
            halves = [ids("é")[0], ids("é")[0]]  # two first halves of a character: no text has these tokens
            return [
                replace(c, tokens=[*halves, EOS], logprobs=torch.zeros(3)) for c in super().generate(requests, sampling)
            ]

    row = {"first": "<", "observations": ["|", "|"], "rewards": [0.0, 0.0]}
    engine = Odd({"a": ["", ""], "b": ["", ""]})
    rollout = roll(engine, scripted(row, row))
    assert [len(call) for call in engine.calls] == [2, 2]  # both episodes in one call a turn
    for first, second in zip(*engine.calls, strict=True):
        turn = [ids("é")[0], ids("é")[0], EOS]
        assert list(second.prompt) == [*first.prompt, *turn, *ids("|")]
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs)
    assert inputs.tokens[: int(inputs.lengths[0])].tolist() == [*engine.calls[1][0].prompt, *turn]


def test_draws_are_made_of_seed_update_prompt_sample_and_turn() -> None:
    row = {"observations": ["", ""], "rewards": [0.0, 0.0]}
    engine = Script({"a": ["x"] * 20, "b": ["x"] * 20})
    collector = DialogueCollector(
        engine, TOKENIZER, scripted(row, row), dialogue(), prompts_per_update=2, samples_per_prompt=2, seed=11,
        reduce=LocalReduce(), device=CPU,
    )  # fmt: skip
    rollout = collector.collect(4)
    keys = list(zip(rollout.prompt_ids.tolist(), rollout.sample_ids.tolist(), strict=True))
    assert sorted(keys) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for turn, call in enumerate(engine.calls):
        assert [r.seed for r in call] == [draw_seed(draw_seed(11, 4, i, s), turn) for i, s in keys]


def test_the_environment_gets_its_row_and_the_episodes_seed() -> None:
    rows: list[dict[str, Any]] = []

    def seeded(prompt: str, level: int, seed: int) -> Scripted:
        rows.append({"prompt": prompt, "level": level, "seed": seed})
        return Scripted(prompt, [""], [0.0])

    prompts = load_prompts([{"prompt": "a", "level": 1}, {"prompt": "b", "level": 2}], TOKENIZER, max_tokens=None)
    roll(Script({"a": ["x"], "b": ["x"]}), prompts, dialogue(seeded))
    assert rows == [
        {"prompt": "a", "level": 1, "seed": draw_seed(5, 0, 0, 0)},
        {"prompt": "b", "level": 2, "seed": draw_seed(5, 0, 1, 0)},
    ]
    rows.clear()
    own = load_prompts([{"prompt": "a", "level": 1, "seed": 42}], TOKENIZER, max_tokens=None)
    roll(Script({"a": ["x"]}), own, dialogue(seeded))
    assert rows[0]["seed"] == 42  # a column of that name is the row's own


def test_rewards_lie_on_the_last_token_of_their_turn_and_none_is_lost() -> None:
    rows = [
        {"observations": ["o", "o"], "rewards": [0.5, -1.0]},
        {"observations": ["", "oo", "o"], "rewards": [0.0, 2.0, 3.0]},
    ]
    rollout = roll(Script({"a": ["xx", "y"], "b": ["x", "yyy", "z"]}), scripted(*rows))
    assert rollout.step_rewards.tolist() == [0, 0, 0.5, 0, -1, 0, 0, 0, 0, 0, 2, 0, 3]
    assert segment_sums(rollout.step_rewards, rollout.offsets).tolist() == [-0.5, 5.0]


def test_the_text_of_an_episode_and_its_answer() -> None:
    row = {"first": "Q: ", "observations": [" = 84", "never read"], "rewards": [0.0, 1.0]}
    how = dialogue(sampling=Sampling(max_new_tokens=30, stop=("</calc>",)))
    rollout = roll(Script({"a": ["<calc>12*7</calc>", "so 84"]}), scripted(row), how)
    assert rollout.completions == ["Q: <calc>12*7</calc> = 84so 84"] and rollout.answers == ["so 84"]


def test_actions_hold_their_stop_string_and_nothing_beyond_it() -> None:
    made: list[Scripted] = []

    def environment(**row: Any) -> Scripted:
        made.append(Scripted(**row))
        return made[-1]

    row = {"observations": ["", "", ""], "rewards": [0.0, 0.0, 0.0]}
    how = dialogue(environment, sampling=Sampling(max_new_tokens=30, stop=("</c>",)))
    rollout = roll(Script({"a": ["1</c>", "2</c>.", "end"]}), scripted(row), how)
    assert made[0].actions == ["1</c>", "2</c>", "end"]
    assert len(rollout.actions) == 5 + 6 + 4  # what stands beyond the stop string is a decision all the same


def test_a_cap_on_turns_cuts_the_episode() -> None:
    rows = [{"observations": ["o"] * 5, "rewards": [1.0] * 5}, {"observations": ["o"] * 5, "rewards": [1.0]}]
    rollout = roll(Script({"a": ["x"] * 5, "b": ["x"] * 5}), scripted(*rows), dialogue(max_turns=3))
    assert rollout.turns.tolist() == [3, 1]
    assert rollout.truncated.tolist() == [True, False] and rollout.terminated.tolist() == [False, True]
    assert rollout.step_rewards.sum() == 4
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs)  # the observation that cut it is there to be valued, and is no decision
    assert inputs.tokens[: int(inputs.lengths[0])].tolist()[-1:] == ids("o") and inputs.lengths[0] == 1 + 3 * 3


def test_an_environment_may_cut_and_an_end_on_the_last_turn_is_an_end() -> None:
    rows = [
        {"observations": ["o", "o"], "rewards": [1.0, 1.0], "end": "truncated"},
        {"observations": ["o", "o"], "rewards": [1.0, 1.0], "end": "terminated"},
    ]
    rollout = roll(Script({"a": ["x"] * 2, "b": ["x"] * 2}), scripted(*rows), dialogue(max_turns=2))
    assert rollout.truncated.tolist() == [True, False] and rollout.terminated.tolist() == [False, True]


@pytest.mark.parametrize(("context", "turns"), [(9, 1), (12, 1), (13, 2), (16, 2), (17, 3)])
def test_a_turn_begins_only_where_a_whole_one_fits(context: int, turns: int) -> None:
    """A prompt of 1 token, turns of 2 (of 8 allowed), observations of 2: turn t begins behind 4 t + 1 tokens."""
    row = {"observations": ["oo"] * 5, "rewards": [1.0] * 5}
    how = dialogue(max_context=context)
    rollout = roll(Script({"a": ["x"] * 5}), scripted(row), how)
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs)
    assert rollout.turns.tolist() == [turns] and rollout.truncated.tolist() == [True]
    assert inputs.lengths.tolist() == [1 + 4 * turns] and int(inputs.lengths[0]) <= context


def test_an_observation_that_does_not_fit_is_cut_with_the_episode() -> None:
    row = {"observations": ["o" * 40] * 2, "rewards": [1.0] * 2}
    rollout = roll(Script({"a": ["x"] * 2}), scripted(row), dialogue(max_context=12))
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs)
    assert inputs.lengths.tolist() == [12] and rollout.turns.tolist() == [1] and rollout.truncated.tolist() == [True]


def test_a_first_observation_without_room_for_a_turn() -> None:
    row = {"first": "o" * 10, "observations": [""], "rewards": [0.0]}
    with pytest.raises(HeelerError, match="my_envs:Mine, prompt 1 of the prompts: 11 tokens before the first turn"):
        roll(Script({"a": ["x"]}), scripted(row), dialogue(max_context=18))


def test_step_is_told_of_a_cut_where_it_asks() -> None:
    class Asks(Scripted):
        cuts: list[bool] = []  # noqa: RUF012

        def step(self, action: str, cut: bool = False) -> Any:
            self.cuts.append(cut)
            return super().step(action)

    roll(Script({"a": ["x...", "x"]}), scripted({"observations": ["", ""], "rewards": [0.0, 0.0]}), dialogue(Asks))
    assert Asks.cuts == [True, False]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            "make",
            r"prompt 2 of the prompts: could not be made: RuntimeError: no such maze \(toy_dialogues.py, line \d+\)",
        ),
        ("reset", "prompt 2 of the prompts: reset returned None as its observation, but an observation is a string"),
        ("raise", r"prompt 2 of the prompts, turn 2: step raised: KeyError: 'door' \(toy_dialogues.py, line \d+\)"),
        ("nan", "prompt 2 of the prompts, turn 2: step returned the reward nan, but every reward must be a finite"),
        ("infinite", "turn 2: step returned the reward inf"),
        ("reward", "turn 2: step returned the reward 'much'"),
        ("observation", "turn 2: step returned 7 as its observation"),
        ("tuple", "turn 2: step returned tuple, but must return a TextStep"),
    ],
)
def test_what_an_environment_gets_wrong(how: str, says: str) -> None:
    prompts = load_prompts([{"prompt": "a", "how": "fine"}, {"prompt": "b", "how": how}], TOKENIZER, max_tokens=None)

    def environment(prompt: str, how: str) -> Any:
        if how == "fine":
            return Scripted(prompt, [""], [0.0])
        return Broken(prompt, how)

    with pytest.raises(HeelerError, match=f"^the environment my_envs:Mine, .*{says}"):
        roll(Script({"a": ["x"] * 3, "b": ["x"] * 3}), prompts, dialogue(environment))


def test_an_engine_that_says_nothing() -> None:
    class Silent(Script):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
            return [replace(c, tokens=[], logprobs=torch.zeros(0)) for c in super().generate(requests, sampling)]

    with pytest.raises(CheckFailed, match="no token for a turn"):
        roll(Silent({"a": ["x"]}), scripted({"observations": [""], "rewards": [0.0]}))


@pytest.mark.parametrize("keep", [True, False], ids=["kept states", "fresh states"])
def test_the_engines_logprobs_are_the_trainers(tiny_llama: str, keep: bool) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    engine = NativeEngine(
        policy.engine_model, eos_ids=range(150, 200), max_rows=3, trunk_layers=policy.num_trunk_layers if keep else None
    )
    tokenizer = load_tokenizer(tiny_llama)
    prompts = load_prompts(["ab", "c", "defgh", "xyz"], tokenizer, max_tokens=None)
    how = dialogue(Vowels, sampling=Sampling(max_new_tokens=6), max_turns=3, max_context=64)
    rollout = dialogue_rollout(engine, tokenizer, prompts, range(4), [0] * 4, [7, 8, 9, 10], how, CPU)
    inputs = rollout.inputs
    assert isinstance(inputs, TokenInputs) and (inputs.trunk_states is not None) == keep
    assert int(rollout.turns.max()) > 1 and len(set(rollout.turns.tolist())) > 1
    output, _, _ = policy.score(inputs)
    torch.testing.assert_close(rollout.behavior_logprobs, output.logprobs, atol=1e-4, rtol=0)


def test_an_episode_does_not_depend_on_the_others(tiny_llama: str) -> None:
    engine = NativeEngine(load_causal_lm(tiny_llama), eos_ids=range(150, 200))
    tokenizer = load_tokenizer(tiny_llama)
    prompts = load_prompts(["ab", "c", "defgh", "xyz"], tokenizer, max_tokens=None)
    how = dialogue(Vowels, sampling=Sampling(max_new_tokens=6), max_turns=3)
    together = play(engine, tokenizer, prompts, range(4), [7, 8, 9, 10], how)
    alone = [play(engine, tokenizer, prompts, [i], [7 + i], how)[0] for i in range(4)]
    assert [e.tokens for e in together] == [e.tokens for e in alone]
    assert len({len(e.turns) for e in together}) > 1
