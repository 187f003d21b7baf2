"""PPO for environments: assembling policy, vector environment and statistics into a run.

from heeler import GymConfig, EnvConfig, train_gym
run = train_gym(GymConfig(env=EnvConfig(id="CartPole-v1"), steps=100_000))
print(run.summary["eval/after"])
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from heeler.envs.vector import Atari as AtariBackend
from heeler.envs.vector import EnvConfig, VectorEnvironment, make_one, make_vector
from heeler.policies.actor_critic import ActorCritic
from heeler.policies.distributions import Exploration, Independent, StateDependent
from heeler.policies.fused import FlatAdam
from heeler.policies.networks import MLP, NatureCNN, Network
from heeler.policies.steps import Observed, Segments, Steps, pick
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.minibatches import budgeted_microbatches, decision_indices
from heeler.ppo.moments import RunningMoments
from heeler.ppo.schedules import Schedule
from heeler.ppo.shaping import segment_of_decision, segment_sums
from heeler.ppo.update import PPOConfig
from heeler.rollout.vector import VectorCollector, VectorRollout
from heeler.runtime import machine
from heeler.runtime.configs import from_json, to_json
from heeler.runtime.passes import PassBudget, pass_budget
from heeler.runtime.reduce import LocalReduce
from heeler.runtime.runs import RunFolder, read_json, write_json
from heeler.train.evaluate_control import GymPolicy, evaluate_policy
from heeler.train.ppo import Revalue, Score, TrainState
from heeler.train.run import OnUpdate, Run, at_least, at_most, begin, default_out, new_folder, restore, resume
from heeler.train.scoring import LOGPROB_TOLERANCE, check_paths, mean_size
from heeler.types import (
    ActionSpec,
    CheckFailed,
    Collector,
    HeelerError,
    ObservationSpec,
    Optimizer,
    Rollout,
    ScoredRollout,
)


@dataclass(frozen=True, kw_only=True)
class GymConfig:
    """A PPO run in an environment. Batch sizes are global.

    Attributes:
        env: which environment, how many, how they are stepped.
        out: the run folder; runs/NAME where None.
        seed: of the environments and of every draw.
        steps: environment steps of the whole run.
        updates: PPO updates; as many as `steps` needs where 0.
        num_steps: steps of each environment in one update.
        network: what turns observations into features; the Nature CNN in place of the default MLP where an
            environment shows nothing but pictures.
        memory: size of an LSTM behind the network; 0 for none.
        shared: actor and critic share the network.
        log_std: initial log standard deviation of continuous actions; of each weight of the noise where it depends on
            the state.
        exploration: how draws of continuous actions differ from their means.
        normalize_observations: by running mean and standard deviation, clipped to +-10.
        scale_rewards: divide by the running standard deviation of the discounted return, clip to +-10.
        lr: peak learning rate of Adam.
        lr_schedule: its course over the run.
        clip_schedule: a factor on the clip range over the run.
        entropy_schedule: a factor on the entropy coefficient over the run.
        adam_eps: of Adam.
        advantage: GAE.
        ppo: the update.
        eval_episodes: episodes of an evaluation; 0 never evaluates.
        eval_every: evaluate each N updates and keep the best policy; 0 evaluates before and after only.
        eval_deterministic: evaluate the most likely actions instead of draws.
        device: "auto" takes a GPU where there is one and the environment shows images.
        threads: CPU threads of torch; None takes one for vectors, one for each core for images.
        precision: of networks that read images: fp32, bf16 (weights in fp32 under autocast), or "auto", which measures
            on a CPU and takes fp32 elsewhere. Vectors are computed in fp32.
        checkpoint_every: updates between checkpoints; one is saved too where the last is a minute old.
    """

    env: EnvConfig
    out: str | None = None
    seed: int = 1
    steps: int = 1_000_000
    updates: int = 0
    num_steps: int = 128
    network: Network = MLP()
    memory: int = 0
    shared: bool = False
    log_std: float = 0.0
    exploration: Exploration = Independent()
    normalize_observations: bool = False
    scale_rewards: bool = False
    lr: float = 3e-4
    lr_schedule: Schedule = Schedule(shape="linear")
    clip_schedule: Schedule = Schedule()
    entropy_schedule: Schedule = Schedule()
    adam_eps: float = 1e-5
    advantage: AdvantageConfig = AdvantageConfig(gamma=0.99, lam=0.95)
    ppo: PPOConfig = PPOConfig(epochs=4, minibatches=4, max_grad_norm=0.5, token_budget=65536)
    eval_episodes: int = 10
    eval_every: int = 0
    eval_deterministic: bool = True
    device: str = "auto"
    threads: int | None = None
    precision: machine.Precision = "auto"
    checkpoint_every: int = 100


class RewardScaler:
    """r / std of the discounted return so far, clipped [Engstrom et al., 2020].

    The return of each environment runs on from rollout to rollout and starts anew with each episode.
    """

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0) -> None:
        self.gamma, self.clip = gamma, clip
        self.moments = RunningMoments()
        self.returns = torch.zeros(num_envs, dtype=torch.float64)

    def __call__(self, rewards: Tensor, rollout: VectorRollout) -> Tensor:
        """Scaled rewards `[N]`, by statistics that these rewards have entered already."""
        offsets, env = rollout.offsets.cpu(), rollout.prompt_ids
        lengths = offsets.diff()
        num_segments = len(lengths)
        given = rewards.double().cpu()
        first = torch.ones(num_segments, dtype=torch.bool)
        first[1:] = env[1:] != env[:-1]
        carry = torch.where(first, self.returns[env], torch.zeros(num_segments, dtype=torch.float64))
        segment = segment_of_decision(offsets)
        position = torch.arange(len(given)) - offsets[segment]
        grid = torch.zeros(int(lengths.max()), num_segments, dtype=torch.float64)
        grid[position, segment] = given
        rows = grid.unbind(0)
        rows[0].add_(carry, alpha=self.gamma)
        for t in range(1, len(rows)):
            rows[t].add_(rows[t - 1], alpha=self.gamma)
        returns = grid[position, segment]
        self.moments = self.moments.merge(returns, LocalReduce())
        after = torch.where(rollout.ended, torch.zeros_like(carry), returns[offsets[1:] - 1])
        last = torch.ones(num_segments, dtype=torch.bool)
        last[:-1] = first[1:]
        self.returns[env[last]] = after[last]
        std = float((self.moments.var + 1e-8).sqrt())
        return (rewards / std).clamp(-self.clip, self.clip)


@dataclass(kw_only=True)
class GymRun(Run):
    """A run in an environment: everything that training, evaluation and export share."""

    verb = "ppo gym"
    seconds_between_saves = 60.0  # updates of environments may be many in a second, or one in minutes

    config: GymConfig
    policy: ActorCritic
    env: VectorEnvironment
    collecting: VectorCollector
    scaler: RewardScaler | None
    recent: deque[tuple[float, int]]

    def collector(self) -> Collector:
        return self.collecting

    def score(self) -> Score:
        return make_score(self)

    def revalue(self) -> Revalue:
        return partial(with_values_of, self.policy, self.state.passes.tokens)

    def can_evaluate(self) -> bool:
        return self.config.eval_episodes > 0

    def evaluate(
        self, episodes: int | None = None, deterministic: bool | None = None, show: bool = False
    ) -> dict[str, float]:
        """Returns over whole episodes of environments of their own."""
        config = self.config
        return evaluate_policy(
            self.policy,
            config.env,
            episodes=config.eval_episodes if episodes is None else episodes,
            deterministic=config.eval_deterministic if deterministic is None else deterministic,
            seed=config.seed + 10_000,
            show=show,
        )

    def figures(self, show: bool, note: str) -> dict[str, float]:
        return self.evaluate(show=show)

    def export(self, folder: Path) -> None:
        export_policy(self.policy, self.config, folder / "policy")

    def describe(self, metrics: Mapping[str, float]) -> str:
        config = self.config
        shown = f"{metrics['episode/return_100']:8.2f}" if len(self.recent) else "       -"
        return (
            f"{int(metrics['decisions']):9,d}/{config.steps:,d}  return {shown}"
            f"  length {metrics['episode/length_100']:6.1f}  KL {metrics['kl/old_new']:.4f}"
            f"  clipped {metrics['policy/clip_fraction']:4.0%}  explained {metrics['value/explained_variance']:5.2f}"
            f"  {metrics['decisions_per_second']:7,.0f} steps/s"
        )

    def describe_evaluation(self, figures: Mapping[str, float]) -> str:
        return f"return {figures['reward']:.1f} ± {figures['reward/std']:.1f} over {figures['episodes']:.0f} episodes"

    def resolved(self) -> dict[str, Any]:
        return {"precision": self.policy.precision, **super().resolved()}

    def save_state(self) -> dict[str, Any]:
        scaler = self.scaler
        return {
            "collector": self.collecting.save_state() if self.collecting.observations is not None else None,
            "scaler": None if scaler is None else {
                "count": scaler.moments.count, "mean": scaler.moments.mean, "var": scaler.moments.var,
                "returns": scaler.returns,
            },
            "recent": [list(pair) for pair in self.recent],
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        scaler = state["scaler"]
        if self.scaler is not None and scaler is not None:
            self.scaler.moments = RunningMoments(count=scaler["count"], mean=scaler["mean"], var=scaler["var"])
            self.scaler.returns = scaler["returns"]
        self.recent.extend(tuple(pair) for pair in state["recent"])
        self.collecting.policy = self.policy
        if state["collector"] is not None and not self.collecting.load_state(state["collector"], self.state.step):
            self.notes.append(
                f"the state of {self.config.env.id} cannot be restored here: its episodes start anew, so the numbers"
                " go on differently than without the interruption"
            )
            if self.scaler is not None:
                self.scaler.returns.zero_()
            self.env.close()  # made again, since some take their seed only then
            self.env = self.collecting.env = make_vector(self.config.env, self.collecting.seed)


def make_score(run: GymRun) -> Score:
    """The scoring stage of environments: old log-probabilities, values, bootstraps, scaled rewards, and the checks."""
    config, policy = run.config, run.policy
    backend = config.env.backend
    signed = isinstance(backend, AtariBackend) and backend.sign_rewards

    def score(rollout: Rollout, state: TrainState) -> tuple[ScoredRollout, dict[str, float]]:
        assert isinstance(rollout, VectorRollout)
        old, values, bootstrap = read_rollout(policy, rollout, state.passes.tokens)
        if bool((rollout.policy_versions != state.step).any()):
            raise CheckFailed(f"the environments were stepped with other weights than those of update {state.step}")
        gap = mean_size(rollout.behavior_logprobs - old, run.reduce)
        check_paths(gap, 0.0, state.step, LOGPROB_TOLERANCE[policy.precision])
        rewards = rollout.step_rewards.to(old.dtype)
        scores = segment_sums(rewards, rollout.offsets)
        learned = rewards.sign() if signed else rewards
        if run.scaler is not None:
            learned = run.scaler(learned, rollout)
        ones = torch.ones_like(old)
        scored = ScoredRollout(
            rollout=rollout, scores=scores, rewards=learned, old_logprobs=old, ref_logprobs=old, values=values,
            bootstrap=bootstrap, policy_weights=ones, value_weights=ones, components={},
        )  # fmt: skip
        returns, lengths = rollout.episode_returns, rollout.episode_lengths
        run.recent.extend(zip(returns.tolist(), lengths.tolist(), strict=True))
        recent = np.array(run.recent) if run.recent else np.full((1, 2), math.nan)
        some = len(returns) > 0
        return scored, {
            "reward/mean": float(returns.mean()) if some else math.nan,
            "reward/std": float(returns.std()) if some else math.nan,
            "episode/return_100": float(recent[:, 0].mean()),
            "episode/length_100": float(recent[:, 1].mean()),
            "kl/ref": 0.0,  # there is no reference
            "completion/length": float(lengths.mean()) if some else math.nan,
            "completion/truncated_fraction": float((~rollout.terminated).float().mean()),
            "engine/logprob_gap": gap,
        }

    return score


@torch.no_grad()
def read_rollout(policy: ActorCritic, rollout: VectorRollout, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the policy as it is now says of a rollout: log-probabilities `[N]`, values `[N]`, bootstraps `[S]`."""
    inputs: Any = rollout.inputs
    if isinstance(inputs, Steps):
        logprobs, values = score_steps(policy, inputs, budget)
        needed = torch.nonzero(~rollout.terminated).squeeze(1)
        bootstrap = torch.zeros(len(rollout.terminated), device=logprobs.device)
        if len(needed):
            bootstrap[needed] = policy.parameters_and_values(pick(rollout.final_observations, needed))[1]
        return logprobs, values, bootstrap
    logprobs, values, after = score_segments(policy, inputs, rollout.final_observations, budget)
    return logprobs, values, torch.where(rollout.terminated, torch.zeros_like(after), after)


