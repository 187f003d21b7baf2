"""The vocabulary of Heeler: what flows between the stages, and the protocols that the stages meet.

A *decision* is one choice whose probability PPO changes: a sampled token, or an environment step.
Decisions lie packed in flat vectors `[N]`. A *segment* is a run of decisions inside which rewards flow
backwards (one response, one stretch of an episode); `offsets [S+1]` marks the segments' edges. An *item* is
the unit that minibatches shuffle (a sequence for language models, a step or a segment for environments).
Prompt tokens, tool outputs and padding are no decisions and never appear here.

Each stage returns a new frozen type: `Rollout` -> `ScoredRollout` -> `TrainBatch`.

This module imports nothing at run time, so that every other module can import it for free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


class HeelerError(Exception):
    """Input that Heeler cannot use. The message is one sentence: what is wrong, where, what to do.

    The command line prints it and exits with status 2, without a traceback.
    """


class Unavailable(HeelerError):
    """A reward failed (its server is gone, its function raised): nothing was learned yet, so the run saves first."""


class CheckFailed(HeelerError):
    """An invariant of the run broke (a NaN, a ratio off 1 at the first minibatch, lost reward mass, ...)."""


class Inputs(Protocol):
    """What a policy reads to score the decisions again: token sequences, observations, ...

    Attributes:
        decision_counts: `[I]` int64, the number of decisions of each item; decisions are stored item by item.
        costs: `[I]` int64, what an item costs in a forward pass (tokens, or steps), for the micro-batch budget.
        groups: `[I]` int64 from 0, the prompt of each item; None where items have no prompts.
        neighbours: `(group [I], shared [I])`, the groups again and the part of each cost that items of a group pay
            once together (a policy that `shares_prompts` then keeps them side by side); None where they do not.
    """

    @property
    def decision_counts(self) -> Tensor: ...
    @property
    def costs(self) -> Tensor: ...
    @property
    def groups(self) -> Tensor | None: ...
    @property
    def neighbours(self) -> tuple[Tensor, Tensor] | None: ...
    def select(self, items: Tensor) -> Self:
        """The inputs of these items (`[J]` int64), in this order."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """What a policy says of the decisions of some inputs, in their order.

    Attributes:
        logprobs: `[n]` log-probability (nats) of the decision taken, under the distribution sampled from.
        entropy: `[n]` entropy (nats) of that distribution.
        values: `[n]` value estimate before the decision, read at the same position as its log-probability.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class ObservationSpec:
    """What a policy looks at in an environment: a float vector, images, or both.

    Attributes:
        vector: length of the vector; 0 where there is none.
        images: `(C, H, W)` of each image by name.
    """

    vector: int
    images: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether observations are dicts: several images, or an image and a vector."""
        return len(self.images) > 1 or (bool(self.images) and self.vector > 0)


@dataclass(frozen=True, kw_only=True)
class ActionSpec:
    """What a policy chooses in an environment.

    Attributes:
        kind: one choice, several choices, several yes-or-no choices, or real numbers.
        sizes: choices of each component; 1 for each component of "multi_binary" and "box".
        shape: of one action as the environment takes it.
        low, high: bounds of a box, flat; infinite where there are none.
        start: the number of the first choice, for each component.
        dtype: what the environment takes.
    """

    kind: Literal["discrete", "multi_discrete", "multi_binary", "box"]
    sizes: tuple[int, ...]
    shape: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    start: tuple[int, ...] = ()
    dtype: str = "int64"

    @property
    def num_parameters(self) -> int:
        """Numbers that a network puts out for one decision: logits, or means."""
        return sum(self.sizes)

    @property
    def mask_size(self) -> int:
        """Length of an action mask; 0 where actions cannot be masked."""
        return sum(self.sizes) if self.kind in ("discrete", "multi_discrete") else 0


class Optimizer(Protocol):
    """What `ppo.update` needs of an optimiser: torch's have it."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Policy(Protocol):
    """What `ppo.update` trains: anything that can score decisions again, with gradients.

    It may have `ppo_gradients`, which takes the place of `evaluate` and autograd (see `ppo.update`), and
    `shares_prompts`: whether it reads a prompt once for several items of it.
    """

    def evaluate(self, inputs: Inputs) -> PolicyOutput: ...


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Decisions as they were sampled, before anybody judged them.

    Attributes:
        inputs: what the policy reads to score the decisions again.
        offsets: `[S+1]` int64, segment s holds the decisions `offsets[s]:offsets[s+1]`.
        actions: `[N]` the decisions (token ids) or `[N, A]` (action vectors).
        behavior_logprobs: `[N]` log-probabilities by the engine that sampled.
        final_states: `[N, H]` final hidden state that each decision was drawn from, where the engine kept it.
        policy_versions: `[N]` int64, the version of the weights that sampled each decision.
        terminated: `[S]` bool, the segment ended for good (end of sequence, a terminal state).
        truncated: `[S]` bool, it was cut (length cap, time limit, rollout edge).
        prompt_ids, group_ids, sample_ids: `[S]` int64, where each segment came from.
        prompts, completions: `[S]` texts (or chat messages) for rewards and logs; empty for environments.
        columns: the other columns of the prompt set, each a list of length S.
    """

    inputs: Inputs
    offsets: Tensor
    actions: Tensor
    behavior_logprobs: Tensor
    policy_versions: Tensor
    terminated: Tensor
    truncated: Tensor
    prompt_ids: Tensor
    group_ids: Tensor
    sample_ids: Tensor
    prompts: Sequence[object]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[object]]
    final_states: Tensor | None = None

    @property
    def num_episodes(self) -> int:
        """Episodes that this rollout completed: for texts every segment is one."""
        return len(self.terminated)


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout with everything that the advantages need.

    Attributes:
        scores: `[S]` what the reward said of each segment, before any shaping.
        rewards: `[N]` reward of each decision after shaping (score at the last decision, minus beta * KL).
        old_logprobs: `[N]` before the update: by the trainer's own path, or the engine's where it is trusted.
        ref_logprobs: `[N]` by the frozen reference; equal to `old_logprobs` where there is none.
        values: `[N]` value estimates before the update.
        bootstrap: `[S]` value after the last decision: 0 where terminated or where the score stands.
        policy_weights: `[N]` weight of each decision in the policy loss (0 drops it).
        value_weights: `[N]` the same for the value loss.
        components: raw reward components by name, each `[S]`.
        attached: the passes that old log-probabilities and values are from, where they are kept: items `[J]`, and what
            the policy said of their decisions, its gradient not taken yet.
    """

    rollout: Rollout
    scores: Tensor
    rewards: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    bootstrap: Tensor
    policy_weights: Tensor
    value_weights: Tensor
    components: Mapping[str, Tensor]
    attached: Sequence[tuple[Tensor, PolicyOutput]] = ()


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """What the update reads: no rewards and no segments any more, only weighted decisions.

    Attributes:
        inputs: what the policy reads, item by item.
        old_logprobs: `[N]`, the centre of the trust region.
        old_values: `[N]`, the centre of the value clip.
        advantages: `[N]`, already normalised where the recipe normalises over the batch.
        returns: `[N]`, the targets of the value function.
        policy_weights: `[N]` weights of the policy loss; they also make its denominator.
        value_weights: `[N]` the same for the value loss.
        importance_weights: `[N]` truncated behavior-to-old ratios; they multiply the policy loss and never
            enter a denominator. 1 where engine and trainer agree.
        attached: of the `ScoredRollout`: a first optimiser step on the whole batch has made these passes already.
    """

    inputs: Inputs
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    policy_weights: Tensor
    value_weights: Tensor
    importance_weights: Tensor
    attached: Sequence[tuple[Tensor, PolicyOutput]] = ()


