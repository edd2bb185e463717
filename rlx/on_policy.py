"""What on-policy learners share: advantages, the value loss, epochs of minibatch steps, the settings of these.

A learner's Config has the fields that `check`, `init` and `make_update` read. Observations are normalised with the
statistics that they were acted on by; the trajectory's own come in last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from rlx import networks, normalize
from rlx.algorithm import Key, Plan
from rlx.errors import require, require_above, require_at_least
from rlx.minibatches import check_minibatches, scan_minibatches
from rlx.networks import MLP, check_vectors, select
from rlx.optimization import descend
from rlx.returns import gae
from rlx.sharding import per_env
from rlx.types import Metrics, PyTree, Spec, Transition

RATES = (1e-5, 1e-2)  # what adaptive_lr keeps the learning rate between


@per_env
class Discounted(NamedTuple):
    sums: jax.Array  # [B] float32: of the episode's rewards so far, each discounted since it came


class RewardScale(NamedTuple):
    discounted: Discounted
    statistics: normalize.RunningStatistics  # of all such sums


class OnPolicyState(NamedTuple):
    params: dict[str, PyTree]  # {"actor", "critic", ...}
    optimizer: optax.OptState
    statistics: normalize.RunningStatistics  # of observations
    learning_rate: jax.Array  # () float32, before annealing
    reward_scale: PyTree  # RewardScale with normalize_reward, else ()


class Batch(NamedTuple):
    """A trajectory with what is computed once an iteration. Leaves [T, B, ...]."""

    transition: Transition  # observations normalised
    values: jax.Array
    advantages: jax.Array
    targets: jax.Array


class Learnt(NamedTuple):
    """What gradient steps change."""

    params: dict[str, PyTree]
    optimizer: optax.OptState
    learning_rate: jax.Array


Values = Callable[[PyTree, Transition], tuple[jax.Array, jax.Array]]  # (params, trajectory): of obs and of next_obs
# (params, minibatch, key) -> what is minimised but for the value error; values; metrics with "kl", "ratio_deviation"
Objective = Callable[[PyTree, Batch, Key], tuple[jax.Array, jax.Array, Metrics]]
# (before, batch, what anneals the rate, key) -> after, metrics: all gradient steps of an iteration
Learn = Callable[[Learnt, Batch, jax.Array, Key], tuple[Learnt, Metrics]]
# (state, trajectory, iteration, key) -> (state, metrics)
Update = Callable[[OnPolicyState, Transition, jax.Array, Key], tuple[OnPolicyState, Metrics]]


def init(
    config: Any,
    spec: Spec,
    plan: Plan,
    params: dict[str, PyTree],
    init_optimizer: Callable[[PyTree], optax.OptState],
    policy: Any,
) -> OnPolicyState:
    """The state of fresh `params`, those of `policy` and its statistics in their place if there is one."""
    statistics = normalize.init(spec.obs)
    if policy is not None:
        params = params | policy.params
        statistics = policy.statistics
    rate = jnp.asarray(config.learning_rate, jnp.float32)
    scale: PyTree = ()
    if config.normalize_reward:
        sums = jnp.zeros(plan.num_envs, jnp.float32)
        scale = RewardScale(Discounted(sums), normalize.init(jax.ShapeDtypeStruct((), jnp.float32)))
    return OnPolicyState(params, init_optimizer(params), statistics, rate, scale)


def scale_rewards(
    scale: RewardScale, trajectory: Transition, gamma: float | jax.Array
) -> tuple[RewardScale, jax.Array]:
    """Rewards [T, B] over the running standard deviation of discounted sums, this trajectory's among them, clipped to
    [-10, 10] (Engstrom et al. 2020, arXiv 2005.12729, section 3)."""

    def step(sums: jax.Array, inputs: tuple[jax.Array, jax.Array]):
        reward, done = inputs
        sums = gamma * sums + reward
        return jnp.where(done, 0.0, sums), sums

    inputs = (trajectory.reward, trajectory.terminated | trajectory.truncated)
    last, sums = jax.lax.scan(step, scale.discounted.sums, inputs)
    statistics = normalize.update(scale.statistics, sums)
    return RewardScale(Discounted(last), statistics), jnp.clip(trajectory.reward / statistics.std, -10.0, 10.0)


class Critic(NamedTuple):
    """State values. `params` of `value` and `values` are those of the learner, {"critic", ...}."""

    init: Callable[[Key], PyTree]
    value: Callable[[PyTree, PyTree], jax.Array]  # (params, obs) -> [...]
    values: Values


def make_critic(config: Any, spec: Spec) -> Critic:
    """A network of `critic_hidden` that reads `critic_obs_key`, [d]."""
    network = MLP(config.critic_hidden, 1, config.activation)

    def init(key: Key) -> PyTree:
        return network.init(key, jnp.zeros(select(spec.obs, config.critic_obs_key).shape, jnp.float32))

    def value(params: PyTree, obs: PyTree) -> jax.Array:
        return network.apply(params["critic"], select(obs, config.critic_obs_key)).squeeze(-1)

    def values(params: PyTree, trajectory: Transition) -> tuple[jax.Array, jax.Array]:
        return value(params, trajectory.obs), value(params, trajectory.next_obs)

    return Critic(init, value, values)


def make_estimate(config: Any, values: Values) -> Callable[[PyTree, Transition], Batch]:
    """(params, trajectory whose observations are normalised) -> values, advantages and value targets.

    Where `values` has one for each of several agents, [T, B, N], so have advantages and targets, of one reward.
    """

    def estimate(params: PyTree, trajectory: Transition) -> Batch:
        of_obs, of_next = values(params, trajectory)
        columns = gae
        for _ in of_obs.shape[1:]:
            columns = jax.vmap(columns, in_axes=(1, 1, 1, 1, 1, None, None), out_axes=1)

        def of_all(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x.reshape(x.shape + (1,) * (of_obs.ndim - x.ndim)), of_obs.shape)

        advantages, targets = columns(
            of_all(trajectory.reward * config.reward_scale),
            of_obs,
            of_next,
            of_all(trajectory.terminated),
            of_all(trajectory.truncated),
            config.gamma,
            config.gae_lambda,
        )
        return Batch(trajectory, of_obs, advantages, targets)

    return estimate


def normalized(config: Any, advantages: jax.Array) -> jax.Array:
    """Those of a minibatch [T, B] with mean 0 and std 1, of several agents [T, B, N] each by itself; or as they are."""
    if not config.normalize_advantage:
        return advantages
    mean, std = (f(advantages, axis=(0, 1), keepdims=True) for f in (jnp.mean, jnp.std))
    return (advantages - mean) / (std + 1e-8)


def squared_error(predicted: jax.Array, batch: Any, clip_eps: float | jax.Array | None = None) -> jax.Array:
    """(V - target)^2, elementwise; with `clip_eps` the larger of it and that of V clipped to so near its old value."""
    error = (predicted - batch.targets) ** 2
    if clip_eps is None:
        return error
    near = batch.values + jnp.clip(predicted - batch.values, -clip_eps, clip_eps)
    return jnp.maximum(error, (near - batch.targets) ** 2)


def adapted(config: Any, learning_rate: jax.Array, kl: jax.Array) -> jax.Array:
    """With `adaptive_lr` the rate raised or lowered after a minibatch that the policy came to by `kl`."""
    if not config.adaptive_lr:
        return learning_rate
    lower = jnp.where(kl > 2 * config.target_kl, learning_rate / 1.5, learning_rate)
    # The first minibatch's KL is 0 whatever the rate: it tells nothing.
    rate = jnp.where((kl > 0) & (kl < config.target_kl / 2), learning_rate * 1.5, lower)
    return jnp.clip(rate, *RATES)


def make_update(
    config: Any,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    values: Values,
    objective: Objective,
    *,
    prepare: Callable[[PyTree, Batch, Key], Batch] | None = None,
    stop_kl: float | jax.Array | None = None,
    segments: bool = False,
    normalize_first: bool = False,
    gae_per_minibatch: bool = False,
    clip_value: bool = False,
) -> Update:
    """Advantages, then epochs of gradient steps on objective + value_coef * 1/2 E[(V - target)^2].

    `objective` sees minibatches whose advantages are normalised already, if the Config says so. Metrics are means over
    all gradient steps, but for its "ratio_deviation", of which the first minibatch's is logged alone, as
    "first_ratio_deviation": 0 but for rounding, or the policy that acted is not the one that learns.
    `prepare`: what minibatches are made of, if not the trajectory: (params before the update, batch, key) -> batch.
    `stop_kl`: nats after which nothing is learnt from this trajectory any more. `segments`: minibatches hold whole
    columns. The rest: see PPO's Config.
    """
    estimate = make_estimate(config, values)

    def loss(params: PyTree, batch: Batch, key: Key) -> tuple[jax.Array, Metrics]:
        if gae_per_minibatch:
            current = jax.lax.stop_gradient(estimate(params, batch.transition))
            batch = current._replace(values=batch.values)
        batch = batch._replace(advantages=normalized(config, batch.advantages))
        minimised, predicted, metrics = objective(params, batch, key)
        value_loss = 0.5 * squared_error(predicted, batch, config.clip_eps if clip_value else None).mean()
        return minimised + config.value_coef * value_loss, {**metrics, "value_loss": value_loss}

    def learn(learnt: Learnt, batch: Batch, anneal: jax.Array, key: Key) -> tuple[Learnt, Metrics]:
        if prepare is not None:
            prepare_key, key = jax.random.split(key)
            batch = prepare(learnt.params, batch, prepare_key)

        def improve(carry: Learnt, batch: Batch, key: Key):
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(carry.params, batch, key)
            learning_rate = adapted(config, carry.learning_rate, metrics["kl"])
            rate = anneal * learning_rate
            rates = {name: rate for name in carry.params} | {"critic": config.critic_lr_scale * rate}
            params, opt_state = descend(optimizer, rates, carry.params, carry.optimizer, grads)
            return Learnt(params, opt_state, learning_rate), {**metrics, "grad_norm": optax.tree.norm(grads)}

        def improve_until(carry: Any, batch: Batch, key: Key):
            before, stopped = carry
            after, metrics = improve(before, batch, key)
            after = jax.tree.map(lambda new, old: jnp.where(stopped, old, new), after, before)
            return (after, stopped | (metrics["kl"] > stop_kl)), {**metrics, "stopped": stopped.astype(jnp.float32)}

        start: Any = learnt
        step, carry = (improve, start) if stop_kl is None else (improve_until, (start, jnp.zeros((), bool)))
        sizes = (config.num_epochs, config.num_minibatches, segments, plan.num_groups)
        carry, metrics = scan_minibatches(step, carry, batch, key, *sizes)
        first_ratio = metrics.pop("ratio_deviation")[0, 0]
        metrics = jax.tree.map(jnp.mean, metrics) | {"first_ratio_deviation": first_ratio}
        return carry if stop_kl is None else carry[0], metrics

    return around(config, plan, estimate, learn, normalize_first)


def around(
    config: Any,
    plan: Plan,
    estimate: Callable[[PyTree, Transition], Batch],
    learn: Learn,
    normalize_first: bool = False,
) -> Update:
    """What comes before and after `learn`: rewards scaled, observations normalised, advantages; the new statistics."""

    def update(state: OnPolicyState, trajectory: Transition, iteration: jax.Array, key: Key):
        chex.assert_shape(trajectory.reward, (plan.unroll_length, plan.num_envs))
        chex.assert_type([trajectory.terminated, trajectory.truncated], bool)
        chex.assert_type(trajectory.reward, jnp.float32)
        learns = config.normalize_obs and not config.freeze_statistics
        updated = normalize.update(state.statistics, trajectory.obs) if learns else state.statistics
        statistics = updated if normalize_first else state.statistics
        scale = state.reward_scale
        if config.normalize_reward:
            scale, reward = scale_rewards(scale, trajectory, config.gamma)
            trajectory = trajectory._replace(reward=reward)
        obs, next_obs = (normalize.observe(config, statistics, x) for x in (trajectory.obs, trajectory.next_obs))
        batch = estimate(state.params, trajectory._replace(obs=obs, next_obs=next_obs))
        explained = 1 - (batch.targets - batch.values).var() / (batch.targets.var() + 1e-8)
        anneal = 1 - iteration / plan.num_iterations if config.anneal_lr else jnp.ones((), jnp.float32)
        learnt, metrics = learn(Learnt(state.params, state.optimizer, state.learning_rate), batch, anneal, key)
        metrics = {**metrics, "learning_rate": anneal * learnt.learning_rate, "explained_variance": explained}
        return OnPolicyState(learnt.params, learnt.optimizer, updated, learnt.learning_rate, scale), metrics

    return update


def clipped_surrogate(ratio: jax.Array, advantages: jax.Array, clip_eps: float | jax.Array) -> jax.Array:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A), elementwise (PPO, eq. 7)."""
    return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantages)


