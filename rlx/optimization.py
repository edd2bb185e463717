"""Gradient steps whose size may be traced: optimizers here have no step size of their own."""

from __future__ import annotations

import jax
import optax

from rlx.types import PyTree


def adam(
    max_grad_norm: float | jax.Array, eps: float = 1e-8, weight_decay: float | jax.Array | None = None
) -> optax.GradientTransformation:
    """Adam without its step size (Kingma and Ba 2015, arXiv 1412.6980), on gradients clipped to a global norm; with
    `weight_decay` AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    decay = [] if weight_decay is None else [optax.add_decayed_weights(weight_decay)]
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.scale_by_adam(eps=eps), *decay)


def descend(
    optimizer: optax.GradientTransformation,
    rate: PyTree,
    params: PyTree,
    state: optax.OptState,
    grads: PyTree,
) -> tuple[PyTree, optax.OptState]:
    """One gradient step: the new `params` and the optimizer's new `state`. `rate`: its size, or one for each of the
    subtrees of `params` that it is a tree prefix of."""
    updates, state = optimizer.update(grads, state, params)

    def part(rate: jax.Array, params: PyTree, updates: PyTree) -> PyTree:
        return jax.tree.map(lambda p, u: p - rate * u, params, updates)

    return jax.tree.map(part, rate, params, updates), state