class Reduce(Protocol):
    """Sums over the processes of a run. In one process every method returns its argument.

    Every statistic that the algorithm uses goes through here, so that N processes compute what one would.
    """

    @property
    def world_size(self) -> int: ...
    @property
    def rank(self) -> int: ...
    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over processes. Does not change `x`."""
        ...

    def max(self, x: Tensor) -> Tensor: ...
    def gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the `.grad` of each parameter over the processes, in place."""
        ...


Result = TypeVar("Result")


class Passes(Protocol):
    """How items become forward and backward passes that fit into the memory."""

    def fit(self, split: Callable[[int], Sequence[Tensor]], run: Callable[[Sequence[Tensor]], Result]) -> Result:
        """`run(split(tokens))`, where `split` makes passes of so many tokens; from its beginning with fewer of them
        where a pass does not fit."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: the length cap, in tokens.
        temperature: logits are divided by it, in the engine, the trainer and the reference alike.
        top_k: only the k most likely tokens, and those as likely as the last of them, can be drawn; 0 for all.
            Training takes no other: its ratio compares the probabilities of the full distribution, which are not
            those that a cut one draws with.
        top_p: only the fewest of the most likely tokens whose probabilities sum to at least p can be drawn (Holtzman
            et al., 1904.09751), after `top_k`; 1 for all, and for training as above.
        stop: a completion ends where one of these strings appears in it, as at an end of sequence. The tokens that
            spell it are decisions; the text that rewards see ends before it.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to sample.

    Attributes:
        prompt: token ids.
        seed: the draw's own seed: the same request gives the same tokens whatever shares its batch.
    """

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an engine sampled.

    Attributes:
        tokens: sampled ids, the end-of-sequence token included where one was drawn.
        logprobs: `[len(tokens)]` float32, under the distribution sampled from.
        finish_reason: "stop" (end of sequence, or a stop string) or "length" (the cap).
        version: of the weights that sampled.
        trunk_states: `[len(prompt) + len(tokens) - 1, H]` hidden states at the boundary of the frozen trunk,
            where the engine was asked to keep them; the trainer then need not compute them again.
        final_states: `[len(tokens), H]` final hidden state that each token was drawn from, where it was asked for.
        stop_string: the stop string that ended it, if one did.
    """

    tokens: Sequence[int]
    logprobs: Tensor
    finish_reason: Literal["stop", "length"]
    version: int
    trunk_states: Tensor | None = None
    final_states: Tensor | None = None
    stop_string: str | None = None


class Engine(Protocol):
    """Samples completions with weights of its own; `publish` is a transaction on Hugging Face names."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        ...

    def begin(self) -> None: ...
    def load(self, bucket: Iterable[tuple[str, Tensor]]) -> None:
        """Take a bucket of named tensors; buckets may come in any number and order."""
        ...

    def commit(self, version: int) -> None:
        """Make the loaded weights the ones that sample."""
        ...