def with_values_of(policy: ActorCritic, budget: int, scored: ScoredRollout) -> ScoredRollout:
    """The same rollout with values and bootstraps by the critic as it is now; rewards and log-probabilities stay.

    Steps after a memory keep the memory that their segment began with in the rollout.
    """
    assert isinstance(scored.rollout, VectorRollout)
    _, values, bootstrap = read_rollout(policy, scored.rollout, budget)
    return replace(scored, values=values, bootstrap=bootstrap)


def score_steps(policy: ActorCritic, inputs: Steps, budget: int) -> tuple[Tensor, Tensor]:
    """Old log-probabilities and values of steps, `budget` at a time."""
    parts = [policy.evaluate(inputs.select(slice(i, i + budget))) for i in range(0, len(inputs.actions), budget)]
    return torch.cat([p.logprobs for p in parts]), torch.cat([p.values for p in parts])


def score_segments(
    policy: ActorCritic, inputs: Segments, final: Observed, budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Old log-probabilities, values, and the value after each segment, for policies with memory."""
    counts = inputs.decision_counts
    old = torch.empty(len(inputs.actions), device=policy.device)
    values, after = torch.empty_like(old), torch.empty(len(counts), device=policy.device)
    for items in budgeted_microbatches(torch.arange(len(counts)), inputs.costs.cpu(), budget):
        items = items.to(policy.device)
        indices = decision_indices(items, counts)
        output, last = policy.evaluate_with_final(inputs.select(items), pick(final, items))
        old[indices], values[indices], after[items] = output.logprobs, output.values, last
    return old, values, after


LARGEST_SEED = 2**31 - 2**16  # ale-py and EnvPool take 31 bits, and each environment has a seed of its own


def check_numbers(config: GymConfig) -> None:
    """Refuse what no run can be made of, by the option's name on the command line."""
    ppo, advantage = config.ppo, config.advantage
    least: dict[str, tuple[float | None, float]] = {  # None: the option was not given
        "--env.num-envs": (config.env.num_envs, 1), "--num-steps": (config.num_steps, 2), "--steps": (config.steps, 1),
        "--updates": (config.updates, 0), "--seed": (config.seed, 0), "--threads": (config.threads, 1),
        "--checkpoint-every": (config.checkpoint_every, 1), "--memory": (config.memory, 0),
        "--eval-episodes": (config.eval_episodes, 0), "--eval-every": (config.eval_every, 0),
        "--lr": (config.lr, 0), "--adam-eps": (config.adam_eps, 0),
        "--advantage.gamma": (advantage.gamma, 0), "--advantage.lam": (advantage.lam, 0),
        "--advantage.value-lam": (advantage.value_lam, 0),
        "--ppo.epochs": (ppo.epochs, 1), "--ppo.minibatches": (ppo.minibatches, 1),
        "--ppo.clip-range": (ppo.clip_range, 0), "--ppo.clip-range-high": (ppo.clip_range_high, 0),
        "--ppo.value-clip": (ppo.value_clip, 0), "--ppo.max-grad-norm": (ppo.max_grad_norm, 0),
        "--ppo.token-budget": (ppo.token_budget, 1),
    }  # fmt: skip
    if isinstance(config.exploration, StateDependent):
        least["--exploration.every"] = (config.exploration.every, 0)
    if isinstance(config.network, MLP):
        least["--network.hidden"] = (min(config.network.hidden, default=None), 1)
    if isinstance(config.network, NatureCNN):
        least["--network.features"] = (config.network.features, 1)
    most: dict[str, tuple[float | None, float]] = {
        "--seed": (config.seed, LARGEST_SEED), "--advantage.gamma": (advantage.gamma, 1),
        "--advantage.lam": (advantage.lam, 1), "--advantage.value-lam": (advantage.value_lam, 1),
    }  # fmt: skip
    at_least({name: (value, limit) for name, (value, limit) in least.items() if value is not None})
    at_most({name: (value, limit) for name, (value, limit) in most.items() if value is not None})


def check_json(config: GymConfig) -> None:
    """Refuse settings that config.json cannot keep, for instance an array among the environment's arguments."""

    def check(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                check(part, f"{name}.{key}" if name else key)
        elif isinstance(value, list):
            for i, part in enumerate(value):
                check(part, f"{name}[{i}]")
        elif not isinstance(value, (str, int, float, type(None))):
            raise HeelerError(
                f"{name} is of type {type(value).__name__}, which config.json cannot keep: give a string, a number, a"
                " boolean, None, or a list or dict of these"
            )

    check(to_json(config), "")


def build_gym_run(config: GymConfig) -> GymRun:
    """Make the environments and the policy; nothing is written yet."""
    check_json(config)
    check_numbers(config)
    if config.ppo.shuffle == "prompts":
        raise HeelerError("--ppo.shuffle prompts is for language models: environments have no prompts")
    machine.keep_freed_memory()
    machine.seed_everything(config.seed)
    if not config.updates:
        config = replace(config, updates=max(1, math.ceil(config.steps / (config.env.num_envs * config.num_steps))))
    config = replace(config, steps=config.updates * config.env.num_envs * config.num_steps)
    env = make_vector(config.env, config.seed)
    chosen: list[str] = []
    if config.network == MLP() and env.observations.images and not env.observations.vector:
        config = replace(config, network=NatureCNN())
        chosen.append(f"{config.env.id} shows nothing but pictures: they are read by the Nature CNN, not by an MLP")
    small = not env.observations.images
    machine.set_threads(config.threads or (1 if small else None))
    try:
        device = machine.choose_device("cpu" if small and config.device == "auto" else config.device)
        precision, why = choose_precision(config.precision, env.observations, device)
        policy = new_actor_critic(env.observations, env.actions, config, precision).to(device)
    except BaseException:
        env.close()
        raise
    if precision == "bf16":
        config = replace(config, ppo=replace(config.ppo, ratio_tolerance=max(config.ppo.ratio_tolerance, 0.05)))
    policy.fuse()
    parameters = policy.trained()
    groups = [{"params": parameters, "name": "policy", "base_lr": config.lr}]
    optimizer: Optimizer
    if policy.fused is not None:
        optimizer = FlatAdam(groups, lr=config.lr, eps=config.adam_eps)
    else:
        optimizer = torch.optim.Adam(groups, lr=config.lr, eps=config.adam_eps, fused=True)
    state = TrainState(
        policy=policy, optimizer=optimizer, generator=torch.Generator().manual_seed(config.seed),
        passes=PassBudget(pass_budget(config.ppo.token_budget, policy.device)),
    )  # fmt: skip
    collecting = VectorCollector(env, config.num_steps, config.seed)
    scaler = RewardScaler(config.env.num_envs, config.advantage.gamma) if config.scale_rewards else None
    notes = [
        f"{config.env.id}: {config.env.num_envs} environments ({type(config.env.backend).__name__}), observations"
        f" {_describe_observations(env)}, actions {env.actions.kind} {env.actions.sizes}",
        f"{device}, {machine.say_threads()}, {why}{sum(p.numel() for p in parameters):,} weights;"
        f" {config.updates} updates of {config.env.num_envs} x {config.num_steps} steps",
        *chosen,
    ]
    return GymRun(
        config=config, policy=policy, env=env, collecting=collecting, scaler=scaler, state=state, notes=notes,
        recent=deque(maxlen=100),
    )  # fmt: skip


def choose_precision(
    wanted: machine.Precision, observations: ObservationSpec, device: str
) -> tuple[Literal["fp32", "bf16"], str]:
    """The precision of a run's networks, and why in words where there was a choice: `GymConfig.precision`."""
    if not observations.images:
        if wanted == "bf16":
            raise HeelerError("--precision bf16 is for networks that read images, and here are none: leave it out")
        return "fp32", ""
    if wanted == "auto" and not device.startswith("cpu"):
        return "fp32", "fp32, "
    precision, why = machine.choose_precision(wanted, device)
    return precision, f"{why}, "


def new_actor_critic(
    observations: ObservationSpec,
    actions: ActionSpec,
    config: GymConfig,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> ActorCritic:
    """The networks that the config describes, freshly initialised."""
    return ActorCritic(
        observations,
        actions,
        config.network,
        memory=config.memory,
        shared=config.shared,
        log_std=config.log_std,
        exploration=config.exploration,
        normalize=config.normalize_observations,
        precision=precision,
    )


def _describe_observations(env: VectorEnvironment) -> str:
    parts = [f"vector of {env.observations.vector}"] if env.observations.vector else []
    named = env.observations.mixed  # a picture alone has no name of its own
    parts += [f"image {name} {shape}" if named else f"image {shape}" for name, shape in env.observations.images]
    return " and ".join(parts)


def train_gym(
    config: GymConfig,
    *,
    on_update: OnUpdate | None = None,
    extra: Mapping[str, Any] | None = None,
    show: bool = True,
) -> GymRun:
    """Train, and leave a run folder.

    Args:
        config: the run.
        on_update: called after each update.
        extra: written into summary.json as it is.
        show: print progress.
    """
    if not isinstance(config.env.id, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HeelerError(
            f"EnvConfig.id must be a string, not {config.env.id!r}: give a Gymnasium id, or 'module:Name' of a class"
        )
    name = config.env.id.rpartition("/")[2].rpartition(":")[2].lower()
    with new_folder(config.out or default_out(name)) as folder:
        run = build_gym_run(config)
    try:
        begin(run, folder, on_update, extra, show)
    finally:
        run.env.close()
    return run


def load_gym_run(path: str | Path, updates: int | None = None) -> GymRun:
    """Assemble a run from its folder and put it into the state of its last checkpoint."""
    folder = RunFolder.open(path)
    saved = folder.read_config()
    config: GymConfig = from_json(GymConfig, saved["config"], str(folder.path / "config.json"))
    resolved = saved["resolved"]
    chosen = {"threads": resolved["threads"], "precision": resolved.get("precision", "fp32")}
    config = replace(config, out=str(path), updates=updates or config.updates, **chosen)
    run = build_gym_run(config)
    restore(run, folder)
    return run


def resume_gym(
    path: str | Path, *, updates: int | None = None, on_update: OnUpdate | None = None, show: bool = True
) -> GymRun:
    """Continue a run from its last checkpoint, to its own number of updates or to `updates`."""
    run = load_gym_run(path, updates)
    try:
        resume(run, on_update, show)
    finally:
        run.env.close()
    return run


# exported policies --------------------------------------------------------------------------------------------


def export_policy(policy: ActorCritic, config: GymConfig, folder: Path) -> None:
    """`policy/`: weights with the observation statistics, and what is needed to build the networks again."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(policy.state_dict(), folder / "weights.pt")
    write_json(
        folder / "policy.json",
        {
            "observations": to_json(policy.observations),
            "actions": to_json(policy.actions),
            "config": to_json(config),
        },
    )


def policy_folder(path: str | Path) -> Path | None:
    """The exported policy of a run (the best one where it kept one), or `path` itself; None where there is none."""
    path = Path(path)
    folders = (path / "best" / "policy", path / "policy", path)
    return next((folder for folder in folders if (folder / "policy.json").is_file()), None)


def last_update(path: str | Path) -> int | None:
    """The update whose checkpoint stands for the policy of a run that has exported none; None where it has one."""
    if policy_folder(path) is not None:
        return None
    path = Path(path)
    step = RunFolder(path).last_checkpoint() if (path / "config.json").is_file() else None
    if step is None:
        raise HeelerError(f"{path} holds neither a policy nor a checkpoint: is it a run of heeler ppo gym?")
    return step


def load_actor_critic(path: str | Path) -> tuple[ActorCritic, GymConfig]:
    """The networks of a run and its config: the exported policy, or the last checkpoint where it was stopped before."""
    step = last_update(path)
    if step is not None:
        folder = RunFolder.open(path)
        config: GymConfig = from_json(GymConfig, folder.read_config()["config"], str(folder.path / "config.json"))
        env = make_vector(config.env, config.seed)
        env.close()
        policy = new_actor_critic(env.observations, env.actions, config)
        weights = folder.load_checkpoint(step)["weights"]
    else:
        exported = policy_folder(path)
        assert exported is not None
        saved = read_json(exported / "policy.json")
        config = from_json(GymConfig, saved["config"], str(exported / "policy.json"))
        policy = new_actor_critic(
            from_json(ObservationSpec, saved["observations"]), from_json(ActionSpec, saved["actions"]), config
        )
        weights = torch.load(exported / "weights.pt", map_location="cpu", weights_only=True)
    policy.load_state_dict(weights)
    return policy.eval(), config


def load_policy(path: str | Path, *, deterministic: bool = True, seed: int = 0) -> GymPolicy:
    """The policy of a run, ready to act on the environment's own observations.

    Args:
        path: a run folder (its best policy is taken where it kept one, its last checkpoint where it was stopped before
            it exported any) or an exported policy.
        deterministic: take the most likely action; draw where False.
        seed: of the draws.
    """
    policy, config = load_actor_critic(path)
    if isinstance(config.env.backend, AtariBackend):
        env = make_vector(replace(config.env, num_envs=1), config.seed)
        space = env.space
    else:
        env = make_one(config.env)
        space = env.observation_space
    env.close()
    return GymPolicy(policy, space, deterministic=deterministic, seed=seed, name=config.env.id)
