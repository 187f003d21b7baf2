"""PPO by PureJaxRL's method, written for this comparison: environments, rollouts and updates are one compiled program.

    python jax_ppo.py --env CartPole-v1 --steps 500000 --target 475 --out result.json

Run with the Python of the environment `jax` (environments.py). It needs nothing of Heeler.

The method and the hyperparameters are those of PureJaxRL's ppo.py: N copies by vmap, rollouts, advantages, epochs,
minibatches and updates by nested scans, all under one jit, optax's Adam. As there, the end of a truncated episode
counts as a terminal state. The networks are plain arrays; PureJaxRL has flax and distrax, which cost time to import.

Two variants do the same sums:
    published: environments of gymnax, the weights made inside the program, advantages in a loop unrolled 16 times.
    lean: less to import and to compile. CartPole of this file, the weights made by numpy, nothing unrolled.

The program returns when all updates are done, so an observer has to wait for the whole run. The report therefore says
two times for a target: until the whole run ended, and until then if the updates after the target had been left out.
JAX's own variable JAX_COMPILATION_CACHE_DIR keeps the compiled program for later runs; without it each run compiles.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import Progress, parser, process_seconds, reached_at, write_report

Array = jax.Array
Weights = dict[str, list[tuple[Array, Array]]]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters.

    Attributes:
        envs: N, copies of the environment.
        rollout_steps: T, steps of each copy between two updates.
        minibatches, epochs: of an update.
        lr: falls linearly to 0 over the training.
    """

    envs: int = 4
    rollout_steps: int = 128
    minibatches: int = 4
    epochs: int = 4
    lr: float = 2.5e-4
    gamma: float = 0.99
    lam: float = 0.95
    clip_range: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    adam_eps: float = 1e-5


SETTINGS = {"purejaxrl": Settings(), "cartpole-bench": Settings(envs=8)}


class Environment(NamedTuple):
    """One copy of an environment as pure functions.

    Attributes:
        reset: key -> (observation, state).
        step: (key, state, action) -> (observation, state, reward, ended); after an end, observation and state are
            those of a new episode.
        max_steps: of an episode.
    """

    reset: Callable[[Array], tuple[Array, Any]]
    step: Callable[[Array, Any, Array], tuple[Array, Any, Array, Array]]
    observation_size: int
    num_actions: int
    max_steps: int


def gymnax_environment(name: str) -> Environment:
    """An environment of gymnax with discrete actions, its observations flattened."""
    import gymnax  # here, because the import already starts XLA

    made, params = gymnax.make(name)

    def reset(key: Array) -> tuple[Array, Any]:
        observation, state = made.reset(key, params)
        return observation.ravel(), state

    def step(key: Array, state: Any, action: Array) -> tuple[Array, Any, Array, Array]:
        observation, state, reward, terminated, truncated, _ = made.step(key, state, action, params)
        return observation.ravel(), state, reward, terminated | truncated

    size = int(np.prod(made.observation_space(params).shape))
    return Environment(reset, step, size, int(made.num_actions), int(params.max_steps_in_episode))


def own_cartpole() -> Environment:
    """CartPole-v1, after Barto, Sutton and Anderson (1983), with the constants and Euler steps of Gymnasium's.

    The state is the pair of the observation [4] (position, velocity, angle, angular velocity) and the steps so far.
    """
    gravity, cart_mass, pole_mass, half_length, force_size, seconds = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    max_position, max_angle, max_steps = 2.4, 12 * np.pi / 180, 500
    mass = cart_mass + pole_mass

    def reset(key: Array) -> tuple[Array, Any]:
        observation = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        return observation, (observation, jnp.int32(0))

    def step(key: Array, state: Any, action: Array) -> tuple[Array, Any, Array, Array]:
        (_, velocity, angle, spin), steps = state[0], state[1] + 1
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        push = (force_size * (2 * action - 1) + pole_mass * half_length * spin**2 * sine) / mass
        spin_change = (gravity * sine - cosine * push) / (half_length * (4 / 3 - pole_mass * cosine**2 / mass))
        velocity_change = push - pole_mass * half_length * spin_change * cosine / mass
        rates = jnp.stack([velocity, velocity_change, spin, spin_change])
        moved = state[0] + seconds * rates
        ended = (jnp.abs(moved[0]) > max_position) | (jnp.abs(moved[2]) > max_angle) | (steps >= max_steps)
        observation, (_, zero) = reset(key)
        observation = jnp.where(ended, observation, moved)
        return observation, (observation, jnp.where(ended, zero, steps)), jnp.float32(1), ended

    return Environment(reset, step, 4, 2, max_steps)


