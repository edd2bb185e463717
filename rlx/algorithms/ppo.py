"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) with GAE (1506.02438).

    A_t      = GAE (1506.02438, eq. 16), bootstrapped with V(next_obs) at time limits, whose trace it cuts
    rho_t    = pi(a_t | s_t) / pi_old(a_t | s_t)
    L^CLIP   = E[min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)]                                        (eq. 7)
    L        = -L^CLIP + value_coef * 1/2 E[(V(s_t) - target_t)^2] - entropy_coef * H[pi]                  (eq. 9)

What differs from the paper: observations are normalised with running statistics, advantages in each minibatch; the
action distribution may be a tanh-squashed Gaussian. The recurrent setting puts a GRU, shared by actor and critic, in
front of both and trains on whole segments from the memory that acting had stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from rlx import normalize
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.distributions import Categorical, Normal, TanhNormal
from rlx.errors import require
from rlx.minibatches import check_minibatches, scan_minibatches
from rlx.networks import GRU, MLP, activation, select
from rlx.optimization import adam, descend
from rlx.returns import gae
from rlx.types import Box, Discrete, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 3e-4  # Adam's step size
    anneal_lr: bool = False  # linearly to 0 over the run
    adaptive_lr: bool = False  # raise or lower the rate by a factor 1.5 to hold the KL near target_kl
    target_kl: float = 0.01  # nats, for adaptive_lr
    gamma: float = 0.99  # discount per decision
    gae_lambda: float = 0.95  # trace decay of GAE
    clip_eps: float = 0.2  # ratio clipping
    clip_value: bool = False  # clip the critic's change to clip_eps too
    value_coef: float = 0.5  # weight of half the squared value error
    entropy_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # global norm; inf for none
    num_epochs: int = 4  # passes over a trajectory
    num_minibatches: int = 8  # gradient steps a pass
    reward_scale: float = 1.0  # applied inside update only
    normalize_obs: bool = True  # running mean and standard deviation of observations
    normalize_advantage: bool = True  # to mean 0 and std 1 in each minibatch
    normalize_first: bool = False  # update the statistics before the losses, as brax does; ratios then start off 1
    gae_per_minibatch: bool = False  # advantages anew from the current critic in each minibatch, as brax does
    recurrent: bool = False  # a GRU in front of actor and critic, trained on whole segments
    memory_size: int = 64  # units of that GRU
    actor_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    critic_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    activation: str = "tanh"  # of the hidden layers
    distribution: str = "normal"  # of continuous actions: normal (clipped to the box) or tanh_normal
    state_dependent_std: bool = False  # the actor's output instead of one parameter an action
    init_std: float = 1.0  # standard deviation at the start, before tanh
    min_std: float = 1e-3  # floor of the standard deviation
    actor_obs_key: str = "state"  # entry of a dict observation that the actor reads
    critic_obs_key: str = "state"  # entry of a dict observation that the critic reads


RATES = (1e-5, 1e-2)  # what adaptive_lr keeps the learning rate between


class Extras(NamedTuple):
    """What the losses need from acting time."""

    raw_action: jax.Array  # before tanh or clipping
    log_prob: jax.Array
    distribution: PyTree  # of the behaviour policy, for the KL
    memory: PyTree  # before the step


class PPOState(NamedTuple):
    params: PyTree  # {"encoder", "actor", "critic"}
    optimizer: optax.OptState
    statistics: PyTree  # of observations
    learning_rate: jax.Array


class PPOPolicy(NamedTuple):
    params: PyTree  # {"encoder", "actor"}
    statistics: PyTree


class Batch(NamedTuple):
    """A trajectory with what is computed once an iteration. Leaves [T, B, ...]."""

    transition: Transition
    values: jax.Array
    advantages: jax.Array
    targets: jax.Array


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    require(spec.num_agents == 1, "env", f"{spec.num_agents} agents", "ppo trains a single agent")
    for name in ("gamma", "gae_lambda"):
        require(0 <= getattr(config, name) <= 1, f"algo.{name}", getattr(config, name), "between 0 and 1")
    for name in ("learning_rate", "clip_eps", "max_grad_norm", "init_std", "target_kl"):
        require(getattr(config, name) > 0, f"algo.{name}", getattr(config, name), "above 0")
    for name in ("num_epochs", "memory_size"):
        require(getattr(config, name) >= 1, f"algo.{name}", getattr(config, name), "at least 1")
    for name in ("value_coef", "entropy_coef", "min_std"):
        require(getattr(config, name) >= 0, f"algo.{name}", getattr(config, name), "at least 0")
    kinds = ("normal", "tanh_normal")
    require(config.distribution in kinds, "algo.distribution", config.distribution, f"one of {', '.join(kinds)}")
    for obs_key in (config.actor_obs_key, config.critic_obs_key):
        shape = select(spec.obs, obs_key).shape
        require(len(shape) == 1, "env", f"observations of shape {shape}", "ppo reads vectors")
    if isinstance(spec.action, Box):
        shape = spec.action.shape
        require(len(shape) == 1, "env", f"actions of shape {shape}", "ppo gives vectors")
    for name in ("actor_hidden", "critic_hidden"):
        widths = getattr(config, name)
        require(all(width >= 1 for width in widths), f"algo.{name}", widths, "widths of at least 1")
    if config.adaptive_lr:
        low, high = RATES
        rate = config.learning_rate
        require(low <= rate <= high, "algo.learning_rate", rate, f"adaptive_lr keeps it between {low} and {high}")
    activation(config.activation)
    segments = config.recurrent or config.gae_per_minibatch
    check_minibatches(plan, config.num_minibatches, segments)


