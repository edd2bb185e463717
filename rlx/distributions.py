"""Action distributions. Each is a pytree of its parameters, batched over leading axes; the last axis is the event.

All have `sample(key)`, `mode()`, `log_prob(value)`, `entropy(key)`, `kl(other)`, `to_action(value)` and
`from_action(action)`. Values are what the density is evaluated at (kept in `extras`); `to_action` makes of them what
the environment receives, `from_action` undoes it as far as that can be.
Log-probabilities, entropies and divergences are in nats, summed over the event: parameters [..., d] give [...].
Of several agents some have fewer entries than others: a `mask` (of categorical ones a logit of -inf) leaves the padding
out of those sums, and makes it 0 in actions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

EDGE = 1e-3  # of the box of actions, where tanh's inverse is cut


def real(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` [..., d], 0 where `mask` says padding."""
    return x if mask is None else jnp.where(mask, x, 0.0)


class Normal(NamedTuple):
    """Independent normals. Actions are values clipped to [-1, 1]; the density is that of the unclipped value."""

    mean: jax.Array  # [..., d] float32
    std: jax.Array  # [..., d] float32, > 0
    mask: jax.Array | None = None  # [..., d] bool: False where an entry is padding; None: nowhere

    def sample(self, key: jax.Array) -> jax.Array:
        """A value [..., d], differentiable in the parameters."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> jax.Array:
        return self.mean

    def log_prob(self, value: jax.Array) -> jax.Array:
        z = (value - self.mean) / self.std
        return -jnp.sum(real(0.5 * jnp.square(z) + jnp.log(self.std) + 0.5 * math.log(2 * math.pi), self.mask), axis=-1)

    def entropy(self, key: jax.Array | None = None) -> jax.Array:
        """Exact; `key` is not used."""
        return jnp.sum(real(jnp.log(self.std) + 0.5 * math.log(2 * math.pi * math.e), self.mask), axis=-1)

    def kl(self, other: Normal) -> jax.Array:
        """KL(self || other), exact."""
        ratio = self.std / other.std  # before squaring: the square of a tiny std underflows
        z = (self.mean - other.mean) / other.std
        return jnp.sum(real(0.5 * (jnp.square(ratio) + jnp.square(z) - 1.0) - jnp.log(ratio), self.mask), axis=-1)

    def to_action(self, value: jax.Array) -> jax.Array:
        return real(jnp.clip(value, -1.0, 1.0), self.mask)

    def from_action(self, action: jax.Array) -> jax.Array:
        return action


def log_det_tanh(u: jax.Array) -> jax.Array:
    """log |d tanh(u) / du|, elementwise: log(1 - tanh(u)^2), without the cancellation that makes that -inf near 10."""
    return 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))


def untanh(action: jax.Array) -> jax.Array:
    """The u of tanh(u) = action. An action at the border counts as one `EDGE` inside (u = 3.8): it lies at infinity."""
    return jnp.arctanh(jnp.clip(action, EDGE - 1.0, 1.0 - EDGE))


class TanhNormal(NamedTuple):
    """The distribution of tanh(u) for independent normal u. Values are u, which is lost once tanh(u) rounds to 1."""

    mean: jax.Array  # [..., d] float32, of u
    std: jax.Array  # [..., d] float32, > 0, of u
    mask: jax.Array | None = None  # as that of Normal

    @property
    def base(self) -> Normal:
        return Normal(self.mean, self.std, self.mask)

    def sample(self, key: jax.Array) -> jax.Array:
        """A pre-tanh value u [..., d], differentiable in the parameters."""
        return self.base.sample(key)

    def mode(self) -> jax.Array:
        """The mode of u. tanh of it is the median action (the density of tanh(u) may peak at the borders)."""
        return self.mean

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density of the action tanh(u) at `value` = u."""
        return self.base.log_prob(value) - jnp.sum(real(log_det_tanh(value), self.mask), axis=-1)

    def entropy(self, key: jax.Array) -> jax.Array:
        """An unbiased one-sample estimate, differentiable: H(u) + E[log |d tanh(u)|] has no closed form."""
        return self.base.entropy() + jnp.sum(real(log_det_tanh(self.sample(key)), self.mask), axis=-1)

    def kl(self, other: TanhNormal) -> jax.Array:
        """KL(self || other), exact: tanh is one-to-one, its Jacobian cancels in the ratio, and the KL is that of u."""
        return self.base.kl(other.base)

    def to_action(self, value: jax.Array) -> jax.Array:
        return real(jnp.tanh(value), self.mask)

    def from_action(self, action: jax.Array) -> jax.Array:
        return untanh(action)


class Categorical(NamedTuple):
    """One of `n` values. A logit of -inf forbids a value; at least one must be finite."""

    logits: jax.Array  # [..., n] float32, not necessarily normalised

    def _log_probs(self) -> jax.Array:
        return jax.nn.log_softmax(self.logits, axis=-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """A value [...], int32."""
        return jax.random.categorical(key, self.logits, axis=-1).astype(jnp.int32)

    def mode(self) -> jax.Array:
        """The first of the most probable values [...], int32."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def log_prob(self, value: jax.Array) -> jax.Array:
        return jnp.take_along_axis(self._log_probs(), value[..., None], axis=-1)[..., 0]

    def entropy(self, key: jax.Array | None = None) -> jax.Array:
        """Exact; `key` is not used."""
        log_p = self._log_probs()
        p = jnp.exp(log_p)
        return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)  # 0 log 0 = 0

    def kl(self, other: Categorical) -> jax.Array:
        """KL(self || other), exact."""
        log_p = self._log_probs()
        p = jnp.exp(log_p)
        return jnp.sum(p * jnp.where(p > 0, log_p - other._log_probs(), 0.0), axis=-1)

    def to_action(self, value: jax.Array) -> jax.Array:
        return value

    def from_action(self, action: jax.Array) -> jax.Array:
        return action


class OneHotCategorical(NamedTuple):
    """A categorical whose values are one-hot vectors [..., n], through which gradients pass to the logits.

    By the straight-through Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144) at temperature 1: the value is that of
    the largest of logits + Gumbel noise, its gradient that of their softmax.
    """

    logits: jax.Array  # as those of Categorical

    @property
    def base(self) -> Categorical:
        return Categorical(self.logits)

    def sample(self, key: jax.Array) -> jax.Array:
        return straight_through(self.logits + jax.random.gumbel(key, self.logits.shape, self.logits.dtype))

    def mode(self) -> jax.Array:
        """The first of the most probable values, with the gradient of the probabilities."""
        return straight_through(self.logits)

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Differentiable in `value` too."""
        allowed = self.logits > -jnp.inf
        return jnp.sum(jnp.where(allowed, value * jnp.where(allowed, self.base._log_probs(), 0.0), 0.0), axis=-1)

    def entropy(self, key: jax.Array | None = None) -> jax.Array:
        """Exact; `key` is not used."""
        return self.base.entropy()

    def kl(self, other: OneHotCategorical) -> jax.Array:
        """KL(self || other), exact."""
        return self.base.kl(other.base)

    def to_action(self, value: jax.Array) -> jax.Array:
        return value

    def from_action(self, action: jax.Array) -> jax.Array:
        return action


def straight_through(logits: jax.Array) -> jax.Array:
    """One-hot [..., n] of the largest logit, exactly; its gradient is that of softmax(logits)."""
    soft = jax.nn.softmax(logits, axis=-1)
    return soft - jax.lax.stop_gradient(soft) + jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