# the networks -------------------------------------------------------------------------------------------------


Layer = Callable[[Array, tuple[int, int], float], Array]


def jax_orthogonal(key: Array, shape: tuple[int, int], gain: float) -> Array:
    """A random matrix with orthogonal rows or columns of length `gain`."""
    return jax.nn.initializers.orthogonal(gain)(key, shape)


def numpy_orthogonal(key: Array, shape: tuple[int, int], gain: float) -> Array:
    """The same without XLA, which would compile a decomposition for each shape."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    columns, triangle = np.linalg.qr(generator.standard_normal((max(shape), min(shape))))
    columns = columns * np.sign(np.diag(triangle)) * gain
    return jnp.asarray(columns if shape[0] >= shape[1] else columns.T, jnp.float32)


def initial_weights(key: Array, inputs: int, actions: int, orthogonal: Layer) -> Weights:
    """Actor and critic without shared weights, each with two hidden layers of 64, orthogonal, biases 0."""
    made: Weights = {}
    for name, outputs, last_gain in (("actor", actions, 0.01), ("critic", 1, 1.0)):
        sizes, gains = (inputs, 64, 64, outputs), (2**0.5, 2**0.5, last_gain)
        layers = []
        for width, following, gain in zip(sizes[:-1], sizes[1:], gains, strict=True):
            key, chosen = jax.random.split(key)
            layers.append((orthogonal(chosen, (width, following), gain), jnp.zeros(following)))
        made[name] = layers
    return made


def forward(layers: list[tuple[Array, Array]], inputs: Array) -> Array:
    """A network with tanh between its layers: [..., inputs] -> [..., outputs]."""
    for weight, bias in layers[:-1]:
        inputs = jnp.tanh(inputs @ weight + bias)
    weight, bias = layers[-1]
    return inputs @ weight + bias


def log_probabilities(weights: Weights, observations: Array) -> Array:
    return jax.nn.log_softmax(forward(weights["actor"], observations))


def values_of(weights: Weights, observations: Array) -> Array:
    return forward(weights["critic"], observations)[..., 0]


# the program --------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Steps of a rollout, [T, N, ...], or of a minibatch, [B, ...]."""

    observations: Array
    actions: Array
    logprobs: Array
    values: Array
    rewards: Array
    ended: Array


