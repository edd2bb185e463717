"""The Environment protocol: two pure functions on one unbatched instance."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rlx.errors import UserError
from rlx.types import Discrete, PyTree, Spec, TimeStep

EnvState = Any


class Environment(Protocol):
    """One instance. `vmap` happens in `rlx.rollout` and `rlx.evaluation`, nowhere else.

    An environment never resets itself: in what `step` returns, `obs` equals `final_obs`, and the source
    (`rlx.rollout`) replaces `obs` at an ending. States, observations and time steps are fixed points in
    shape, dtype and weak type: `step` returns what `reset` returned. An environment that can be drawn also has
    `render(states)`: frames [F, H, W, 3] uint8 of a list of states, made on the host; one with a viewer too
    takes `page`, seconds, and gives a page of HTML that shows each state so long.
    """

    @property
    def spec(self) -> Spec: ...

    def reset(self, key: jax.Array, params: PyTree) -> tuple[EnvState, PyTree]:
        """Starts an episode. `params` is kept in the state; the default is `spec.params`."""
        ...

    def step(self, state: EnvState, action: jax.Array, key: jax.Array) -> tuple[EnvState, TimeStep]:
        """One decision. `action`: [-1, 1]^d float32, or () int32; of several agents [N, a] float32, or [N] int32."""
        ...


def render(env: Environment, states: Sequence[EnvState], page: float | None = None) -> Any:
    """Frames [F, H, W, 3] uint8 of a list of states, made on the host by the environment's optional `render`.

    `page`: the text of an HTML page that shows each of them for so many seconds. Raises UserError where the environment
    has no such thing.
    """
    draw = getattr(env, "render", None)
    if draw is None:
        raise UserError(f"{type(env).__name__} cannot be rendered: it has no `render`.")
    if page is not None and "page" not in inspect.signature(draw).parameters:
        raise UserError(f"{type(env).__name__} has no viewer in HTML; its videos are pictures.")
    return draw(states) if page is None else draw(states, page=page)


def real_time(spec: Spec) -> float:
    """Decisions in a second of simulated time: the frames a second of a film in real time. 20 where it is not known."""
    return 1 / (spec.dt * spec.action_repeat) if spec.dt else 20.0


def random_action(spec: Spec, key: jax.Array) -> jax.Array:
    """A uniformly random action of one environment: [-1, 1]^d float32 or () int32, as `step` takes it.

    Of several agents each takes one of the values that `spec.action_mask` allows it; padding is 0.
    """
    if isinstance(spec.action, Discrete) and spec.action_mask is not None:
        return jax.random.categorical(key, jnp.where(spec.action_mask, 0.0, -jnp.inf)).astype(jnp.int32)
    if isinstance(spec.action, Discrete):
        return jax.random.randint(key, spec.action.shape, 0, spec.action.num_values)
    action = jax.random.uniform(key, spec.action.shape, minval=-1.0, maxval=1.0)
    return action if spec.action_mask is None else jnp.where(spec.action_mask, action, 0.0)
