"""FPO: flow policy optimisation (McAllister et al. 2025, arXiv 2507.21053), and FPO++ (arXiv 2602.02481).

    l_i(theta) = flow-matching loss of (a, eps_i, t_i), i = 1..M pairs of an action                    (`rlx.flow`)
    rho        = exp(1/M sum_i l_i(theta_old) - l_i(theta))                                            (FPO, eq. 9)
    rho_i      = exp(l_i(theta_old) - l_i(theta))                                   (per_sample: FPO++'s ratio)
    L          = -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)] + value_coef * 1/2 E[(V(s) - target)^2]
    A < 0      : rho A - |A| / (2 eps) (rho - 1)^2 in the place of the clipped term                 (asymmetric)

The loss bounds the action's likelihood from below, so that its fall stands in for a ratio of likelihoods.

What differs from the papers: the pairs of an action are drawn when its trajectory comes to be learnt from, not when it
is taken; they and their losses are the same for all epochs, as there. Mean ratios are clamped as the others are, far
outside of the clipping, so that none overflows. Greedy actions start from eps = 0 (FPO++'s zero
sampling), those of mode "sample" from noise, as FPO evaluates. FPO++ is settings: ratio = "per_sample", flow_loss =
"velocity", flow_times = "uniform", sum_loss, asymmetric, ema_decay 0.95 (from the first update on), loss_clamp 20,
difference_clamp 10 with straight_through, advantage_clamp 100, max_grad_norm 1, weight_decay 1e-4, and if wanted
entropy_samples and adaptive_lr.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx import flow, normalize, on_policy
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.errors import require, require_above, require_at_least
from rlx.flow import make_flow
from rlx.networks import select
from rlx.on_policy import Batch, OnPolicyState, clipped_surrogate, make_critic, make_update, ratio_metrics
from rlx.optimization import adam
from rlx.types import Box, Metrics, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 3e-4  # Adam's step size
    critic_lr_scale: float = 1.0  # the critic's step size over the actor's
    anneal_lr: bool = False  # linearly to 0 over the run
    adaptive_lr: bool = False  # raise or lower the rate by a factor 1.5 to hold the estimated KL near target_kl
    target_kl: float = 0.01  # nats, for adaptive_lr
    gamma: float = 0.99  # discount per decision
    gae_lambda: float = 0.95  # trace decay of GAE
    clip_eps: float = 0.05  # ratio clipping
    value_coef: float = 0.5  # weight of half the squared value error
    max_grad_norm: float = 0.5  # global norm; inf for none
    weight_decay: float = 0.0  # of AdamW, times the step size
    num_epochs: int = 4  # passes over a trajectory
    num_minibatches: int = 8  # gradient steps a pass
    num_samples: int = 8  # M pairs of noise and time an action
    ratio: str = "mean"  # mean: of an action, from its pairs' mean losses; per_sample: each pair has its own
    asymmetric: bool = False  # pull the ratios of bad actions back by a square instead of clipping them
    flow_loss: str = "epsilon"  # error of the noise (epsilon) or of the velocity
    sum_loss: bool = False  # summed over the action and divided by the root of its size, not its mean
    flow_times: str = "discrete"  # of the losses: those of the Euler steps (at time 1 an epsilon loss is 0), or uniform
    loss_clamp: float = float("inf")  # largest loss of a pair that counts
    difference_clamp: float = 3.0  # largest logarithm of a ratio that counts, either way
    straight_through: bool = False  # the clamp of differences lets gradients pass
    advantage_clamp: float = float("inf")  # largest advantage that counts, either way
    ema_decay: float = 0.0  # an update's share of old weights in the actor that is evaluated; 0: the learnt one
    entropy_coef: float = 0.0  # weight of an entropy bonus, estimated from nearest neighbours
    entropy_samples: int = 0  # actions an observation that estimate takes, at least 2; 0: none, no bonus
    num_flow_steps: int = 10  # K Euler steps from noise to action
    output_scale: float = 0.25  # of the velocity network's output
    reward_scale: float = 1.0  # applied inside update only
    normalize_reward: bool = False  # by the running standard deviation of their discounted sums
    normalize_obs: bool = True  # running mean and standard deviation of observations
    freeze_statistics: bool = False  # keep those of observations that the policy to start from has
    normalize_advantage: bool = True  # to mean 0 and std 1 in each minibatch
    actor_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    critic_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    activation: str = "swish"  # of the hidden layers
    residual: bool = False  # pairs of the actor's hidden layers add to their input
    actor_obs_key: str = "state"  # entry of a dict observation that the actor reads
    critic_obs_key: str = "state"  # entry of a dict observation that the critic reads


class Extras(NamedTuple):
    raw_action: jax.Array  # [..., d] before tanh


class Pairs(NamedTuple):
    """In the place of `Extras` while a trajectory is learnt from."""

    raw_action: jax.Array  # [..., d]
    noise: jax.Array  # [..., M, d]
    time: jax.Array  # [..., M]
    loss: jax.Array  # [..., M], of the policy before the update


class FPOState(NamedTuple):
    learned: OnPolicyState
    average: PyTree  # the actor's weights, averaged over updates

    @property
    def params(self) -> dict[str, PyTree]:
        return self.learned.params


class FPOPolicy(NamedTuple):
    params: PyTree  # {"actor"}
    statistics: PyTree


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    flow.check(config, spec, "fpo")
    on_policy.check(config, spec, plan, "fpo")
    require_at_least(config, 1, "num_samples")
    require(config.ratio in ("mean", "per_sample"), "algo.ratio", config.ratio, "one of mean, per_sample")
    require(0 <= config.ema_decay < 1, "algo.ema_decay", config.ema_decay, "from 0 to below 1")
    require_above(config, 0, "loss_clamp", "difference_clamp", "advantage_clamp")
    require_at_least(config, 0, "weight_decay", "entropy_coef")
    samples = config.entropy_samples
    require(samples == 0 or samples >= 2, "algo.entropy_samples", samples, "0, or at least 2")
    given = config.entropy_coef == 0 or samples > 0
    require(given, "algo.entropy_coef", config.entropy_coef, "0 without algo.entropy_samples")


def pulled_surrogate(ratio: jax.Array, advantages: jax.Array, clip_eps: float | jax.Array) -> jax.Array:
    """rho A - |A| / (2 eps) (rho - 1)^2, elementwise: for A < 0 largest at rho = 1 - eps (FPO++; arXiv 2401.16025)."""
    return ratio * advantages - jnp.abs(advantages) / (2 * clip_eps) * jnp.square(ratio - 1)


def make(config: Config, spec: Spec, plan: Plan) -> Algorithm:
    """FPO for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns."""
    assert isinstance(spec.action, Box)
    action_shape = spec.action.shape
    actor = make_flow(config, spec)
    critic = make_critic(config, spec)
    optimizer = adam(config.max_grad_norm, weight_decay=config.weight_decay)

    def seen(obs: PyTree) -> jax.Array:
        return select(obs, config.actor_obs_key)

    def init(key: Key, policy: FPOPolicy | None = None) -> FPOState:
        actor_key, critic_key = jax.random.split(key)
        params = {"actor": actor.init(actor_key), "critic": critic.init(critic_key)}
        learned = on_policy.init(config, spec, plan, params, optimizer.init, policy)
        return FPOState(learned, jax.tree.map(jnp.copy, learned.params["actor"]))

    def policy(state: FPOState, mode: Mode) -> FPOPolicy:
        weights = state.params["actor"] if mode == "explore" else state.average
        return FPOPolicy({"actor": weights}, state.learned.statistics)

    def act(policy: FPOPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        obs = seen(normalize.observe(config, policy.statistics, obs))
        noise = flow.draw_noise(key, (*obs.shape[:-1], *action_shape), mode)
        raw_action = actor.sample(policy.params["actor"], obs, noise)
        return memory, jnp.tanh(raw_action), Extras(raw_action)

    def losses(params: PyTree, obs: PyTree, pairs: Pairs) -> jax.Array:
        """Of every pair, [..., M]."""

        def over_pairs(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x[..., None, :], (*pairs.time.shape, x.shape[-1]))

        each = actor.loss(params["actor"], over_pairs(seen(obs)), over_pairs(pairs.raw_action), pairs.noise, pairs.time)
        return jnp.minimum(each, config.loss_clamp)

    def prepare(params: PyTree, batch: Batch, key: Key) -> Batch:
        """Pairs for every action, and their losses under the policy that took it."""
        noise_key, time_key = jax.random.split(key)
        raw_action = batch.transition.extras.raw_action
        shape = (*raw_action.shape[:-1], config.num_samples)
        noise = jax.random.normal(noise_key, (*shape, raw_action.shape[-1]))
        pairs = Pairs(raw_action, noise, actor.times(time_key, shape), jnp.zeros(shape, jnp.float32))
        pairs = pairs._replace(loss=losses(params, batch.transition.obs, pairs))
        return batch._replace(transition=batch.transition._replace(extras=pairs))

    def ratios(params: PyTree, transition: Transition) -> jax.Array:
        """rho_i [..., M], or rho [..., 1] of the mean losses."""
        difference = transition.extras.loss - losses(params, transition.obs, transition.extras)
        if config.ratio == "mean":
            difference = difference.mean(axis=-1, keepdims=True)
        clamped = jnp.clip(difference, -config.difference_clamp, config.difference_clamp)
        if config.straight_through:
            clamped = difference + jax.lax.stop_gradient(clamped - difference)
        return jnp.exp(clamped)

    def entropy(params: PyTree, obs: PyTree, key: Key) -> jax.Array:
        """Of raw actions, in nats, from the distance to the nearest of the others, up to a constant (Kozachenko and
        Leonenko 1987). Gradients pass through the sampler."""
        obs = seen(obs)
        over = jnp.broadcast_to(obs[..., None, :], (*obs.shape[:-1], config.entropy_samples, obs.shape[-1]))
        noise = jax.random.normal(key, (*over.shape[:-1], *action_shape))
        drawn = actor.sample(params["actor"], over, noise)
        squared = jnp.square(drawn[..., :, None, :] - drawn[..., None, :, :]).sum(axis=-1)
        itself = jnp.eye(config.entropy_samples, dtype=bool).reshape((1,) * (obs.ndim - 1) + squared.shape[-2:])
        nearest = jnp.where(itself, jnp.inf, squared).min(axis=-1)
        return 0.5 * action_shape[0] * jnp.log(nearest + 1e-8).mean()

    def objective(params: PyTree, batch: Batch, key: Key) -> tuple[jax.Array, jax.Array, Metrics]:
        transition = batch.transition
        advantages = jnp.clip(batch.advantages, -config.advantage_clamp, config.advantage_clamp)[..., None]
        ratio = ratios(params, transition)
        surrogate = clipped_surrogate(ratio, advantages, config.clip_eps)
        if config.asymmetric:
            surrogate = jnp.where(advantages < 0, pulled_surrogate(ratio, advantages, config.clip_eps), surrogate)
        policy_loss = -surrogate.mean()
        metrics = {
            "policy_loss": policy_loss,
            "flow_loss": transition.extras.loss.mean(),
            "kl": (ratio - 1 - jnp.log(ratio)).mean(),
            **ratio_metrics(ratio, config.clip_eps),
        }
        if config.entropy_samples:
            metrics["entropy"] = entropy(params, transition.obs, key)
            policy_loss -= config.entropy_coef * metrics["entropy"]
        return policy_loss, critic.value(params, transition.obs), metrics

    learn = make_update(config, plan, optimizer, critic.values, objective, prepare=prepare)

    def update(state: FPOState, trajectory: Transition, iteration: jax.Array, key: Key):
        learned, metrics = learn(state.learned, trajectory, iteration, key)
        average = optax.incremental_update(learned.params["actor"], state.average, 1 - config.ema_decay)
        return FPOState(learned, average), metrics

    return Algorithm(init, policy, lambda key: (), act, update)
