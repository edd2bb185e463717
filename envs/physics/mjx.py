"""MuJoCo XLA, on any device, and its Warp implementation, on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
from mujoco import mjx

from envs.physics import IMPLEMENTATIONS


class MJX:
    """See `envs.physics.Engine`. Differentiable on "mjx" where MJX is.

    `sizes`: of Warp's lists: `naconmax` contacts of all simulations together, `njmax` constraint rows of each. MJX's
    defaults are those of one simulation.
    """

    def __init__(
        self,
        name: str,
        mj_model: mujoco.MjModel,
        model: mjx.Model | None = None,
        sizes: Mapping[str, int] = MappingProxyType({}),
    ):
        self.name, self._mj_model, self._sizes = name, mj_model, dict(sizes) if name == "warp" else {}
        self.model = mjx.put_model(mj_model, impl=IMPLEMENTATIONS[name]) if model is None else model

    def make_data(self, **fields: Any) -> mjx.Data:
        return mjx.make_data(self._mj_model, impl=IMPLEMENTATIONS[self.name], **self._sizes).replace(**fields)

    def forward(self, model: mjx.Model, data: mjx.Data) -> mjx.Data:
        return mjx.forward(model, data)

    def step(self, model: mjx.Model, data: mjx.Data, ctrl: jax.Array, substeps: int) -> mjx.Data:
        return jax.lax.fori_loop(0, substeps, lambda _, d: mjx.step(model, d.replace(ctrl=ctrl)), data)

    def detach(self, data: mjx.Data) -> mjx.Data:
        # Contacts, constraints and factors: each step fills them anew. Kept, they are most of what a batch would carry
        # from step to step; Warp's are lists that all simulations share.
        return data.replace(_impl=None)

    def attach(self, data: mjx.Data) -> mjx.Data:
        return data.replace(_impl=self.make_data()._impl)

    def diverged(self, data: mjx.Data) -> jax.Array:
        # After a reset without steps an impossible model shows in its accelerations alone.
        in_range = [(jnp.abs(x) <= mujoco.mjMAXVAL).all() for x in (data.qpos, data.qvel, data.qacc)]  # False for nan
        return ~(in_range[0] & in_range[1] & in_range[2])
