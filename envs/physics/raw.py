"""MuJoCo's C code stepped from a plain loop: the limit that the native engine cannot pass. For benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from mujoco import mjx
from mujoco.batch import Batch

from envs.physics.native import Native
from rlx.environment import Environment
from rlx.machine import usable_cores


def raw_rollout(env: Environment, num_envs: int) -> Callable[[int], None] | None:
    """A function that takes n control steps of `num_envs` simulations of `env`'s model.

    None where no adapter under the wrappers has a native `engine` and `substeps` (of one control step), or its state
    holds not exactly one `mjx.Data`.

    Random controls, the environment's substeps and start states (again after each `episode_length`), all usable cores;
    no observation, reward or derived field leaves MuJoCo.
    """
    task: Any = env
    while not (isinstance(getattr(task, "engine", None), Native) and getattr(task, "substeps", None)):
        task = getattr(task, "env", None)
        if task is None:
            return None
    model, substeps = task.engine.mj_model, task.substeps
    keys = jax.random.split(jax.random.key(0), num_envs)
    state, _ = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, env.spec.params)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, mjx.Data))
    simulated = [leaf for leaf in leaves if isinstance(leaf, mjx.Data)]
    if len(simulated) != 1:
        return None
    data, batch = simulated[0], Batch(model, num_envs, usable_cores())
    batch.bind("qpos")[...], batch.bind("qvel")[...] = data.qpos, data.qvel
    start = batch.state.copy()
    low, high = np.where(model.actuator_ctrllimited[:, None], model.actuator_ctrlrange, (-1.0, 1.0)).T
    controls = np.random.default_rng(0).uniform(low, high, (64, num_envs, model.nu))
    control, length, taken = batch.bind("ctrl"), env.spec.episode_length or 1000, 0

    def roll(control_steps: int) -> None:
        nonlocal taken
        for _ in range(control_steps):
            if taken % length == 0:
                batch.state[...] = start
            control[...] = controls[taken % len(controls)]
            batch.step(nstep=substeps)
            taken += 1

    return roll