def inverse_softplus(x: float | jax.Array) -> jax.Array:
    """log(exp(x) - 1) without its overflow."""
    return x + jnp.log(-jnp.expm1(-x))


def make(config: Config, spec: Spec, plan: Plan) -> Algorithm:
    """PPO for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns."""
    discrete = isinstance(spec.action, Discrete)
    action_size = spec.action.num_values if isinstance(spec.action, Discrete) else spec.action.shape[0]
    outputs = 2 * action_size if config.state_dependent_std and not discrete else action_size
    encoder = GRU(config.memory_size)
    actor = MLP(config.actor_hidden, outputs, config.activation, output_scale=0.01)
    critic = MLP(config.critic_hidden, 1, config.activation)
    optimizer = adam(config.max_grad_norm, eps=1e-5)
    segments = config.recurrent or config.gae_per_minibatch

    def memory(key: Key) -> PyTree:
        return encoder.initial_memory() if config.recurrent else ()

    def encode(params: PyTree, memory: PyTree, obs: PyTree) -> tuple[PyTree, PyTree]:
        """One step of memory; what the networks read: (memory, features), both [..., H], or () without memory."""
        if not config.recurrent:
            return (), ()
        return encoder.apply(params["encoder"], memory, select(obs, config.actor_obs_key))

    def inputs(obs: PyTree, obs_key: str, features: PyTree) -> jax.Array:
        return jnp.concatenate([select(obs, obs_key), *([features] if config.recurrent else [])], axis=-1)

    def distribution(params: PyTree, obs: PyTree, features: PyTree) -> Any:
        out = actor.apply(params["actor"]["network"], inputs(obs, config.actor_obs_key, features))
        if discrete:
            return Categorical(out)
        mean, raw_std = jnp.split(out, 2, axis=-1) if config.state_dependent_std else (out, jnp.zeros_like(out))
        raw_std = raw_std + params["actor"]["raw_std"].reshape((1,) * (out.ndim - 1) + (-1,))
        std = jax.nn.softplus(raw_std) + config.min_std
        return TanhNormal(mean, std) if config.distribution == "tanh_normal" else Normal(mean, std)

    def value(params: PyTree, obs: PyTree, features: PyTree) -> jax.Array:
        return critic.apply(params["critic"], inputs(obs, config.critic_obs_key, features)).squeeze(-1)

    def normalized(statistics: PyTree, obs: PyTree) -> PyTree:
        return normalize.normalize(statistics, obs, clip=10.0) if config.normalize_obs else obs

    def init(key: Key, policy: PPOPolicy | None = None) -> PPOState:
        encoder_key, actor_key, critic_key = jax.random.split(key, 3)
        obs = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), spec.obs)
        start = memory(key)
        params: dict[str, PyTree] = {"encoder": ()}
        if config.recurrent:
            params["encoder"] = encoder.init(encoder_key, start, select(obs, config.actor_obs_key))
        _, features = encode(params, start, obs)
        params["actor"] = {
            "network": actor.init(actor_key, inputs(obs, config.actor_obs_key, features)),
            "raw_std": jnp.full(action_size, inverse_softplus(config.init_std), jnp.float32),
        }
        params["critic"] = critic.init(critic_key, inputs(obs, config.critic_obs_key, features))
        statistics = normalize.init(spec.obs)
        if policy is not None:
            params |= policy.params
            statistics = policy.statistics
        learning_rate = jnp.asarray(config.learning_rate, jnp.float32)
        return PPOState(params, optimizer.init(params), statistics, learning_rate)

    def policy(state: PPOState, mode: Mode) -> PPOPolicy:
        return PPOPolicy({k: state.params[k] for k in ("encoder", "actor")}, state.statistics)

    def act(policy: PPOPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        obs = normalized(policy.statistics, obs)
        new_memory, features = encode(policy.params, memory, obs)
        pi = distribution(policy.params, obs, features)
        raw_action = pi.mode() if mode == "greedy" else pi.sample(key)
        return new_memory, pi.to_action(raw_action), Extras(raw_action, pi.log_prob(raw_action), pi, memory)

    def unroll(params: PyTree, trajectory: Transition) -> tuple[PyTree, PyTree]:
        """Features of obs and of next_obs, [T, B, H] each. The memory starts anew after every ending."""
        if not config.recurrent:
            return (), ()
        done = trajectory.terminated | trajectory.truncated
        start = trajectory.extras.memory[0]

        def step(memory, inputs):
            obs, done = inputs
            memory, features = encode(params, memory, obs)
            return jnp.where(done[:, None], jnp.zeros_like(memory), memory), (memory, features)

        _, (memories, features) = jax.lax.scan(step, start, (trajectory.obs, done))
        return features, encode(params, memories, trajectory.next_obs)[1]

    def estimate(params: PyTree, trajectory: Transition) -> Batch:
        """Values, advantages and value targets of a trajectory whose observations are normalised."""
        features, next_features = unroll(params, trajectory)
        values = value(params, trajectory.obs, features)
        next_values = value(params, trajectory.next_obs, next_features)
        estimate_one = jax.vmap(gae, in_axes=(1, 1, 1, 1, 1, None, None), out_axes=1)
        advantages, targets = estimate_one(
            trajectory.reward * config.reward_scale,
            values,
            next_values,
            trajectory.terminated,
            trajectory.truncated,
            config.gamma,
            config.gae_lambda,
        )
        return Batch(trajectory, values, advantages, targets)

    def loss(params: PyTree, batch: Batch, key: Key) -> tuple[jax.Array, dict[str, jax.Array]]:
        if config.gae_per_minibatch:
            current = jax.lax.stop_gradient(estimate(params, batch.transition))
            batch = current._replace(values=batch.values)
        transition, advantages = batch.transition, batch.advantages
        if config.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        features, _ = unroll(params, transition)
        pi = distribution(params, transition.obs, features)
        ratio = jnp.exp(pi.log_prob(transition.extras.raw_action) - transition.extras.log_prob)
        clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
        policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()

        values = value(params, transition.obs, features)
        error = (values - batch.targets) ** 2
        if config.clip_value:
            near = batch.values + jnp.clip(values - batch.values, -config.clip_eps, config.clip_eps)
            error = jnp.maximum(error, (near - batch.targets) ** 2)
        value_loss = 0.5 * error.mean()

        entropy = pi.entropy(key).mean()
        metrics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "kl": transition.extras.distribution.kl(pi).mean(),
            "clip_fraction": (jnp.abs(ratio - 1) > config.clip_eps).mean(),
            "ratio_deviation": jnp.abs(ratio - 1).max(),
        }
        return policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy, metrics

    def adapted(learning_rate: jax.Array, kl: jax.Array) -> jax.Array:
        if not config.adaptive_lr:
            return learning_rate
        lower = jnp.where(kl > 2 * config.target_kl, learning_rate / 1.5, learning_rate)
        # The first minibatch's KL is 0 whatever the rate: it tells nothing.
        rate = jnp.where((kl > 0) & (kl < config.target_kl / 2), learning_rate * 1.5, lower)
        return jnp.clip(rate, *RATES)

    def update(state: PPOState, trajectory: Transition, iteration: jax.Array, key: Key):
        chex.assert_shape(trajectory.reward, (plan.unroll_length, plan.num_envs))
        chex.assert_type([trajectory.terminated, trajectory.truncated], bool)
        chex.assert_type([trajectory.reward, trajectory.extras.log_prob], jnp.float32)
        chex.assert_equal_shape([trajectory.reward, trajectory.extras.log_prob])
        updated = normalize.update(state.statistics, trajectory.obs) if config.normalize_obs else state.statistics
        statistics = updated if config.normalize_first else state.statistics
        seen = trajectory._replace(
            obs=normalized(statistics, trajectory.obs), next_obs=normalized(statistics, trajectory.next_obs)
        )
        anneal = 1 - iteration / plan.num_iterations if config.anneal_lr else jnp.ones((), jnp.float32)

        def step(carry, batch: Batch, key: Key):
            params, opt_state, learning_rate = carry
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
            learning_rate = adapted(learning_rate, metrics["kl"])
            params, opt_state = descend(optimizer, anneal * learning_rate, params, opt_state, grads)
            return (params, opt_state, learning_rate), metrics | {"grad_norm": optax.tree.norm(grads)}

        batch = estimate(state.params, seen)
        (params, opt_state, learning_rate), metrics = scan_minibatches(
            step,
            (state.params, state.optimizer, state.learning_rate),
            batch,
            key,
            config.num_epochs,
            config.num_minibatches,
            segments,
            plan.num_groups,
        )
        first_ratio = metrics.pop("ratio_deviation")[0, 0]
        metrics = jax.tree.map(jnp.mean, metrics) | {
            "first_ratio_deviation": first_ratio,
            "learning_rate": anneal * learning_rate,
            "explained_variance": 1 - (batch.targets - batch.values).var() / (batch.targets.var() + 1e-8),
        }
        return PPOState(params, opt_state, updated, learning_rate), metrics

    return Algorithm(init, policy, memory, act, update)
