"""brax's pipeline on the native engine: its two functions for one environment object, the state that they return."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import jax.numpy as jnp
import mujoco
import numpy as np
from brax.base import Motion, System, Transform
from brax.envs.base import PipelineEnv
from brax.mjx.base import State as PipelineState
from mujoco import mjx

from envs.physics import Engine
from envs.physics.native import Unbound


def simulate_natively(env: PipelineEnv, engine: Engine) -> None:
    """Gives this one environment object pipeline functions of ours; all frames of a step are one call of the engine.

    `pipeline_state.contact` is not there: reading it raises UserError. (brax's environments do not.)
    Raises RuntimeError where brax's functions have other parameters than those that ours take the place of.
    """

    def pipeline_init(q, qd, act=None, ctrl=None):
        given = {"qpos": q, "qvel": qd, "act": act, "ctrl": ctrl}
        data = engine.make_data(**{name: value for name, value in given.items() if value is not None})
        return brax_state(engine.forward(env.sys, data), env.sys)

    def pipeline_step(pipeline_state, action):
        return brax_state(engine.step(env.sys, pipeline_state, action, env._n_frames), env.sys)

    for ours in (pipeline_init, pipeline_step):
        if list(inspect.signature(getattr(env, ours.__name__)).parameters) != list(inspect.signature(ours).parameters):
            raise RuntimeError(f"this version of brax has other parameters of {ours.__name__} than rlx knows of.")
        setattr(env, ours.__name__, ours)


def brax_state(data: mjx.Data, sys: System) -> PipelineState:
    """`data` with what brax adds to it: poses of the bodies and velocities of their origins, the world left out.

    MuJoCo gives a body's velocity as (angular, linear) at the centre of mass of its kinematic tree, c; the origin p
    of the body moves with v(p) = v(c) + w x (p - c).
    """
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(mjx.Data)}
    angular, linear = data.cvel[1:, :3], data.cvel[1:, 3:]
    lever = data.xpos[1:] - data.subtree_com[sys.body_rootid[1:]]
    return PipelineState(
        q=data.qpos,
        qd=data.qvel,
        x=Transform(pos=data.xpos[1:], rot=data.xquat[1:]),
        xd=Motion(ang=angular, vel=linear + jnp.cross(angular, lever)),
        contact=Unbound("contact"),
        **fields,
    )


def model_of(sys: System) -> mujoco.MjModel:
    """A copy of `sys.mj_model` that agrees with `sys`, in which environments change options after loading."""
    model = copy.copy(sys.mj_model)
    pairs = ((sys, model, dataclasses.fields(mjx.Model)), (sys.opt, model.opt, dataclasses.fields(sys.opt)))
    for owner, target, fields in pairs:
        for name in (field.name for field in fields if field.name not in ("opt", "stat", "_impl")):
            have, wanted = getattr(target, name, None), getattr(owner, name)
            if not isinstance(have, int | float | np.ndarray):
                continue  # a field of MJX's own, or a list of names
            if isinstance(have, np.ndarray):
                wanted = np.asarray(wanted).reshape(have.shape)
            if np.array_equal(np.float32(have), np.float32(wanted), equal_nan=True):
                continue
            if isinstance(have, np.ndarray):
                have[...] = wanted
            else:
                setattr(target, name, type(have)(wanted))
    return model