def advantages_of(steps: Steps, last_values: Array, settings: Settings, unroll: int) -> Array:
    """Generalized advantage estimation of a rollout, [T, N]."""

    def backwards(carry: tuple[Array, Array], step: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        advantage, next_value = carry
        reward, value, ended = step
        goes_on = 1.0 - ended
        delta = reward + settings.gamma * next_value * goes_on - value
        advantage = delta + settings.gamma * settings.lam * goes_on * advantage
        return (advantage, value), advantage

    start = (jnp.zeros_like(last_values), last_values)
    each = (steps.rewards, steps.values, steps.ended)
    return jax.lax.scan(backwards, start, each, reverse=True, unroll=unroll)[1]


def minibatch_loss(weights: Weights, steps: Steps, advantages: Array, settings: Settings) -> Array:
    """PPO's loss, with the value's change clipped too."""
    returns = advantages + steps.values
    logprobs = log_probabilities(weights, steps.observations)
    ratios = jnp.exp(jnp.take_along_axis(logprobs, steps.actions[:, None], 1)[:, 0] - steps.logprobs)
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    low, high = 1 - settings.clip_range, 1 + settings.clip_range
    policy_loss = -jnp.minimum(ratios * scaled, ratios.clip(low, high) * scaled).mean()
    values = values_of(weights, steps.observations)
    near = steps.values + (values - steps.values).clip(-settings.clip_range, settings.clip_range)
    value_loss = 0.5 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
    entropy = -(jnp.exp(logprobs) * logprobs).sum(-1).mean()
    return policy_loss + settings.value_coef * value_loss - settings.entropy_coef * entropy


def make_train(
    environment: Environment, settings: Settings, updates: int, unroll: int
) -> Callable[[Array, Weights | None], tuple[Weights, Array, Array]]:
    """The whole training as one function of a key and of the weights to start from (None: make them).

    It returns the weights, and for each step of training ([U, T, N]) whether an episode ended with it and its return
    so far.
    """
    envs, per_update = settings.envs, settings.epochs * settings.minibatches
    batch = envs * settings.rollout_steps

    def lr(count: Array) -> Array:
        return settings.lr * (1.0 - (count // per_update) / updates)

    optimizer = optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), optax.adam(lr, eps=settings.adam_eps))

    def train(key: Array, weights: Weights | None) -> tuple[Weights, Array, Array]:
        key, for_weights, for_reset = jax.random.split(key, 3)
        if weights is None:
            sizes = environment.observation_size, environment.num_actions
            weights = initial_weights(for_weights, *sizes, jax_orthogonal)
        observations, states = jax.vmap(environment.reset)(jax.random.split(for_reset, envs))

        def one_step(carry: Any, _: None) -> tuple[Any, tuple[Steps, Array]]:
            weights, states, observations, totals, key = carry
            key, for_action, for_step = jax.random.split(key, 3)
            logprobs = log_probabilities(weights, observations)
            actions = jax.random.categorical(for_action, logprobs)
            chosen = jnp.take_along_axis(logprobs, actions[:, None], 1)[:, 0]
            values = values_of(weights, observations)
            new, states, rewards, ended = jax.vmap(environment.step)(jax.random.split(for_step, envs), states, actions)
            totals = totals + rewards
            steps = Steps(observations, actions, chosen, values, rewards, ended)
            return (weights, states, new, totals * (1 - ended), key), (steps, totals)

        def one_minibatch(carry: Any, rows: tuple[Steps, Array]) -> tuple[Any, None]:
            weights, moments = carry
            gradient = jax.grad(minibatch_loss)(weights, *rows, settings)
            change, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(weights, change), moments), None

        def one_update(carry: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
            weights, moments, states, observations, totals, key = carry
            carry = (weights, states, observations, totals, key)
            carry, (steps, returns) = jax.lax.scan(one_step, carry, None, settings.rollout_steps)
            _, states, observations, totals, key = carry
            advantages = advantages_of(steps, values_of(weights, observations), settings, unroll)
            flat = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), (steps, advantages))

            def one_epoch(carry: Any, key: Array) -> tuple[Any, None]:
                order = jax.random.permutation(key, batch)
                rows = jax.tree.map(lambda x: x[order].reshape(settings.minibatches, -1, *x.shape[1:]), flat)
                return jax.lax.scan(one_minibatch, carry, rows)

            key, for_epochs = jax.random.split(key)
            (weights, moments), _ = jax.lax.scan(
                one_epoch, (weights, moments), jax.random.split(for_epochs, settings.epochs)
            )
            return (weights, moments, states, observations, totals, key), (steps.ended, returns)

        carry = (weights, optimizer.init(weights), states, observations, jnp.zeros(envs), key)
        carry, (ended, returns) = jax.lax.scan(one_update, carry, None, updates)
        return carry[0], ended, returns

    return train