class Collector(Protocol):
    """Samples with the policy that was last published."""

    def publish(self, policy: Policy, version: int) -> None: ...
    def collect(self, step: int) -> Rollout: ...


@dataclass(frozen=True, kw_only=True)
class Samples:
    """S prompts with one completion each, as rewards see them.

    Attributes:
        prompts: strings, or lists of chat messages.
        completions: texts, without stop strings and special tokens.
        columns: the other columns of the prompt set, each a list of length S.
        completion_ids: the sampled tokens of each completion, an end-of-sequence token included.
        truncated: each completion was cut at the length cap: it has no end.
    """

    prompts: Sequence[object]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[object]]
    completion_ids: Sequence[Sequence[int]]
    truncated: Sequence[bool]

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """What a reward says of S samples.

    Attributes:
        scores: `[S]` float32, one a sample (the sum of the token rewards where there are any).
        token_rewards: one list of floats a sample, aligned to its decisions, or None.
        components: parts of the score by name, each `[S]`, for the log.
    """

    scores: Tensor
    token_rewards: Sequence[Sequence[float]] | None
    components: Mapping[str, Tensor]


class Reward(Protocol):
    """Judges completions. Raises `HeelerError` where it cannot, `Unavailable` where it might later."""

    def __call__(self, samples: Samples) -> RewardOutput: ...
