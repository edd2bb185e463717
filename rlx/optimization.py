"""Gradient steps whose size may be traced: optimizers here have no step size of their own."""

from __future__ import annotations

import jax
import optax

from rlx.types import PyTree


def adam(max_grad_norm: float | jax.Array, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam without its step size (Kingma and Ba 2015, arXiv 1412.6980), on gradients clipped to a global norm."""
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.scale_by_adam(eps=eps))


def descend(
    optimizer: optax.GradientTransformation,
    rate: float | jax.Array,
    params: PyTree,
    state: optax.OptState,
    grads: PyTree,
) -> tuple[PyTree, optax.OptState]:
    """One gradient step of size `rate`: the new `params` and the optimizer's new `state`."""
    updates, state = optimizer.update(grads, state)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state
