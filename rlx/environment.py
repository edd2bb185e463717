"""The Environment protocol: two pure functions on one unbatched instance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from rlx.types import Discrete, PyTree, Spec, TimeStep

EnvState = Any


class Environment(Protocol):
    """One instance. `vmap` happens in `rlx.rollout` and `rlx.evaluation`, nowhere else.

    An environment never resets itself: in what `step` returns, `obs` equals `final_obs`, and the source
    (`rlx.rollout`) replaces `obs` at an ending. States, observations and time steps are fixed points in
    shape, dtype and weak type: `step` returns what `reset` returned.
    """

    @property
    def spec(self) -> Spec: ...

    def reset(self, key: jax.Array, params: PyTree) -> tuple[EnvState, PyTree]:
        """Starts an episode. `params` is kept in the state; the default is `spec.params`."""
        ...

    def step(self, state: EnvState, action: jax.Array, key: jax.Array) -> tuple[EnvState, TimeStep]:
        """One decision. `action`: [-1, 1]^d float32, or () int32."""
        ...

    def render(self, states: Sequence[EnvState]) -> Any:
        """Frames [F, H, W, 3] uint8, made on the host. Optional."""
        ...


def random_action(spec: Spec, key: jax.Array) -> jax.Array:
    """A uniformly random action of one environment: [-1, 1]^d float32 or () int32."""
    if isinstance(spec.action, Discrete):
        return jax.random.randint(key, (), 0, spec.action.num_values)
    return jax.random.uniform(key, spec.action.shape, minval=-1.0, maxval=1.0)
