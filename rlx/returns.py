"""Returns and advantages of one stream of experience, time-major `[T]`. Batches are the caller's `vmap`.

Everywhere `values[t]` is V(obs[t]) and `next_values[t]` is V(next_obs[t]) of the true successor, never of the
observation after a reset. A terminated step bootstraps from 0. A truncated step bootstraps from `next_values` and cuts:
nothing of the episode behind it flows back. `terminated` wins where both are set. The end of the stream bootstraps
like a truncation.

Each function asserts ranks, shapes and dtypes first (AssertionError): rewards and values float32 [T], endings bool [T].
`gamma` and `lambda` are scalars and may be traced. Gradients flow through: stop them where the targets are fixed.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

Scalar = float | jax.Array


def _check(floats: list[jax.Array], endings: list[jax.Array], scalars: list[Scalar]) -> None:
    chex.assert_rank(floats + endings, 1)
    chex.assert_equal_shape(floats + endings)
    chex.assert_type(floats, jnp.float32)
    chex.assert_type(endings, bool)
    chex.assert_rank(scalars, 0)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16), with both endings.

    delta_t = r_t + gamma (1 - terminated_t) V(next_obs_t) - V(obs_t)
    A_t = delta_t + gamma lambda (1 - terminated_t)(1 - truncated_t) A_{t+1}

    Returns:
      advantages [T] and value targets A + V [T], float32.
    """
    _check([rewards, values, next_values], [terminated, truncated], [gamma, gae_lambda])
    deltas = rewards + gamma * jnp.where(terminated, 0.0, next_values) - values
    decays = jnp.where(terminated | truncated, 0.0, gamma * gae_lambda)

    def step(advantage: jax.Array, delta_and_decay: tuple[jax.Array, jax.Array]):
        delta, decay = delta_and_decay
        advantage = delta + decay * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros((), jnp.float32), (deltas, decays), reverse=True)
    return advantages, advantages + values


def lambda_returns(
    rewards: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: Scalar,
    lambda_: Scalar,
) -> jax.Array:
    """TD(lambda) targets (Sutton and Barto 2018, eq. 12.18 with both endings).

    G_t = r_t + gamma (1 - terminated_t) [(1 - c_t) V(next_obs_t) + c_t G_{t+1}],  c_t = lambda (1 - truncated_t)

    Returns:
      targets [T], float32.
    """
    _check([rewards, next_values], [terminated, truncated], [gamma, lambda_])
    discounts = jnp.where(terminated, 0.0, jnp.full(rewards.shape, gamma, jnp.float32))
    traces = jnp.where(truncated, 0.0, jnp.full(rewards.shape, lambda_, jnp.float32)).at[-1].set(0.0)

    def step(target: jax.Array, inputs: tuple[jax.Array, ...]):
        reward, next_value, discount, trace = inputs
        target = reward + discount * ((1.0 - trace) * next_value + trace * target)
        return target, target

    inputs = (rewards, next_values, discounts, traces)
    return jax.lax.scan(step, jnp.zeros((), jnp.float32), inputs, reverse=True)[1]


def n_step_returns(
    rewards: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: Scalar,
    n: int,
) -> jax.Array:
    """n-step targets (Sutton and Barto 2018, eq. 7.1), each with its own number of steps k_t <= n.

    G_t = sum_{i < k} gamma^i r_{t+i} + gamma^k (1 - terminated_{t+k-1}) V(next_obs_{t+k-1})

    k_t counts to the first ending (included), to n or to the end of the stream, whichever comes first.

    Args:
      n: static, at least 1.

    Returns:
      targets [T], float32.
    """
    _check([rewards, next_values], [terminated, truncated], [gamma])
    chex.assert_type(n, int)
    chex.assert_scalar_positive(n)
    bootstraps = jnp.where(terminated, 0.0, next_values)
    last = (terminated | truncated).at[-1].set(True)
    one_step = rewards + gamma * bootstraps

    def extend(_, targets: jax.Array) -> jax.Array:
        """k-step targets from (k-1)-step targets: the latter of the step after, unless the episode or stream ends."""
        return rewards + gamma * jnp.where(last, bootstraps, jnp.roll(targets, -1))

    return jax.lax.fori_loop(0, min(n, rewards.shape[0]) - 1, extend, one_step)


def n_step_window(
    rewards: jax.Array, terminated: jax.Array, truncated: jax.Array, gamma: Scalar
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The n-step target of a window's first step in parts, G = reward + discount * V(next_obs[last]).

    last = the first ending, or n - 1;  reward = sum_{i <= last} gamma^i r_i;
    discount = gamma^(last + 1) (1 - terminated_last)

    For a critic that is to be asked once for each window of `n` steps; `n_step_returns` has all targets of a stream.

    Args:
      rewards: [n] float32, or [n, N] of agents that are paid apart.

    Returns:
      reward () or [N] float32, discount () float32, last () int32.
    """
    chex.assert_rank(rewards, {1, 2})
    _check([rewards.reshape(len(rewards), -1)[:, 0]], [terminated, truncated], [gamma])
    ended = jnp.cumsum((terminated | truncated).astype(jnp.int32))
    reached = jnp.append(jnp.ones(1, bool), ended[:-1] == 0)
    powers = jnp.power(jnp.asarray(gamma, jnp.float32), jnp.arange(rewards.shape[0] + 1))
    last = reached.sum(dtype=jnp.int32) - 1
    of_each, weights = (x.reshape(-1, *(1,) * (rewards.ndim - 1)) for x in (reached, powers[:-1]))
    reward = jnp.where(of_each, weights * rewards, 0.0).sum(axis=0)
    return reward, jnp.where(terminated[last], 0.0, powers[last + 1]), last
