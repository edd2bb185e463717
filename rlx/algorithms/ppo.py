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

import jax
import jax.numpy as jnp

from rlx import actors, normalize, on_policy
from rlx.actors import make_actor
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.errors import require_at_least
from rlx.networks import GRU, MLP, select
from rlx.on_policy import Batch, OnPolicyState, clipped_surrogate, make_update, ratio_metrics
from rlx.optimization import adam
from rlx.types import PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 3e-4  # Adam's step size
    critic_lr_scale: float = 1.0  # the critic's step size over the actor's
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
    normalize_reward: bool = False  # by the running standard deviation of their discounted sums
    normalize_obs: bool = True  # running mean and standard deviation of observations
    freeze_statistics: bool = False  # keep those of observations that the policy to start from has
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


class Extras(NamedTuple):
    """What the losses need from acting time."""

    raw_action: jax.Array  # before tanh or clipping
    log_prob: jax.Array
    distribution: PyTree  # of the behaviour policy, for the KL
    memory: PyTree  # before the step


class PPOPolicy(NamedTuple):
    params: PyTree  # {"encoder", "actor"}
    statistics: PyTree


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    on_policy.check(config, spec, plan, "ppo", config.recurrent or config.gae_per_minibatch)
    actors.check(config)
    require_at_least(config, 1, "memory_size")
    require_at_least(config, 0, "entropy_coef")


def make(config: Config, spec: Spec, plan: Plan) -> Algorithm:
    """PPO for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns."""
    encoder = GRU(config.memory_size)
    actor = make_actor(config, spec)
    critic = MLP(config.critic_hidden, 1, config.activation)
    optimizer = adam(config.max_grad_norm, eps=1e-5)

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
        return actor.distribution(params["actor"], inputs(obs, config.actor_obs_key, features))

    def value(params: PyTree, obs: PyTree, features: PyTree) -> jax.Array:
        return critic.apply(params["critic"], inputs(obs, config.critic_obs_key, features)).squeeze(-1)

    def init(key: Key, policy: PPOPolicy | None = None) -> OnPolicyState:
        encoder_key, actor_key, critic_key = jax.random.split(key, 3)
        obs = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), spec.obs)
        start = memory(key)
        params: dict[str, PyTree] = {"encoder": ()}
        if config.recurrent:
            params["encoder"] = encoder.init(encoder_key, start, select(obs, config.actor_obs_key))
        _, features = encode(params, start, obs)
        params["actor"] = actor.init(actor_key, inputs(obs, config.actor_obs_key, features))
        params["critic"] = critic.init(critic_key, inputs(obs, config.critic_obs_key, features))
        return on_policy.init(config, spec, plan, params, optimizer.init, policy)

    def policy(state: OnPolicyState, mode: Mode) -> PPOPolicy:
        return PPOPolicy({k: state.params[k] for k in ("encoder", "actor")}, state.statistics)

    def act(policy: PPOPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        obs = normalize.observe(config, policy.statistics, obs)
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

    def values(params: PyTree, trajectory: Transition) -> tuple[jax.Array, jax.Array]:
        features, next_features = unroll(params, trajectory)
        return value(params, trajectory.obs, features), value(params, trajectory.next_obs, next_features)

    def objective(params: PyTree, batch: Batch, key: Key) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """-L^CLIP - entropy_coef * H[pi], eq. 9."""
        transition = batch.transition
        features, _ = unroll(params, transition)
        pi = distribution(params, transition.obs, features)
        ratio = jnp.exp(pi.log_prob(transition.extras.raw_action) - transition.extras.log_prob)
        policy_loss = -clipped_surrogate(ratio, batch.advantages, config.clip_eps).mean()
        entropy = pi.entropy(key).mean()
        metrics = {
            "policy_loss": policy_loss,
            "entropy": entropy,
            "kl": transition.extras.distribution.kl(pi).mean(),
            **ratio_metrics(ratio, config.clip_eps),
        }
        return policy_loss - config.entropy_coef * entropy, value(params, transition.obs, features), metrics

    update = make_update(
        config,
        plan,
        optimizer,
        values,
        objective,
        segments=config.recurrent or config.gae_per_minibatch,
        normalize_first=config.normalize_first,
        gae_per_minibatch=config.gae_per_minibatch,
        clip_value=config.clip_value,
    )
    return Algorithm(init, policy, memory, act, update)
