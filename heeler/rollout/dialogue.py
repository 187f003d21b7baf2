"""Collecting episodes of several turns: the policy writes, an environment answers; only what was written decides.

    prompt | first observation | turn 1 | observation 1 | turn 2 | ... | turn n
    no       no                  yes      no              yes            yes      decision?

An episode is one item and one segment. Its decisions are the tokens of its turns, in order: GAE steps from the last
token of a turn to the first token of the next, whatever was inserted between them. The reward of a turn lies on its
last token. Token ids are kept: a turn continues the very tokens before it, so no text is tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heeler.data.prompts import PromptSet
from heeler.envs.text import CheckedEnvironment, EnvironmentFactory
from heeler.policies.inputs import TokenInputs
from heeler.rollout.engines.draws import draw_seed
from heeler.rollout.text import TextCollector, decode, final_states
from heeler.types import CheckFailed, Completion, Engine, HeelerError, Reduce, Request, Rollout, Sampling


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """How episodes are played.

    Attributes:
        environment: makes an environment for each episode.
        name: of the environment, for messages.
        sampling: `max_new_tokens` caps a turn, and `stop` ends it, as an end of sequence does.
        max_turns: turns after which an episode is cut.
        max_context: tokens that a sequence may have; an episode without room for another whole turn is cut. None
            where nothing limits it.
    """

    environment: EnvironmentFactory
    name: str
    sampling: Sampling
    max_turns: int
    max_context: int | None = None

    def has_room(self, tokens: int) -> bool:
        """Whether a whole turn fits behind a context of so many tokens."""
        return self.max_context is None or tokens + self.sampling.max_new_tokens <= self.max_context


@dataclass(frozen=True, kw_only=True)
class DialogueRollout(Rollout):
    """A rollout of episodes of several turns; `completions` are all that follows the prompts, observations included.

    Attributes:
        step_rewards: `[N]` float32, what the environment paid: each turn's reward at its last token, 0 elsewhere.
        turns: `[S]` int64, turns of each episode.
        answers: `[S]` the last turn's text, without a stop string.
        written: `[S]` the texts of all turns, without observations.
    """

    step_rewards: Tensor
    turns: Tensor
    answers: Sequence[str]
    written: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the policy wrote, and what the environment made of it.

    Attributes:
        completion: the sampled tokens.
        reward: of the turn.
        observation: the tokens that follow it in the context.
    """

    completion: Completion
    reward: float
    observation: Sequence[int] = ()


@dataclass(kw_only=True)
class Episode:
    """An episode as it is played.

    Attributes:
        prompt: tokens before the first turn, those of the first observation included.
        turns: the turns so far.
        terminated, truncated: how it ended; both False while it runs.
        text: what followed the prompt, observations included.
        written: the turns' texts.
        answer: the last turn's text.
    """

    prompt: list[int]
    turns: list[Turn] = field(default_factory=list[Turn])
    terminated: bool = False
    truncated: bool = False
    text: str = ""
    written: str = ""
    answer: str = ""

    @property
    def tokens(self) -> list[int]:
        """The whole context."""
        return self.prompt + [token for turn in self.turns for token in (*turn.completion.tokens, *turn.observation)]

    @property
    def running(self) -> bool:
        return not (self.terminated or self.truncated)


def play(
    engine: Engine,
    tokenizer: Any,
    prompts: PromptSet,
    indices: Sequence[int],
    seeds: Sequence[int],
    dialogue: Dialogue,
) -> list[Episode]:
    """Play one episode for each of `indices` (into `prompts`). All running episodes take their turns together.

    Turn t of an episode draws with a seed made of the episode's and t, so what an episode becomes does not depend on
    the others.

    Raises:
        HeelerError: an environment broke its protocol, or its first observation leaves no room for a turn.
        CheckFailed: the engine sampled no token for a turn.
    """
    environments: list[CheckedEnvironment] = []
    episodes: list[Episode] = []
    for index, seed in zip(indices, seeds, strict=True):
        row = {"prompt": prompts.prompts[index], **{name: column[index] for name, column in prompts.columns.items()}}
        environment = CheckedEnvironment(
            dialogue.environment, row, seed=seed, name=dialogue.name, where=f"prompt {index + 1} of {prompts.name}"
        )
        first = environment.reset()
        episode = Episode(prompt=[*prompts.tokens[index], *_tokenize(tokenizer, first)], text=first)
        if not dialogue.has_room(len(episode.prompt)):
            raise HeelerError(
                f"{environment.who}: {len(episode.prompt)} tokens before the first turn leave no room for a turn of"
                f" {dialogue.sampling.max_new_tokens} in a context of {dialogue.max_context}: shorten the prompt or the"
                " first observation, or allow fewer new tokens"
            )
        environments.append(environment)
        episodes.append(episode)

    running = list(range(len(episodes)))
    while running:
        requests = [
            Request(prompt=episodes[i].tokens, seed=draw_seed(seeds[i], len(episodes[i].turns))) for i in running
        ]
        for i, completion in zip(running, engine.generate(requests, dialogue.sampling), strict=True):
            _take_turn(episodes[i], environments[i], completion, tokenizer, dialogue)
        running = [i for i in running if episodes[i].running]
    return episodes


