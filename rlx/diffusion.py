"""Diffusion policies: an action is drawn by denoising (DDPM, Ho et al. 2020, arXiv 2006.11239; DPPO, arXiv 2409.00588).

    q(x_k | a)        = N(sqrt(abar_k) a, (1 - abar_k) I),  k = 1..K      abar: a cosine schedule (arXiv 2102.09672)
    a_hat             = (x_k - sqrt(1 - abar_k) eps_hat(x_k, k; s)) / sqrt(abar_k), clipped to the box
    p(x_{k-1} | x_k)  = N(mean(a_hat, x_k), std_k^2)                                        (DDPM's eq. 7)

The mean is linear in a_hat and x_k; so is that of DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12), which takes fewer
steps over the same schedule. Both are a table of coefficients here, a row a step, the noisiest step first.
A learner's Config has the fields that `check` and `make_diffusion` read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlx.algorithm import Key, Mode
from rlx.errors import require, require_above, require_at_least
from rlx.networks import TimeMLP, activation, check_residual, select
from rlx.types import Box, PyTree, Spec

OFFSET = 0.008  # of the cosine schedule
EMBEDDING = 16  # width of an embedded step
MAX_BETA = 0.999  # of the schedule, at whose end abar would be 0


class Table(NamedTuple):
    """How each step is taken, [S] float32 each: x' = of_clean * a_hat + of_noisy * x + std * noise."""

    step: Any  # k - 1, as the network is told
    signal: Any  # sqrt(abar_k)
    noise: Any  # sqrt(1 - abar_k)
    of_clean: Any
    of_noisy: Any
    std: Any  # as the schedule has it, before any floor


