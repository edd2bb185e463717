"""Behaviour cloning (Pomerleau 1989; studied in arXiv 2108.03298) of the actions in a data set.

    normal, tanh_normal, discrete actions:  L = -E[log pi(a | s)]
    flow:       L = E[flow-matching loss of (arctanh a, eps, t)]                        (`rlx.flow`, arXiv 2507.21053)
    diffusion:  L = E[(eps - eps_hat(sqrt(abar_k) a + sqrt(1 - abar_k) eps, k; s))^2]   (`rlx.diffusion`, 2409.00588)

A policy so cloned is what PPO, FPO or DPPO of the same networks start from (`--from RUN`). Before tanh, actions at the
border of the box lie at infinity; they count as those just inside. Observations are normalised by the statistics of all
that were read so far, this update's included: nobody acted on others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx import actors, diffusion, flow, networks, normalize
from rlx.actors import DISTRIBUTIONS, make_actor
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.diffusion import draw, make_diffusion
from rlx.distributions import untanh
from rlx.errors import require, require_above, require_at_least
from rlx.flow import make_flow
from rlx.minibatches import check_minibatches, scan_minibatches
from rlx.networks import check_vectors, select
from rlx.optimization import adam, descend
from rlx.types import Box, PyTree, Spec, Transition

GENERATIVE = ("flow", "diffusion")


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 1e-3  # Adam's step size
    anneal_lr: bool = False  # along half a cosine to 0 over the run
    weight_decay: float = 0.0  # of AdamW, times the step size
    max_grad_norm: float = float("inf")  # global norm; inf for none
    num_minibatches: int = 8  # gradient steps an iteration, each on its own part of the trajectory
    ema_decay: float = 0.0  # a gradient step's share of old weights in the actor that is evaluated; 0: the learnt one
    normalize_obs: bool = True  # running statistics of observations
    statistics: str = "mean_std"  # to mean 0 and deviation 1, or range: smallest and largest to -1 and 1
    actor_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    activation: str = "tanh"  # of the hidden layers
    distribution: str = "normal"  # of continuous actions: normal (clipped to the box), tanh_normal, flow or diffusion
    state_dependent_std: bool = False  # normals: the actor's output instead of one parameter an action
    init_std: float = 0.7  # normals: standard deviation at the start, before tanh
    min_std: float = 0.05  # normals: floor of it, which a deterministic expert would bring to 0
    residual: bool = False  # flow, diffusion: pairs of the actor's hidden layers add to their input
    num_flow_steps: int = 10  # flow: K Euler steps from noise to action
    flow_loss: str = "velocity"  # flow: error of the noise (epsilon) or of the velocity
    flow_times: str = "uniform"  # flow: of the losses: those of the Euler steps (discrete) or uniform
    sum_loss: bool = False  # flow: summed over the action and divided by the root of its size, not its mean
    output_scale: float = 0.25  # flow: of the velocity network's output, as FPO's
    num_denoising_steps: int = 20  # diffusion: K
    ddim_steps: int = 0  # diffusion: take so many steps of DDIM over them instead; 0: all, of DDPM
    clean_clip: float = 1.0  # diffusion: largest predicted action
    eval_min_std: float = 1e-3  # diffusion: floor of a step's deviation in mode "sample", as DPPO's
    actor_obs_key: str = "state"  # entry of a dict observation that the actor reads


class Actor(NamedTuple):
    """A policy that can be cloned; obs is normalised."""

    init: Callable[[Key], PyTree]
    act: Callable[[PyTree, jax.Array, Key, Mode], jax.Array]  # (params, obs [B, o], key, mode) -> action [B, ...]
    loss: Callable[[PyTree, jax.Array, jax.Array, Key], jax.Array]  # (params, obs, action, key) -> [...]


class BCState(NamedTuple):
    params: dict[str, PyTree]  # {"actor"}
    average: PyTree  # of the actor's weights over gradient steps
    optimizer: optax.OptState
    statistics: normalize.RunningStatistics  # of observations


class BCPolicy(NamedTuple):
    params: dict[str, PyTree]  # {"actor"}
    statistics: PyTree


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    check_vectors(spec, (config.actor_obs_key,), "bc")
    require_above(config, 0, "learning_rate", "max_grad_norm", "min_std")
    require_at_least(config, 0, "weight_decay", "eval_min_std")
    require(0 <= config.ema_decay < 1, "algo.ema_decay", config.ema_decay, "from 0 to below 1")
    kinds = ("mean_std", "range")
    require(config.statistics in kinds, "algo.statistics", config.statistics, f"one of {', '.join(kinds)}")
    actors.check(config, DISTRIBUTIONS + GENERATIVE)
    if config.distribution in GENERATIVE:
        {"flow": flow.check, "diffusion": diffusion.check}[config.distribution](config, spec, "bc")
    networks.check(config, "actor_hidden")
    check_minibatches(plan, config.num_minibatches)


def uses_data(config: Config) -> str:
    """Data in the place of environments: from those it would imitate itself."""
    return "alone"


def by_likelihood(config: Config, spec: Spec) -> Actor:
    actor = make_actor(config, spec)

    def init(key: Key) -> PyTree:
        return actor.init(key, jnp.zeros(select(spec.obs, config.actor_obs_key).shape, jnp.float32))

    def act(params: PyTree, obs: jax.Array, key: Key, mode: Mode) -> jax.Array:
        pi = actor.distribution(params, obs)
        return pi.to_action(pi.mode() if mode == "greedy" else pi.sample(key))

    def loss(params: PyTree, obs: jax.Array, action: jax.Array, key: Key) -> jax.Array:
        pi = actor.distribution(params, obs)
        return -pi.log_prob(pi.from_action(action))

    return Actor(init, act, loss)


def by_flow(config: Config, spec: Spec) -> Actor:
    assert isinstance(spec.action, Box)
    shape = spec.action.shape
    actor = make_flow(config, spec)

    def act(params: PyTree, obs: jax.Array, key: Key, mode: Mode) -> jax.Array:
        noise = flow.draw_noise(key, (*obs.shape[:-1], *shape), mode)
        return jnp.tanh(actor.sample(params, obs, noise))

    def loss(params: PyTree, obs: jax.Array, action: jax.Array, key: Key) -> jax.Array:
        noise_key, time_key = jax.random.split(key)
        noise, time = jax.random.normal(noise_key, action.shape), actor.times(time_key, action.shape[:-1])
        return actor.loss(params, obs, untanh(action), noise, time)

    return Actor(actor.init, act, loss)


def by_diffusion(config: Config, spec: Spec) -> Actor:
    assert isinstance(spec.action, Box)
    shape = spec.action.shape
    actor = make_diffusion(config, spec)

    def act(params: PyTree, obs: jax.Array, key: Key, mode: Mode) -> jax.Array:
        start, noise = diffusion.noises(config, key, (*obs.shape[:-1], *shape), mode)
        chain, _ = draw(actor, actor.evaluate, params, obs, start, noise, config.eval_min_std)
        return jnp.clip(chain[-1], -1.0, 1.0)

    def loss(params: PyTree, obs: jax.Array, action: jax.Array, key: Key) -> jax.Array:
        noise_key, step_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, action.shape)
        step = jax.random.randint(step_key, action.shape[:-1], 0, config.num_denoising_steps)
        return actor.loss(params, obs, action, noise, step)

    return Actor(actor.init, act, loss)


def make(config: Config, spec: Spec, plan: Plan) -> Algorithm:
    """Behaviour cloning for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns."""
    kinds = {"flow": by_flow, "diffusion": by_diffusion}
    actor = kinds.get(config.distribution, by_likelihood)(config, spec)
    optimizer = adam(config.max_grad_norm, weight_decay=config.weight_decay)
    include = normalize.update_range if config.statistics == "range" else normalize.update

    def seen(statistics: PyTree, obs: PyTree) -> jax.Array:
        return select(normalize.observe(config, statistics, obs), config.actor_obs_key)

    def init(key: Key, policy: BCPolicy | None = None) -> BCState:
        if policy is None:
            policy = BCPolicy({"actor": actor.init(key)}, normalize.init(spec.obs))
        policy = BCPolicy({"actor": policy.params["actor"]}, policy.statistics)  # without what else a learner keeps
        average = jax.tree.map(jnp.copy, policy.params["actor"])
        return BCState(policy.params, average, optimizer.init(policy.params), policy.statistics)

    def policy(state: BCState, mode: Mode) -> BCPolicy:
        return BCPolicy({"actor": state.average}, state.statistics)

    def act(policy: BCPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        return memory, actor.act(policy.params["actor"], seen(policy.statistics, obs), key, mode), ()

    def update(state: BCState, trajectory: Transition, iteration: jax.Array, key: Key):
        statistics = include(state.statistics, trajectory.obs)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * iteration / plan.num_iterations)) if config.anneal_lr else 1.0

        def loss(params: PyTree, batch: Transition, key: Key) -> jax.Array:
            return actor.loss(params["actor"], seen(statistics, batch.obs), batch.action, key).mean()

        def step(carry: Any, batch: Transition, key: Key):
            params, average, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params, batch, key)
            params, opt_state = descend(optimizer, cosine * config.learning_rate, params, opt_state, grads)
            average = optax.incremental_update(params["actor"], average, 1 - config.ema_decay)
            return (params, average, opt_state), value

        carry: Any = (state.params, state.average, state.optimizer)
        carry, losses = scan_minibatches(
            step, carry, trajectory, key, 1, config.num_minibatches, False, plan.num_groups
        )
        params, average, opt_state = carry
        return BCState(params, average, opt_state, statistics), {"loss": losses.mean()}

    return Algorithm(init, policy, lambda key: (), act, update)
