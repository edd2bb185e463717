"""What learners of several agents share: the agents of a Spec, networks of their own, one agent's part of them all.

Inside a learner observations are [..., N, d] and actions [..., N, a], those of a single-agent environment too, with
N = 1: so HASAC of one agent is SAC, MATD3 is TD3 and MAPPO is PPO. Padding (`spec.obs_mask`, `spec.action_mask`) is 0
in observations and actions, and in no log-probability, entropy or divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlx.algorithm import Key
from rlx.distributions import Categorical, OneHotCategorical
from rlx.errors import require
from rlx.networks import select
from rlx.types import Discrete, PyTree, Spec, TimeStep


class Agents(NamedTuple):
    """Of a Spec, static. `made_of` makes it."""

    num_agents: int  # N
    obs_size: int  # d: entries of an agent's observation, padding included
    action_size: int  # a: entries of an agent's action, or how many values a discrete one may have; with padding
    action_mask: np.ndarray  # [N, a] bool: which of them are real
    discrete: bool
    alone: bool  # in an environment of a single agent, whose arrays have no axis of agents

    def rows(self, obs: jax.Array) -> jax.Array:
        """[..., N, d] of what agents observe as environments show it."""
        return obs[..., None, :] if self.alone else obs

    def split(self, action: jax.Array) -> jax.Array:
        """[..., N, a], or [..., N] int32, of an action as environments take it."""
        return jnp.expand_dims(action, -1 if self.discrete else -2) if self.alone else action

    def merge(self, action: jax.Array) -> jax.Array:
        """What `split` undoes."""
        return action.squeeze(-1 if self.discrete else -2) if self.alone else action

    def encode(self, action: jax.Array) -> jax.Array:
        """[..., N, a] float32, discrete ones one-hot, of an action as environments take it."""
        action = self.split(action)
        return jax.nn.one_hot(action, self.action_size) if self.discrete else action

    def decode(self, action: jax.Array) -> jax.Array:
        """What `encode` undoes."""
        return self.merge(jnp.argmax(action, axis=-1).astype(jnp.int32) if self.discrete else action)


def made_of(spec: Spec, obs_key: str = "agents") -> Agents:
    """The agents of `spec`. `obs_key`: the entry of a dict observation that they read."""
    alone, discrete = spec.num_agents == 1, isinstance(spec.action, Discrete)
    size = spec.action.num_values if isinstance(spec.action, Discrete) else spec.action.shape[-1]
    mask = np.ones((spec.num_agents, size), bool) if spec.action_mask is None else np.asarray(spec.action_mask)
    return Agents(spec.num_agents, select(spec.obs, obs_key).shape[-1], size, mask, discrete, alone)


def check(spec: Spec, obs_key: str, name: str) -> None:
    """Raises UserError for an environment whose agents learner `name` cannot train: observations and continuous
    actions are vectors, one of each an agent."""
    N, obs = spec.num_agents, spec.obs
    if isinstance(obs, Mapping):
        require(obs_key in obs, "env", f"observations {sorted(obs)}", f"{name} reads algo.actor_obs_key = {obs_key!r}")
    of_all = () if N == 1 else (N,)
    shape, action = select(obs, obs_key).shape, spec.action.shape
    fits = len(shape) > 0 and shape[:-1] == of_all
    require(fits, "env", f"observations of shape {shape}", f"{name} reads a vector of each of {N} agents")
    fits = action == of_all if isinstance(spec.action, Discrete) else len(action) > 0 and action[:-1] == of_all
    require(fits, "env", f"actions of shape {action}", f"{name} gives a vector, or a whole number, of {N} agents each")


def masked(pi: Any, mask: np.ndarray | jax.Array) -> Any:
    """A distribution [..., N, a] without its padding. `mask` [N, a], or [a] of one agent's distribution [..., a]."""
    if isinstance(pi, (Categorical, OneHotCategorical)):
        return pi._replace(logits=jnp.where(jnp.broadcast_to(mask, pi.logits.shape), pi.logits, -jnp.inf))
    return pi._replace(mask=jnp.broadcast_to(mask, pi.mean.shape))


def take(tree: PyTree, agent: jax.Array) -> PyTree:
    """The part [...] of one agent, a () int32, in leaves [N, ...]."""
    return jax.tree.map(lambda x: x[agent], tree)


def put(tree: PyTree, agent: jax.Array, part: PyTree) -> PyTree:
    """`tree` with the part of one agent replaced."""
    return jax.tree.map(lambda x, new: x.at[agent].set(new), tree, part)


class Networks(NamedTuple):
    """A network an agent, leaves [N, ...]; or with `share_params` one for all, which reads who it is, one-hot, too.

    A scan over agents trains one of them: `put(params, i, step(take(params, i)))`.
    """

    init: Callable[[Key], PyTree]
    apply: Callable[[PyTree, jax.Array], Any]  # (params, rows [..., N, d]) -> leaves [..., N, o]
    apply_one: Callable[[PyTree, jax.Array, jax.Array], Any]  # (take(params, i), i, row [..., d]) -> leaves [..., o]
    each: Callable[[Callable[..., Any]], Callable[..., Any]]  # f of one network -> f of them all: optimizers' init
    take: Callable[[PyTree, jax.Array], PyTree]  # as the functions above, but for what is shared
    put: Callable[[PyTree, jax.Array, PyTree], PyTree]


def make_networks(
    init: Callable[[Key, jax.Array], PyTree], apply: Callable[[PyTree, jax.Array], Any], agents: Agents, share: bool
) -> Networks:
    """Of `init(key, inputs [d])` and `apply(params, inputs [..., d])` of one network. `share`: its parameters."""
    N = agents.num_agents
    ids = jnp.eye(N if share and N > 1 else 0, dtype=jnp.float32)

    def inputs(rows: jax.Array, of: jax.Array) -> jax.Array:
        return jnp.concatenate([rows, jnp.broadcast_to(of, rows.shape[:-1] + of.shape[-1:])], axis=-1)

    def init_all(key: Key) -> PyTree:
        width = jnp.zeros(agents.obs_size + len(ids), jnp.float32)
        return init(key, width) if share else jax.vmap(init, (0, None))(jax.random.split(key, N), width)

    def apply_all(params: PyTree, rows: jax.Array) -> Any:
        if share:
            return apply(params, inputs(rows, ids) if len(ids) else rows)
        return jax.vmap(apply, (0, -2), -2)(params, rows)

    def apply_one(params: PyTree, agent: jax.Array, row: jax.Array) -> Any:
        return apply(params, inputs(row, ids[agent]) if len(ids) else row)

    if share:
        return Networks(init_all, apply_all, apply_one, lambda f: f, lambda tree, _: tree, lambda *parts: parts[2])
    return Networks(init_all, apply_all, apply_one, jax.vmap, take, put)


def team(reward: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[*shape]: the reward of all agents together, of what each of them is paid, [*shape, N], or all are, [*shape]."""
    return reward.reshape(*shape, -1).sum(axis=-1) if reward.ndim > len(shape) else reward


def team_reward(timestep: TimeStep) -> jax.Array:
    """[B] float32: the reward, summed over agents where they are paid apart ([B, N])."""
    return team(timestep.reward, timestep.terminated.shape)
