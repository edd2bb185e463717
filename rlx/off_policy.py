"""What off-policy learners share: an ensemble of critics, gradient steps on replayed batches, the settings of both.

A learner's Config has the fields that `check`, `make_critics` and `make_off_policy` read. Observations are normalised
with statistics of what the environments have shown, those of data sets beside them too; alone, by those of the data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlx import agents, networks, normalize
from rlx.algorithm import Key, Mode, Plan
from rlx.environment import random_action
from rlx.errors import require, require_above, require_at_least
from rlx.networks import DTYPES, MLP, check_vectors, keep, select
from rlx.replay import OBS_DTYPES, Batch, Draw, Replay, check_replay, make_replay, mix
from rlx.types import Box, Discrete, Metrics, PyTree, Spec, Transition


class Critics(NamedTuple):
    """E action values with parameters of their own, leaves [E, ...]; observations as a batch holds them."""

    init: Callable[[Key], PyTree]
    apply: Callable[[PyTree, PyTree, jax.Array], jax.Array]  # (params, obs, action [B, a]) -> [E, B] float32
    loss: Callable[[PyTree, Batch, jax.Array], tuple[jax.Array, Metrics]]  # (params, batch, targets [B])


def make_critics(config: Any, spec: Spec) -> Critics:
    """`num_critics` of them, of `critic_hidden`, with `layer_norm` or without, that read `critic_obs_key`.

    Their action [B, a] is, of several agents, all of theirs one behind the other, discrete ones one-hot.
    """
    network = MLP(config.critic_hidden, 1, config.activation, layer_norm=config.layer_norm, dtype=DTYPES[config.dtype])
    values = spec.action.num_values if isinstance(spec.action, Discrete) else 1
    width = select(spec.obs, config.critic_obs_key).shape[0] + values * math.prod(spec.action.shape)

    def init(key: Key) -> PyTree:
        keys = jax.random.split(key, config.num_critics)
        return jax.vmap(network.init, (0, None))(keys, jnp.zeros(width, jnp.float32))

    def apply(params: PyTree, obs: PyTree, action: jax.Array) -> jax.Array:
        inputs = jnp.concatenate([select(obs, config.critic_obs_key), action], axis=-1)
        return jax.vmap(network.apply, (0, None))(params, inputs).squeeze(-1).astype(jnp.float32)

    def loss(params: PyTree, batch: Batch, targets: jax.Array) -> tuple[jax.Array, Metrics]:
        """1/2 E[(Q_i(s, a) - y)^2], summed over the ensemble."""
        values = apply(params, batch.obs, batch.action)
        error = 0.5 * jnp.square(values - targets[None]).mean(axis=1).sum()
        return error, {"critic_loss": error, "q": values.mean(), "target": targets.mean()}

    return Critics(init, apply, loss)


class Experience(NamedTuple):
    """What an off-policy learner holds besides its parameters."""

    rows: Any  # Rows; none where all batches come out of a data set
    statistics: normalize.RunningStatistics  # of the observations that its networks read
    random: jax.Array  # () bool: whether the next trajectory is gathered by random actions


class OffPolicyState(NamedTuple):
    learned: Any  # what a gradient step changes: the algorithm's `Learned`
    experience: Experience

    @property
    def params(self) -> dict[str, PyTree]:
        return self.learned.params


class Explorer(NamedTuple):
    """The part of `Experience` that acting needs."""

    statistics: normalize.RunningStatistics
    random: PyTree  # () bool in mode "explore", else ()


class ActingPolicy(NamedTuple):
    actor: PyTree
    explorer: Explorer


class OffPolicy(NamedTuple):
    """Pure functions around an algorithm's gradient step."""

    init: Callable[[Any, ActingPolicy | None], OffPolicyState]  # (learned, another run's policy): then none is random
    policy: Callable[[OffPolicyState, Mode], ActingPolicy]
    observe: Callable[[PyTree, PyTree], PyTree]  # (statistics, obs): the entries that networks read, normalised
    explore: Callable[[ActingPolicy, jax.Array, Key, Mode], jax.Array]  # (policy, its action [B, a], key, mode)
    update: Callable[..., tuple[OffPolicyState, Metrics]]  # (step, state, trajectory, iteration, key)
    updates: int  # gradient steps an iteration