def ratio_metrics(ratio: jax.Array, clip_eps: float | jax.Array) -> Metrics:
    """How far a minibatch's ratios are from 1, where the policy that acted has them."""
    away = jnp.abs(ratio - 1)
    return {"clip_fraction": (away > clip_eps).mean(), "ratio_deviation": away.max()}


def check(config: Any, spec: Spec, plan: Plan, name: str, segments: bool = False, of: str = "num_envs") -> None:
    """Raises UserError for settings, shared by on-policy learners of a single agent, that cannot work; `name` is the
    algorithm's. `of`: what `plan.num_envs` counts."""
    check_vectors(spec, (config.actor_obs_key, config.critic_obs_key), name)
    check_settings(config, plan, segments, of)


def check_settings(config: Any, plan: Plan, segments: bool = False, of: str = "num_envs") -> None:
    """As `check`, whatever the environment."""
    for field in ("gamma", "gae_lambda"):
        require(0 <= getattr(config, field) <= 1, f"algo.{field}", getattr(config, field), "between 0 and 1")
    require_above(config, 0, "learning_rate", "critic_lr_scale", "clip_eps", "max_grad_norm", "target_kl")
    require_at_least(config, 1, "num_epochs")
    require_at_least(config, 0, "value_coef")
    if config.adaptive_lr:
        low, high = RATES
        rate = config.learning_rate
        require(low <= rate <= high, "algo.learning_rate", rate, f"adaptive_lr keeps it between {low} and {high}")
    networks.check(config, "actor_hidden", "critic_hidden")
    check_minibatches(plan, config.num_minibatches, segments, of)
