"""Behaviour cloning: maximum likelihood of the actions in a data set (Pomerleau 1989; studied in arXiv 2108.03298).

    L = -E[log pi(a | s)]

Actions at the border of the box lie at infinity before tanh; they count as those just inside. Observations are
normalised by the statistics of all that were read so far, this update's included: nobody acted on others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx import normalize
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.distributions import Categorical, Normal, TanhNormal
from rlx.errors import require
from rlx.minibatches import check_minibatches, scan_minibatches
from rlx.networks import MLP, activation, select
from rlx.optimization import descend
from rlx.types import Box, Discrete, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 1e-3  # Adam's step size
    num_minibatches: int = 8  # gradient steps an iteration, each on its own part of the trajectory
    normalize_obs: bool = True  # running mean and standard deviation of observations
    actor_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    activation: str = "tanh"  # of the hidden layers
    distribution: str = "normal"  # of continuous actions: normal (clipped to the box) or tanh_normal
    min_std: float = 0.05  # floor of the standard deviation, which a deterministic expert would bring to 0
    obs_key: str = "state"  # entry of a dict observation that the actor reads


class BCState(NamedTuple):
    params: PyTree
    optimizer: optax.OptState
    statistics: PyTree  # of observations


class BCPolicy(NamedTuple):
    params: PyTree
    statistics: PyTree


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    require(spec.num_agents == 1, "env", f"{spec.num_agents} agents", "bc clones a single agent")
    require(config.learning_rate > 0, "algo.learning_rate", config.learning_rate, "above 0")
    require(config.min_std > 0, "algo.min_std", config.min_std, "above 0")
    kinds = ("normal", "tanh_normal")
    require(config.distribution in kinds, "algo.distribution", config.distribution, f"one of {', '.join(kinds)}")
    widths = config.actor_hidden
    require(all(width >= 1 for width in widths), "algo.actor_hidden", widths, "widths of at least 1")
    shapes = {"observations": select(spec.obs, config.obs_key).shape}
    shapes |= {"actions": spec.action.shape} if isinstance(spec.action, Box) else {}
    for what, shape in shapes.items():
        require(len(shape) == 1, "env", f"{what} of shape {shape}", "bc takes vectors")
    activation(config.activation)
    check_minibatches(plan, config.num_minibatches)


def uses_data(config: Config) -> str:
    """Data in the place of environments: from those it would imitate itself."""
    return "alone"


def make(config: Config, spec: Spec, plan: Plan) -> Algorithm:
    """Behaviour cloning for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns."""
    discrete = isinstance(spec.action, Discrete)
    size = spec.action.num_values if isinstance(spec.action, Discrete) else spec.action.shape[0]
    actor = MLP(config.actor_hidden, size, config.activation, output_scale=0.01)
    optimizer = optax.scale_by_adam()

    def distribution(params: PyTree, statistics: PyTree, obs: PyTree) -> Any:
        obs = normalize.normalize(statistics, obs, clip=10.0) if config.normalize_obs else obs
        out = actor.apply(params["network"], select(obs, config.obs_key))
        if discrete:
            return Categorical(out)
        std = jnp.broadcast_to(jax.nn.softplus(params["raw_std"]) + config.min_std, out.shape)
        return TanhNormal(out, std) if config.distribution == "tanh_normal" else Normal(out, std)

    def init(key: Key, policy: BCPolicy | None = None) -> BCState:
        if policy is None:
            obs = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), spec.obs)
            params = {
                "network": actor.init(key, select(obs, config.obs_key)),
                "raw_std": jnp.zeros((1, size), jnp.float32),
            }
            policy = BCPolicy(params, normalize.init(spec.obs))
        return BCState(policy.params, optimizer.init(policy.params), policy.statistics)

    def policy(state: BCState, mode: Mode) -> BCPolicy:
        return BCPolicy(state.params, state.statistics)

    def act(policy: BCPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        pi = distribution(policy.params, policy.statistics, obs)
        return memory, pi.to_action(pi.mode() if mode == "greedy" else pi.sample(key)), ()

    def update(state: BCState, trajectory: Transition, iteration: jax.Array, key: Key):
        statistics = normalize.update(state.statistics, trajectory.obs)

        def loss(params: PyTree, batch: Transition) -> jax.Array:
            pi = distribution(params, statistics, batch.obs)
            return -pi.log_prob(pi.from_action(batch.action)).mean()

        def step(carry, batch: Transition, key: Key):
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            return descend(optimizer, config.learning_rate, params, opt_state, grads), value

        (params, opt_state), losses = scan_minibatches(
            step, (state.params, state.optimizer), trajectory, key, 1, config.num_minibatches, False, plan.num_groups
        )
        return BCState(params, opt_state, statistics), {"loss": losses.mean()}

    return Algorithm(init, policy, lambda key: (), act, update)