def cosine_schedule(num_steps: int) -> np.ndarray:
    """abar_0 .. abar_K, [K + 1] float64: the share of the signal's variance (arXiv 2102.09672, eq. 17)."""
    curve = np.cos((np.arange(num_steps + 1) / num_steps + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2
    betas = np.minimum(1 - curve[1:] / curve[:-1], MAX_BETA)
    return np.cumprod(np.concatenate([[1.0], 1 - betas]))


def make_table(num_steps: int, ddim_steps: int, eta: float) -> Table:
    """DDPM's K steps, or with `ddim_steps` as many of DDIM's, whose noise is `eta` times that of DDPM."""
    abar = cosine_schedule(num_steps)
    k = np.arange(num_steps, 0, -1)
    if ddim_steps:
        k = np.arange(ddim_steps, 0, -1) * num_steps // ddim_steps
    now, after = abar[k], abar[np.append(k[1:], 0)]
    variance = (1 - after) / (1 - now) * (1 - now / after)
    if ddim_steps:
        variance = eta**2 * variance
        of_noisy = np.sqrt(np.maximum(1 - after - variance, 0.0) / (1 - now))
        of_clean = np.sqrt(after) - of_noisy * np.sqrt(now)
    else:
        of_clean = np.sqrt(after) * (1 - now / after) / (1 - now)
        of_noisy = np.sqrt(now / after) * (1 - after) / (1 - now)
    rows = (k - 1, np.sqrt(now), np.sqrt(1 - now), of_clean, of_noisy, np.sqrt(variance))
    return Table(*(row.astype(np.float32) for row in rows))


class Diffusion(NamedTuple):
    """Pure functions; obs [..., o] is what the actor reads, normalised, x and actions [..., d]."""

    init: Callable[[Key], PyTree]
    mean: Callable[..., jax.Array]  # (params, obs, x, row of a Table, leaves () or [...]) -> of x after that step
    loss: Callable[..., jax.Array]  # (params, obs, action, noise, k - 1 [...] int32) -> [...]
    explore: Table  # the steps in mode "explore"
    evaluate: Table  # in the others


def make_diffusion(config: Any, spec: Spec) -> Diffusion:
    """A noise network of `actor_hidden` over `num_denoising_steps`, or over `ddim_steps` of them."""
    assert isinstance(spec.action, Box)
    size = spec.action.shape[0]
    frequencies = tuple(math.exp(-math.log(10_000) * i / (EMBEDDING // 2 - 1)) for i in range(EMBEDDING // 2))
    network = TimeMLP(
        config.actor_hidden, size, frequencies, config.activation, config.residual, embed_hidden=2 * EMBEDDING
    )
    abar = cosine_schedule(config.num_denoising_steps)[1:]
    signal, spread = jnp.asarray(np.sqrt(abar), jnp.float32), jnp.asarray(np.sqrt(1 - abar), jnp.float32)

    def init(key: Key) -> PyTree:
        obs = jnp.zeros(select(spec.obs, config.actor_obs_key).shape, jnp.float32)
        return network.init(key, obs, jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.float32))

    def mean(params: PyTree, obs: jax.Array, x: jax.Array, row: Table) -> jax.Array:
        step, *coefficients = (jnp.broadcast_to(value, x.shape[:-1]) for value in row)
        signal, noise, of_clean, of_noisy, _ = (value[..., None] for value in coefficients)
        clean = (x - noise * network.apply(params, obs, x, step)) / signal
        clean = jnp.clip(clean, -config.clean_clip, config.clean_clip)
        return of_clean * clean + of_noisy * x

    def loss(params: PyTree, obs: jax.Array, action: jax.Array, noise: jax.Array, step: jax.Array) -> jax.Array:
        """E[(eps - eps_hat)^2], DDPM's eq. 14, the mean over the action."""
        x = signal[step][..., None] * action + spread[step][..., None] * noise
        return jnp.square(noise - network.apply(params, obs, x, step.astype(jnp.float32))).mean(axis=-1)

    tables = (make_table(config.num_denoising_steps, config.ddim_steps, eta) for eta in (1.0, 0.0))
    return Diffusion(init, mean, loss, *tables)


def draw(
    diffusion: Diffusion, table: Table, params: PyTree, obs: jax.Array, x: jax.Array, noise: jax.Array, floor: Any
) -> tuple[jax.Array, jax.Array]:
    """Carries x [..., d] through the S steps of `table`: every x with the first [S + 1, ..., d], and each step's mean.

    `noise` [S, ..., d]: what each step adds, times its standard deviation, which is at least `floor`.
    """

    def step(x: jax.Array, inputs: tuple[Table, jax.Array]):
        row, noise = inputs
        mean = diffusion.mean(params, obs, x, row)
        x = mean + jnp.maximum(row.std, floor) * noise
        return x, (x, mean)

    rows = jax.tree.map(jnp.asarray, table)
    _, (chain, means) = jax.lax.scan(step, x, (rows, noise))
    return jnp.concatenate([x[None], chain]), means


def noises(config: Any, key: Key, shape: tuple[int, ...], mode: Mode) -> tuple[jax.Array, jax.Array]:
    """x_K of `shape` and what every step adds [S, ...], in deviations. Nothing when greedy; in mode "sample"
    neither do DDIM's steps, nor the last one of DDPM's."""
    steps = config.ddim_steps or config.num_denoising_steps
    if mode == "greedy":
        return jnp.zeros(shape, jnp.float32), jnp.zeros((steps, *shape), jnp.float32)
    start_key, step_key = jax.random.split(key)
    start, noise = jax.random.normal(start_key, shape), jax.random.normal(step_key, (steps, *shape))
    if mode == "explore":
        return start, noise
    return start, jnp.zeros_like(noise) if config.ddim_steps else noise.at[-1].set(0.0)


def steps_of(table: Table, start: int, stop: int | None = None) -> Table:
    return Table(*(row[start:stop] for row in table))


def check(config: Any, spec: Spec, name: str) -> None:
    """Raises UserError for settings of a diffusion that cannot work; `name` is the algorithm's."""
    require(isinstance(spec.action, Box), "env", spec.action, f"{name} needs continuous actions")
    require_at_least(config, 1, "num_denoising_steps")
    steps = config.num_denoising_steps
    allowed = f"from 1 to num_denoising_steps = {steps}, or 0 for all of them"
    require(0 <= config.ddim_steps <= steps, "algo.ddim_steps", config.ddim_steps, allowed)
    require_above(config, 0, "clean_clip")
    if config.residual:
        check_residual(config.actor_hidden, "algo.actor_hidden")
    activation(config.activation)
