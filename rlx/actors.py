"""The actor that PPO and behaviour cloning share: a network's output as the parameters of a distribution of actions.

A learner's Config has the fields that `check` and `make_actor` read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlx.algorithm import Key
from rlx.distributions import Categorical, Normal, TanhNormal
from rlx.errors import require, require_above, require_at_least
from rlx.networks import MLP
from rlx.types import Discrete, PyTree, Spec

DISTRIBUTIONS = ("normal", "tanh_normal")


class Actor(NamedTuple):
    init: Callable[[Key, jax.Array], PyTree]  # (key, inputs [..., d]) -> {"network", "raw_std"}
    distribution: Callable[[PyTree, jax.Array], Any]  # (params, inputs [..., d]) -> Categorical, Normal or TanhNormal


def make_actor(config: Any, spec: Spec) -> Actor:
    """Of `actor_hidden` and `activation`. Discrete actions: categorical; others `distribution`, with a standard
    deviation softplus(x) + min_std, begun at `init_std`: a parameter an action, or with `state_dependent_std` outputs.
    """
    discrete = isinstance(spec.action, Discrete)
    size = spec.action.num_values if isinstance(spec.action, Discrete) else spec.action.shape[0]
    outputs = 2 * size if config.state_dependent_std and not discrete else size
    network = MLP(config.actor_hidden, outputs, config.activation, output_scale=0.01)

    def init(key: Key, inputs: jax.Array) -> PyTree:
        raw_std = jnp.full(size, inverse_softplus(config.init_std), jnp.float32)
        return {"network": network.init(key, inputs), "raw_std": raw_std}

    def distribution(params: PyTree, inputs: jax.Array) -> Any:
        out = network.apply(params["network"], inputs)
        if discrete:
            return Categorical(out)
        mean, raw_std = jnp.split(out, 2, axis=-1) if config.state_dependent_std else (out, jnp.zeros_like(out))
        raw_std = raw_std + params["raw_std"].reshape((1,) * (out.ndim - 1) + (-1,))
        std = jax.nn.softplus(raw_std) + config.min_std
        return TanhNormal(mean, std) if config.distribution == "tanh_normal" else Normal(mean, std)

    return Actor(init, distribution)


def squashed_normal(out: jax.Array, min_std: float | jax.Array) -> TanhNormal:
    """Of a network's output [..., 2 d]: means, then standard deviations softplus(x) + min_std."""
    mean, raw_std = jnp.split(out.astype(jnp.float32), 2, axis=-1)
    return TanhNormal(mean, jax.nn.softplus(raw_std) + min_std)


def inverse_softplus(x: float | jax.Array) -> jax.Array:
    """log(exp(x) - 1) without its overflow."""
    return x + jnp.log(-jnp.expm1(-x))


def check(config: Any, distributions: tuple[str, ...] = DISTRIBUTIONS) -> None:
    """Raises UserError for settings of an actor that cannot work."""
    require_above(config, 0, "init_std")
    require_at_least(config, 0, "min_std")
    allowed = f"one of {', '.join(distributions)}"
    require(config.distribution in distributions, "algo.distribution", config.distribution, allowed)
