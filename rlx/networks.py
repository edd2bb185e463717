"""Networks that algorithms are made of. Heads and their meaning belong to the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlx.errors import UserError, require, unknown
from rlx.types import Box, PyTree, Spec

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "elu": nn.elu,
    "gelu": nn.gelu,
    "leaky_relu": nn.leaky_relu,
    "mish": jax.nn.mish,
    "relu": nn.relu,
    "selu": nn.selu,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "softplus": nn.softplus,
    "swish": nn.swish,
    "tanh": nn.tanh,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of arithmetic; parameters are float32


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function called `name`; a UserError with close matches where there is none."""
    if name not in ACTIVATIONS:
        raise unknown("Activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def check(config: Any, *hidden: str) -> None:
    """Raises UserError for settings of networks that cannot work: `activation`, and widths, those of `hidden`."""
    for field in hidden:
        widths = getattr(config, field)
        require(all(width >= 1 for width in widths), f"algo.{field}", widths, "widths of at least 1")
    activation(config.activation)


def check_vectors(spec: Spec, obs_keys: Sequence[str], name: str) -> None:
    """Raises UserError for an environment that learner `name` of a single agent cannot train: with several of them, or
    whose continuous actions, or observations at `obs_keys`, are no vectors."""
    require(spec.num_agents == 1, "env", f"{spec.num_agents} agents", f"{name} trains a single agent")
    shapes = [("observations", select(spec.obs, key).shape) for key in obs_keys]
    shapes += [("actions", spec.action.shape)] if isinstance(spec.action, Box) else []
    for what, shape in shapes:
        require(len(shape) == 1, "env", f"{what} of shape {shape}", f"{name} takes vectors")


def _kernel_init(scale: float) -> nn.initializers.Initializer:
    """Uniform with variance scale / fan_in: lecun_uniform at 1, as in brax."""
    return nn.initializers.variance_scaling(scale, "fan_in", "uniform")


class MLP(nn.Module):
    """Dense layers over the last axis: [..., d] -> [..., out]. Parameters float32, biases start at 0."""

    hidden: tuple[int, ...]
    out: int | None = None  # width of the linear output layer; None: end with the last hidden layer
    activation: str = "swish"
    output_scale: float = 1.0  # of the output kernel's variance; small for actors that shall start near zero
    layer_norm: bool = False  # after each hidden activation, as in brax
    dtype: Any = None  # of the arithmetic, and of what it returns; None: that of parameters and inputs

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = activation(self.activation)
        for width in self.hidden:
            x = act(nn.Dense(width, kernel_init=_kernel_init(1.0), dtype=self.dtype)(x))
            if self.layer_norm:
                x = nn.LayerNorm(dtype=self.dtype)(x)
        if self.out is None:
            return x
        kernel_init = _kernel_init(self.output_scale)
        return nn.Dense(self.out, kernel_init=kernel_init, dtype=self.dtype, name="output")(x)


class ResidualMLP(nn.Module):
    """[..., d] -> [..., out] through pairs of layers that add to their input: x + W2 act(W1 act(x)), after a first
    layer, as the policies of DPPO (Ren et al. 2024, arXiv 2409.00588); here act comes before the output layer too.

    Hidden widths are equal, and odd in number.
    """

    hidden: tuple[int, ...]
    out: int
    activation: str = "mish"
    output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = activation(self.activation)

        def dense(x: jax.Array) -> jax.Array:
            return nn.Dense(self.hidden[0], kernel_init=_kernel_init(1.0))(x)

        x = dense(x)
        for _ in range((len(self.hidden) - 1) // 2):
            x = x + dense(act(dense(act(x))))
        return nn.Dense(self.out, kernel_init=_kernel_init(self.output_scale), name="output")(act(x))


def check_residual(widths: tuple[int, ...], name: str) -> None:
    """Raises UserError unless `ResidualMLP` takes these hidden widths."""
    require(
        len(set(widths)) == 1 and len(widths) % 2 == 1,
        name,
        widths,
        "an odd number of equal widths for a residual network",
    )


def embed_time(time: jax.Array, frequencies: tuple[float, ...]) -> jax.Array:
    """cos(f t) and sin(f t) for each frequency f: [...] -> [..., 2 F] float32."""
    angles = time[..., None] * jnp.asarray(frequencies, jnp.float32).reshape((1,) * time.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeMLP(nn.Module):
    """What a flow or diffusion policy asks at each of its steps: an observation, a noisy action x and a time give a
    velocity or a noise in the shape of x. The network reads the three side by side, time as `embed_time`.
    """

    hidden: tuple[int, ...]
    out: int
    frequencies: tuple[float, ...]
    activation: str = "swish"
    residual: bool = False
    embed_hidden: int = 0  # width of a hidden layer that the embedded time passes; 0: none

    @nn.compact
    def __call__(self, obs: jax.Array, x: jax.Array, time: jax.Array) -> jax.Array:
        """obs [..., o], x [..., d], time [...] -> [..., d], float32."""
        embedded = embed_time(time, self.frequencies)
        if self.embed_hidden:
            embedded = MLP((self.embed_hidden,), 2 * len(self.frequencies), self.activation)(embedded)
        inputs = jnp.concatenate([obs, x, embedded], axis=-1)
        network = ResidualMLP if self.residual else MLP
        return network(self.hidden, self.out, self.activation, name="network")(inputs)


class GRU(nn.Module):
    """One step of a gated recurrent unit (Cho et al. 2014, arXiv 1406.1078). Scan it over time outside."""

    features: int

    @nn.compact
    def __call__(self, memory: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """memory [..., features] and x [..., d] -> the new memory and the output, both [..., features]."""
        return nn.GRUCell(self.features)(memory, x)

    @nn.nowrap
    def initial_memory(self) -> jax.Array:
        """Zeros [features]: one unbatched memory, needs no parameters."""
        return jnp.zeros(self.features, jnp.float32)


def select(obs: PyTree, key: str) -> PyTree:
    """`obs[key]` of a dict observation; an array (or a spec of one) is passed through.

    Raises a UserError, while tracing, that names the keys there are.
    """
    if not isinstance(obs, Mapping):
        return obs
    if key not in obs:
        raise UserError(f"{unknown('Observation key', key, obs)} The keys there are: {', '.join(sorted(obs))}.")
    return obs[key]


def keep(obs: PyTree, *keys: str) -> PyTree:
    """The entries `keys` of a dict observation (or of its spec); an array is passed through. Errors as `select`."""
    return {key: select(obs, key) for key in keys} if isinstance(obs, Mapping) else obs