def evaluate(environment: Environment, weights: Weights, key: Array, episodes: int) -> list[float]:
    """Returns of episodes with the most probable action."""

    def one_episode(key: Array) -> Array:
        def step(carry: Any, key: Array) -> tuple[Any, None]:
            observation, state, total, alive = carry
            action = forward(weights["actor"], observation).argmax()
            observation, state, reward, ended = environment.step(key, state, action)
            return (observation, state, total + alive * reward, alive * (1.0 - ended)), None

        key, for_reset = jax.random.split(key)
        start = (*environment.reset(for_reset), jnp.float32(0), jnp.float32(1))
        return jax.lax.scan(step, start, jax.random.split(key, environment.max_steps))[0][2]

    returns = jax.jit(jax.vmap(one_episode))(jax.random.split(key, episodes))
    return [float(value) for value in returns]


def limit_threads(threads: int) -> None:
    """Tell XLA, which has not started yet, how many CPU threads to use."""
    os.environ["NPROC"] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    jax.config.update("jax_platforms", "cpu")


def record(progress: Progress, ended: np.ndarray, returns: np.ndarray, seconds: float) -> None:
    """Make the curve from what the program returned; each update is taken to last equally long."""
    updates, rollout_steps, envs = ended.shape
    for update in range(updates):
        for step, copy in np.argwhere(ended[update]):
            count = (update * rollout_steps + int(step) + 1) * envs
            progress.add_episode(count, float(returns[update, step, copy]))
        progress.add_point((update + 1) * rollout_steps * envs, seconds * (update + 1) / updates)


def main() -> None:
    command_line: argparse.ArgumentParser = parser(__doc__ or "", env="CartPole-v1", steps=500_000)
    command_line.add_argument("--settings", choices=SETTINGS, default="purejaxrl", help="(purejaxrl)")
    command_line.add_argument("--variant", choices=("published", "lean"), default="published", help="(published)")
    arguments = command_line.parse_args()
    lean = arguments.variant == "lean"
    if lean and arguments.env != "CartPole-v1":
        command_line.error("the lean variant has CartPole-v1 only")
    limit_threads(arguments.threads)
    environment = own_cartpole() if lean else gymnax_environment(arguments.env)
    import_seconds = process_seconds()
    settings = SETTINGS[arguments.settings]
    if arguments.num_envs:
        settings = replace(settings, envs=arguments.num_envs)
    updates = max(1, arguments.steps // (settings.rollout_steps * settings.envs))
    key, for_weights, for_evaluation = jax.random.split(jax.random.key(arguments.seed), 3)
    weights = None
    if lean:
        sizes = environment.observation_size, environment.num_actions
        weights = initial_weights(for_weights, *sizes, numpy_orthogonal)

    start = time.perf_counter()
    train = make_train(environment, settings, updates, unroll=1 if lean else 16)
    lowered = jax.jit(train).lower(key, weights)
    trace_seconds = time.perf_counter() - start
    program = lowered.compile()
    compile_seconds = time.perf_counter() - start

    progress = Progress()
    progress.begin()
    weights, ended, returns = jax.block_until_ready(program(key, weights))
    learning_seconds = progress.seconds()
    record(progress, np.asarray(ended), np.asarray(returns), learning_seconds)
    index = reached_at(progress.curve, arguments.target)
    timing: dict[str, float | None] = {
        "import_seconds": import_seconds,
        "trace_seconds": trace_seconds,
        "compile_seconds": compile_seconds,  # tracing included
        "full_run_seconds": progress.startup_seconds + learning_seconds,
        "compile_and_share_seconds": None if index is None else compile_seconds + progress.curve_seconds[index],
    }

    start = time.perf_counter()
    episodes = arguments.eval_episodes
    evaluation = evaluate(environment, weights, for_evaluation, episodes) if episodes else []
    packages = ["jax", "jaxlib", "optax", "numpy"] + ([] if lean else ["gymnax"])
    write_report(
        arguments,
        packages,
        {"name": arguments.settings, "variant": arguments.variant, **asdict(settings)},
        updates * settings.rollout_steps * settings.envs,
        learning_seconds,
        progress,
        evaluation,
        time.perf_counter() - start,
        **timing,
    )
    print(
        f"imports {import_seconds:.2f} s, tracing and compiling {compile_seconds:.2f} s;"
        f" the whole run ended {timing['full_run_seconds']:.2f} s after the process's start"
    )


if __name__ == "__main__":
    main()
