"""Flow policies: an action is drawn by carrying noise along a learnt velocity field (FPO, arXiv 2507.21053).

    x_t  = t eps + (1 - t) a,  eps ~ N(0, I)          time 1 is noise, time 0 the action
    u    = eps - a                                    the velocity that carries a to eps
    x_{t - 1/K} = x_t - u_hat(x_t, t; s) / K          Euler's K steps from x_1 = eps
    l_u  = mean_d (u - u_hat)^2                       the conditional flow-matching loss
    l_e  = mean_d (eps - eps_hat)^2 = (1 - t)^2 l_u   with eps_hat = x_t + (1 - t) u_hat

Actions are tanh(a): a has no bounds, and no density is ever asked for, so that the Jacobian does not matter.
A learner's Config has the fields that `check` and `make_flow` read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlx.algorithm import Key, Mode
from rlx.errors import require, require_above, require_at_least
from rlx.networks import TimeMLP, activation, check_residual, select
from rlx.types import Box, PyTree, Spec

FREQUENCIES = (1.0, 2.0, 4.0, 8.0)  # of the embedded time, as in the paper's code


class Flow(NamedTuple):
    """Pure functions; obs [..., o] is what the actor reads, normalised, x, noise and raw actions [..., d]."""

    init: Callable[[Key], PyTree]
    velocity: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]  # (params, obs, x, time [...])
    sample: Callable[[PyTree, jax.Array, jax.Array], jax.Array]  # (params, obs, noise) -> raw actions
    times: Callable[[Key, tuple[int, ...]], jax.Array]  # (key, shape): at which losses are taken
    loss: Callable[..., jax.Array]  # (params, obs, raw_action, noise, time [...]) -> [...]


def make_flow(config: Any, spec: Spec) -> Flow:
    """A velocity field of `actor_hidden` and `num_flow_steps` Euler steps through it; `flow_loss`, `flow_times`."""
    assert isinstance(spec.action, Box)
    size = spec.action.shape[0]
    steps = config.num_flow_steps
    network = TimeMLP(config.actor_hidden, size, FREQUENCIES, config.activation, config.residual)

    def init(key: Key) -> PyTree:
        obs = jnp.zeros(select(spec.obs, config.actor_obs_key).shape, jnp.float32)
        return network.init(key, obs, jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.float32))

    def velocity(params: PyTree, obs: jax.Array, x: jax.Array, time: jax.Array) -> jax.Array:
        return config.output_scale * network.apply(params, obs, x, time)

    def sample(params: PyTree, obs: jax.Array, noise: jax.Array) -> jax.Array:
        def euler(x: jax.Array, time: jax.Array):
            return x - velocity(params, obs, x, jnp.broadcast_to(time, x.shape[:-1])) / steps, None

        return jax.lax.scan(euler, noise, jnp.arange(steps, 0, -1, dtype=jnp.float32) / steps)[0]

    def times(key: Key, shape: tuple[int, ...]) -> jax.Array:
        if config.flow_times == "uniform":
            return jax.random.uniform(key, shape)
        return jax.random.randint(key, shape, 1, steps + 1).astype(jnp.float32) / steps

    def loss(params: PyTree, obs: jax.Array, raw_action: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        left = 1 - time[..., None]
        x = time[..., None] * noise + left * raw_action
        error = (noise - raw_action) - velocity(params, obs, x, time)
        if config.flow_loss == "epsilon":
            error = left * error
        squared = jnp.square(error)
        return squared.sum(axis=-1) / size**0.5 if config.sum_loss else squared.mean(axis=-1)

    return Flow(init, velocity, sample, times, loss)


def draw_noise(key: Key, shape: tuple[int, ...], mode: Mode) -> jax.Array:
    """eps of `shape` that actions start from: zeros when greedy."""
    return jnp.zeros(shape, jnp.float32) if mode == "greedy" else jax.random.normal(key, shape)


def check(config: Any, spec: Spec, name: str) -> None:
    """Raises UserError for settings of a flow that cannot work; `name` is the algorithm's."""
    require(isinstance(spec.action, Box), "env", spec.action, f"{name} needs continuous actions")
    require_at_least(config, 1, "num_flow_steps")
    require_above(config, 0, "output_scale")
    for field, kinds in (("flow_loss", ("epsilon", "velocity")), ("flow_times", ("discrete", "uniform"))):
        require(getattr(config, field) in kinds, f"algo.{field}", getattr(config, field), f"one of {', '.join(kinds)}")
    if config.residual:
        check_residual(config.actor_hidden, "algo.actor_hidden")
    activation(config.activation)