def _take_turn(
    episode: Episode, environment: CheckedEnvironment, completion: Completion, tokenizer: Any, dialogue: Dialogue
) -> None:
    """Append a turn and the environment's answer to it; tell whether the episode is over."""
    if len(completion.tokens) == 0:
        raise CheckFailed("the engine sampled no token for a turn: its reward would have no decision to lie on")
    action = decode(tokenizer, completion, keep_stop=True)
    step = environment.step(action, cut=completion.finish_reason == "length")
    if episode.turns and completion.trunk_states is not None:  # the last turn's cover the whole context
        episode.turns[-1] = replace(
            episode.turns[-1], completion=replace(episode.turns[-1].completion, trunk_states=None)
        )
    observation = [] if step.terminated else _tokenize(tokenizer, step.observation)
    length = len(episode.tokens) + len(completion.tokens)
    episode.terminated = step.terminated
    full = len(episode.turns) + 1 >= dialogue.max_turns or not dialogue.has_room(length + len(observation))
    episode.truncated = not step.terminated and (step.truncated or full)
    if episode.truncated and dialogue.max_context is not None:
        observation = observation[: dialogue.max_context - length]  # read for the value after the last decision only
    episode.turns.append(Turn(completion=completion, reward=step.reward, observation=observation))
    episode.text += action + ("" if step.terminated else step.observation)
    episode.written += action
    episode.answer = decode(tokenizer, completion)


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def pack_episodes(episodes: Sequence[Episode], device: torch.device) -> tuple[TokenInputs, Tensor]:
    """Episodes behind one another: what the policy reads, and the environment's rewards.

    Returns:
        The inputs, one sequence an episode, in which only the tokens of turns are decisions; and `[N]` float32, each
        turn's reward at its last token.
    """
    tokens: list[int] = []
    is_decision: list[bool] = []
    lengths: list[int] = []
    rewards: list[float] = []
    states: list[Tensor] = []
    for episode in episodes:
        tokens += episode.tokens
        lengths.append(len(episode.tokens))
        is_decision += [False] * len(episode.prompt)
        for turn in episode.turns:
            written = len(turn.completion.tokens)
            is_decision += [True] * written + [False] * len(turn.observation)
            rewards += [0.0] * (written - 1) + [turn.reward]
        kept = episode.turns[-1].completion.trunk_states
        if kept is not None:
            states += [kept, kept.new_zeros(lengths[-1] - len(kept), kept.shape[1])]
    inputs = TokenInputs(
        tokens=torch.tensor(tokens, device=device),
        lengths=torch.tensor(lengths, device=device),
        is_decision=torch.tensor(is_decision, device=device),
        trunk_states=torch.cat(states).to(device) if states else None,
    )
    return inputs, torch.tensor(rewards, dtype=torch.float32, device=device)


def dialogue_rollout(
    engine: Engine,
    tokenizer: Any,
    prompts: PromptSet,
    indices: Sequence[int],
    samples: Sequence[int],
    seeds: Sequence[int],
    dialogue: Dialogue,
    device: torch.device,
) -> DialogueRollout:
    """Play one episode for each of `indices` (into `prompts`) and pack them; tensors lie on `device`."""
    episodes = play(engine, tokenizer, prompts, indices, seeds, dialogue)
    completions = [turn.completion for episode in episodes for turn in episode.turns]
    inputs, step_rewards = pack_episodes(episodes, device)
    return DialogueRollout(
        inputs=inputs,
        offsets=torch.cat([inputs.lengths.new_zeros(1), inputs.decision_counts.cumsum(0)]),
        actions=inputs.tokens[inputs.is_decision],
        behavior_logprobs=torch.cat([c.logprobs for c in completions]).to(device),
        final_states=final_states(completions, device),
        policy_versions=torch.tensor([c.version for c in completions for _ in c.tokens], device=device),
        terminated=torch.tensor([e.terminated for e in episodes], device=device),
        truncated=torch.tensor([e.truncated for e in episodes], device=device),
        prompt_ids=torch.tensor(indices),
        group_ids=torch.tensor(indices),
        sample_ids=torch.tensor(samples),
        prompts=[prompts.prompts[i] for i in indices],
        completions=[e.text for e in episodes],
        columns={name: [column[i] for i in indices] for name, column in prompts.columns.items()},
        step_rewards=step_rewards,
        turns=torch.tensor([len(e.turns) for e in episodes], device=device),
        answers=[e.answer for e in episodes],
        written=[e.written for e in episodes],
    )


class DialogueCollector(TextCollector):
    """Plays episodes with the policy that was last published; implements `heeler.types.Collector`.

    Args:
        engine, tokenizer, prompts, prompts_per_update, samples_per_prompt, seed, reduce, device: as for
            `TextCollector`.
        dialogue: how episodes are played.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        prompts: PromptSet,
        dialogue: Dialogue,
        *,
        prompts_per_update: int,
        samples_per_prompt: int,
        seed: int,
        reduce: Reduce,
        device: torch.device,
    ) -> None:
        super().__init__(
            engine, tokenizer, prompts, dialogue.sampling,
            prompts_per_update=prompts_per_update, samples_per_prompt=samples_per_prompt,
            seed=seed, reduce=reduce, device=device,
        )  # fmt: skip
        self.dialogue = dialogue

    def sample(self, indices: Sequence[int], samples: Sequence[int], seeds: Sequence[int]) -> DialogueRollout:
        return dialogue_rollout(
            self.engine, self.tokenizer, self.prompts, indices, samples, seeds, self.dialogue, self.device
        )
