"""PPO on dialogues: a text run whose completions are episodes of several turns with an environment.

from heeler import DialogueConfig, train_dialogue
run = train_dialogue(DialogueConfig(model="path", updates=50), prompts=["2+3"], env=MyEnvironment)
print(run.sample("2+3"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from heeler.data.prompts import PromptSet
from heeler.envs.text import EnvironmentFactory, load_environment
from heeler.policies import loading
from heeler.ppo.shaping import segment_sums
from heeler.rewards.functions import RewardFunction
from heeler.rewards.weighted import WeightedSum
from heeler.rollout.dialogue import Dialogue, DialogueCollector, DialogueRollout, dialogue_rollout
from heeler.rollout.text import samples_of
from heeler.runtime.runs import RunFolder
from heeler.train.ppo import UpdateReport
from heeler.train.run import at_least, begin, default_out, new_folder, resume
from heeler.train.text import TextConfig, TextRun, build_text_run, load_run
from heeler.types import HeelerError, Reward, RewardOutput, Rollout, Samples


@dataclass(frozen=True, kw_only=True)
class DialogueConfig(TextConfig):
    """A PPO run on dialogues with an environment. Batch sizes are global.

    Attributes:
        env: "module:Name", a class or function that makes an environment of a prompt's columns (docs/dialogue.md), for
            instance heeler.envs.tools:Calculator.
        reward: of the last turn, added to what the environment pays: as for `heeler ppo lm`. Nothing where empty.
        sampling: the cap of tokens of one turn, temperature, and what ends a turn beside the end of sequence.
        max_turns: turns after which an episode is cut.
        max_context: tokens of a whole episode, prompt and observations included; the model's own limit where None.
    """

    env: str = ""
    max_turns: int = 8
    max_context: int | None = None


class _Nothing:
    """The reward of last turns where none was given."""

    def __call__(self, samples: Samples) -> RewardOutput:
        return RewardOutput(scores=torch.zeros(len(samples)), token_rewards=None, components={})


@dataclass(kw_only=True)
class DialogueRun(TextRun):
    """A run on dialogues: it plays episodes where a text run samples completions."""

    verb = "ppo dialogue"
    rewards_are_scores = False  # what the environment has paid stands, also where an episode is cut

    config: DialogueConfig
    dialogue: Dialogue

    def collector(self) -> DialogueCollector:
        config = self.config
        assert self.prompts is not None
        return DialogueCollector(
            self.engine, self.tokenizer, self.prompts, self.dialogue,
            prompts_per_update=config.prompts_per_update, samples_per_prompt=config.samples_per_prompt,
            seed=config.seed, reduce=self.reduce, device=self.policy.device,
        )  # fmt: skip

    def rollout(self, prompts: PromptSet, seeds: Sequence[int]) -> DialogueRollout:
        """One episode for each prompt by the published weights."""
        indices = list(range(len(prompts)))
        return dialogue_rollout(
            self.engine, self.tokenizer, prompts, indices, [0] * len(indices), seeds, self.dialogue, self.policy.device
        )

    def samples_of(self, rollout: Rollout) -> Samples:
        """Last turns, as the answers of their prompts; `completion_ids` are the tokens of all turns."""
        assert isinstance(rollout, DialogueRollout)
        return replace(samples_of(rollout), completions=rollout.answers)

    def judge(self, rollout: Rollout) -> RewardOutput:
        """What the environment paid, each reward at the last token of its turn, and what the reward says of answers."""
        assert isinstance(rollout, DialogueRollout)
        paid = rollout.step_rewards.tolist()
        earned = RewardOutput(
            scores=segment_sums(rollout.step_rewards, rollout.offsets),
            token_rewards=[paid[start:end] for start, end in pairwise(rollout.offsets.tolist())],
            components={},
        )
        if isinstance(self.reward, _Nothing):
            return earned
        both = WeightedSum({"environment": (1.0, lambda samples: earned), "answer": (1.0, self.reward)})
        return both(self.samples_of(rollout))

    def episode_figures(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """Turns, tokens of the whole context, and 1 where the episode ended by itself."""
        assert isinstance(rollout, DialogueRollout)
        return {
            "episode/turns": rollout.turns,
            "episode/context": rollout.inputs.costs,
            "episode/ended": rollout.terminated,
        }

    def resolved(self) -> dict[str, Any]:
        return {"answer_reward": not isinstance(self.reward, _Nothing), **super().resolved()}

    def texts_of(self, rollout: Rollout) -> Sequence[str]:
        assert isinstance(rollout, DialogueRollout)
        return rollout.written

    def most_tokens(self) -> int:
        return self.config.sampling.max_new_tokens * self.config.max_turns

    def describe(self, metrics: Mapping[str, float]) -> str:
        return f"{super().describe(metrics)}  {metrics['episode/turns']:.1f} turns"


def build_dialogue_run(
    config: DialogueConfig,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    env: EnvironmentFactory | None = None,
    reward: RewardFunction | Reward | None = None,
) -> DialogueRun:
    """Load everything a run needs; nothing is written yet.

    Args:
        config: the run.
        prompts, eval_prompts, env, reward: in place of the config's.

    Raises:
        HeelerError: no environment, a cap below 1, an encoder-decoder model, a context longer than the model's, a
            prompt that leaves no room for a turn, a reward of last turns together with `--truncation bootstrap`.
    """
    factory = env if env is not None else load_environment(config.env)
    at_least({"--max-turns": (config.max_turns, 1)})
    rewarded = reward is not None or bool(config.reward.strip())
    if rewarded and config.truncation == "bootstrap":
        raise HeelerError(
            "--truncation bootstrap lets V stand for what a cut episode would still earn, but the reward would score"
            " its last turn as well: leave out one of the two"
        )
    run = build_text_run(config, prompts=prompts, eval_prompts=eval_prompts, reward=reward if rewarded else _Nothing())
    if run.policy.model.config.is_encoder_decoder:
        raise HeelerError(
            "dialogues need a causal model: an encoder-decoder model reads a source once, and has no place for what an"
            " environment answers"
        )
    limit = loading.context_length(run.policy.model)
    if limit is not None and config.max_context is not None and config.max_context > limit:
        raise HeelerError(f"--max-context {config.max_context} is more than the {limit} tokens of the model's context")
    stops = [*config.sampling.stop, *getattr(factory, "stop", ())]
    dialogue = Dialogue(
        environment=factory,
        name=config.env or getattr(factory, "__name__", type(factory).__name__),
        sampling=replace(config.sampling, stop=tuple(dict.fromkeys(stops))),
        max_turns=config.max_turns,
        max_context=limit if config.max_context is None else config.max_context,
    )
    for loaded in filter(None, (run.prompts, run.eval_prompts)):
        for number, tokens in enumerate(loaded.tokens, start=1):
            if not dialogue.has_room(len(tokens)):
                raise HeelerError(
                    f"{loaded.name}, prompt {number}: {len(tokens)} tokens leave no room for a turn of"
                    f" {config.sampling.max_new_tokens} in a context of {dialogue.max_context}: shorten the prompt, or"
                    " allow fewer new tokens"
                )
    return DialogueRun(**{f.name: getattr(run, f.name) for f in fields(run)}, dialogue=dialogue)


def train_dialogue(
    config: DialogueConfig,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    env: EnvironmentFactory | None = None,
    reward: RewardFunction | Reward | None = None,
    on_update: Callable[[UpdateReport], None] | None = None,
    extra: Mapping[str, Any] | None = None,
    show: bool = True,
) -> DialogueRun:
    """Train, and leave a run folder.

    Args:
        config: the run.
        prompts, eval_prompts: lists, in place of the config's files.
        env: makes an environment of a prompt's columns, in place of the config's.
        reward: of the last turn, in place of the config's.
        on_update: called after each update.
        extra: written into summary.json as it is.
        show: print progress.
    """
    with new_folder(config.out or default_out("dialogue")) as folder:
        run = build_dialogue_run(config, prompts=prompts, eval_prompts=eval_prompts, env=env, reward=reward)
        if run.prompts is None:
            raise HeelerError('no prompts were given: --prompts FILE.jsonl with a "prompt" column')
    begin(run, folder, on_update, extra, show)
    return run


def resume_dialogue(
    path: str | Path,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    env: EnvironmentFactory | None = None,
    reward: RewardFunction | Reward | None = None,
    on_update: Callable[[UpdateReport], None] | None = None,
    updates: int | None = None,
    show: bool = True,
) -> DialogueRun:
    """Continue a run from its last checkpoint, to its own number of updates or to `updates`."""
    run = load_dialogue_run(path, prompts=prompts, eval_prompts=eval_prompts, env=env, reward=reward, updates=updates)
    if run.prompts is None:
        raise HeelerError(f"{path} was trained on prompts given in Python: resume it there, with the same prompts")
    resume(run, on_update, show)
    return run


def load_dialogue_run(
    path: str | Path,
    *,
    prompts: Sequence[Any] | None = None,
    eval_prompts: Sequence[Any] | None = None,
    env: EnvironmentFactory | None = None,
    reward: RewardFunction | Reward | None = None,
    updates: int | None = None,
) -> DialogueRun:
    """Assemble a run from its folder and put it into the state of its last checkpoint."""

    saved = RunFolder.open(path).read_config().get("resolved", {})

    def build(config: DialogueConfig) -> DialogueRun:
        if env is None and not config.env:
            raise HeelerError(f"{path} was trained in an environment given in Python: load it there, with the same one")
        if reward is None and not config.reward.strip() and saved.get("answer_reward"):
            raise HeelerError(f"{path} was trained with a reward given in Python: load it there, with the same one")
        return build_dialogue_run(config, prompts=prompts, eval_prompts=eval_prompts, env=env, reward=reward)

    return load_run(path, DialogueConfig, build, updates)