def make_off_policy(config: Any, spec: Spec, plan: Plan, data: Draw | None = None, apart: bool = False) -> OffPolicy:
    """`data`: out of which `data_batch` transitions of every batch come. `apart`: rewards of a batch are [size, N],
    each agent's own; else they are summed."""
    per_iteration = plan.num_envs * plan.unroll_length
    updates, gathering = updates_in(config, per_iteration), -(-config.prefill_steps // per_iteration)
    keys = (config.actor_obs_key, config.critic_obs_key)
    spec = dataclasses.replace(spec, obs=keep(spec.obs, *keys))
    online = config.batch_size - config.data_batch
    gathering = gathering if online else 0
    paid = (spec.num_agents,) if apart else ()
    sizes = (online, config.data_batch)
    replay: Replay = make_replay(config.replay_size, sizes, plan, spec, config.replay_dtype, paid)

    def init(learned: Any, policy: ActingPolicy | None) -> OffPolicyState:
        statistics = normalize.init(spec.obs) if policy is None else policy.explorer.statistics
        random = jnp.asarray(config.random_prefill and gathering > 0 and policy is None)
        return OffPolicyState(learned, Experience(replay.init() if online else (), statistics, random))

    def policy(state: OffPolicyState, mode: Mode) -> ActingPolicy:
        random = state.experience.random if mode == "explore" else ()
        return ActingPolicy(state.params["actor"], Explorer(state.experience.statistics, random))

    def observe(statistics: normalize.RunningStatistics, obs: PyTree) -> PyTree:
        return normalize.observe(config, statistics, keep(obs, *keys))

    def explore(policy: ActingPolicy, action: jax.Array, key: Key, mode: Mode) -> jax.Array:
        if mode != "explore":
            return action
        draws = jax.vmap(lambda key: random_action(spec, key))(jax.random.split(key, action.shape[0]))
        return jnp.where(policy.explorer.random, draws, action)

    def pay(reward: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Rewards [*shape] or [*shape, N] as they are learnt from."""
        return jnp.broadcast_to(reward.reshape(*shape, -1), (*shape, *paid)) if apart else agents.team(reward, shape)

    def draw(experience: Experience, iteration: jax.Array, key: Key) -> Batch:
        """[batch_size, ...], observations as networks read them."""
        online_key, data_key = jax.random.split(key) if online and config.data_batch else (key, key)
        parts = []
        if online:
            parts.append(replay.sample(experience.rows, iteration, online_key, online, config.n_step, config.gamma))
        if config.data_batch:
            assert data is not None, "data_batch without a data set"
            size, of_groups = config.data_batch // replay.num_groups, jax.random.split(data_key, replay.num_groups)
            of_data = jax.vmap(lambda key: data(key, size, config.n_step, config.gamma))(of_groups)
            of_data = of_data._replace(reward=pay(of_data.reward, of_data.discount.shape))
            parts.append(of_data._replace(obs=keep(of_data.obs, *keys), next_obs=keep(of_data.next_obs, *keys)))
        batch = mix(parts)
        obs, next_obs = (observe(experience.statistics, x) for x in (batch.obs, batch.next_obs))
        return batch._replace(obs=obs, next_obs=next_obs, reward=batch.reward * config.reward_scale)

    def update(
        step: Callable[[Any, Batch, jax.Array, Key], tuple[Any, Metrics]],
        state: OffPolicyState,
        trajectory: Transition,
        iteration: jax.Array,
        key: Key,
    ) -> tuple[OffPolicyState, Metrics]:
        """Stores a trajectory and runs `step(learned, batch, count, key) -> (learned, metrics)` on fresh draws.

        `count`: () int32, gradient steps before this one in the iteration. Metrics are means, and 0 while there is
        nothing but gathering. The statistics of observations come first: no gradient step is taken without any.
        """
        shape = (plan.unroll_length, plan.num_envs)
        chex.assert_shape([trajectory.terminated, trajectory.truncated], shape)
        chex.assert_type([trajectory.terminated, trajectory.truncated], bool)
        chex.assert_type(trajectory.reward, jnp.float32)
        obs = keep(trajectory.obs, *keys)
        reward = pay(trajectory.reward, shape)
        trajectory = trajectory._replace(obs=obs, reward=reward, next_obs=keep(trajectory.next_obs, *keys))
        experience = state.experience
        if config.normalize_obs:
            experience = experience._replace(statistics=normalize.update(experience.statistics, obs))
        if online:
            experience = experience._replace(rows=replay.insert(experience.rows, trajectory, iteration))

        def one(learned: Any, inputs: tuple[jax.Array, Key]):
            count, (draw_key, step_key) = inputs
            return step(learned, draw(experience, iteration, draw_key), count, step_key)

        def learn(learned: Any, key: Key):
            counts = jnp.arange(updates, dtype=jnp.int32)
            learned, metrics = jax.lax.scan(one, learned, (counts, jax.random.split(key, (updates, 2))))
            return learned, jax.tree.map(lambda x: x.mean(axis=0), metrics)

        def gather(learned: Any, key: Key):
            metrics = jax.eval_shape(learn, learned, key)[1]
            return learned, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

        learned, metrics = jax.lax.cond(iteration + 1 >= gathering, learn, gather, state.learned, key)
        random = experience.random & (iteration + 1 < gathering)
        return OffPolicyState(learned, experience._replace(random=random)), metrics

    return OffPolicy(init, policy, observe, explore, update, updates)


def noisy(action: jax.Array, std: float | jax.Array, key: Key, clip: float | jax.Array = math.inf) -> jax.Array:
    """An action in [-1, 1] with normal noise, of at most `clip`, added; inside of that box again."""
    noise = std * jax.random.normal(key, action.shape, jnp.float32)
    return jnp.clip(action + jnp.clip(noise, -clip, clip), -1.0, 1.0)


def turn(delay: int, experience: OffPolicy, iteration: jax.Array, count: jax.Array) -> jax.Array:
    """() int32, 0 on every `delay`-th gradient step of the run, of which `count` were before in this iteration."""
    before = iteration % delay * experience.updates  # gradient steps, but for whole turns
    return (before + count + 1) % delay


def delayed(
    delay: int, turn: jax.Array, step: Callable[..., tuple[Any, Metrics]], carry: Any, *inputs: Any
) -> tuple[Any, Metrics]:
    """`step(carry, *inputs) -> (carry, metrics)` on turn 0, else nothing. Of the mean of its metrics over all gradient
    steps, those of its own are left: on others they are 0."""

    def skipped(carry: Any, *inputs: Any) -> tuple[Any, Metrics]:
        metrics = jax.eval_shape(step, carry, *inputs)[1]
        return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)

    carry, metrics = jax.lax.cond(turn == 0, step, skipped, carry, *inputs)
    return carry, {name: value * delay for name, value in metrics.items()}


def updates_in(config: Any, decisions: int) -> int:
    """Gradient steps for so many decisions, to the nearest whole one."""
    updates, each = config.utd_ratio
    return round(updates * decisions / each)


def uses_data(config: Any) -> str:
    """Whether batches come out of data sets: not at all, in part ("beside" environments), or "alone"."""
    return "" if not config.data_batch else "beside" if config.data_batch < config.batch_size else "alone"


def check(config: Any, spec: Spec, plan: Plan, name: str, several: bool = False, apart: bool = False) -> None:
    """Raises UserError for settings, shared by off-policy learners, that cannot work; `name` is the algorithm's.

    `several`: it trains several agents, with discrete actions too. `apart` as in `make_off_policy`.
    """
    if several:
        agents.check(spec, config.actor_obs_key, name)
        shape = select(spec.obs, config.critic_obs_key).shape
        require(len(shape) == 1, "env", f"a state of shape {shape}", f"{name}'s critics read vectors")
    else:
        check_vectors(spec, (config.actor_obs_key, config.critic_obs_key), name)
        require(isinstance(spec.action, Box), "env", spec.action, f"{name} needs continuous actions")
    for field in ("gamma", "tau"):
        require(0 <= getattr(config, field) <= 1, f"algo.{field}", getattr(config, field), "between 0 and 1")
    require_above(config, 0, "max_grad_norm", "actor_learning_rate", "critic_learning_rate")
    require_at_least(config, 1, "n_step", "batch_size", "num_critics")
    require_at_least(config, 0, "prefill_steps")
    steps = plan.num_envs * plan.unroll_length
    ratio = config.utd_ratio
    require(len(ratio) == 2 and min(ratio) > 0, "algo.utd_ratio", ratio, "two whole numbers above 0")
    allowed = f"at least a gradient step for the {steps} decisions of an iteration"
    require(updates_in(config, steps) >= 1, "algo.utd_ratio", ratio, allowed)
    part = config.data_batch
    require(0 <= part <= config.batch_size, "algo.data_batch", part, f"from 0 to batch_size = {config.batch_size}")
    require(config.dtype in DTYPES, "algo.dtype", config.dtype, f"one of {', '.join(DTYPES)}")
    networks.check(config, "actor_hidden", "critic_hidden")
    require(
        config.replay_dtype in OBS_DTYPES, "algo.replay_dtype", config.replay_dtype, f"one of {', '.join(OBS_DTYPES)}"
    )
    if part == config.batch_size:
        return
    allowed = "as many gather everything that the run does: more total_steps"
    enough = -(-config.prefill_steps // steps) <= plan.num_iterations
    require(enough, "algo.prefill_steps", config.prefill_steps, allowed)
    sizes = (config.batch_size - part, part)
    kept = Spec(keep(spec.obs, config.actor_obs_key, config.critic_obs_key), spec.action)
    paid = (spec.num_agents,) if apart else ()
    check_replay(plan, kept, config.replay_size, sizes, config.replay_dtype, paid)


def check_noise(config: Any) -> None:
    """Raises UserError for settings of deterministic actors that cannot work."""
    require_at_least(config, 1, "policy_delay")
    require_at_least(config, 0, "exploration_noise", "target_noise", "noise_clip")
